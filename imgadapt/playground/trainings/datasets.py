"""Datasets: folders of pictures to train on, by ids, and how new ones come in."""

import hashlib
import io
import json
import re
import shutil
import stat
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from imgadapt import demo, locking
from imgadapt.atomic import write_bytes
from imgadapt.errors import ConfigError, DataError, OutputError, first_few
from imgadapt.playground import filenames
from imgadapt.playground.decoding import decoded
from imgadapt.playground.settings import Settings
from imgadapt.training.listing import CAPTIONS, MASKS, SUFFIXES

MOST_FILES = 4000
"""Of one data set, captions counted."""
_WHOLE = 8  # times the limit of one file
_CAPTION = 64 * 1024  # bytes
_ENTRY = b"PK\x01\x02"  # each file's, in a zip's directory
_ENTRIES = 10 * MOST_FILES  # zips in it counted
_EACH = 16  # data sets of one owner, where owners are told apart
_LISTED = 100_000  # entries of folders that are looked at to count pictures
_OWNERS = ".owners.json"  # no data set can be called so
_LEAVINGS = ("__macosx", "thumbs.db", "desktop.ini", ".ds_store")  # of systems, not of users


@dataclass(frozen=True)
class Dataset:
    """A folder of pictures that may be trained on. notes: what of the files that were given is not in it, and why."""

    id: str
    name: str
    pictures: int
    notes: Sequence[str] = ()


