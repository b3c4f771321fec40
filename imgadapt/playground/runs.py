"""Runs: trainings in processes of their own, started, watched, stopped and resumed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from imgadapt.playground.album import Picture
from imgadapt.playground.desk import Ticket
from imgadapt.playground.library import Card
from imgadapt.playground.requests import Id, Line, Number, Request, Whole
from imgadapt.playground.session import Playground


class TrainRequest(Request):
    """data: a folder of pictures; base: None: the one that is loaded. What is None is planned by `imgadapt train`."""

    data: Id
    kind: Literal["style", "character", "concept"] | None = None
    base: Id | None = None
    name: Line = ""
    trigger: Line = ""
    class_prompt: Line = ""
    word: Line = ""
    method: Line = "lora"
    rank: Annotated[Whole, Field(ge=1, le=256)] | None = None
    steps: Annotated[Whole, Field(ge=1, le=100_000)] | None = None
    batch_size: Annotated[Whole, Field(ge=1, le=64)] | None = None
    learning_rate: Annotated[Number, Field(gt=0, le=10)] | None = None
    resolution: Annotated[Whole, Field(ge=16, le=2048)] | None = None
    sample_every: Annotated[Whole, Field(ge=1)] | None = None
    seed: Annotated[Whole, Field(ge=0, lt=2**31)] = 0


@dataclass(frozen=True)
class Dataset:
    """A folder of pictures that may be trained on."""

    id: str
    name: str
    pictures: int


@dataclass(frozen=True)
class Check:
    """findings: (level, text); plan: settings with their reasons, as lines; sheet: what the trainer will see."""

    findings: Sequence[tuple[str, str]]
    plan: Sequence[str]
    sheet: Picture | None


@dataclass(frozen=True)
class Run:
    """A training. state: "starting", "training", "finishing", "done", "stopped", "failed". loss: (step, loss,
    learning rate) of all steps; evaluations: figures by step (held_out, ...). samples: (step, picture). cards: the
    adapters that it wrote: snapshots, best, final. message: why it failed, or what it says last.
    """

    id: str
    name: str
    state: str
    step: int
    steps: int
    eta: float | None
    loss: Sequence[tuple[int, float, float]]
    evaluations: Sequence[Mapping[str, float]]
    samples: Sequence[tuple[int, Picture]]
    cards: Sequence[Card]
    message: str
    began: float
    owner: str = ""


class Runs:
    def __init__(self, playground: Playground) -> None:
        raise NotImplementedError

    def datasets(self) -> list[Dataset]:
        """Those in the home's `data/` and the settings' folders, and the embedded style (40 pictures)."""
        raise NotImplementedError

    def add_dataset(self, name: str, files: Sequence[tuple[str, bytes]], *, owner: str = "") -> Dataset:
        """Keep pictures (checked, see Album.accept) and captions (`fox.txt` beside `fox.png`) as a data set.

        Raises:
            DataError: nothing usable, too much, a name that is no file's.
        """
        raise NotImplementedError

    def check(self, request: TrainRequest, *, owner: str = "") -> Ticket[Check]:
        raise NotImplementedError

    def start(self, request: TrainRequest, *, owner: str = "") -> Run:
        """Raises ConfigError: it cannot be planned. Busy: another training runs."""
        raise NotImplementedError

    def stop(self, id: str, owner: str = "") -> None:
        """End it after the step in progress, its state saved."""
        raise NotImplementedError

    def resume(self, id: str, owner: str = "") -> Run:
        """Go on, also after a restart of the playground."""
        raise NotImplementedError

    def get(self, id: str, owner: str = "") -> Run:
        raise NotImplementedError

    def all(self, owner: str = "") -> list[Run]:
        """Newest first."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop all, and wait until they have saved."""
        raise NotImplementedError
