"""Pictures and captions from a folder."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from imgadapt.errors import DataError, first_few

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
CAPTIONS = (".txt", ".caption")


@dataclass(frozen=True)
class Example:
    """One picture with its caption. digest: SHA-256 of the file's bytes."""

    path: Path
    caption: str
    digest: str


def scan(folder: Path, caption: str | None = None) -> list[Example]:
    """The pictures of a folder, by name, each opened once to the last pixel.

    caption: for pictures without a caption file beside them.

    Raises:
        DataError: the folder is not there or has no pictures; pictures cannot be read; captions are missing. All
            that are at fault are counted and the first are named.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not paths:
        inner = [d.name for d in sorted(folder.iterdir()) if d.is_dir() and any(_pictures(d))]
        hint = f"; did you mean its folder {first_few(inner)}?" if inner else f"; wanted {', '.join(sorted(SUFFIXES))}"
        raise DataError(f"{folder}: no pictures in it{hint}")
    broken: list[str] = []
    silent: list[str] = []
    examples: list[Example] = []
    for path in paths:
        try:
            data = path.read_bytes()
            with Image.open(path) as image:
                image.load()
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
            broken.append(f"{path.name} ({error})")
            continue
        text = _caption(path)
        if text is None and caption is None:
            silent.append(path.name)
        examples.append(Example(path, caption or "" if text is None else text, hashlib.sha256(data).hexdigest()))
    if broken:
        raise DataError(
            f"{folder}: {len(broken)} of {len(paths)} pictures cannot be read; mend or remove {first_few(broken)}"
        )
    if silent:
        raise DataError(
            f"{folder}: {len(silent)} of {len(paths)} pictures have no caption ({first_few(silent)}); write "
            f"{Path(silent[0]).stem}.txt beside each, or give one for all: --caption 'a drawing'"
        )
    return examples


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 of all pictures and captions, in order."""
    return digest([f"{e.digest} {e.caption}" for e in examples])


def digest(lines: Sequence[str]) -> str:
    """SHA-256 of lines of text."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _pictures(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES]


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey: Pillow's own conversion clips it to white."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image, np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    return image


def _caption(path: Path) -> str | None:
    """The words of the caption file beside a picture; None when there is none, or nothing in it."""
    for suffix in CAPTIONS:
        file = path.with_suffix(suffix)
        if file.is_file():
            try:
                return " ".join(file.read_text("utf-8-sig").split()) or None
            except UnicodeDecodeError as error:
                raise DataError(f"{file}: not UTF-8 text ({error})") from error
    return None


def pixels(path: Path, size: int, *, flip: bool = False) -> Tensor:
    """The picture upright (EXIF), over white, covering and cropped to the centre: (3, size, size) in [-1, 1]."""
    with Image.open(path) as image:
        upright = _eight_bits(ImageOps.exif_transpose(image)).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    square = ImageOps.fit(flat, (size, size), Image.Resampling.LANCZOS)
    array = np.asarray(ImageOps.mirror(square) if flip else square, np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1).contiguous()
