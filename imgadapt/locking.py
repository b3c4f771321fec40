"""Locks of folders: one process at a time; the system takes a lock back however its process ends."""

import json
import os
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

from imgadapt.atomic import make_folder
from imgadapt.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"
"""The file in the folder: it stays, and says who had the lock last."""
_LOOKS = 5  # at a lock that may be held by somebody who only looks at it


class Lock:
    """A lock; close it, or use it as a context. held: False on file systems without locks, and on Windows."""

    def __init__(self, descriptor: int, held: bool) -> None:
        self._descriptor, self.held = descriptor, held
        self._process = os.getpid()

    def again(self, descriptor: int) -> Self | None:
        """The same lock once more, which is held until both are closed; None: it is not of this open file, or it is
        the parent's of this process.
        """
        if not self.held or self._descriptor < 0 or self._process != os.getpid():
            return None
        if not os.path.samestat(os.fstat(self._descriptor), os.fstat(descriptor)):
            return None
        return type(self)(os.dup(self._descriptor), True)

    def close(self) -> None:
        """Give it back; any number of times."""
        if self._descriptor >= 0:
            with suppress(OSError):  # what it wrote says who has the lock, and no more
                os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


_taken: WeakSet[Lock] = WeakSet()  # by this process


def take(folder: Path) -> Lock:
    """The lock of a folder, which is made where it is not there. Of one that this process has already: the same, which
    is free when all have closed it.

    Raises:
        OutputError: another process has it, which is named; or the folder cannot be written.
    """
    make_folder(folder)
    descriptor = _opened(folder / NAME)
    said = _try(descriptor)
    for _ in range(_LOOKS):
        if said is None:
            with suppress(OSError):  # a full disk: it is held without a name then
                os.ftruncate(descriptor, 0)
                row = {"pid": os.getpid(), "host": socket.gethostname(), "since": int(time.time())}
                os.pwrite(descriptor, json.dumps(row).encode(), 0)
            lock = Lock(descriptor, True)
            _taken.add(lock)
            return lock
        if not said:
            return Lock(descriptor, False)
        if (own := next(filter(None, (lock.again(descriptor) for lock in list(_taken))), None)) is not None:
            _close(descriptor)
            _taken.add(own)
            return own
        time.sleep(0.02)
        said = _try(descriptor)
    _close(descriptor)
    raise OutputError(
        f"{folder} is being written to by {_who(said or {})}; let it end, stop it, or choose another output"
    )


def holder(folder: Path) -> str | None:
    """Who has the lock of a folder, in words; None: nobody, as far as can be told."""
    try:
        descriptor = os.open(folder / NAME, os.O_RDWR)
    except OSError:
        return None
    try:
        said = _try(descriptor)
    finally:
        _close(descriptor)
    return _who(said) if said else None


@contextmanager
def alone(path: Path) -> Generator[None]:
    """Wait for the lock of `path`, a file that is there for this; for a few lines that read a file and write it anew.

    Raises:
        OutputError: it cannot be made.
    """
    make_folder(path.parent)
    descriptor = _opened(path)
    try:
        if fcntl is not None:
            with suppress(OSError):  # no locks here
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        _close(descriptor)


def _close(descriptor: int) -> None:
    with suppress(OSError):  # nothing was written by it
        os.close(descriptor)


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise OutputError(f"cannot write to {path.parent}: {path.name}: {error.strerror or error}") from error


def _try(descriptor: int) -> dict[str, Any] | None:
    """None: the lock is ours now. What its holder says, or {"pid": None} where that cannot be read; {}: there are no
    locks here.
    """
    if fcntl is None:
        return {}
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the second: so NFS says it
        try:
            said = json.loads(os.pread(descriptor, 4096, 0))
        except (OSError, ValueError, RecursionError):
            said = None
        return said if isinstance(said, dict) and said else {"pid": None}
    except OSError:
        return {}
    return None


def _who(said: dict[str, Any]) -> str:
    """Of a holder: its process, machine and time, as far as they are said."""
    pid, host, since = said.get("pid"), said.get("host"), said.get("since")
    if not (isinstance(pid, int) and isinstance(host, str) and isinstance(since, int) and 0 <= since < 2**33):
        return "another process"
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
    return f"process {pid} on {host[:80]}, since {at}"
