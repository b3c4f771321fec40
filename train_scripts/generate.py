"""Draw prompts with a base and any adapters.

    imgadapt generate "a fox" "a red apple" --adapter out/adapter.safetensors:0.8 --output fox.png

Several --adapter stack, each with its strength after a colon. A row a seed, a column a prompt.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from imgadapt import attach, load
from imgadapt.atomic import write_bytes
from imgadapt.cli import program
from imgadapt.errors import ConfigError
from imgadapt.training import families, pictures


def adapter(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:STRENGTH`; a colon inside the path itself is left alone."""
    path, colon, strength = text.rpartition(":")
    if Path(text).is_file():
        return Path(text), 1.0
    try:
        return (Path(path), float(strength)) if colon else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--base", default="demo", help="'demo', a diffusers folder, or a checkpoint file [demo]")
    parser.add_argument("--adapter", action="append", type=adapter, default=[], metavar="FILE[:STRENGTH]")
    parser.add_argument("--output", type=Path, default=Path("picture.png"), help="PNG to write [picture.png]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a row each [0]")
    parser.add_argument("--steps", type=int, default=20, help="sampler steps [20]")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance [4.0]")
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise ConfigError(f"steps is {args.steps}; it must be 1 or more")
    files = [(path, load(path), strength) for path, strength in args.adapter]

    family = families.load(args.base, device="cuda" if torch.cuda.is_available() else "cpu")
    for k, (path, file, strength) in enumerate(files):
        attach(family.pipeline, file, name=f"{k + 1} {path.stem}", weight=strength)
        print(f"{path}: {len(file.parts)} layers at {strength:g}")
    options = {"steps": args.steps, "guidance": args.guidance}
    rows = [family.draw(args.prompts, [seed] * len(args.prompts), **options) for seed in args.seeds]
    plain = len(rows) == len(args.prompts) == 1
    names = [f"seed {seed}" for seed in args.seeds]
    made = rows[0][0] if plain else pictures.sheet(rows, names, args.prompts, scale=max(1, 128 // rows[0][0].width))
    write_bytes(args.output, pictures.png(made))
    print(f"{args.output}: {made.width} x {made.height}")


if __name__ == "__main__":
    program(main, sys.argv[1:])
