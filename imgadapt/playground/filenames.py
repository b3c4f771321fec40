"""Names that users give, as names of files: of one folder, on any system, and never another file's."""

import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from imgadapt.atomic import make_folder, sync, sync_tree, told_of
from imgadapt.errors import OutputError
from imgadapt.temporary import claimed

MOST = 100
"""Bytes of a name; file systems take 255, and endings and numbers come on top."""
_DEVICES = re.compile(r"(con|prn|aux|nul|(?:com|lpt)[\d¹²³]) *(\..*)?", re.IGNORECASE)
"""What Windows opens as devices, in any folder."""


def cleaned(name: str, otherwise: str, most: int = MOST) -> str:
    """A name without folders, control characters, what shells and `<lora:...>` read, dots and spaces at its ends.
    otherwise: where nothing is left of it.
    """
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", name))[-1]
    kept = re.sub(r"(?:[^\w.+() -]|\s)+", " ", last)
    short = _cut(kept, most)
    device = _DEVICES.fullmatch(short)
    return _cut(f"{device[1]}_{device[2] or ''}", most) if device else short or otherwise


def _cut(text: str, most: int) -> str:
    return text.strip(" .-").encode("utf-8", "ignore")[:most].decode("utf-8", "ignore").strip(" .-")


def placed(folder: Path, name: str, suffix: str, write: Callable[[Path], object]) -> Path:
    """A file of this name in a folder, or of the name with a number where there is one already. write: writes it to the
    path that it is given, as `atomically` does.

    Raises:
        OutputError: the folder cannot be written.
    """
    _candidates(folder, name, suffix)
    make_folder(folder)
    try:
        with claimed(folder.resolve() / f"{name}{suffix}", os.mkdir) as inside:
            written = inside / f"new{suffix}"
            with told_of(folder / f"{name}{suffix}", written):
                write(written)
            path = _first(folder, name, suffix, lambda path: _moved(written, path))
        sync(folder)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}") from error
    return path


def folder_placed(folder: Path, name: str, write: Callable[[Path], object]) -> Path:
    """A folder of this name in a folder, or with a number. write: fills the empty one that it is given.

    Raises:
        OutputError: it cannot be written.
    """
    _candidates(folder, name, "")
    try:
        with claimed(folder.resolve() / name, os.mkdir) as inside:
            with told_of(folder / name, inside):
                write(inside)
            sync_tree(inside)
            path = _first(folder, name, "", lambda path: _moved_folder(inside, path))
        sync(folder)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}") from error
    return path


def _moved_folder(source: Path, target: Path) -> None:
    """Raises FileExistsError: there is something at `target`."""
    os.mkdir(target)
    try:
        os.replace(source, target)
    except OSError:
        os.rmdir(target)
        raise


def _moved(source: Path, target: Path) -> None:
    """Raises FileExistsError: there is something at `target`."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # no hard links here, or worse, which is then said
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        try:
            os.replace(source, target)
        except OSError:
            os.unlink(target)
            raise


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


def _candidates(folder: Path, name: str, suffix: str) -> Iterator[Path]:
    root = folder.resolve()
    if (root / f"{name}{suffix}").parent != root:
        raise OutputError(f"{name!r} is no name of a file")
    return (root / f"{name}{end}{suffix}" for end in ("", *(f"-{k}" for k in range(2, 1000))))
