"""Lab: merging what a stack of adapters does into one file, after looking at it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from imgadapt.playground.desk import Ticket
from imgadapt.playground.library import Card
from imgadapt.playground.requests import Line, Number, Request, Use, Whole
from imgadapt.playground.session import Playground


class MergeRequest(Request):
    """adapters: as in a stack (start and stop must not be set). rule, options, space, rank, error, energy, size: see
    MergeRecipe. name: of the file, without folders or ending; "": made of the inputs' names. format: of the file.
    """

    adapters: Annotated[tuple[Use, ...], Field(min_length=1, max_length=16)]
    rule: Line = "weighted"
    options: Mapping[str, Any] = {}
    space: Literal["delta", "core"] = "delta"
    rank: Annotated[Whole, Field(ge=1, le=1024)] | None = None
    error: Annotated[Number, Field(gt=0, le=1)] | None = None
    energy: Annotated[Number, Field(gt=0, le=1)] | None = None
    size: Annotated[Number, Field(gt=0, le=4096)] | None = None
    seed: Annotated[Whole, Field(ge=0, lt=2**53)] = 0
    format: Line | None = None
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    name: Line = ""


@dataclass(frozen=True)
class LabReport:
    """names: of the inputs. cosines: (inputs, inputs), of their changes over all layers. residuals: (rank, relative
    error of the merge cut to that rank). exact: whether a live stack at these weights draws what the merge will.
    lines: the report, for people.
    """

    names: Sequence[str]
    cosines: Sequence[Sequence[float]]
    residuals: Sequence[tuple[int, float]]
    exact: bool
    lines: Sequence[str]


class Lab:
    def __init__(self, playground: Playground) -> None:
        raise NotImplementedError

    def rules(self) -> Sequence[tuple[str, str, Mapping[str, Any]]]:
        """Name, one line, options with their defaults, of every rule."""
        raise NotImplementedError

    def report(self, request: MergeRequest, *, owner: str = "") -> Ticket[LabReport]:
        raise NotImplementedError

    def save(self, request: MergeRequest, *, owner: str = "") -> Ticket[Card]:
        """Merge into a file of the home's adapters, with its recipe in it; never over another file."""
        raise NotImplementedError

    def replay(self, id: str) -> MergeRequest:
        """The request that a merged file's recipe is, its inputs found in the library by their SHA-256.

        Raises:
            ConfigError: it has none, or inputs are not here (which).
        """
        raise NotImplementedError
