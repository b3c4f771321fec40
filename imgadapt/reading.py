"""Reading: files that anyone may have made, whole or not at all."""

import errno
import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def opened(path: Path) -> Generator[BinaryIO]:
    """A file, open to be read. Pipes and devices, which may never end, are not opened.

    Raises:
        OSError: it is no file, or cannot be read; strerror says why.
    """
    try:
        _check_kind(path.stat().st_mode)
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        why = "no such file, only a link to one" if path.is_symlink() else "no such file"
        raise OSError(errno.ENOENT, why) from error
    except ValueError as error:  # NUL in its name
        raise OSError(errno.EINVAL, str(error)) from error
    with open(descriptor, "rb") as file:
        _check_kind(os.fstat(descriptor).st_mode)
        yield file


def _check_kind(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, "no such file, only a folder")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "no file, but a pipe, socket or device")


def read(path: Path, most: int) -> bytes:
    """The bytes of a file, if it is one and has no more than `most`.

    Raises:
        OSError: it is none, is longer, cannot be read, or changed meanwhile; strerror says why.
    """
    with opened(path) as file:
        before = os.fstat(file.fileno())
        if before.st_size > most:
            raise OSError(errno.EFBIG, f"{before.st_size:,} bytes, wanted {most:,} at most")
        data = file.read(most + 1)
        after = os.fstat(file.fileno())
    if not len(data) == before.st_size == after.st_size or before.st_mtime_ns != after.st_mtime_ns:
        raise OSError(errno.EAGAIN, "it changed while it was read")
    return data
