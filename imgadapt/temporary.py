"""Temporary names beside files: claimed by one process, locked while it is at work, swept when it was killed."""

import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from imgadapt import stopping
from imgadapt.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows, where nothing is swept: there is no telling who is at work
    fcntl = None

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]+\.tmp")
_AT_ONCE = 4  # writers of one file that have its numbered names; others have random ones, which `sweep` finds
_LONGEST = 200  # bytes of a file's name within its temporary one; file systems take 255 in all


@contextmanager
def claimed(target: Path, make: Callable[[str], None]) -> Generator[Path]:
    """A name beside `target`, `.NAME.0.tmp`, of what `make` has made there. It is gone after the block, unless it has
    another name by then. Those of processes that were killed are removed first.

    make: raises FileExistsError where there is something.

    Raises:
        OSError: it cannot be made; `target` is the name in it.
    """
    numbered = [_name(target, f"{k:x}") for k in range(_AT_ONCE)]
    for name in numbered:
        _sweep(name)
    for name in chain(numbered, (_name(target, secrets.token_hex(6)) for _ in range(_AT_ONCE))):
        with suppress(FileExistsError), stopping.unbroken():
            _made(name, target, make)
            try:
                about, held = os.lstat(name), _lock(name)
            except (BlockingIOError, FileNotFoundError):  # taken for a dead one's, in the moment before
                continue
            except BaseException:
                _remove(name)
                raise
            stopping.goes(name, about)
            break
    else:
        raise OutputError(f"cannot write {target}: too many are writing it")
    try:
        yield name
    finally:
        _leave(name, about)
        stopping.stays(name)
        if held is not None:
            os.close(held)


def _made(name: Path, target: Path, make: Callable[[str], None]) -> None:
    try:
        make(os.fspath(name))
    except OSError as error:
        if error.filename == os.fspath(name):  # which nobody has heard of
            error.filename = os.fspath(target)
        raise


def _leave(name: Path, about: os.stat_result) -> None:
    """Remove what has a name of ours, if it is not another's by now, as the name is free once a file has its own."""
    with suppress(OSError):
        if os.path.samestat(now := os.lstat(name), about):
            _remove(name)
            return
        held = _lock(name)  # nobody else's: a folder that ours was exchanged with
        if held is not None or stat.S_ISDIR(now.st_mode):
            _remove(name)
        if held is not None:
            with suppress(OSError):  # nothing was written by it
                os.close(held)


def sweep(folder: Path) -> None:
    """Remove what killed processes left in a folder of files that have another name each time."""
    with suppress(OSError):  # another time
        for entry in os.scandir(folder):
            if _TEMPORARY.fullmatch(entry.name):
                _sweep(Path(entry.path))


def _name(target: Path, what: str) -> Path:
    short = target.name.encode("utf-8", "replace")[:_LONGEST].decode("utf-8", "ignore")
    return target.parent / f".{short}.{what}.tmp"


def _lock(name: Path) -> int | None:
    """A descriptor that holds the lock of what has this name; None: it cannot be locked on this file system.

    Raises:
        BlockingIOError: it is another's. FileNotFoundError: it has another name by now.
    """
    if fcntl is None:
        return None
    descriptor = -1
    try:
        flags = os.O_RDONLY if name.is_dir() else os.O_RDWR
        descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.lstat(name)):
            raise FileNotFoundError(name)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        if isinstance(error, BlockingIOError | FileNotFoundError):
            raise
        return None
    return descriptor


def _sweep(name: Path) -> None:
    """Remove what a process that was killed has left there; not what somebody is at, and not what cannot be known."""
    with suppress(OSError):
        if not os.path.lexists(name):
            return
        held = _lock(name)
        if held is not None:
            _remove(name)
            os.close(held)


def _remove(name: Path) -> None:
    """What cannot be removed is swept another time."""
    with suppress(OSError):
        if stat.S_ISDIR(os.lstat(name).st_mode):
            shutil.rmtree(name, ignore_errors=True)
        else:
            os.unlink(name)
