"""Comparing: numbers worked out by hand, and the map."""

import math

import numpy as np
import pytest
from PIL import Image

from imgadapt.errors import DataError
from imgadapt.playground.pictures.comparing import Difference, difference, heat


def _picture(changes: dict[tuple[int, int], tuple[int, int, int]] | None = None, size: tuple[int, int] = (5, 4)):
    picture = Image.new("RGB", size, (100, 100, 100))
    for place, colour in (changes or {}).items():
        picture.putpixel(place, colour)
    return picture


def test_a_picture_does_not_differ_from_itself() -> None:
    assert difference(_picture(), _picture()) == Difference(0.0, 0, 0.0, None)
    assert np.asarray(heat(_picture(), _picture())).max() == 0


def test_numbers_are_those_worked_out_by_hand() -> None:
    other = _picture({(0, 0): (110, 100, 100), (4, 3): (100, 70, 101)})
    found = difference(_picture(), other)
    assert found.mean == (10 + 30 + 1) / 60
    assert (found.largest, found.changed) == (30, 2 / 20)
    assert found.psnr == pytest.approx(10 * math.log10(255**2 / ((100 + 900 + 1) / 60)), rel=1e-12)
    assert difference(other, _picture()) == found


def test_black_against_white_is_all_there_is() -> None:
    white, black = Image.new("RGB", (3, 3), "white"), Image.new("L", (3, 3), 0)
    assert difference(white, black) == Difference(255.0, 255, 1.0, 0.0)


def test_the_map_is_black_where_nothing_differs_and_white_where_most_does() -> None:
    made = heat(_picture(), _picture({(1, 2): (100, 200, 100), (3, 0): (100, 100, 150), (2, 2): (125, 100, 100)}))
    assert made.size == (5, 4)
    assert made.getpixel((1, 2)) == (255, 255, 255)
    assert made.getpixel((0, 0)) == (0, 0, 0)
    colours = np.asarray(made).astype(int)
    brightness = [int(colours[y, x].sum()) for x, y in ((0, 0), (2, 2), (3, 0), (1, 2))]
    assert brightness == sorted(brightness)
    assert len(set(brightness)) == 4


def test_transparency_counts() -> None:
    clear = Image.new("RGBA", (2, 2), (100, 100, 100, 0))
    assert difference(clear, Image.new("RGB", (2, 2), (100, 100, 100))).largest == 255


def test_other_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="5 x 4 and 4 x 5"):
        difference(_picture(), _picture(size=(4, 5)))
    with pytest.raises(DataError, match="one size"):
        heat(_picture(), _picture(size=(4, 5)))
