"""Grids: pictures over axes, all from the same noise; they stream in, can be stopped, resumed and taken along."""

import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from imgadapt.errors import ConfigError
from imgadapt.playground import samplers
from imgadapt.playground.desk import Busy, Ticket
from imgadapt.playground.grids import exporting, ordering, ruling
from imgadapt.playground.grids.axis import AXES, Axis
from imgadapt.playground.grids.cells import BASE, Board, Cell, Grid, GridRequest, board
from imgadapt.playground.grids.reckoning import GridPlan, Reckoning
from imgadapt.playground.grids.shelf import Shelf
from imgadapt.playground.pictures import record
from imgadapt.playground.pictures.album import Picture
from imgadapt.playground.pictures.comparing import difference
from imgadapt.playground.requests import GenerateRequest, Use
from imgadapt.playground.session import Playground

__all__ = ["AXES", "BASE", "Axis", "Cell", "Grid", "GridPlan", "GridRequest", "Grids"]


class Grids:
    """See the module; drawing is the desk's."""

    def __init__(self, playground: Playground) -> None:
        self.playground = playground
        self._shelf = Shelf(playground.settings.folder("outputs") / "grids", playground.album)
        self._lock = threading.Lock()
        self._live: dict[str, Grid] = {}  # those that are drawn
        self._resumed: dict[str, Ticket[Grid]] = {}
        self._reckoning = Reckoning(playground)

    def plan(self, request: GridRequest, owner: str = "") -> GridPlan:
        """Raises ConfigError: an axis that cannot be read, too many cells, too much work."""
        laid, _ = self._checked(request, owner)
        return self._reckoning.plan(laid)

    def start(self, request: GridRequest, *, owner: str = "") -> Ticket[Grid]:
        """Draw; its tickets hand over each Cell as it is ready; the grid's id is in the first Made (a Grid).

        Raises:
            ConfigError: see `plan`. Busy: the queue is full.
        """
        laid, request = self._checked(request, owner)

        def work(ticket: Ticket[Grid]) -> Grid:
            grid = self._begun(ticket, request, laid)
            self._shelf.write(grid)
            with self._lock:
                self._live[grid.id] = grid
            try:
                ticket.made(grid)
                return self._drawn(ticket, grid)
            finally:
                self._ended(grid.id)

        return self.playground.desk.submit(work, owner=owner)

    def resume(self, id: str, *, owner: str = "") -> Ticket[Grid]:
        """Draw the cells that are still missing; also after a restart.

        Raises:
            ConfigError: there is no such grid, or its adapters or its base are not what they were. Busy: it is being
                drawn, or the queue is full.
        """
        self._same(self.get(id, owner))

        def work(ticket: Ticket[Grid]) -> Grid:
            grid = self.get(id, owner)  # as it is now: it waited, and may have been drawn further before that
            self._same(grid)
            self.playground.use_base(ticket, grid.cells[0].request.base)
            try:
                ticket.made(grid)
                return self._drawn(ticket, grid)
            finally:
                self._ended(id)

        with self._lock:
            before = self._resumed.get(id)
            if id in self._live or (before is not None and not before.ended.is_set()):
                raise Busy("this grid is being drawn already")
            ticket = self.playground.desk.submit(work, owner=owner)
            self._resumed = {k: one for k, one in self._resumed.items() if not one.ended.is_set()} | {id: ticket}
        return ticket

    def get(self, id: str, owner: str = "") -> Grid:
        """Raises ConfigError where there is none, or it is another owner's in a shared playground."""
        with self._lock:
            grid = self._live.get(id)
        grid = grid or self._shelf.read(id)
        whose = self.playground.whose(owner)
        if whose is not None and grid.owner != whose:
            raise ConfigError("there is no such grid (any more)")
        return grid

    def recent(self, owner: str = "", count: int = 20) -> list[Grid]:
        """Newest first; what cannot be read any more is left out."""
        found: list[Grid] = []
        for id in self._shelf.ids():
            if len(found) == count:
                break
            try:
                found.append(self.get(id, owner))
            except ConfigError:
                continue
        return found

    def export(self, id: str, owner: str = "") -> Path:
        """A zip: index.html (works offline, alone), the pictures, grid.json.

        Raises:
            ConfigError: see `get`. OutputError: it cannot be written.
        """
        grid = self.get(id, owner)
        path = self._shelf.folder(id) / "grid.zip"
        exporting.write(grid, path, {use.adapter: self._name(use.adapter) for use in _uses(grid)})
        return path

    def _checked(self, request: GridRequest, owner: str) -> tuple[Board, GridRequest]:
        """The grid laid out, and its request with the seed that was chosen for all."""
        playground = self.playground
        request = request.model_copy(update={"common": playground.on_base(request.common)})
        laid = board(request, playground.library, playground.settings.limits)
        unique = list(dict.fromkeys(cell.request for cell in laid.cells))
        for one in unique:
            playground.check(one, owner)
        for index, rule in laid.rules.items():
            ruling.checked(laid.cells[index].request, rule)
        work, most = sum(self._reckoning.work(one) for one in unique), playground.settings.limits.work
        if work > most:
            raise ConfigError(
                f"{len(unique)} pictures of this size and these steps are {work / most:.1f} times too much at once; "
                "ask for fewer cells, fewer steps or smaller pictures"
            )
        return laid, request

    def _begun(self, ticket: Ticket[Grid], request: GridRequest, laid: Board) -> Grid:
        """The grid, settled: nothing is left that could go wrong with its requests."""
        playground = self.playground
        base = playground.use_base(ticket, request.common.base)
        ruled = {index: (laid.cells[index].request, rule) for index, rule in laid.rules.items()}
        requests = {cell.index: cell.request for cell in laid.cells}
        for name, steps in dict.fromkeys((one.sampler, one.steps) for one in requests.values()):
            samplers.check(name, steps, playground.studio.family)
        requests |= ruling.merged(ticket, playground, ruled) if ruled else {}
        settled: dict[object, GenerateRequest] = {}
        cells: list[Cell] = []
        for cell in laid.cells:
            one = requests[cell.index]
            key = tuple((use.adapter, use.blocks) for use in one.adapters), one.sampler
            if key not in settled:
                ticket.progress("preparing", cell.index, len(laid.cells))
                settled[key] = playground.studio.settle(one)
            same = settled[key]
            guidance = same.guidance if one.guidance is None else one.guidance
            update = {"base": same.base, "width": same.width, "height": same.height, "guidance": guidance}
            cells.append(replace(cell, request=one.model_copy(update=update)))
        library = playground.library
        more = {f"base {name}": value for name, value in record.about(base, playground.settings).items()}
        more |= {f"adapter {use.adapter}": library.mark(use.adapter) for cell in cells for use in cell.request.adapters}
        return Grid(secrets.token_hex(8), request, laid.labels, cells, ticket.owner, time.time(), more)

    def _same(self, grid: Grid) -> None:
        """Raises ConfigError where cells drawn now could not be compared with those that are there."""
        playground = self.playground
        self._same_adapters(grid, _uses(grid))
        base = playground.bases.get(str(grid.cells[0].request.base))
        now = record.about(base, playground.settings)
        for name in ("print", "device", "dtype"):
            if now.get(name, "") != grid.more.get(f"base {name}", ""):
                what = "has changed" if name == "print" else f"is used in another {name}"
                raise ConfigError(f"{base.name} {what} since this grid was begun; begin it anew")

    def _same_adapters(self, grid: Grid, uses: Sequence[Use]) -> None:
        library = self.playground.library
        for use in uses:
            if library.mark(use.adapter) != grid.more.get(f"adapter {use.adapter}"):
                raise ConfigError(
                    f"{library.get(use.adapter).name} has changed since this grid was begun; begin it anew"
                )

    def _drawn(self, ticket: Ticket[Grid], grid: Grid) -> Grid:
        """Draw what is missing, batch by batch, in the batches that the whole grid would have."""
        at: dict[GenerateRequest, list[int]] = {}
        for cell in grid.cells:
            at.setdefault(cell.request, []).append(cell.index)
        unique = list(at)
        pictures = {one: self._picture(grid, indices) for one, indices in at.items()}
        order = [
            [unique[k] for k in batch]
            for batch in ordering.batches(unique, self._reckoning.together)
            if any(pictures[unique[k]] is None for k in batch)
        ]
        total, before = sum(batch[0].steps for batch in order), 0
        for batch in order:
            self._same_adapters(grid, batch[0].adapters)
            made = self.playground.studio.draw(
                batch,
                lambda done, _, preview, before=before: ticket.progress("drawing", before + done, total, preview),
            )
            before += batch[0].steps
            cells = list(grid.cells)
            news: list[int] = []
            for request, drawn in zip(batch, made, strict=True):
                self._reckoning.learn(request, drawn.seconds)
                if pictures[request] is None:
                    places = [list(cells[index].place) for index in at[request]]
                    about = {"id": grid.id, "places": places}
                    pictures[request] = self.playground.kept(drawn, owner=ticket.owner, grid=about)
                for index in at[request]:
                    if cells[index].picture is None:
                        cells[index] = replace(cells[index], picture=pictures[request])
                        news.append(index)
            news = list(dict.fromkeys([*news, *_compared(cells)]))
            grid = replace(grid, cells=cells)
            self._shelf.write(grid)
            with self._lock:
                self._live[grid.id] = grid
            for index in news:
                ticket.made(grid.cells[index])
        return grid

    def _picture(self, grid: Grid, indices: Sequence[int]) -> Picture | None:
        return next((p for p in (grid.cells[index].picture for index in indices) if p is not None), None)

    def _ended(self, id: str) -> None:
        with self._lock:
            self._live.pop(id, None)

    def _name(self, id: str) -> str:
        try:
            return self.playground.library.get(id).name
        except ConfigError:  # gone since
            return id


def _uses(grid: Grid) -> list[Use]:
    """The uses of all adapters, one each."""
    return list({use.adapter: use for cell in grid.cells for use in cell.request.adapters}.values())


def _compared(cells: list[Cell]) -> list[int]:
    """Fill in the differences that can be told by now; the indices of cells that got one."""
    made: list[int] = []
    images: dict[Path, Image.Image] = {}

    def opened(path: Path) -> Image.Image:
        if path not in images:
            with Image.open(path, formats=("PNG",)) as image:
                image.load()
                images[path] = image
        return images[path]

    for cell in cells:
        base = None if cell.base is None else cells[cell.base].picture
        if cell.picture is not None and base is not None and cell.difference is None:
            found = difference(opened(cell.picture.path), opened(base.path))
            cells[cell.index] = replace(cell, difference=found)
            made.append(cell.index)
    return made
