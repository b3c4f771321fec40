"""Analyser: which blocks of an adapter change the picture, by turning them off and on one at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from imgadapt.playground.desk import Ticket
from imgadapt.playground.requests import GenerateRequest, Id, Request, Whole
from imgadapt.playground.session import Playground


class AnalyseRequest(Request):
    """common: the pictures to look at (prompt, seed, ...); adapter: one of its stack. seeds: how many pictures."""

    common: GenerateRequest
    adapter: Id
    seeds: Annotated[Whole, Field(ge=1, le=8)] = 2


@dataclass(frozen=True)
class BlockEffect:
    """only: mean difference to the base with this block alone; without: to the whole adapter with this block off; both
    as shares of the whole adapter's difference to the base. norm: share of the change's squared norm.
    """

    block: str
    only: float
    without: float
    norm: float


@dataclass(frozen=True)
class Analysis:
    """suggestion: kohya's list of block weights that leaves out what does nothing, or "" where there is no list."""

    effects: Sequence[BlockEffect]
    whole: float
    suggestion: str
    said: str


class Analyser:
    def __init__(self, playground: Playground) -> None:
        raise NotImplementedError

    def start(self, request: AnalyseRequest, *, owner: str = "") -> Ticket[Analysis]:
        """Hands over each BlockEffect as it is known."""
        raise NotImplementedError
