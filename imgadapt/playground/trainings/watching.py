"""Watching: what a training's files say of it, read again only as far as they have grown."""

import json
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from imgadapt.errors import ConfigError
from imgadapt.playground.pictures.album import Album, Picture
from imgadapt.playground.trainings.launching import CONSOLE
from imgadapt.training.log import read_lines

Loss = tuple[int, float, float]
"""Steps done, loss, learning rate."""
POINTS = 1500
"""Of a loss curve: more than a screen has pixels for."""
SAMPLES = 32
"""Of a run's samples, so many are shown."""
_TAIL = 16 * 1024  # bytes of the console that are looked at
_SAMPLE = re.compile(r"step-[0-9]{1,12}\.png")
_BAR = re.compile(r"\d%\|")  # tqdm's


class Losses:
    """The loss of all steps, out of `log.jsonl`."""

    def __init__(self, path: Path) -> None:
        self.path, self._rows = path, list[Loss]()
        self._file, self._offset = 0, 0

    def read(self) -> list[Loss]:
        """All rows; only what was added is read. A resumed run writes the file anew."""
        try:
            with self.path.open("rb") as file:
                about = self.path.stat()
                if about.st_ino != self._file or about.st_size < self._offset:
                    self._file, self._offset, self._rows = about.st_ino, 0, []
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):  # it is being written
                        break
                    self._offset += len(line)
                    self._rows += _loss(line)
        except OSError:
            return self._rows
        return self._rows


def _loss(line: bytes) -> list[Loss]:
    try:
        row = json.loads(line)
        found = (int(row["step"]) + 1, float(row["loss"]), float(row["lr"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # torn by a crash; a skipped step
        return []
    return [found] if math.isfinite(found[1]) else []


def thinned(rows: Sequence[Loss], most: int = POINTS) -> list[Loss]:
    """At most so many rows: means of the loss over as many steps each, at the last of them."""
    every = -(-len(rows) // most)
    if every <= 1:
        return list(rows)
    parts = [rows[k : k + every] for k in range(0, len(rows), every)]
    return [(part[-1][0], sum(row[1] for row in part) / len(part), part[-1][2]) for part in parts]


class Watch:
    """Reads a run's folder; safe to use from any thread."""

    def __init__(self, folder: Path, album: Album) -> None:
        self.folder, self.album = folder, album
        self._losses, self._lock = Losses(folder / "log.jsonl"), threading.Lock()

    def losses(self) -> list[Loss]:
        """At most POINTS of them."""
        with self._lock:
            return thinned(self._losses.read())

    def status(self) -> Mapping[str, Any]:
        """`status.json`; nothing where there is none yet."""
        return _json(self.folder / "status.json")

    def evaluations(self) -> list[dict[str, float]]:
        """A row for each evaluation, with its step."""
        return read_lines(self.folder / "evaluations.jsonl")

    def samples(self, owner: str | None) -> list[tuple[int, Picture]]:
        """(steps done, picture), at most SAMPLES and the last one, lent to the album. owner: whose they shall be there;
        None: anyone's.
        """
        found: list[tuple[int, Picture]] = []
        for path in _some(self.folder / "samples"):
            with suppress(ConfigError):  # it is broken, or went away
                found.append((int(path.stem.rpartition("-")[2]), self.album.lend(path, owner=owner or "")))
        return found

    def said(self) -> str:
        """The last line that the process printed, save progress bars."""
        return next(self._lines(), "")

    def fault(self) -> str:
        """Why it ended, as it said: the last error, or whatever was last."""
        lines = list(self._lines())
        told = [line for line in lines if line.startswith("imgadapt: error: ") or ": error: " in line[:60]]
        return told[0].partition("error: ")[2] if told else lines[0] if lines else ""

    def _lines(self) -> Iterator[str]:
        """Of the end of the console, the last first."""
        try:
            with (self.folder / CONSOLE).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - _TAIL))
                text = file.read(_TAIL).decode("utf-8", "replace")
        except OSError:
            return
        for line in reversed(re.split(r"[\r\n]+", text)):
            if line.strip() and not _BAR.search(line):
                yield line.strip()


def _some(folder: Path) -> list[Path]:
    """The samples to show: all, or every second, fourth, ... and the last, so that those shown stay the same."""
    found = sorted(path for path in folder.glob("step-*.png") if _SAMPLE.fullmatch(path.name))
    every = 1
    while len(found[::every]) > SAMPLES:
        every *= 2
    return list(dict.fromkeys([*found[::every], *found[-1:]]))


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
