"""What preservation is worth: a character learnt on the embedded base, with none, class-free and classic preservation.

    python benchmarks/character.py --output character            # three trainings of 150 steps, then the table

The character is one emoji of the base's, in other colours: 12 pictures of it, turned, moved and scaled on five
backgrounds, as "ohwx elephant"; 6 more, on other backgrounds, are held out. Identity: loss on those below the base's,
and likeness (cosine of latents, less the mean latent of 40 subjects) of what is drawn for "ohwx elephant" to the
nearest of the character, against that of the base's own elephant. Drift: how far pictures of the class and of eight
other subjects move from the base's at the same seeds (root mean square of the pixels, 0 to 255).
"""

import argparse
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from imgadapt import attach, demo, detach, load
from imgadapt.atomic import write_bytes
from imgadapt.cli import program
from imgadapt.demo import character
from imgadapt.demo.character import KIND, SUBJECT
from imgadapt.training import families, objective, pictures
from imgadapt.training.config import TrainConfig
from imgadapt.training.data import scan
from imgadapt.training.evaluate import bootstrap, held_out_losses
from imgadapt.training.material import Material

OTHERS = ["a lion", "an owl", "a panda", "a poodle", "a tomato", "a bicycle", "a crown", "a mushroom"]
WAYS: dict[str, list[str]] = {
    "none": ["--preservation", "none"],
    "class-free": ["--preservation", "class-free"],
    "classic": ["--preservation", "classic", "--class-count", "40"],
}
PROGRAM = Path(__file__).parents[1] / "train_scripts" / "dreambooth.py"


def latents(family: families.Family, images: Sequence[Image.Image]) -> Tensor:
    """(pictures, numbers) of the autoencoder, whose common part is taken away."""
    rows = [torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 127.5 - 1) for image in images]
    return torch.stack([family.encode_image(row.permute(2, 0, 1)).flatten() for row in rows])


def likeness(drawn: Tensor, references: Tensor, mean: Tensor) -> float:
    """Mean over drawn pictures of the cosine to the nearest reference."""
    return (F.normalize(drawn - mean, dim=1) @ F.normalize(references - mean, dim=1).T).max(1).values.mean().item()


def moved(images: Sequence[Image.Image], before: Sequence[Image.Image]) -> float:
    """Root mean square difference of pixels."""
    gaps = [np.asarray(a, np.float32) - np.asarray(b, np.float32) for a, b in zip(images, before, strict=True)]
    return float(np.sqrt(np.mean(np.square(gaps))))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    seen, held_out = args.output / "pictures", args.output / "held_out"
    character.draw(seen, character.SEEN, 12, 0)
    character.draw(held_out, character.HELD_OUT, 6, 1)
    for way, flags in WAYS.items():
        settings = [str(seen), "--trigger", "ohwx", "--class-prompt", KIND, "--output", str(args.output / way), *flags]
        recipe = [
            "--rank",
            "8",
            "--targets",
            "transformer",
            "convolution",
            "--learning-rate",
            "1e-3",
            "--batch-size",
            "8",
        ]
        runpy.run_path(str(PROGRAM))["main"](
            [*settings, *recipe, "--steps", str(args.steps), "--no-report", "--log-with"]
        )

    family = families.load("demo")
    config = TrainConfig.of({"folder": held_out, "cache": args.output / "cache"})
    material = Material(config, family, scan(held_out), fixed=True)
    asked = objective.of(config, family.schedule, objective.Sampling())
    references = latents(family, [Image.open(path) for path in sorted(held_out.glob("*.png"))[0::3]])  # on white
    mean = latents(family, [Image.open(path) for path in (demo.STYLE / "plain").glob("*.png")]).mean(0)
    prompts = {"subject": [SUBJECT] * 4, "class": [KIND] * 4, "others": OTHERS}
    before = {name: family.draw(texts, range(len(texts))) for name, texts in prompts.items()}
    base = held_out_losses(family, asked, material)
    rows: dict[str, dict[str, Any]] = {
        "base": {"loss": base.mean().item(), "likeness": likeness(latents(family, before["class"]), references, mean)}
    }
    sheet = [[*before["subject"][:2], *before["class"][:2], *before["others"]]]
    for way in WAYS:
        attach(family.pipeline, load(args.output / way / "adapter.safetensors"))
        losses = held_out_losses(family, asked, material)
        drawn = {name: family.draw(texts, range(len(texts))) for name, texts in prompts.items()}
        detach(family.pipeline)
        rows[way] = {
            "loss": losses.mean().item(), "gain": bootstrap(losses, base),
            "likeness": likeness(latents(family, drawn["subject"]), references, mean),
            "drift of the class": moved(drawn["class"], before["class"]),
            "drift of others": moved(drawn["others"], before["others"]),
        }  # fmt: skip
        sheet.append([*drawn["subject"][:2], *drawn["class"][:2], *drawn["others"]])
    made = pictures.sheet(sheet, list(rows), [*[SUBJECT] * 2, *[KIND] * 2, *OTHERS], scale=1)
    write_bytes(args.output / "sheet.png", pictures.png(made))
    write_bytes(args.output / "character.json", json.dumps(rows, indent=1).encode())
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    program(main, sys.argv[1:])
