"""Converter: an adapter of the library in another tool's format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imgadapt.playground.desk import Ticket
from imgadapt.playground.requests import Id, Line, Request
from imgadapt.playground.session import Playground


class ConvertRequest(Request):
    adapter: Id
    format: Line
    dtype: Literal["fp32", "fp16", "bf16"] | None = None


@dataclass(frozen=True)
class ConvertPlan:
    """losses: how exact it is -> layers; notes: what else to know; possible: "" or why not."""

    losses: Mapping[str, int]
    notes: Sequence[str]
    possible: str


@dataclass(frozen=True)
class Converted:
    """path: of the file, in the home; file name for the user. plan: what it cost."""

    id: str
    name: str
    path: Path
    plan: ConvertPlan


class Converter:
    def __init__(self, playground: Playground) -> None:
        raise NotImplementedError

    def formats(self) -> Sequence[tuple[str, str]]:
        """Name and which tools read it."""
        raise NotImplementedError

    def plan(self, request: ConvertRequest) -> ConvertPlan:
        raise NotImplementedError

    def convert(self, request: ConvertRequest, *, owner: str = "") -> Ticket[Converted]:
        raise NotImplementedError

    def get(self, id: str) -> Converted:
        """For its download."""
        raise NotImplementedError
