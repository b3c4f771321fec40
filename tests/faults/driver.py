"""What becomes of an operation when each call that it makes to the disk fails, comes up short, or is its last."""

import ctypes
import errno
import io
import json
import os
import re
import shutil
import signal
import struct
import sys
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from PIL import Image

from imgadapt.errors import ImgadaptError

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
WRITES, READS = 15, 16  # kinds of calls, see shim.c
_LONGEST = 300  # seconds of a child; then it hangs
_TEMPORARY = re.compile(r"(^|/)\.[^/]*\.tmp(/|$)")


class Mode(IntEnum):
    """As in shim.c: one call fails; it and all later ones fail; half is written, then the disk is full; the process
    dies; the power goes, and what is not synced is lost: all of it, or half of it and the names.
    """

    ONCE = 0
    STAYS = 1
    SHORT = 2
    DIES = 3
    POWER = 4
    POWER_BACK = 5


FAILS, CRASHES = (Mode.ONCE, Mode.STAYS, Mode.SHORT), (Mode.DIES, Mode.POWER, Mode.POWER_BACK)


@dataclass(frozen=True)
class Operation:
    """prepare: puts what is there before into a folder. run: does it, in the folder. loose: files (globs) that are not
    the same each time, or change on the way: each has to be whole. away: files
    that may be missing after a fault. together: files that have to be all old or all new.
    public: errors are told to anyone, without folders.
    once: what is there whole is not written over.
    dear: takes long; fewer calls are tried. reads: calls that read fail, and no others.
    """

    name: str
    prepare: Callable[[Path], object]
    run: Callable[[Path], object]
    loose: Sequence[str] = ()
    away: Sequence[str] = ()
    together: Sequence[str] = ()
    dear: bool = False
    public: bool = False
    once: bool = False
    reads: bool = False


@dataclass
class Tally:
    """calls: of the whole operation. outcomes: how many faults ended how. wrong: what should not have been."""

    name: str
    calls: int = 0
    outcomes: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])

    @property
    def faults(self) -> int:
        return sum(self.outcomes.values())


