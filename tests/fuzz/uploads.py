"""What is sent to a playground: zips of pictures."""

import io
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from imgadapt.errors import DataError
from imgadapt.playground.settings import Limits, Settings
from imgadapt.playground.trainings.datasets import Datasets
from imgadapt.training.data import scan
from imgadapt.training.listing import CAPTIONS, SUFFIXES
from tests.fuzz.files import scratch
from tests.fuzz.pictures import _made
from tests.fuzz.target import Target

_UPLOAD = 2**20


def _within(folder: Path, place: Path) -> None:
    assert place.resolve().is_relative_to(folder.resolve()), place
    for one in place.rglob("*"):
        assert one.is_file(), one
        assert not one.is_symlink(), one
        assert one.suffix in {*SUFFIXES, *CAPTIONS}, one
        assert all(c.isprintable() for c in one.name), one


def _given(files: list[tuple[str, bytes]]) -> None:
    """What is kept of files lies in a folder of its own, and can be trained on."""
    home = scratch() / "uploads"
    sets = Datasets(Settings(home, limits=Limits(upload=_UPLOAD, upload_pixels=512 * 512)))
    made = sets.add("from outside", files)
    folder = sets.folder(made.id)
    try:
        _within(home / "data", folder)
        assert made.pictures > 0
        with suppress(DataError):  # of one side that is too short, and the like
            scan(folder, "a cat")
    finally:
        for one in folder.iterdir():
            one.unlink()
        folder.rmdir()
    assert {one.name for one in home.iterdir()} == {"data"}


def _zip(data: bytes) -> None:
    _given([("pictures.zip", data)])


def _names(data: bytes) -> None:
    """A zip of files with such names, a line each; those that may be captions are."""
    file = io.BytesIO()
    names = data.decode("utf-8", "replace").split("\n")[:20]
    with zipfile.ZipFile(file, "w") as archive:
        for k, name in enumerate(name for name in dict.fromkeys(names) if name.partition("\0")[0]):
            archive.writestr(name, b"a cat" if name.endswith(CAPTIONS) else _made("PNG", side=8 + k))
    _given([("pictures.zip", file.getvalue())])


def _zips() -> Iterator[bytes]:
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", compression) as archive:
            archive.writestr("a/fox.png", _made("PNG"))
            archive.writestr("a/fox.txt", "a fox")
            archive.writestr("b/fox.jpg", _made("JPEG"))
        yield file.getvalue()
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for k in range(12):
            archive.writestr(f"{k}.png", bytes(_UPLOAD))
    yield bomb.getvalue()


def _listed() -> Iterator[bytes]:
    yield b"fox.png\nfox.txt\nfox-mask.png"
    yield b"../../fox.png\n/etc/fox.png\nC:\\fox.png\n..\\fox.png"
    yield b"__MACOSX/._fox.png\n.DS_Store\nThumbs.db\nfox.PNG"
    yield "a/fox.png\nb/fox.png\nfóx.png\nfo\u0301x.png\ncon.png\n.png\n\x07.png".encode()


TARGETS = (
    Target("zip", _zip, _zips, ("PK\x01\x02", "PK\x03\x04", "PK\x05\x06", "../", ".png", ".txt", "\xff\xff\xff\xff")),
    Target(
        "zip-names",
        _names,
        _listed,
        ("../", "\\", ".png\n", ".txt\n", "-mask", "\n", "/", ":", "\x00", "\u202e", "CON"),
    ),
)
