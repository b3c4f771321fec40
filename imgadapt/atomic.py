"""Whole files and folders or none: a temporary name beside them, fsync, rename."""

import os
import secrets
import shutil
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
    _sync(path.parent)


@contextmanager
def folder_atomically(path: Path) -> Generator[Path]:
    """An empty folder to write into, which becomes `path` when the block ends well and vanishes when it does not. Files
    in it are to be written by `atomically`.

    Raises:
        OutputError: it cannot be written, or there is something at `path` already.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise OutputError(f"{path} is there already; name a folder that is not, or remove it")
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for folder in (*(one for one in temporary.rglob("*") if one.is_dir()), temporary):
            _sync(folder)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    with suppress(OSError):  # some file systems cannot sync a folder, and Windows cannot open one
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file `path` by `data`, whole.

    Raises:
        OutputError: see `atomically`.
    """
    with atomically(path) as file:
        file.write(data)
