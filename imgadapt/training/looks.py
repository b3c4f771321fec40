"""How pictures look, as only their files say, and which of them look alike."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imgadapt.errors import DataError
from imgadapt.reading import read
from imgadapt.training import decoding

ALIKE = 6  # bits of 64
_SIDE = 32  # pixels that hashes are made of


@dataclass(frozen=True)
class Looks:
    """What of a picture only its file says.

    kind, mode: Pillow's names. deep: more than 8 bits a channel. moves: it is animated. turned: by EXIF. hashes: of it
    and of its mirror image; None when it has one colour.
    """

    kind: str
    mode: str
    deep: bool
    moves: bool
    turned: bool
    hashes: tuple[int, int] | None


def look(path: Path) -> Looks:
    """Read what only a picture's file says; of a JPEG as little as suffices.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        data = read(path, decoding.MOST_BYTES)
        image = decoding.opened(data)
        kind, mode = image.format or "", image.mode
        # of colours with 16 bits Pillow tells only in how it will decode them
        deep = any("16" in str(tile[3]) for tile in getattr(image, "tile", ()))
        small = decoding.decoded(data, about=2 * _SIDE)
        grey, turned = _grey(decoding.plain(small)), decoding.turn(small) is not None
        moves = kind != "MPO" and _moves(image)  # a camera's MPO holds previews and depths
    except (OSError, DataError) as error:
        raise DataError(f"{path}: cannot be read ({error}); was it changed since it was scanned?") from error
    return Looks(kind, mode, deep, moves, turned, phash(grey) if grey.std() > 1 else None)


def _moves(image: Image.Image) -> bool:
    """Whether pictures follow the first in time. They are not counted, for that takes long where there are millions."""
    try:
        image.seek(1)
    except EOFError:
        return False
    except Exception:  # the first is whole, those after it are not: there are some
        return True
    return True


def _grey(image: Image.Image) -> NDArray[np.float64]:
    """(32, 32) brightness of RGB or RGBA, over white."""
    small = image.resize((_SIDE, _SIDE), Image.Resampling.BOX)
    if small.mode == "RGBA":
        small = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small)
    return np.asarray(small.convert("L"), np.float64)


def phash(grey: NDArray[np.float64]) -> tuple[int, int]:
    """64 bits of (n, n) brightness, and those of its mirror image: which of the 8 x 8 lowest DCT terms are above their
    median (phash.org). A mirror image has the same terms, the odd ones across with the other sign.
    """
    at = np.arange(len(grey)) + 0.5
    cosines = np.cos(np.pi / len(grey) * np.arange(8)[:, None] * at)
    terms = cosines @ grey @ cosines.T
    pair = (terms, terms * np.where(np.arange(8) % 2, -1, 1))
    first, second = (int.from_bytes(np.packbits(x > np.median(x)).tobytes(), "big") for x in pair)
    return first, second


def bits(hashes: Sequence[int]) -> NDArray[np.float32]:
    """(n, 64) of -1 and 1."""
    each = np.frombuffer(b"".join(x.to_bytes(8, "big") for x in hashes), np.uint8)
    return np.unpackbits(each).reshape(-1, 64).astype(np.float32) * 2 - 1


def grouped(
    these: NDArray[np.float32], those: NDArray[np.float32], apart: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """The group of each place (its first place), where places a < b that differ in few bits are of one group.

    apart: groups within which pairs do not count. Thousands of places may be all alike: pairs are not listed.
    """
    group = np.arange(len(these))
    for a in range(len(these)):
        close = these[a] @ those[a + 1 :].T >= 64 - 2 * ALIKE
        if apart is not None:
            close &= apart[a + 1 :] != apart[a]
        if (others := group[a + 1 :][close])[others != group[a]].size:
            joined = np.unique(np.append(others, group[a]))
            group[np.isin(group, joined)] = joined[0]
    return group


def members(group: NDArray[np.int64], names: Sequence[int]) -> list[list[int]]:
    """The names of each group of two or more."""
    found: dict[int, list[int]] = defaultdict(list)
    for name, which in zip(names, group.tolist(), strict=True):
        found[which].append(name)
    return [some for some in found.values() if len(some) > 1]