class Disk:
    """The preloaded library."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.seen.restype = ctypes.c_char_p
        self._library.disarm.restype = ctypes.c_long

    def arm(self, folder: Path, n: int, error: int, mode: Mode, kinds: int) -> None:
        self._library.arm(os.fsencode(folder), ctypes.c_long(n), error, int(mode), kinds)

    def disarm(self) -> int:
        """How many calls there were."""
        return self._library.disarm()

    def seen(self, k: int) -> str:
        return self._library.seen(ctypes.c_long(k)).decode()

    @property
    def hit(self) -> bool:
        return bool(self._library.was_hit())


class Driver:
    """Tries operations in a folder, which must be on a disk that knows hard links."""

    def __init__(self, folder: Path) -> None:
        self.disk, self._template, self._place = Disk(), folder / "before", folder / "run"

    def tried(
        self,
        operation: Operation,
        errors: Sequence[int] = ERRORS,
        modes: Sequence[Mode] = (*FAILS, *CRASHES),
        most: int = 0,
    ) -> Tally:
        """most: calls that are tried, evenly spread; 0: all."""
        tally = Tally(operation.name)
        shutil.rmtree(self._template, ignore_errors=True)
        self._template.mkdir()
        self._place.mkdir(exist_ok=True)
        operation.prepare(self._template)
        kinds = READS if operation.reads else WRITES
        self._fresh()
        before = _content(self._place)
        self.disk.arm(self._place, 0, 0, Mode.ONCE, kinds)
        try:
            _quiet(operation, self._place)
        finally:
            tally.calls = self.disk.disarm()
        after = _content(self._place)
        judge = _Judge(operation, self._place, before, after, tally)
        step = max(1, -(-tally.calls // most)) if most else 1
        for n in range(1, tally.calls + 1, step):
            for mode in (mode for mode in modes if not operation.reads or mode in (Mode.ONCE, Mode.STAYS)):
                if mode in CRASHES:
                    self._crash(judge, n, mode, kinds)
                    continue
                for error in errors if mode != Mode.SHORT else (errno.ENOSPC,):
                    self._fail(judge, n, error, mode, kinds)
        return tally

    def _fresh(self) -> None:
        for kept in self._place.parent.glob("run.kept.*"):
            kept.unlink()
        shutil.rmtree(self._place)
        shutil.copytree(self._template, self._place, symlinks=True)

    def _fail(self, judge: "_Judge", n: int, error: int, mode: Mode, kinds: int) -> None:
        self._fresh()
        raised: BaseException | None = None
        self.disk.arm(self._place, n, error, mode, kinds)
        try:
            _quiet(judge.operation, self._place)
        except BaseException as found:
            raised = found
        finally:
            self.disk.disarm()
        if not self.disk.hit:
            return
        call = self.disk.seen(n - 1)
        judge.where = f"{errno.errorcode[error]} at call {n} ({call}), {mode.name}"
        judge.failed(raised, error, strays=call in ("unlink", "rmdir") or mode == Mode.STAYS)

    def _crash(self, judge: "_Judge", n: int, mode: Mode, kinds: int) -> None:
        self._fresh()
        child = os.fork()
        if not child:
            status = 1
            signal.alarm(_LONGEST)
            try:
                self.disk.arm(self._place, n, errno.EIO, mode, kinds)
                _quiet(judge.operation, self._place)
                status = 0
            except BaseException:
                self.disk.disarm()
                traceback.print_exc()
            finally:
                os._exit(status)
        judge.where = f"{mode.name} at call {n}"
        judge.crashed(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


class _Judge:
    def __init__(
        self, operation: Operation, place: Path, before: dict[str, bytes], after: dict[str, bytes], tally: Tally
    ) -> None:
        self.operation, self.place, self.before, self.after, self.tally = operation, place, before, after, tally
        self.where = ""
        if strays := [name for name in after if _TEMPORARY.search(name)]:
            self._wrong(f"left {strays} without any fault")

    def _wrong(self, what: str) -> None:
        self.tally.wrong.append(f"{self.operation.name}, {self.where}: {what}")

    def failed(self, raised: BaseException | None, error: int, *, strays: bool) -> None:
        """strays: whether temporary files may be left, as they could not be removed."""
        found = _content(self.place)
        self._files(found)
        left = [name for name in found if _TEMPORARY.search(name)]
        if left and not strays:
            self._wrong(f"left {left}")
        if raised is None:
            self.tally.outcomes["done all the same"] += 1
            if missing := [name for name in self.after if self._strict(name) and found.get(name) != self.after[name]]:
                self._wrong(f"says nothing, and {missing} are not there or old")
            return
        if isinstance(raised, ImgadaptError):
            told = str(raised)
            self.tally.outcomes["refused"] += 1
            if os.strerror(error).lower() not in told.lower() or not (str(self.place) in told or self.operation.public):
                self._wrong(f"says only: {told}")
        else:
            self.tally.outcomes["traceback"] += 1
            tail = "".join(traceback.format_exception(raised)[-3:])
            self._wrong(f"{type(raised).__name__}: {raised}\n{tail}")
        if left:
            self._again("left strays")

    def crashed(self, status: int) -> None:
        if status != 137:
            if status:
                self._wrong(f"ended by itself with {status}")
            return
        found = _content(self.place)
        self._files(found)
        new = all(found.get(name) == data for name, data in self.after.items() if self._strict(name))
        self.tally.outcomes["crashed, new" if new else "crashed, old"] += 1
        if not (new and self.operation.once):
            self._again("crashed")

    def _again(self, what: str) -> None:
        """The same again mends it."""
        try:
            _quiet(self.operation, self.place)
        except BaseException as error:
            self._wrong(f"{what}, and cannot be done again: {type(error).__name__}: {error}")
            return
        found = _content(self.place)
        left = [name for name in found if _TEMPORARY.search(name)]
        if left:
            self._wrong(f"{what}, and done again left {left}")
        if differing := [name for name in self.after if self._strict(name) and found.get(name) != self.after[name]]:
            self._wrong(f"{what}, and done again {differing} are not as they should be")

    def _strict(self, name: str) -> bool:
        return not any(Path(name).match(glob) for glob in self.operation.loose) and not _TEMPORARY.search(name)

    def _files(self, found: dict[str, bytes]) -> None:
        """Each is the old one or the new one, or whole; and so are those that belong together."""
        for name in {*found, *self.before, *self.after}:
            if _TEMPORARY.search(name):
                continue
            data = found.get(name)
            if self._strict(name):
                gone = data is None and name in self.operation.away
                if not gone and data not in (self.before.get(name), self.after.get(name)):
                    held = "gone" if data is None else f"{len(data)} bytes that are"
                    self._wrong(f"{name} is {held} neither old nor new")
            elif data is not None and data != self.before.get(name) and (fault := _fault(name, data)):
                self._wrong(f"{name} is not whole: {fault}")
        if names := self.operation.together:
            now = [found.get(name) for name in names]
            if now not in ([self.before.get(name) for name in names], [self.after.get(name) for name in names]):
                self._wrong(f"{', '.join(names)} do not belong together")


def _quiet(operation: Operation, place: Path) -> None:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        operation.run(place)


def _content(folder: Path) -> dict[str, bytes]:
    """Of all files; and temporary folders, which may be empty."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*")}
    files = {name: p.read_bytes() for name, p in found.items() if p.is_file()}
    return files | {f"{name}/": b"" for name, p in found.items() if p.is_dir() and _TEMPORARY.search(name)}


def _fault(name: str, data: bytes) -> str:
    """Why a file is not whole; "": it is, as far as its format tells."""
    readers: dict[str, Callable[[bytes], Any]] = {
        ".json": json.loads, ".safetensors": _safetensors, ".png": lambda d: Image.open(io.BytesIO(d)).load(),
        ".zip": lambda d: zipfile.ZipFile(io.BytesIO(d)).testzip(), ".html": lambda d: d.index(b"</html>"),
    }  # fmt: skip
    try:
        readers.get(Path(name).suffix, len)(data)
    except Exception as error:  # of whatever kind
        return f"{type(error).__name__}: {error}"
    return ""


def _safetensors(data: bytes) -> None:
    (length,) = struct.unpack("<Q", data[:8])
    rows = json.loads(data[8 : 8 + length])
    rows.pop("__metadata__", None)
    assert max((row["data_offsets"][1] for row in rows.values()), default=0) == len(data) - 8 - length


def table(tallies: Iterable[Tally]) -> str:
    """A row an operation."""
    rows = [("operation", "calls", "faults", "wrong", "outcomes")]
    for one in tallies:
        told = ", ".join(f"{count} {what}" for what, count in sorted(one.outcomes.items()))
        rows.append((one.name, f"{one.calls}", f"{one.faults}", f"{len(one.wrong)}", told))
    return "\n".join(f"{a:<34}{b:>7}{c:>8}{d:>7}  {e}" for a, b, c, d, e in rows)


def flush() -> None:
    """What was printed is printed once, not by each child, too."""
    sys.stdout.flush()
    sys.stderr.flush()
