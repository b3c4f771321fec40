"""Reading: files that anyone may have put into a folder, whole or not at all."""

import errno
import os
import stat
from pathlib import Path


def read(path: Path, most: int) -> bytes:
    """The bytes of a file, if it is one and has no more than `most`. Pipes and devices, which may never end, are not
    opened.

    Raises:
        OSError: it is none, is longer, cannot be read, or changed meanwhile; strerror says why.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(errno.EINVAL, "not a file")
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise OSError(errno.ENOENT, "a link to nothing" if path.is_symlink() else "no such file") from error
    except ValueError as error:  # NUL in its name
        raise OSError(errno.EINVAL, str(error)) from error
    with open(descriptor, "rb") as file:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise OSError(errno.EINVAL, "not a file")
        if before.st_size > most:
            raise OSError(errno.EFBIG, f"{before.st_size:,} bytes, wanted {most:,} at most")
        data = file.read(most + 1)
        after = os.fstat(descriptor)
    if not len(data) == before.st_size == after.st_size or before.st_mtime_ns != after.st_mtime_ns:
        raise OSError(errno.EAGAIN, "it changed while it was read")
    return data
