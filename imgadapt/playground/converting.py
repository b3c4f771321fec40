"""Converter: an adapter of the library in another tool's format."""

import secrets
import shutil
import threading
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imgadapt.atomic import atomically, folder_atomically
from imgadapt.errors import ConfigError, FormatError, first_few
from imgadapt.file import AdapterFile, load, plan, save
from imgadapt.formats import FORMATS
from imgadapt.playground import filenames
from imgadapt.playground.desk import Ticket
from imgadapt.playground.requests import Id, Line, Request
from imgadapt.playground.session import Playground
from imgadapt.summary import NO_CONFIG, alpha_unsaid
from imgadapt.temporary import sweep
from imgadapt.training.families import DTYPES

_KEPT = 50
_PEFT = "peft"


class ConvertRequest(Request):
    """dtype: None: as they are. dense: whole differences for what the format has no word for."""

    adapter: Id
    format: Line
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    dense: bool = False


@dataclass(frozen=True)
class ConvertPlan:
    """losses: how exact it is -> layers ("exact", "aligned", "dense", "impossible"); notes: what else to know;
    possible: "" or why not.
    """

    losses: Mapping[str, int]
    notes: Sequence[str]
    possible: str


@dataclass(frozen=True)
class Converted:
    """path: of the file, in the home; name: for the user. plan: what it cost. owner: who asked for it."""

    id: str
    name: str
    path: Path
    plan: ConvertPlan
    owner: str = ""


class Converter:
    """Files go into the home's `outputs/converted`; the newest fifty stay."""

    def __init__(self, playground: Playground) -> None:
        self._playground = playground
        self._folder = playground.settings.folder("outputs") / "converted"
        self._lock = threading.Lock()
        self._made: OrderedDict[str, Converted] = OrderedDict()
        sweep(self._folder)

    def formats(self) -> Sequence[tuple[str, str]]:
        """Name and which tools read it."""
        return [(form.name, form.about) for form in FORMATS]

    def plan(self, request: ConvertRequest) -> ConvertPlan:
        """What it would cost, layer by layer; nothing is written.

        Raises:
            ConfigError: no such adapter, no such format. FormatError: see `Library.file`.
        """
        self._check(request)
        return _planned(self._playground.library.file(request.adapter), request)

    def fitting(self, adapter: str, wanted: str = "") -> str:
        """The format to offer for an adapter: `wanted`, where it can hold it, else the first that can.

        Raises:
            ConfigError: no such adapter. FormatError: see `Library.file`.
        """
        file, names = self._playground.library.file(adapter), [form.name for form in FORMATS]
        order = [wanted, *names] if wanted in names else names
        asked = (ConvertRequest(adapter=adapter, format=name) for name in order)
        return next((one.format for one in asked if not _planned(file, one).possible), order[0])

    def convert(self, request: ConvertRequest, *, owner: str = "") -> Ticket[Converted]:
        """Write it; it is read back before it is handed over.

        Raises:
            ConfigError: no such adapter, no such format. Busy: the queue is full.
        """
        self._check(request)
        return self._playground.desk.submit(lambda ticket: self._converted(ticket, request), owner=owner)

    def get(self, id: str, owner: str | None = None) -> Converted:
        """For its download.

        Raises:
            ConfigError: there is none, or it has made way for newer ones; or it is another owner's and `owner` is
                given.
        """
        with self._lock:
            made = self._made.get(id)
        if made is None or owner not in (None, made.owner) or not made.path.is_file():
            raise ConfigError("this file is not kept any more; convert it again")
        return made

    def _check(self, request: ConvertRequest) -> None:
        self._playground.library.get(request.adapter)
        if request.format not in (names := [form.name for form in FORMATS]):
            raise ConfigError(f"no format '{request.format[:40]}'; there are: {', '.join(names)}")

    def _converted(self, ticket: Ticket[Converted], request: ConvertRequest) -> Converted:
        library = self._playground.library
        card = library.get(request.adapter)
        ticket.progress(f"reading {card.name}", 0, 3)
        file = library.file(request.adapter)
        planned = _planned(file, request)
        if planned.possible:
            raise FormatError(f"{card.name} cannot be written as {request.format}: {planned.possible}")
        ticket.progress(f"writing {request.format}", 1, 3)
        stem = filenames.cleaned(card.name, "adapter")
        made_id = secrets.token_hex(8)
        folder = self._folder / made_id
        with folder_atomically(folder) as inside:
            name = self._write(file, inside, f"{stem}.{request.format}", request, ticket).name
        made = Converted(made_id, name, folder / name, planned, ticket.owner)
        with self._lock:
            self._made[made_id] = made
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)
        self._prune()
        return made

    @staticmethod
    def _write(file: AdapterFile, folder: Path, name: str, request: ConvertRequest, ticket: Ticket[Converted]) -> Path:
        wanted, dense = request.format, request.dense
        dtype = DTYPES[request.dtype] if request.dtype else None
        if wanted != _PEFT or not file.parts:
            path = save(file, folder / f"{name}.safetensors", format=wanted, dtype=dtype, dense=dense)
            ticket.progress("reading it back", 2, 3)
            load(path)
            return path
        inside = save(file, folder / "adapter", format=wanted, dtype=dtype, dense=dense)  # two files; a download is one
        ticket.progress("reading it back", 2, 3)
        load(inside)
        path = folder / f"{name}.zip"
        with atomically(path) as written, zipfile.ZipFile(written, "w") as archive:
            for one in sorted(inside.iterdir()):
                archive.write(one, f"{name}/{one.name}")
        shutil.rmtree(inside, ignore_errors=True)
        return path

    def _prune(self) -> None:
        """The oldest go, those of earlier sessions, too."""
        folders = sorted((f for f in self._folder.glob("[!.]*") if f.is_dir()), key=lambda f: f.stat().st_mtime_ns)
        for folder in folders[:-_KEPT]:
            shutil.rmtree(folder, ignore_errors=True)


def _planned(file: AdapterFile, request: ConvertRequest) -> ConvertPlan:
    steps = plan(file, request.format)
    losses = Counter(step.loss for step in steps)
    reasons: dict[str, list[str]] = {}
    for step in steps:
        if step.reason:
            reasons.setdefault(step.reason, []).append(step.name)
    lost = ("impossible",) if request.dense else ("impossible", "dense")
    lacking = {step.reason: step.name for step in steps if step.loss in lost}
    notes = [f"{reason} ({first_few(names)})" for reason, names in reasons.items() if reason not in lacking]
    if alpha_unsaid(file):
        notes.append(NO_CONFIG)
    return ConvertPlan(dict(losses), notes, first_few([f"{why} ({reasons[why][0]})" for why in lacking], 2))
