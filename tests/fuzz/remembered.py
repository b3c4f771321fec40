"""What is remembered on disk, as a crash, a full disk or another program may leave it: every reader of it."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from imgadapt.combining.checkpoints.base import open_base
from imgadapt.errors import ConfigError, ImgadaptError
from imgadapt.playground.grids.shelf import Shelf
from imgadapt.playground.library.bases import Bases
from imgadapt.playground.library.remembering import _VERSION, Memory
from imgadapt.playground.pictures import owners
from imgadapt.playground.pictures.album import Album
from imgadapt.playground.settings import Settings
from imgadapt.playground.trainings import launching
from imgadapt.playground.trainings.trainings import RECORD, Record, Training
from imgadapt.playground.trainings.watching import Watch
from imgadapt.training.evidence import Lines
from imgadapt.training.families.load import load
from imgadapt.training.log import read_lines
from imgadapt.training.report import readings, scores
from tests.fuzz.files import placed, scratch
from tests.fuzz.target import Target

A = "a" * 16
_JSON = (
    *(
        "null",
        "true",
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1",
        "9" * 30,
        "[" * 30,
        '{"":',
        '"\\ud800"',
        "\\u0000",
        "{}",
    ),
    *("[]", '""', "\n", '"step":', '"version":', "\xff"),
)


@cache
def _album() -> Album:
    return Album(scratch() / "outputs", scratch() / "uploads", most_bytes=2**20, most_pixels=2**20)


def _memory(data: bytes) -> None:
    """A library's headers and digests."""
    memory = Memory(placed(data, "library.json"))
    header = memory.header(A, (1, 2))
    if header is not None:
        assert all(
            isinstance(text, str) for text in (header.format, header.architecture, header.fault, *header.trigger)
        )
        assert sum(kind.layers for kind in header.kinds) >= 0
    assert isinstance(memory.digest(A, (1, 2)), str | None)
    memory.keep_digest("b", (1, 2), "x")
    memory.save([A, "b"])
    assert Memory(scratch() / "library.json").digest("b", (1, 2)) == "x"


def _memories() -> Iterator[bytes]:
    header = {"format": "kohya", "architecture": "sd1", "kinds": [{"method": "lora", "rank": 4, "alpha": 4.0, "layers": 3}],  # noqa: E501
              "components": ["unet"], "numbers": 9, "dtypes": ["float32"], "words": [], "trigger": ["x"], "weight": None,  # noqa: E501
              "fault": ""}  # fmt: skip
    yield json.dumps({"version": _VERSION, "headers": {A: [1, 2, header]}, "digests": {A: [1, 2, "00"]}}).encode()


def _grid(data: bytes) -> None:
    shelf = Shelf(scratch() / "grids", _album())
    folder = scratch() / "grids" / A
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "grid.json").write_bytes(data)
    grid = shelf.read(A)
    assert shelf.ids() == [A]
    shelf.write(grid)
    assert shelf.read(A).request == grid.request


def _grids() -> Iterator[bytes]:
    request = {"common": {"prompt": "x"}, "x": {"kind": "weight", "values": "0, 1"}}
    cell = {
        "place": [0, 0, 0],
        "request": {"prompt": "x", "seed": 3},
        "picture": None,
        "difference": None,
        "base": None,
    }
    yield json.dumps({"version": 1, "id": A, "name": "", "made": 3.0, "request": request, "labels": [["a", "b"], [""], [""]],  # noqa: E501
                      "cells": [cell, {**cell, "place": [1, 0, 0], "base": 0}], "owner": "", "more": {"base": "demo"}}).encode()  # fmt: skip  # noqa: E501


def _run(data: bytes) -> None:
    """run.json, status.json and log.jsonl of a training; parted by lines of `--`."""
    folder = scratch() / "run"
    folder.mkdir(exist_ok=True)
    for name, part in zip(  # noqa: B905
        (RECORD, "status.json", "log.jsonl", "evaluations.jsonl", launching.CONSOLE), data.split(b"\n--\n")
    ):
        (folder / name).write_bytes(part)
    record, watch = Record.read(folder / RECORD), Watch(folder, _album())
    for _, loss, rate in watch.losses():
        assert loss == loss
        assert isinstance(rate, float)
    for row in watch.evaluations():
        assert isinstance(row["step"], int | float)
    watch.fault().encode()
    if record is None:
        raise ConfigError("no record")
    training = Training(record, watch, lambda _: None)
    status = watch.status()
    state = training.state(status)
    training.message(state, status).encode()
    sorted([record.began, 3.0])
    assert isinstance(record.name + record.owner, str)


