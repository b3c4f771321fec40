"""The pictures of the embedded base: 64 x 64 emoji with alpha, put on a plain background.

A set is an `.npz` with `images` (n, 64, 64, 4), premultiplied RGBA bytes, and `ids` (n,), rows of `concepts.json`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
import numpy.typing as npt

SIZE = 64  # pixels
BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "red": (235, 64, 52),
    "orange": (250, 150, 40),
    "yellow": (255, 221, 74),
    "green": (80, 190, 90),
    "blue": (60, 120, 230),
    "purple": (145, 80, 200),
    "pink": (255, 160, 200),
    "black": (20, 20, 24),
}
COLOURS = tuple(name for name in BACKGROUNDS if name != "white")
TEMPLATES: Mapping[str, float] = {  # how a caption is worded, and how often
    "{}": 0.4,
    "a {}": 0.25,
    "an emoji of a {}": 0.15,
    "a picture of a {}": 0.1,
    "a drawing of a {}": 0.1,
}


class Concept(TypedDict):
    """One emoji: what it is called, in how many ways, and whether its mirror image is still it."""

    label: str
    names: list[str]  # of a core concept: tags that are its alone
    tags: list[str]
    flip: bool
    core: bool  # learned by the base
    concrete: bool  # a thing, not a sign or a mood; all core concepts are


def concepts(folder: Path) -> list[Concept]:
    """Every concept of the data folder, in the order that the sets' `ids` count."""
    return cast("list[Concept]", json.loads((folder / "concepts.json").read_text()))


def images(folder: Path, name: str) -> dict[int, npt.NDArray[np.uint8]]:
    """The set `name`: concept id -> premultiplied RGBA (64, 64, 4)."""
    with np.load(folder / f"{name}.npz") as data:
        return {int(i): image for i, image in zip(data["ids"], data["images"], strict=True)}


def compose(image: npt.NDArray[np.uint8], background: str = "white", *, flip: bool = False) -> npt.NDArray[np.uint8]:
    """RGB (64, 64, 3) of premultiplied RGBA (64, 64, 4) over a named background."""
    return over(image[:, ::-1] if flip else image, BACKGROUNDS[background])


def over(image: npt.NDArray[np.uint8], colour: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """RGB (64, 64, 3) of premultiplied RGBA (64, 64, 4) over a colour."""
    pixels = image.astype(np.float32)
    paper = np.array(colour, np.float32)
    return (pixels[..., :3] + paper * (1 - pixels[..., 3:] / 255)).clip(0, 255).round().astype(np.uint8)


def held_out_colours(concept: int) -> tuple[str, str]:
    """The two backgrounds that the base never saw behind this concept."""
    first, second = np.random.default_rng(1000 + concept).choice(COLOURS, 2, replace=False)
    return str(first), str(second)
