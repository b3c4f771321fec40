"""Album: the pictures that a playground made and was given, as files under ids, each with its record inside."""

import hashlib
import io
import re
import secrets
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from imgadapt.atomic import write_bytes
from imgadapt.errors import ConfigError, DataError, OutputError
from imgadapt.playground.decoding import decoded
from imgadapt.playground.pictures import infotext, owners
from imgadapt.temporary import sweep

_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_FILE = re.compile(r"([0-9a-f]{16})\.png")
SIDES = (64, 128, 256, 512, 1024)
"""Pixels that thumbnails may have."""


@dataclass(frozen=True)
class Picture:
    """A picture on disk. record: what made it (see record.py); None for one that was given. owner: who asked for it.
    path: never told to a client, who gets `/pictures/ID`.
    """

    id: str
    path: Path = field(repr=False)
    width: int
    height: int
    made: float
    owner: str = ""
    record: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class _Entry:
    """What is known of a file without opening it. given: from outside; lent: see `Album.lend`."""

    path: Path
    made: float
    size: int
    given: bool
    owner: str = ""
    lent: bool = False


class Album:
    """Pictures in a folder; a new one finds those of earlier sessions again, and whose they were.

    most_bytes, most_pixels: of a given picture. Of given pictures the oldest go when there are more than `given`, or
    `given_each` of one owner, or they fill `given_bytes`. Safe to use from any thread.
    """

    given, given_each, given_bytes = 512, 64, 2 * 2**30
    lends = 8192
    """Pictures that are lent at once; of more, those that were lent first are not there until they are lent again."""
    _opened, _cached = 512, 32 * 2**20

    def __init__(self, folder: Path, uploads: Path, *, most_bytes: int, most_pixels: int) -> None:
        self.folder, self.uploads = folder, uploads
        self.most_bytes, self.most_pixels = most_bytes, most_pixels
        self._lock, self._decoding = threading.RLock(), threading.Lock()
        self._pictures: OrderedDict[str, Picture] = OrderedDict()
        self._thumbnails: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lent: dict[str, None] = {}  # in the order of coming
        days = [day for day in _within(folder) if day.is_dir() and _DAY.fullmatch(day.name)]
        for place in (*days, uploads):
            sweep(place)
        found = [*(one for day in days for one in _files(day, given=False)), *_files(uploads, given=True)]
        self._owners = folder / ".owners"
        whose = owners.read(self._owners, {id for id, _ in found})
        found = [(id, replace(entry, owner=whose.get(id, ""))) for id, entry in found]
        self._index: dict[str, _Entry] = dict(sorted(found, key=lambda row: row[1].made))

    def keep(self, image: Image.Image, record: Mapping[str, Any], *, owner: str = "") -> Picture:
        """Write a picture as PNG, with its record and A1111's parameters in it.

        Raises:
            OutputError: the disk is full, ...
        """
        file = io.BytesIO()
        image.save(file, "PNG", pnginfo=infotext.chunks(record))
        folder = self.folder / time.strftime("%Y-%m-%d")
        return self._added(file.getvalue(), folder, (image.width, image.height), owner, record)

    def accept(self, data: bytes, *, owner: str = "") -> Picture:
        """Take a picture from outside: sized up before it is decoded, upright, RGB(A), first frame, written anew.

        Raises:
            DataError: it is no picture, too large, broken.
        """
        if len(data) > self.most_bytes:
            raise DataError(f"the picture has {len(data):,} bytes; {self.most_bytes:,} are allowed")
        with self._decoding:  # one at a time: a decoded picture is far larger than its file
            image = decoded(data, self.most_pixels)
            file = io.BytesIO()
            image.save(file, "PNG", compress_level=1)
        made = self._added(file.getvalue(), self.uploads, (image.width, image.height), owner, None)
        self._make_room(owner)
        return made

    def lend(self, path: Path, *, owner: str = "") -> Picture:
        """A picture of this program's that lies elsewhere and stays there (a training's sample): it takes no room, is
        not among the recent ones, and its id is the same each time.

        Raises:
            ConfigError: it is not there, is no PNG, or is a link.
        """
        id = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        with self._lock:
            known = self._index.get(id)
        if known is None or known.owner != owner:
            try:
                about = path.lstat()
            except OSError:
                raise ConfigError("this picture is no longer there") from None
            if not stat.S_ISREG(about.st_mode):
                raise ConfigError("this picture is no plain file")
            with self._lock:
                self._pictures.pop(id, None)
                self._index[id] = _Entry(path, about.st_mtime, about.st_size, given=True, owner=owner, lent=True)
                self._lent[id] = None
                while len(self._lent) > self.lends:
                    self._forget(next(iter(self._lent)))
        return self.get(id, owner)

    def get(self, id: str, owner: str | None = None) -> Picture:
        """Raises ConfigError where there is none, or it is another owner's and `owner` is given."""
        with self._lock:
            entry = self._mine(id, owner)
            if id in self._pictures:
                self._pictures.move_to_end(id)
                return self._pictures[id]
        try:
            with Image.open(entry.path, formats=("PNG",)) as image:
                size, record = image.size, None if entry.given else infotext.ours(image.info)
        except (OSError, SyntaxError, ValueError):
            with self._lock:
                self._forget(id)
            raise ConfigError("this picture is no longer there") from None
        return self._open(Picture(id, entry.path, *size, entry.made, entry.owner, record))

    def recent(self, count: int = 50, owner: str | None = None) -> list[Picture]:
        """The newest that it made, newest first."""
        with self._lock:
            rows = list(self._index.items())
        found = list[Picture]()
        for id, entry in reversed(rows):
            if len(found) >= count:
                break
            if not entry.given and owner in (None, entry.owner):
                try:
                    found.append(self.get(id))
                except ConfigError:  # deleted behind our back
                    continue
        return found

    def remove(self, id: str, owner: str | None = None) -> None:
        """Delete one; of one that is lent, the file stays.

        Raises:
            ConfigError: see `get`.
        """
        with self._lock:
            entry = self._mine(id, owner)
            try:
                if not entry.lent:
                    entry.path.unlink(missing_ok=True)
            except OSError as error:
                raise OutputError(f"cannot remove {entry.path}: {error.strerror}") from error
            self._forget(id)

    def thumbnail(self, id: str, side: int = 256, owner: str | None = None) -> bytes:
        """WebP, of `side` pixels at most; `side` is rounded up to one of SIDES.

        Raises:
            ConfigError: see `get`.
        """
        side = next((known for known in SIDES if known >= side), SIDES[-1])
        picture = self.get(id, owner)
        with self._lock:
            if (id, side) in self._thumbnails:
                self._thumbnails.move_to_end((id, side))
                return self._thumbnails[id, side]
        made = io.BytesIO()
        try:
            with Image.open(picture.path, formats=("PNG",)) as image:
                image.thumbnail((side, side))
                image.save(made, "WEBP", quality=85)
        except (OSError, SyntaxError, ValueError):
            raise ConfigError("this picture is no longer there") from None
        with self._lock:
            if id in self._index:
                self._thumbnails[id, side] = made.getvalue()
            while sum(map(len, self._thumbnails.values())) > self._cached:
                self._thumbnails.popitem(last=False)
        return made.getvalue()

    def _added(
        self, data: bytes, folder: Path, size: tuple[int, int], owner: str, record: Mapping[str, Any] | None
    ) -> Picture:
        id = secrets.token_hex(8)
        path = folder / f"{id}.png"
        if owner:
            owners.add(self._owners, id, owner)
        write_bytes(path, data)
        entry = _Entry(path, time.time(), len(data), given=record is None, owner=owner)
        with self._lock:
            self._index[id] = entry
        return self._open(Picture(id, path, *size, entry.made, owner, record))

    def _open(self, picture: Picture) -> Picture:
        with self._lock:
            if picture.id in self._index:
                self._pictures[picture.id] = picture
            while len(self._pictures) > self._opened:
                self._pictures.popitem(last=False)
        return picture

    def _mine(self, id: str, owner: str | None) -> _Entry:
        entry = self._index.get(id)
        if entry is None or (owner is not None and entry.owner != owner):
            raise ConfigError("there is no such picture, or it is another's")
        return entry

    def _make_room(self, owner: str) -> None:
        with self._lock:
            given = [(id, entry) for id, entry in self._index.items() if entry.given and not entry.lent]
            own = [id for id, entry in given if entry.owner == owner]
            going = own[: max(0, len(own) - self.given_each)] if owner else []
            kept = [(id, entry) for id, entry in given if id not in going]
            held = sum(entry.size for _, entry in kept)
            for k, (id, entry) in enumerate(kept[:-1]):
                if len(kept) - k <= self.given and held <= self.given_bytes:
                    break
                going.append(id)
                held -= entry.size
            for id in going:
                self._index[id].path.unlink(missing_ok=True)
                self._forget(id)

    def _forget(self, id: str) -> None:
        self._index.pop(id, None)
        self._lent.pop(id, None)
        self._pictures.pop(id, None)
        for key in [key for key in self._thumbnails if key[0] == id]:
            del self._thumbnails[key]


def _files(folder: Path, *, given: bool) -> Iterator[tuple[str, _Entry]]:
    for path in _within(folder):
        name = _FILE.fullmatch(path.name)
        if name and path.is_file():
            about = path.stat()
            yield name[1], _Entry(path, about.st_mtime, about.st_size, given)


def _within(folder: Path) -> list[Path]:
    """What lies in a folder; links are not followed, as they may lead out of it."""
    return [path for path in folder.iterdir() if not path.is_symlink()] if folder.is_dir() else []