def _runs() -> Iterator[bytes]:
    record = {
        "id": A,
        "name": "x",
        "owner": "",
        "began": 3.0,
        "request": {},
        "steps": 9,
        "pid": None,
        "ended": 0,
        "stopping": False,
    }
    rows: list[list[Any]] = [
        [record], [{"state": "training", "step": 3, "steps": 9, "eta_seconds": 3.5}],
        [{"step": 0, "loss": 0.5, "lr": 1e-4}, {"step": 1, "loss": 0.4, "lr": 1e-4}], [{"step": 3, "held_out": 0.1}],
        ["imgadapt: error: no"],
    ]  # fmt: skip
    yield b"\n--\n".join(b"".join(json.dumps(row).encode() + b"\n" for row in part) for part in rows)


def _log(data: bytes) -> None:
    path = placed(data, "log.jsonl")
    before = read_lines(path)
    for row in before:
        int(row["step"])
    readings.read(path.parent)
    lines = Lines(path, 5)
    lines.write({"step": 5})
    after = read_lines(path)
    assert after[:-1] == [row for row in before if int(row["step"]) < 5]
    assert after[-1] == {"step": 5}


def _logs() -> Iterator[bytes]:
    yield b'{"step": 0, "loss": 0.5}\n{"step": 1, "loss": NaN}\n{"step": 7}\n{"st'


def _owners(data: bytes) -> None:
    path = placed(data, "owners")
    known = owners.read(path, {A})
    assert known.keys() <= {A}
    owners.add(path, A, "eve")
    assert owners.read(path, {A}) == {A: "eve"}


def _owner_files() -> Iterator[bytes]:
    yield f"{A} adam\n\n{A} eve\nbbbb x y z".encode()


# --- a base's own JSON


def _base(data: bytes) -> None:
    """model_index.json of a folder, and config.json of its denoiser; parted by a line of `--`."""
    folder = scratch() / "models" / "base"
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    index, _, config = data.partition(b"\n--\n")
    (folder / "model_index.json").write_bytes(index)
    (folder / "unet" / "config.json").write_bytes(config)
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_bytes(config)
    bases = Bases(Settings(scratch() / "home", models=(folder.parent,)))
    assert len(bases.all) + len(bases.faults) >= 2
    "".join(bases.faults).encode()
    refusals: list[ImgadaptError] = []
    readers: list[Callable[[], object]] = [
        lambda: open_base(folder), lambda: load(str(folder)), lambda: scores.kind(folder / "unet"),
    ]  # fmt: skip
    for read in readers:
        try:
            read()
        except ImgadaptError as error:
            refusals.append(error)
    if len(refusals) == len(readers):
        raise refusals[0]


def _base_files() -> Iterator[bytes]:
    from diffusers import UNet2DConditionModel  # which takes seconds, the first time

    assert UNet2DConditionModel
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": [None, None],
    }
    yield (
        json.dumps(index).encode()
        + b"\n--\n"
        + json.dumps({"weight_map": {"a": "b.safetensors"}, "model_type": "clip"}).encode()
    )
    yield (
        json.dumps({**index, "_class_name": "FluxPipeline"}).encode()
        + b"\n--\n"
        + b'{"weight_map": {"x": "../../etc/passwd"}}'
    )


TARGETS = (
    Target("library-memory", _memory, _memories, _JSON),
    Target("grid-file", _grid, _grids, _JSON),
    Target(
        "run-files", _run, _runs, (*_JSON, "\n--\n", '"pid":', '"ended":', '"state":', "imgadapt: error: ", "\x1b[2J")
    ),
    Target("log-lines", _log, _logs, _JSON),
    Target("owners", _owners, _owner_files, (A, " ", "\n", "\r", "\u2028")),
    Target(
        "base-folder", _base, _base_files, (*_JSON, "\n--\n", '"_class_name":', '"weight_map":{', "../", "/dev/zero")
    ),
)
