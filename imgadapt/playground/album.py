"""Album: the pictures that a playground made and was given, as files under ids, each with its record inside."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image


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


class Album:
    """Pictures in a folder; a new one finds those of earlier sessions again.

    uploads: bytes and pixels that a given picture may have.
    """

    def __init__(self, folder: Path, uploads: Path, *, most_bytes: int, most_pixels: int) -> None:
        raise NotImplementedError

    def keep(self, image: Image.Image, record: Mapping[str, Any], *, owner: str = "") -> Picture:
        """Write a picture as PNG, with its record and A1111's parameters in it.

        Raises:
            OutputError: the disk is full, ...
        """
        raise NotImplementedError

    def accept(self, data: bytes, *, owner: str = "") -> Picture:
        """Take a picture from outside: sized up before it is decoded, upright, RGB(A), first frame, written anew.

        Raises:
            DataError: it is no picture, too large, broken.
        """
        raise NotImplementedError

    def get(self, id: str, owner: str | None = None) -> Picture:
        """Raises ConfigError where there is none, or it is another owner's and `owner` is given."""
        raise NotImplementedError

    def recent(self, count: int = 50, owner: str | None = None) -> list[Picture]:
        """The newest that it made, newest first."""
        raise NotImplementedError

    def remove(self, id: str, owner: str | None = None) -> None:
        """Delete one."""
        raise NotImplementedError

    def thumbnail(self, id: str, side: int = 256) -> bytes:
        """WebP, of `side` pixels at most."""
        raise NotImplementedError
