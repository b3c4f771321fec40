"""Reckoning: what a grid will take, before it is drawn."""

from dataclasses import dataclass

from imgadapt.errors import ConfigError
from imgadapt.playground.drawing.stacks import off
from imgadapt.playground.grids import ordering
from imgadapt.playground.grids.cells import Board, Cell
from imgadapt.playground.requests import GenerateRequest, Use
from imgadapt.playground.session import Playground
from imgadapt.targets import TEXT_ENCODERS

_SIDES = {"demo": 64, "sd1": 512, "sd2": 768}
"""Pixels of a base's sides before it is loaded, where they are not 1024."""


@dataclass(frozen=True)
class GridPlan:
    """What a grid will take. swaps: changes of which adapters act on the base; encodes: prompts encoded; batches: calls
    of the base; seconds: as far as earlier drawing tells, None: it does not.
    """

    cells: int
    swaps: int
    encodes: int
    batches: int
    seconds: float | None


class Reckoning:
    """See the module; it learns from what is drawn."""

    def __init__(self, playground: Playground) -> None:
        self._playground = playground
        self._pace: dict[str | None, float] = {}  # seconds for a pixel and step, by base

    def plan(self, board: Board) -> GridPlan:
        unique = list(dict.fromkeys(_stand_in(board, cell) for cell in board.cells))
        order = ordering.batches(unique, self.together)
        pace = self._pace.get(self._base(unique[0]))
        return GridPlan(
            cells=len(board.cells),
            swaps=ordering.swaps(unique, order),
            encodes=ordering.encodes(unique, self._reads_text),
            batches=len(order),
            seconds=None if pace is None else pace * sum(self.work(one) for one in unique),
        )

    def learn(self, request: GenerateRequest, seconds: float) -> None:
        """How long a pixel and step take: a moving average."""
        pace = seconds / self.work(request)
        self._pace[request.base] = 0.8 * self._pace.get(request.base, pace) + 0.2 * pace

    def work(self, request: GenerateRequest) -> int:
        """Pixels times steps; also of one that is not settled."""
        width, height = self._sides(request)
        return width * height * request.steps

    def together(self, request: GenerateRequest) -> int:
        """How many may be drawn at once."""
        width, height = self._sides(request)
        return max(1, self._playground.settings.limits.drawn_together // (width * height))

    def _base(self, request: GenerateRequest) -> str:
        loaded = self._playground.studio.base or self._playground.bases.first
        return request.base or loaded.id

    def _sides(self, request: GenerateRequest) -> tuple[int, int]:
        if request.width is not None and request.height is not None:
            return request.width, request.height
        base, studio = self._playground.bases.get(self._base(request)), self._playground.studio
        family = studio.family if studio.base == base else None
        side = _SIDES.get(base.kind, 1024) if family is None else int(family.native)
        return request.width or side, request.height or side

    def _reads_text(self, use: Use) -> bool:
        """Whether an adapter changes what text encoders say; one that is merged later is taken not to."""
        try:
            card = self._playground.library.get(use.adapter)
        except ConfigError:
            return False
        strength = use.weight if use.text is None else use.text
        return bool(card.words and not off(use)) or (
            strength != 0 and any(name in TEXT_ENCODERS for name in card.components)
        )


def _stand_in(board: Board, cell: Cell) -> GenerateRequest:
    """A cell's request; where its stack is merged first, with something in its place that is as different."""
    rule = board.rules.get(cell.index)
    if rule is None:
        return cell.request
    merged = Use.model_construct(adapter=f"{rule} {cell.request.adapters}")
    return cell.request.model_copy(update={"adapters": (merged,)})
