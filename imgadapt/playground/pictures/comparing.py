"""Comparing: two pictures in numbers, and as a map of where they differ."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from imgadapt.errors import DataError

_RAMP = ((0.0, (0, 0, 0)), (0.25, (67, 16, 110)), (0.5, (187, 55, 84)), (0.75, (249, 142, 9)), (1.0, (255, 255, 255)))
"""Share of the largest difference -> colour; each is lighter than the one before."""


@dataclass(frozen=True)
class Difference:
    """mean: of the absolute difference, in levels of 255; largest: of it; changed: share of pixels that differ at all;
    psnr: dB, None for equal pictures. 0, 0, 0, None: equal to the bit.
    """

    mean: float
    largest: int
    changed: float
    psnr: float | None


def difference(picture: Image.Image, base: Image.Image) -> Difference:
    """Raises DataError where their sizes are not the same."""
    apart = _apart(picture, base)
    squares = int((apart.astype(np.int64) ** 2).sum())
    return Difference(
        mean=int(apart.sum(dtype=np.int64)) / apart.size,
        largest=int(apart.max()),
        changed=int(apart.any(axis=2).sum()) / (apart.shape[0] * apart.shape[1]),
        psnr=10 * math.log10(255**2 * apart.size / squares) if squares else None,
    )


def heat(picture: Image.Image, base: Image.Image) -> Image.Image:
    """Where they differ: black for nothing to white for most."""
    most = _apart(picture, base).max(axis=2)
    peak = max(int(most.max()), 1)
    levels = np.arange(256) / peak
    places = [place for place, _ in _RAMP]
    colours = [np.interp(levels, places, [colour[k] for _, colour in _RAMP]) for k in range(3)]
    return Image.fromarray(np.stack(colours, axis=1).round().astype(np.uint8)[most])


def _apart(picture: Image.Image, base: Image.Image) -> Any:
    """Absolute differences (height, width, channels); uint8."""
    if picture.size != base.size:
        said = " and ".join(f"{one.width} x {one.height}" for one in (picture, base))
        raise DataError(f"the pictures are {said} pixels; only pictures of one size can be compared")
    mode = "RGBA" if any(one.has_transparency_data for one in (picture, base)) else "RGB"
    first, second = (np.asarray(one.convert(mode)) for one in (picture, base))
    return np.maximum(first, second) - np.minimum(first, second)
