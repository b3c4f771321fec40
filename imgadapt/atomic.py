"""Whole files or none: a temporary name in the same folder, fsync, rename."""

import os
import tempfile
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
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; what was there is untouched") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    with suppress(
        OSError
    ):  # the file is there and whole; some file systems cannot sync a folder, Windows cannot open it
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file `path` by `data`, whole.

    Raises:
        OutputError: see `atomically`.
    """
    with atomically(path) as file:
        file.write(data)
