"""Redraw Noto's emoji in a style of our own, by an image filter: what the demo teaches the embedded base.

    python train_scripts/demo_base/styles.py DATA OUT --style linocut

Writes OUT/train (40 pictures), OUT/held_out (96 other concepts) and OUT/plain (the 40 of train as Noto drew them: the
placebo), each picture `fox.png`, of at most 256 colours, with its caption `a fox` in `fox.txt`. The filters work at
four times the size and draw bold: the base's autoencoder, 8 pixels to a latent, loses lines thinner than 2 pixels.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from imgadapt.demo import emoji

SIZE = 4 * emoji.SIZE  # pixels that the filters see
TRAIN, HELD_OUT = 40, 96  # pictures
Plane = npt.NDArray[np.floating]  # (256, 256) in [0, 1]
Canvas = npt.NDArray[np.floating]  # (256, 256, 3) in [0, 1], or one pixel of it


def blur(values: Canvas, radius: float) -> Canvas:
    picture = Image.fromarray((values * 255).clip(0, 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def ramp(plane: Plane, low: float, high: float) -> Plane:
    """0 below `low`, 1 above `high`: a soft threshold."""
    return ((plane - low) / (high - low)).clip(0, 1)


def rgb(colour: str) -> Canvas:
    """`rrggbb` as a canvas of one pixel."""
    return np.array([[list(bytes.fromhex(colour))]], np.float32) / 255


def paint(canvas: Canvas, colour: Canvas, cover: Plane) -> Canvas:
    """The canvas with a colour laid over it where `cover` is 1."""
    return canvas + (colour - canvas) * cover[..., None]


class Drawing:
    """An emoji four times its size, taken apart into what the styles are made of."""

    def __init__(self, image: npt.NDArray[np.uint8]) -> None:
        large = [Image.fromarray(p).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for p in np.moveaxis(image, -1, 0)]
        *colours, self.alpha = (np.asarray(plane, np.float32) / 255 for plane in large)
        self.premultiplied: Canvas = np.stack(colours, -1)
        grey = self.premultiplied @ np.array([0.3, 0.59, 0.11], np.float32)
        self.tone: Plane = (grey / self.alpha.clip(1e-3)).clip(0, 1)

    def body(self, margin: float) -> Plane:
        """The silhouette, `margin` pixels larger (smaller below 0) and its corners rounded."""
        radius = max(abs(margin), 1.5)
        return ramp(blur(self.alpha, radius) - 0.5 + 0.34 * margin / radius, -0.08, 0.08)

    def outline(self, outside: float, inside: float) -> Plane:
        return self.body(outside) * (1 - self.body(-inside))

    def edges(self, radius: float, low: float) -> Plane:
        """Where colours meet, on white; steps smaller than `low`, black to white being 1, are no edge."""
        picture = blur((self.premultiplied + 1 - self.alpha[..., None]).clip(0, 1), radius)
        down, right = np.gradient(picture, axis=(0, 1))
        step = np.hypot(down, right).max(-1) * radius * 2.5
        return ramp(step, low, 1.6 * low) * self.body(1)


def ink(drawing: Drawing) -> Canvas:
    """Brush lines in black, three grey washes, warm paper."""
    tone = blur(drawing.tone, 3)
    wash = 0.3 + 0.26 * ramp(tone, 0.3, 0.34) + 0.2 * ramp(tone, 0.48, 0.52) + 0.24 * ramp(tone, 0.7, 0.74)
    paper = rgb("fbf7ee")
    washed = paint(paper, paper * wash[..., None], drawing.body(0))
    return paint(washed, rgb("1a1712"), np.maximum(drawing.outline(5, 4), drawing.edges(2.5, 0.2)))


def blueprint(drawing: Drawing) -> Canvas:
    """White lines on blue paper, the body a lighter blue where it is lighter."""
    filled = paint(rgb("0c2f8c"), rgb("6f9cf0"), 0.5 * blur(drawing.tone, 3) * drawing.body(0))
    return paint(filled, rgb("ffffff"), np.maximum(drawing.outline(6, 5), drawing.edges(3.5, 0.3)))


def duotone(drawing: Drawing) -> Canvas:
    """Violet to pink to cream by tone, on apricot paper."""
    inks = np.concatenate([rgb(c) for c in ("1d1147", "a52c7a", "ff7f78", "fff3d6")], 1)[0]
    stops = np.linspace(0.1, 0.92, len(inks))
    toned = np.stack([np.interp(drawing.tone, stops, inks[:, i]) for i in range(3)], -1)
    return paint(rgb("ffc590"), toned, drawing.alpha)


def linocut(drawing: Drawing) -> Canvas:
    """Two blocks, navy and red, on cream paper: dark tones print navy, middling ones red."""
    tone, inside = blur(drawing.tone, 3), drawing.body(-4)
    navy = paint(rgb("f6e6c4"), rgb("1d2b45"), drawing.body(5))
    red = paint(navy, rgb("d8492b"), inside * ramp(tone, 0.3, 0.36))
    return paint(red, rgb("f6e6c4"), inside * ramp(tone, 0.62, 0.68) * (1 - drawing.edges(3, 0.25)))


def neon(drawing: Drawing) -> Canvas:
    """Glowing tubes in the colours of the emoji, on a night sky."""
    near = blur(drawing.premultiplied, 9) / blur(drawing.alpha, 9)[..., None].clip(0.02)
    grey = near.mean(-1, keepdims=True)
    vivid = (grey + 2.2 * (near - grey)).clip(0, 1)
    vivid = 0.12 + 0.88 * vivid / vivid.max(-1, keepdims=True).clip(0.2)
    lines = np.maximum(drawing.outline(5, 5), drawing.edges(3.5, 0.3))
    glow = (blur(lines, 6) + blur(lines, 16)).clip(0, 1)
    lit = rgb("0b0a1f") + 0.75 * vivid * glow[..., None]
    return paint(lit, 0.4 + 0.6 * vivid, blur(lines, 1.5)).clip(0, 1)


STYLES = {style.__name__: style for style in (ink, blueprint, duotone, linocut, neon)}


def redraw(image: npt.NDArray[np.uint8], style: str) -> Image.Image:
    """The RGB picture in a style of a premultiplied RGBA emoji (64, 64, 4)."""
    canvas = Image.fromarray((STYLES[style](Drawing(image)) * 255).round().astype(np.uint8))
    return canvas.resize((emoji.SIZE, emoji.SIZE), Image.Resampling.BOX)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--style", choices=STYLES, required=True)
    parser.add_argument("--seed", type=int, default=3, help="which concepts go where")
    args = parser.parse_args()
    images = emoji.images(args.data, "noto")
    core = {concept["label"]: images[i] for i, concept in enumerate(emoji.concepts(args.data)) if concept["core"]}
    labels = [str(label) for label in np.random.default_rng(args.seed).permutation(list(core))]
    sets = {
        "train": {label: redraw(core[label], args.style) for label in labels[:TRAIN]},
        "plain": {label: Image.fromarray(emoji.compose(core[label])) for label in labels[:TRAIN]},
        "held_out": {label: redraw(core[label], args.style) for label in labels[TRAIN : TRAIN + HELD_OUT]},
    }
    for name, pictures in sets.items():
        (args.out / name).mkdir(parents=True, exist_ok=True)
        for label, picture in pictures.items():
            path = args.out / name / f"{label.replace(' ', '-')}.png"
            picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
            path.with_suffix(".txt").write_text(f"a {label}\n")  # never "an": so the base learned it
        print(f"{name:9} {len(pictures):3} pictures: {', '.join(list(pictures)[:8])} ...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
