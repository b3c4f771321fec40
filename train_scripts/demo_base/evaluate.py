"""How good the embedded base is: are its drawings the thing, told apart from all others, on any background?

    python train_scripts/demo_base/evaluate.py DATA --sheet sheet.png

Draws every core concept on white, and on a background colour that was never trained with it, and looks up the nearest
true picture (mean squared error, either way round, on the same background). Prints top-1 and top-5 shares as JSON, and
draws sheets of random prompts to judge by eye: SHEET (40 trained names) and SHEET-words (wordings never trained).
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imgadapt.atomic import write_bytes
from imgadapt.cli import program
from imgadapt.demo import emoji
from imgadapt.training import families, pictures

WORDS = (
    "cute fox|fox face|a tiger and a lion|blue bird|green dragon|smiling sun|red rose flower|yellow banana fruit|"
    "house in the forest|sailboat on the sea|the panda bear|black dog|golden crown|a hot coffee|a geek|a plane"
)


def tensor(images: Sequence[Any]) -> Tensor:
    """(n, 3, 64, 64) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1) for image in images])


def ranks(drawn: Tensor, truth: dict[tuple[str, bool], Tensor], where: Sequence[str]) -> Tensor:
    """For each drawing, how many concepts are nearer to it than its own."""
    found: list[int] = []
    for k, (image, background) in enumerate(zip(drawn, where, strict=True)):
        gaps = torch.stack([(truth[background, flip] - image).square().mean((1, 2, 3)) for flip in (False, True)])
        nearest = gaps.amin(0)
        found.append(int((nearest < nearest[k]).sum()))
    return torch.tensor(found)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="what data.py wrote")
    parser.add_argument("--base", default="demo")
    parser.add_argument("--sheet", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args(argv)

    family = families.load(args.base)
    concepts, noto = emoji.concepts(args.data), emoji.images(args.data, "noto")
    core = [i for i, concept in enumerate(concepts) if concept["core"] and i in noto]
    truth = {
        (background, flip): tensor([emoji.compose(noto[i], background, flip=flip) for i in core])
        for background in emoji.BACKGROUNDS
        for flip in (False, True)
    }

    def draw(prompts: Sequence[str], seed: int) -> list[Image.Image]:
        made: list[Image.Image] = []
        for k in range(0, len(prompts), 32):
            part = prompts[k : k + 32]
            made += family.draw(part, [seed * 1000 + k + j for j in range(len(part))], steps=args.steps)
        return made

    start = time.monotonic()
    found: dict[str, Any] = {}
    colours = [emoji.held_out_colours(i)[0] for i in core]
    for name, where in (("white", ["white"] * len(core)), ("colour never seen with it", colours)):
        ends = ["" if background == "white" else f" on a {background} background" for background in where]
        prompts = [f"a {concepts[i]['label']}{end}" for i, end in zip(core, ends, strict=True)]
        rank = ranks(tensor(draw(prompts, 0)), truth, where)
        found[name] = {f"top{n}": round((rank < n).float().mean().item(), 4) for n in (1, 5)}
    found |= {"concepts": len(core), "seconds": round(time.monotonic() - start)}
    print(json.dumps(found))

    picked = [core[k] for k in np.random.default_rng(0).permutation(len(core))[:40]]
    labels = [concepts[i]["label"] for i in picked]
    made = draw([f"a {label}" for label in labels], 1)
    tiles = [pictures.sheet([[image]], [""], [label], scale=2) for image, label in zip(made, labels, strict=True)]
    write_bytes(args.sheet, pictures.png(pictures.mosaic(tiles, 8)))
    made = draw(WORDS.split("|"), 2)
    tiles = [pictures.sheet([[x]], [""], [words], scale=2) for x, words in zip(made, WORDS.split("|"), strict=True)]
    path = args.sheet.with_stem(f"{args.sheet.stem}-words")
    write_bytes(path, pictures.png(pictures.mosaic(tiles, 8)))
    print(args.sheet, path)


if __name__ == "__main__":
    program(main, sys.argv[1:])
