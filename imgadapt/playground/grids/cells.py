"""Cells: a grid as it is asked for, laid out: its labels, and what each place draws."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from imgadapt.errors import ConfigError
from imgadapt.playground.grids.axes import untagged, values
from imgadapt.playground.grids.axis import ADAPTERS, Axis, Rule, Value, changed
from imgadapt.playground.grids.stack_axes import each
from imgadapt.playground.library.library import Library
from imgadapt.playground.pictures.album import Picture
from imgadapt.playground.pictures.comparing import Difference
from imgadapt.playground.requests import RANDOM, GenerateRequest, Line, Request
from imgadapt.playground.settings import Limits

BASE = "base"
"""The label of what is drawn without adapters."""


class GridRequest(Request):
    """common: what all cells share; its count is taken as 1. x, y, z: what differs. baseline: cells without any adapter
    at the beginning of the first axis that is about adapters; where none is, of an axis of their own, if one is free.
    """

    common: GenerateRequest
    x: Axis
    y: Axis | None = None
    z: Axis | None = None
    baseline: bool = True
    name: Line = ""


@dataclass(frozen=True)
class Cell:
    """place: indices (x, y, z) into the grid's labels. base: index of the cell that it is compared with, the same
    without adapters; None: there is none, or it is one. difference: to it; None: not drawn yet, too. picture: None
    until it is drawn.
    """

    index: int
    place: tuple[int, int, int]
    request: GenerateRequest
    picture: Picture | None = None
    difference: Difference | None = None
    base: int | None = None

    @property
    def again(self) -> GenerateRequest:
        """What draws its picture again to the bit: the request, in the batch that the picture was drawn in."""
        record = self.picture.record if self.picture is not None else None
        said = record.get("request") if record is not None else None
        layout = said.get("layout") if isinstance(said, Mapping) else None
        return self.request if layout is None else changed(self.request, layout=layout)


@dataclass(frozen=True)
class Grid:
    """labels: of x, y and z; one, "", where there is no such axis. more: base, device, notes."""

    id: str
    request: GridRequest
    labels: tuple[Sequence[str], Sequence[str], Sequence[str]]
    cells: Sequence[Cell]
    owner: str = ""
    made: float = 0.0
    more: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Board:
    """A grid before anything is settled or drawn. rules: index of a cell -> what its stack is merged by."""

    labels: tuple[Sequence[str], Sequence[str], Sequence[str]]
    cells: Sequence[Cell]
    rules: Mapping[int, Rule]


def board(request: GridRequest, library: Library, limits: Limits) -> Board:
    """Raises ConfigError: an axis that cannot be read, two that are about the same, too many cells."""
    common = untagged(changed(request.common, count=1, layout=None), library)
    if common.seed == RANDOM:  # one for all of them
        common = changed(common, seed=secrets.randbelow(2**32))
    axes = [axis for axis in (request.x, request.y, request.z) if axis is not None]
    if len({(axis.kind, axis.adapter) for axis in axes}) < len(axes):
        raise ConfigError(f"two axes are about {axes[-1].kind}; let each be about something else")
    read = _read(request, common, library, limits.cells)
    kinds: dict[str, str] = {name: axis.kind for name, axis in _named(request).items()}
    where = _of_base(request, read, kinds, common)
    lengths = [len(read.get(name, "1")) + (name == where) for name in "xyz"]
    if (total := lengths[0] * lengths[1] * lengths[2]) > limits.cells:
        said = " x ".join(str(length) for length in lengths if length > 1)
        raise ConfigError(f"{said} are {total:,} cells; {limits.cells:,} are the most")
    return _filled(common, read, kinds, where)


def _read(request: GridRequest, common: GenerateRequest, library: Library, most: int) -> dict[str, list[Value]]:
    """The axes' values. What is about an adapter is about those, too, that another axis puts in its place.

    Raises:
        ConfigError: see `values`; two axes exchange the same adapter.
    """
    named = _named(request)
    read = {name: values(axis, common, library, most) for name, axis in named.items()}
    instead: dict[str, tuple[str, set[str]]] = {}
    for name, row in read.items():
        for which, ids in (value.instead for value in row if value.instead is not None):
            by, known = instead.setdefault(which, (name, set()))
            if by != name:
                raise ConfigError(f"two axes put others in the place of {library.get(which).name}; let one do it")
            known |= ids
    for name, axis in named.items():
        if axis.adapter in instead:
            ids = {axis.adapter, *instead[axis.adapter][1]}
            read[name] = [one if one.each is None else replace(one, change=each(ids, one.each)) for one in read[name]]
    return read


def _named(request: GridRequest) -> dict[str, Axis]:
    rows = {"x": request.x, "y": request.y, "z": request.z}
    return {name: axis for name, axis in rows.items() if axis is not None}


def _of_base(
    request: GridRequest, read: dict[str, list[Value]], kinds: dict[str, str], common: GenerateRequest
) -> str | None:
    """The axis at whose beginning the base is. Where none is about adapters, and there are some, a free one gets them
    as its only value.
    """
    if not request.baseline:
        return None
    if about := [name for name, kind in kinds.items() if kind in ADAPTERS]:
        return about[0]
    free = next((name for name in "xyz" if name not in read), None)
    stacks = [value.change(common).adapters for values in read.values() for value in values]
    if free is None or not (common.adapters or any(stacks)):
        return None
    read[free], kinds[free] = [Value("with adapters", lambda request: request)], ADAPTERS[0]
    return free


def _filled(
    common: GenerateRequest, read: Mapping[str, Sequence[Value]], kinds: Mapping[str, str], where: str | None
) -> Board:
    """All cells, x the fastest."""
    places: dict[str, Sequence[Value | None]] = {
        name: [*([None] if name == where else []), *read.get(name, [Value("", lambda request: request)])]
        for name in "xyz"
    }
    order = sorted(read, key=lambda name: ADAPTERS.index(kinds[name]) if kinds[name] in ADAPTERS else -1)
    at = {"x": 0, "y": 1, "z": 2}
    size = [len(places[name]) for name in "xyz"]
    cells: list[Cell] = []
    rules: dict[int, Rule] = {}
    for z, y, x in product(range(size[2]), range(size[1]), range(size[0])):
        place = (x, y, z)
        index = (z * size[1] + y) * size[0] + x
        chosen = {name: places[name][place[at[name]]] for name in order}
        bare = where is not None and place[at[where]] == 0
        made = common
        for name, value in chosen.items():
            if value is not None and not (bare and kinds[name] in ADAPTERS):
                made = value.change(made)
        if bare:
            made = made.model_copy(update={"adapters": ()})
        elif rule := next((value.rule for value in chosen.values() if value is not None and value.rule), None):
            rules[index] = rule
        base = None
        if where is not None and not bare:
            rest = [0 if name == where else place[at[name]] for name in "xyz"]
            base = (rest[2] * size[1] + rest[1]) * size[0] + rest[0]
        cells.append(Cell(index, place, made, base=base))
    about = [kind for kind in kinds.values() if kind in ADAPTERS[1:]]
    if about and not any(cell.request.adapters for cell in cells):
        raise ConfigError(f"{about[0]}: the stack has no adapter; put one into it, or let an axis be about adapters")
    x, y, z = (tuple(BASE if value is None else value.label for value in places[name]) for name in "xyz")
    return Board((x, y, z), cells, rules)
