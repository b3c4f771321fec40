"""Names that users give, as names of files: of one folder, on any system, and never another file's."""

import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

from imgadapt.errors import OutputError

MOST = 100
"""Bytes of a name; file systems take 255, and endings and numbers come on top."""
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # Windows opens these, in any folder


def cleaned(name: str, otherwise: str, most: int = MOST) -> str:
    """A name without folders, control characters, what shells and `<lora:...>` read, dots and spaces at its ends.
    otherwise: where nothing is left of it.
    """
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", name))[-1]
    kept = re.sub(r"[^\w.+() -]+|\s+", " ", last)
    short = kept.strip(" .-").encode("utf-8", "ignore")[:most].decode("utf-8", "ignore").strip(" .-")
    return f"{short}_" if _DEVICES.fullmatch(short) else short or otherwise


def reserved(folder: Path, name: str, suffix: str) -> Path:
    """An empty file of this name in a folder, or of the name with a number where there is one already.

    Raises:
        OutputError: the folder cannot be written.
    """
    return _first(
        folder, name, suffix, lambda path: os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    )


def made(folder: Path, name: str) -> Path:
    """A new folder of this name in a folder, or with a number.

    Raises:
        OutputError: it cannot be made.
    """
    return _first(folder, name, "", lambda path: path.mkdir(parents=True))


def _first(folder: Path, name: str, suffix: str, make: Callable[[Path], None]) -> Path:
    """The first of the names that is free, made."""
    for path in _candidates(folder, name, suffix):
        try:
            make(path)
        except FileExistsError:
            continue
        except OSError as error:
            raise OutputError(f"cannot write to {folder}: {error.strerror or error}") from error
        return path
    raise OutputError(f"{name} is taken too often in {folder.name}; choose another name")


def _candidates(folder: Path, name: str, suffix: str) -> list[Path]:
    root = folder.resolve()
    paths = [root / f"{name}{suffix}", *(root / f"{name}-{k}{suffix}" for k in range(2, 1000))]
    if not all(path.parent == root for path in paths):
        raise OutputError(f"{name!r} is no name of a file")
    return paths
