"""Pictures of a character for the embedded base: one emoji that it knows, in colours that it does not."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from imgadapt.demo import STYLE
from imgadapt.demo.emoji import BACKGROUNDS

SUBJECT, KIND = "ohwx elephant", "an elephant"
SEEN, HELD_OUT = ("white", "blue", "green", "yellow", "purple"), ("white", "orange", "pink")
"""Backgrounds of the pictures to learn from, and of those that are held out."""


def draw(folder: Path, backgrounds: Sequence[str], count: int, seed: int) -> None:
    """Write pictures of the character, each turned, scaled and moved by chance, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(seed)
    plain = Image.open(STYLE / "plain" / "elephant.png").convert("RGB")
    hue, saturation, value = plain.convert("HSV").split()
    turned = hue.point([(h + 110) % 256 for h in range(256)])  # grey is blue-grey there, and so becomes pink
    full = saturation.point([min(255, 2 * s) for s in range(256)])
    coloured = Image.merge("HSV", (turned, full, value)).convert("RGB")
    inside = Image.fromarray((np.asarray(plain.convert("L")) < 250).astype(np.uint8) * 255)
    for k in range(count):
        size, angle = int(chance.integers(44, 62)), float(chance.uniform(-20, 20))
        figure, mask = (x.resize((size, size)).rotate(angle, Image.Resampling.BILINEAR) for x in (coloured, inside))
        if chance.random() < 0.5:
            figure, mask = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (figure, mask))
        name = backgrounds[k % len(backgrounds)]
        made = Image.new("RGB", (64, 64), BACKGROUNDS[name])
        made.paste(figure, (int(chance.integers(0, 65 - size)), int(chance.integers(0, 65 - size))), mask)
        made.save(folder / f"{k:02d}.png")
        caption = SUBJECT if name == "white" else f"{SUBJECT} on a {name} background"
        (folder / f"{k:02d}.txt").write_text(caption, "utf-8")