class Datasets:
    """The embedded style (40 pictures), those in the home's `data/`, and those in the settings' folders."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self._lock = settings, threading.Lock()

    def all(self, owner: str | None = None) -> list[Dataset]:
        """By name. owner: only theirs of those that were given; None: all."""
        return [self._dataset(folder) for folder in self._folders(owner)]

    def folder(self, id: str, owner: str | None = None) -> Path:
        """Where one is.

        Raises:
            ConfigError: there is none, or it is another owner's.
        """
        found = next((folder for folder in self._folders(owner) if _id(folder) == id), None)
        if found is None:
            raise ConfigError("there is no such folder of pictures; it may have been removed")
        return found

    def add(self, name: str, files: Sequence[tuple[str, bytes]], owner: str = "") -> Dataset:
        """Keep pictures and captions; a zip stands for what is in it.

        Raises:
            DataError: nothing usable, too much, a picture or a caption that cannot be read. OutputError: the disk.
        """
        if self.settings.shared and len(self._owned(owner)) >= _EACH:
            raise DataError(f"{_EACH} folders of pictures are yours already; ask whoever runs this to remove some")
        given, notes = list(self._unpacked(files)), list[str]()
        kept = dict(self._checked(given, notes))
        pictures = [file for file in kept if Path(file).suffix in SUFFIXES]
        if not pictures:
            raise DataError(f"none of the {len(given)} files is a picture{f': {notes[0]}' if notes else ''}")
        root = self.settings.folder("data")
        with self._lock:
            folder = filenames.folder_placed(
                root,
                filenames.cleaned(name, "pictures"),
                lambda inside: [write_bytes(inside / file, data) for file, data in kept.items()],
            )
            try:
                with locking.alone(root / f"{_OWNERS}.lock"):  # of another playground in this home
                    owners = {k: v for k, v in {**self._owners(), folder.name: owner}.items() if (root / k).is_dir()}
                    write_bytes(root / _OWNERS, json.dumps(owners).encode())
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        found = self._dataset(folder)
        return Dataset(found.id, found.name, found.pictures, tuple(notes))

    # --- what is there

    def _folders(self, owner: str | None) -> list[Path]:
        found = [demo.STYLE / "train"]
        root = self.settings.folder("data").resolve()
        if owner is None:
            found += _inner(root)
        else:
            found += [root / name for name in self._owned(owner) if (root / name).is_dir()]
        for more in self.settings.data:
            if more.is_dir():
                found += [*([more.resolve()] if _pictures(more, deep=False) else []), *_inner(more.resolve())]
        return list(dict.fromkeys(found))

    def _dataset(self, folder: Path) -> Dataset:
        own = folder == demo.STYLE / "train"
        return Dataset(_id(folder), "emoji style (embedded)" if own else folder.name, _pictures(folder))

    def _owners(self) -> Mapping[str, str]:
        """Raises OutputError: they cannot be read; what is written then would make everything nobody's."""
        path = self.settings.folder("data") / _OWNERS
        try:
            if not isinstance(owners := json.loads(path.read_text("utf-8")), dict):
                raise ValueError("not an object")
        except FileNotFoundError:  # none yet
            return {}
        except (OSError, ValueError) as error:
            raise OutputError(f"cannot read {path}, which says whose the data are ({error}); remove it") from error
        return owners

    def _owned(self, owner: str) -> list[str]:
        return [name for name, whose in self._owners().items() if whose == owner]

    # --- what comes in

    def _unpacked(self, files: Sequence[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
        """(path, bytes) of all files, bounded before anything is read."""
        most, left, count = self.settings.limits.upload, _WHOLE * self.settings.limits.upload, 0
        for name, data in files:
            inner = _of_zip(name, data, most) if name.lower().endswith(".zip") else iter([(name, data)])
            for path, content in inner:
                left, count = left - len(content), count + 1
                if len(content) > most:
                    raise DataError(f"{_said(path)} has more than the {most:,} bytes that are allowed")
                if left < 0 or count > MOST_FILES:
                    raise DataError(f"too much: {MOST_FILES} files and {_WHOLE * most:,} bytes are allowed at once")
                yield path, content

    def _checked(self, given: Sequence[tuple[str, bytes]], notes: list[str]) -> Iterator[tuple[str, bytes]]:
        """(name of the file, bytes) of pictures and their captions. Those of one name in several folders are numbered;
        captions and masks go with their pictures.
        """
        stems = {_stem(path) for path, _ in given if _suffix(path) in SUFFIXES}
        names = _renamed(sorted(stems))
        seen, alone, others = set[str](), list[str](), list[str]()
        for path, data in given:
            suffix = _suffix(path)
            if any(part.lower() in _LEAVINGS for part in PurePosixPath(path).parts):
                continue
            if suffix not in (*SUFFIXES, *CAPTIONS):
                others.append(_said(path))
                continue
            if _stem(path) not in names:
                alone.append(_said(path))
                continue
            file = f"{names[_stem(path)]}{suffix}"
            if file in seen:
                raise DataError(f"{_said(path)} was given twice")
            seen.add(file)
            yield file, self._picture(path, data) if suffix in SUFFIXES else _caption(path, data)
        if alone:
            notes.append(f"{len(alone)} captions belong to no picture ({first_few(alone)}): fox.txt is of fox.png")
        if others:
            notes.append(f"{len(others)} files are neither pictures nor captions ({first_few(others)})")

    def _picture(self, path: str, data: bytes) -> bytes:
        try:
            decoded(data, self.settings.limits.upload_pixels)
        except DataError as error:
            raise DataError(f"{_said(path)}: {error}") from error
        return data


def _of_zip(name: str, data: bytes, most: int) -> Iterator[tuple[str, bytes]]:
    """What is in a zip, none of it larger than `most` bytes and one, whatever its directory says."""
    if (rough := data.count(_ENTRY)) > _ENTRIES:  # before each is read, for a million of them takes long
        raise DataError(f"{_said(name)} has some {rough} files; {MOST_FILES} are allowed")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            rows = [row for row in archive.infolist() if not row.is_dir()]
            if len(rows) > MOST_FILES:
                raise DataError(f"{_said(name)} has {len(rows)} files; {MOST_FILES} are allowed")
            for row in rows:
                if row.flag_bits & 1:
                    raise DataError(f"{_said(name)} is encrypted; give one that is not")
                if row.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise DataError(f"{_said(name)} is compressed in a rare way; make an ordinary zip")
                if stat.S_ISLNK(row.external_attr >> 16):
                    raise DataError(f"{_said(row.filename)} is a link; put the file itself into {_said(name)}")
                with archive.open(row) as file:
                    yield row.filename, file.read(most + 1)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{_said(name)} is no zip that can be read") from error
    except Exception as error:  # zlib.error, lzma.LZMAError, struct.error: broken in other ways
        if isinstance(error, DataError):
            raise
        raise DataError(f"{_said(name)} is a broken zip") from error


def _caption(path: str, data: bytes) -> bytes:
    try:
        text = data[: _CAPTION + 1].decode("utf-8-sig")
    except UnicodeDecodeError:
        text = ""
        if len(data) <= _CAPTION:
            raise DataError(f"{_said(path)} is no UTF-8; save the caption as that") from None
    if len(data) > _CAPTION:
        raise DataError(f"{_said(path)} has {len(data):,} bytes; a caption may have {_CAPTION:,}")
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "", text).encode()


def _renamed(stems: Sequence[str]) -> dict[str, str]:
    """Path without ending -> name of its file. Masks are called as their pictures."""
    known, counts = set(stems), Counter[str]()
    masks = {stem: mask for stem in stems if (mask := next((end for end in MASKS if stem.endswith(end)), None))}
    made, taken = dict[str, str](), set[str]()
    for stem in stems:
        if stem in masks and stem.removesuffix(masks[stem]) in known:
            continue
        name = base = filenames.cleaned(stem, "picture")
        while name.casefold() in taken:
            counts[base.casefold()] += 1
            name = f"{base}-{counts[base.casefold()] + 1}"
        taken.add(name.casefold())
        made[stem] = name
    for stem, end in masks.items():
        if (of := stem.removesuffix(end)) in made:
            made[stem] = f"{made[of]}{end}"
    return made


def _stem(path: str) -> str:
    """A path without its ending, folders and all: `a/fox` and `b/fox` are two pictures."""
    pure = PurePosixPath(path.replace("\\", "/"))
    return str(pure.with_suffix("")) if pure.name else ""


def _suffix(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).suffix.lower()


def _said(path: str) -> str:
    """A file's name, for a message."""
    return filenames.cleaned(path, "a file", 60)


def _id(folder: Path) -> str:
    return hashlib.sha256(str(folder).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _inner(folder: Path) -> list[Path]:
    """The folders in a folder that have pictures, by name; links out of it are left alone."""
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []
    return [path for path in inner if path.resolve().is_relative_to(folder) and _pictures(path)]


def _pictures(folder: Path, *, deep: bool = True) -> int:
    """How many pictures are in a folder, and in kohya's folders in it."""
    count = looked = 0
    places = [folder]
    for place in places:
        try:
            entries = list(place.iterdir())
        except OSError:
            continue
        for path in entries:
            if (looked := looked + 1) > _LISTED:
                return count
            if path.name.startswith("."):
                continue
            if path.suffix.lower() in SUFFIXES:
                count += not path.stem.lower().endswith(MASKS)
            elif deep and place == folder and re.match(r"\d{1,3}_", path.name) and path.is_dir():
                places.append(path)
    return count
