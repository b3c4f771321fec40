"""Grids: pictures over axes, all from the same noise; they stream in, can be stopped, resumed and taken along."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from imgadapt.playground.album import Picture
from imgadapt.playground.comparing import Difference
from imgadapt.playground.desk import Ticket
from imgadapt.playground.requests import GenerateRequest, Id, Line, Request, Text
from imgadapt.playground.session import Playground

AXES = ("adapter", "weight", "seed", "prompt", "blocks", "rule", "checkpoint", "steps", "guidance", "sampler")


class Axis(Request):
    """values: as text, one a comma or a line: `0, 0.5, 1`, ranges `0:1:0.25` (start:stop:step, both ends), `1..5`;
    for adapters ids (or names), with `a+b` for a stack; prompts one a line. adapter: which one of the stack a weight or
    block axis is about, or whose run's checkpoints; None: all of it.
    """

    kind: Literal[AXES]  # pyright: ignore[reportInvalidTypeForm] # a table
    values: Text
    adapter: Id | None = None


class GridRequest(Request):
    """common: what all cells share (count 1); x, y, z: what differs. baseline: a column without any adapter."""

    common: GenerateRequest
    x: Axis
    y: Axis | None = None
    z: Axis | None = None
    baseline: bool = True
    name: Line = ""


@dataclass(frozen=True)
class Cell:
    """place: indices (x, y, z) into the grid's labels. difference: to the base column of its row; None: no such
    column, or not drawn yet. picture: None until it is drawn.
    """

    index: int
    place: tuple[int, int, int]
    request: GenerateRequest
    picture: Picture | None = None
    difference: Difference | None = None


@dataclass(frozen=True)
class GridPlan:
    """What a grid will take. swaps: changes of the adapters on the base; encodes: prompts encoded; batches: calls of
    the base; seconds: as far as earlier drawing tells, None: it does not.
    """

    cells: int
    swaps: int
    encodes: int
    batches: int
    seconds: float | None


@dataclass(frozen=True)
class Grid:
    """labels: of x (the base column first, where there is one), y and z."""

    id: str
    request: GridRequest
    labels: tuple[Sequence[str], Sequence[str], Sequence[str]]
    cells: Sequence[Cell]
    owner: str = ""
    made: float = 0.0
    more: Mapping[str, str] = field(default_factory=dict[str, str])


class Grids:
    def __init__(self, playground: Playground) -> None:
        raise NotImplementedError

    def plan(self, request: GridRequest, owner: str = "") -> GridPlan:
        """Raises ConfigError: an axis that cannot be read, too many cells, too much work."""
        raise NotImplementedError

    def start(self, request: GridRequest, *, owner: str = "") -> Ticket[Grid]:
        """Draw; its tickets hand over each Cell as it is ready; the grid's id is in the first Made (a Grid)."""
        raise NotImplementedError

    def resume(self, id: str, *, owner: str = "") -> Ticket[Grid]:
        """Draw the cells that are still missing; also after a restart."""
        raise NotImplementedError

    def get(self, id: str, owner: str = "") -> Grid:
        raise NotImplementedError

    def recent(self, owner: str = "", count: int = 20) -> list[Grid]:
        raise NotImplementedError

    def export(self, id: str, owner: str = "") -> Path:
        """A zip: index.html (works offline, alone), the PNGs, grid.json."""
        raise NotImplementedError
