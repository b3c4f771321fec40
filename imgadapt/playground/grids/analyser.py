"""Analyser: which blocks of an adapter change the picture, by turning them off and on one at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from PIL import Image
from pydantic import Field

from imgadapt.combining.blocks import LISTS, block_of, expanded
from imgadapt.errors import ConfigError, first_few
from imgadapt.playground.desk import Ticket
from imgadapt.playground.grids import ordering
from imgadapt.playground.grids.axes import untagged
from imgadapt.playground.grids.axis import changed
from imgadapt.playground.pictures.comparing import difference
from imgadapt.playground.requests import GenerateRequest, Id, Request, Use, Whole
from imgadapt.playground.session import Playground
from imgadapt.summary import summary

NOTHING = 0.02
"""Share of the whole effect below which a block is said to do nothing."""
_Draw = Callable[[Sequence[GenerateRequest]], list[Image.Image]]


class AnalyseRequest(Request):
    """common: the pictures to look at (prompt, seed, ...); adapter: one of its stack. seeds: how many pictures."""

    common: GenerateRequest
    adapter: Id
    seeds: Annotated[Whole, Field(ge=1, le=8)] = 2


@dataclass(frozen=True)
class BlockEffect:
    """only: mean difference to the base with this block alone; without: to the whole adapter with this block off; both
    as shares of the whole adapter's difference to the base. norm: share of the change's squared norm; 0 where it is the
    base's weights that tell it (DoRA, OFT, ...).
    """

    block: str
    only: float
    without: float
    norm: float


@dataclass(frozen=True)
class Analysis:
    """whole: mean difference of the whole adapter to the base, in levels of 255. suggestion: kohya's list of block
    weights that leaves out what does nothing, or "" where nothing is to be left out.
    """

    effects: Sequence[BlockEffect]
    whole: float
    suggestion: str
    said: str


@dataclass(frozen=True)
class _Parts:
    """blocks: those of a list of numbers, in its order; own: those in which the adapter has layers -> share of norm."""

    blocks: Sequence[str]
    own: Mapping[str, float]

    def numbers(self, on: Callable[[str], bool]) -> str:
        """A list of numbers: 1 for the blocks that are on, 0 for the others."""
        return ",".join("1" if on(block) else "0" for block in self.blocks)


class Analyser:
    """See the module; the work is the desk's."""

    def __init__(self, playground: Playground) -> None:
        self.playground = playground

    def start(self, request: AnalyseRequest, *, owner: str = "") -> Ticket[Analysis]:
        """Hands over each BlockEffect as it is known.

        Raises:
            ConfigError: the adapter is not in the stack, its architecture has no blocks with names, too much work.
            Busy: the queue is full.
        """
        playground = self.playground
        common = untagged(changed(request.common, count=1, layout=None), playground.library)
        if all(use.adapter != request.adapter for use in common.adapters):
            raise ConfigError(
                "the adapter to be analysed is not in the stack; put it there, at the weight that you use"
            )
        playground.check(common, owner)
        common = playground.on_base(common)
        parts = self._parts(request.adapter)
        return playground.desk.submit(partial(self._analysed, common=common, request=request, parts=parts), owner=owner)

    def _parts(self, id: str) -> _Parts:
        """An adapter's blocks, of the shortest list that has a number for each."""
        file, name = self.playground.library.file(id), self.playground.library.get(id).name
        rows = summary(file).rows
        by_layer = {row.layer: block_of(row.layer, file.architecture or "") for row in rows}
        lists = [expanded(text) for text in LISTS.get(file.architecture or "", ())]
        blocks = next((one for one in lists if set(by_layer.values()) <= set(one)), None)
        if blocks is None:
            known = ", ".join(LISTS)
            raise ConfigError(
                f"{name} is for {file.architecture or 'no known base'}; blocks have names on {known} only"
            )
        squares = {block: 0.0 for block in blocks if block in by_layer.values()}
        for row in rows:
            squares[str(by_layer[row.layer])] += (row.norm or 0.0) ** 2
        total = sum(squares.values()) or 1.0
        return _Parts(blocks, {block: square / total for block, square in squares.items()})

    def _analysed(
        self, ticket: Ticket[Analysis], common: GenerateRequest, request: AnalyseRequest, parts: _Parts
    ) -> Analysis:
        playground, limits = self.playground, self.playground.settings.limits
        playground.use_base(ticket, common.base)
        settled = playground.studio.settle(_with(common, request.adapter, blocks=""))
        assert settled.width is not None
        assert settled.height is not None
        pictures = 2 * (len(parts.own) + 1) * request.seeds
        if pictures * settled.width * settled.height * settled.steps > limits.work:
            raise ConfigError(f"{pictures} pictures of this size are too much at once; take fewer seeds, steps, pixels")
        seeds = [settled.model_copy(update={"seed": settled.seed + k}) for k in range(request.seeds)]
        draw = _drawer(ticket, playground, settled, pictures)
        names, count = list(parts.own), len(seeds)
        off = {"weight": 0.0, "text": 0.0}
        bases = draw([_with(one, request.adapter, **off) for one in seeds])
        wholes = draw(seeds)
        whole = _apart(wholes, bases)
        effects: list[BlockEffect] = []
        for first in range(
            0, len(names), some := max(1, min(ordering.MOST, playground.together(settled)) // (2 * count))
        ):
            chosen = names[first : first + some]
            asked = [
                _with(one, request.adapter, blocks=parts.numbers(lambda block, n=name, on=alone: (block == n) == on))
                for name in chosen
                for alone in (True, False)
                for one in seeds
            ]
            made = draw(asked)
            for k, name in enumerate(chosen):
                alone, lacking = (made[(2 * k + j) * count : (2 * k + j + 1) * count] for j in (0, 1))
                only, without = _apart(alone, bases) / (whole or 1.0), _apart(lacking, wholes) / (whole or 1.0)
                effects.append(BlockEffect(name, only, without, parts.own[name]))
                ticket.made(effects[-1])
        return _concluded(effects, whole, parts)


def _drawer(ticket: Ticket[Analysis], playground: Playground, settled: GenerateRequest, pictures: int) -> _Draw:
    """Draws in batches as large as they may be; says how far it is over all pictures."""
    done, total = 0, pictures * settled.steps

    def draw(requests: Sequence[GenerateRequest]) -> list[Image.Image]:
        nonlocal done
        together, made = playground.together(settled), list[Image.Image]()
        for first in range(0, len(requests), together):
            some = requests[first : first + together]

            def watch(step: int, _: int, preview: bytes | None, before: int = done, count: int = len(some)) -> None:
                ticket.progress("analysing", before + step * count, total, preview)

            made += [one.image for one in playground.studio.draw(some, watch)]
            done += settled.steps * len(some)
        return made

    return draw


def _with(request: GenerateRequest, adapter: str, **update: object) -> GenerateRequest:
    """The request with something else of one adapter."""

    def one(use: Use) -> Use:
        return use.model_copy(update=update) if use.adapter == adapter else use

    return request.model_copy(update={"adapters": tuple(one(use) for use in request.adapters)})


def _apart(some: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """Mean difference of pairs."""
    return sum(difference(a, b).mean for a, b in zip(some, others, strict=True)) / len(some)


def _concluded(effects: Sequence[BlockEffect], whole: float, parts: _Parts) -> Analysis:
    if whole == 0:
        return Analysis(effects, whole, "", "The adapter changes nothing in these pictures.")
    idle = [one.block for one in effects if max(one.only, one.without) < NOTHING]
    strongest = sorted(effects, key=lambda one: one.only + one.without, reverse=True)[:3]
    said = f"Most is done by {', '.join(f'{one.block} ({one.only:.0%} alone)' for one in strongest)}."
    if not idle:
        return Analysis(effects, whole, "", f"{said} Each block does something here.")
    said += f" {first_few(idle, 12)} {'does' if len(idle) == 1 else 'do'} nothing that is to be seen here."
    return Analysis(effects, whole, parts.numbers(lambda block: block not in idle), said)
