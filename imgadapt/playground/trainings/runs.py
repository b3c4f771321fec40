"""Runs: trainings in processes of their own, started, watched, stopped and resumed."""

import shutil
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from imgadapt.errors import ConfigError, ImgadaptError
from imgadapt.playground import filenames
from imgadapt.playground.desk import Busy, Ticket
from imgadapt.playground.library.library import Card
from imgadapt.playground.pictures.album import Picture
from imgadapt.playground.requests import Id, Line, Number, Request, Whole
from imgadapt.playground.session import Playground
from imgadapt.playground.trainings import checking, launching
from imgadapt.playground.trainings.checking import Check
from imgadapt.playground.trainings.datasets import Dataset, Datasets
from imgadapt.playground.trainings.trainings import RECORD, Record, Training
from imgadapt.playground.trainings.watching import Watch
from imgadapt.training import plan, spelling

__all__ = ["Check", "Dataset", "Run", "Runs", "TrainRequest"]

_HIGHEST = 1024  # rank that a method may name itself


class TrainRequest(Request):
    """data: a folder of pictures; base: None: the one that is loaded. What is None is planned by `imgadapt train`.
    report: write report.html into the run's folder, too, which takes as long as some dozens of pictures.
    """

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
    report: bool = False

    @model_validator(mode="after")
    def _in_lines(self) -> Self:
        for name in ("name", "trigger", "class_prompt", "word", "method"):
            if any(not c.isprintable() for c in getattr(self, name)):
                raise ValueError(f"{name} has line ends or characters that cannot be printed")
        return self


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


@dataclass(frozen=True)
class Running:
    """How far a training is, in short."""

    name: str
    owner: str
    step: int
    steps: int


