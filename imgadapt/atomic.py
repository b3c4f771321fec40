"""Whole files or none: a temporary name in the same folder, fsync, rename."""

import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from imgadapt.errors import OutputError


@contextmanager
def atomically(path: Path) -> Generator[BinaryIO]:
    """A binary file to write, which becomes `path` when the block ends well and vanishes when it does not.

    Raises:
        OutputError: it cannot be written (disk full, read-only, no permission); what was at `path` is untouched.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(name, flags, 0o666)
        temporary = name
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; what was there is untouched") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    # the file is there and whole: some file systems cannot sync a folder, and Windows cannot open one
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file `path` by `data`, whole.

    Raises:
        OutputError: see `atomically`.
    """
    with atomically(path) as file:
        file.write(data)
