"""Comparing: two pictures in numbers, and as a map of where they differ."""

from dataclasses import dataclass

from PIL import Image


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
    raise NotImplementedError


def heat(picture: Image.Image, base: Image.Image) -> Image.Image:
    """Where they differ: black for nothing to white for most."""
    raise NotImplementedError