class Runs:
    """One training at a time. A base that is loaded on a GPU keeps its memory meanwhile.

    patience: seconds that `close` waits for a training to save before it is killed; its last checkpoint is kept then.
    """

    patience = 120.0

    def __init__(self, playground: Playground) -> None:
        self.playground = playground
        self._datasets = Datasets(playground.settings)
        self._root = playground.settings.folder("runs").resolve()
        self._lock, self._closed = threading.RLock(), False
        self._own: dict[str, Training] = {}

    # --- pictures

    def datasets(self, owner: str = "") -> list[Dataset]:
        """Those in the home's `data/` and the settings' folders, and the embedded style (40 pictures)."""
        return self._datasets.all(self.playground.whose(owner))

    def add_dataset(self, name: str, files: Sequence[tuple[str, bytes]], *, owner: str = "") -> Dataset:
        """Keep pictures and captions (`fox.txt` beside `fox.png`) as a data set; a zip stands for what is in it.

        Raises:
            DataError: nothing usable, too much, a name that is no file's.
        """
        return self._datasets.add(name, files, owner)

    def check(self, request: TrainRequest, *, owner: str = "") -> Ticket[Check]:
        """Plan, and look at the pictures.

        Raises:
            ConfigError: there is no such folder or base. Busy: the queue is full.
        """
        given, album, device = self._given(request, owner), self.playground.album, self.playground.settings.device
        given["output"] = self._root / "check"
        work = partial(checking.check, given=given, kind=request.kind, album=album, device=device)
        return self.playground.desk.submit(work, owner=owner)

    # --- starting and stopping

    def start(self, request: TrainRequest, *, owner: str = "") -> Run:
        """Raises ConfigError, DataError: it cannot be planned. Busy: another training runs."""
        self._free(owner)
        request = request.model_copy(update={"base": self._base(request)})
        given = self._given(request, owner)
        planned = plan.of(given, request.kind)
        data = next(one.name for one in self.datasets(owner) if one.id == request.data)
        name = filenames.cleaned(request.name, launching.named_after(data, planned.kind))
        with self._starting(owner):
            folder = filenames.made(self._root, name)
            values = request.model_dump(mode="json")
            record = Record(token_hex(8), folder.name, owner, time.time(), values, planned.config.steps)
            own = self._training(record, folder)
            try:
                own.launch(launching.command(given, request.kind, folder), self.playground.settings.device)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._own[record.id] = own
        return self._run(own)

    def stop(self, id: str, owner: str = "") -> None:
        """End it after the step in progress, its state saved."""
        with self._lock:
            self._get(id, owner).stop()

    def resume(self, id: str, owner: str = "") -> Run:
        """Go on, also after a restart of the playground.

        Raises:
            ConfigError: it is done, or its pictures or its base are no longer there. Busy: a training runs.
        """
        self._free(owner)
        with self._starting(owner):
            own = self._get(id, owner)
            if own.state(own.watch.status()) == "done":
                raise ConfigError(f"{own.record.name} is done; start another training for more steps")
            request = TrainRequest.of(dict(own.record.request))
            arguments = launching.command(self._given(request, owner), request.kind, own.folder)
            own.launch(arguments, self.playground.settings.device)
        return self._run(own)

    def close(self) -> None:
        """Stop all, and wait until they have saved."""
        with self._lock:
            self._closed = True
            running = [own for own in self._all() if own.alive]
            for own in running:
                own.stop()
        for own in running:
            own.end(self.patience)

    @contextmanager
    def _starting(self, owner: str) -> Generator[None]:
        with self._lock:
            self._free(owner)
            yield

    def _free(self, owner: str) -> None:
        """Raises Busy: another training runs."""
        with self._lock:
            if self._closed:
                raise Busy("the playground is closing")
            for own in self._all():
                if own.alive:
                    mine = self.playground.whose(owner) in (None, own.record.owner)
                    named = f"{own.record.name} is being trained" if mine else "somebody's training runs"
                    raise Busy(f"{named}; one training runs at a time: stop it, or wait for its end")

    # --- what is asked for

    def _base(self, request: TrainRequest) -> str:
        here = self.playground.studio.base or self.playground.bases.first
        return request.base or here.id

    def _given(self, request: TrainRequest, owner: str) -> dict[str, Any]:
        """The settings that a request gives, as `plan.of` takes them.

        Raises:
            ConfigError: there is no such folder or base, or no such method.
        """
        method = spelling.method(request.method, {})
        rank = getattr(getattr(method, "inner", method), "rank", 0)
        if isinstance(rank, int) and rank > _HIGHEST:
            raise ConfigError(f"rank {rank} is more than {_HIGHEST}")
        base = self.playground.bases.get(self._base(request))
        folder = self._datasets.folder(request.data, self.playground.whose(owner))
        names = ("trigger", "class_prompt", "word", "rank", "steps", "batch_size", "learning_rate", "sample_every")
        given = {name: value for name in names if (value := getattr(request, name)) not in (None, "")}
        more = {"resolution": [request.resolution]} if request.resolution else {}
        title = {"title": request.name} if request.name.strip() else {}
        place = base.place if base.place == "demo" or not Path(base.place).exists() else str(Path(base.place).resolve())
        rest = {"method": request.method, "seed": request.seed, "report": request.report}
        return {"folder": folder, "base": place, **given, **more, **title, **rest}

    # --- what there is

    def get(self, id: str, owner: str = "") -> Run:
        """Raises ConfigError where there is none, or it is another owner's."""
        return self._run(self._get(id, owner))

    def all(self, owner: str = "") -> list[Run]:
        """Newest first."""
        whose = self.playground.whose(owner)
        found = [own for own in self._all() if whose in (None, own.record.owner)]
        return [self._run(own) for own in sorted(found, key=lambda own: -own.record.began)]

    def running(self) -> Running | None:
        """The training that runs now, whoever's, at the cost of a look at its status."""
        with self._lock:
            own = next((own for own in self._own.values() if own.alive), None)
        if own is None:
            return None
        status, record = own.watch.status(), own.record
        return Running(record.name, record.owner, int(status.get("step", 0)), int(status.get("steps", record.steps)))

    def _get(self, id: str, owner: str) -> Training:
        whose = self.playground.whose(owner)
        for own in self._all():
            if own.record.id == id and whose in (None, own.record.owner):
                return own
        raise ConfigError("there is no such training, or it is another's")

    def _all(self) -> list[Training]:
        """All runs on the disk, of earlier sessions too."""
        with self._lock:
            known = {own.folder for own in self._own.values()}
            for path in self._root.glob(f"*/{RECORD}"):
                if path.parent not in known and (record := Record.read(path)) is not None:
                    self._own[record.id] = self._training(record, path.parent)
            gone = [id for id, own in self._own.items() if not own.folder.is_dir()]
            for id in gone:
                del self._own[id]
            return list(self._own.values())

    def _training(self, record: Record, folder: Path) -> Training:
        return Training(record, Watch(folder, self.playground.album), self._ended)

    def _ended(self, own: Training) -> None:
        """A process ended: its adapters are in the library from now on."""
        try:
            own.keep(ended=own.status)
            self.playground.library.scan()
        except ImgadaptError as error:  # a full disk
            self.playground.desk.log(f"{own.record.name}: {error}")

    def _run(self, own: Training) -> Run:
        """Raises ConfigError where its folder was removed meanwhile."""
        watch, record = own.watch, own.record
        status, loss = watch.status(), watch.losses()
        state = own.state(status)
        step = int(status.get("step", loss[-1][0] if loss else 0))
        eta = status.get("eta_seconds") if state == "training" else None
        shared = self.playground.settings.shared
        return Run(
            record.id, record.name, state, step, int(status.get("steps", record.steps)), eta, loss,
            watch.evaluations(), watch.samples(record.owner if shared else None), self._cards(own),
            own.message(state, status), record.began, record.owner,
        )  # fmt: skip

    def _cards(self, own: Training) -> list[Card]:
        """Its adapters in the library, snapshots first; looked for again when there are others."""
        files = [*sorted(own.folder.glob("snapshots/*.safetensors")), *own.folder.glob("*.safetensors")]
        seen = [(path.name, path.stat().st_mtime) for path in files if path.exists()]
        if seen != own.seen:
            own.seen = seen
            self.playground.library.scan()
        cards = {card.path.resolve(): card for card in self.playground.library.cards()}
        order = {"best.safetensors": 1, "adapter.safetensors": 2}
        mine = [card for path, card in cards.items() if path.is_relative_to(own.folder)]
        return sorted(mine, key=lambda card: (order.get(card.path.name, 0), str(card.path)))
