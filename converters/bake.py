"""Bake adapters into a checkpoint: a single file or a diffusers folder, in its own names, dtypes and layout.

imgadapt bake base.safetensors style.safetensors:0.8 hero.safetensors --output baked.safetensors
imgadapt bake ./sdxl style.safetensors hero.safetensors --rule ties --density 0.3 --output ./baked
imgadapt bake base_fp8.safetensors style.safetensors --rounding stochastic --output baked.safetensors
imgadapt bake base.safetensors recipe.toml --output baked.safetensors
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from imgadapt.cli import program
from imgadapt.combining import printing
from imgadapt.combining.asking import add_arguments, recipe_of
from imgadapt.combining.checkpoints.baking import Baking
from imgadapt.combining.checkpoints.checkpoint import bake_files
from imgadapt.combining.report import json_of
from imgadapt.errors import ConfigError, first_few
from imgadapt.progress import bar


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("base", help="a checkpoint (.safetensors), a folder that diffusers wrote, or demo")
    add_arguments(parser, adapter=False)
    parser.add_argument("--output", "-o", type=Path, help="the checkpoint to write; a folder, if the base is one")
    parser.add_argument(
        "--rounding", choices=["nearest", "stochastic"], default="nearest",
        help="of sums to the base's dtype; stochastic (by --seed) keeps on average what is below half a step",
    )  # fmt: skip
    parser.add_argument("--skip-missing", action="store_true", help="leave out layers that the base does not have")
    parser.add_argument(
        "--hash-base", action="store_true", help="write down the base's SHA-256, too (5 s more for 7 GB)"
    )
    parser.add_argument("--json", action="store_true", help="the report, for scripts")
    args = parser.parse_args(argv)

    recipe = recipe_of(args)
    if args.output is None:
        raise ConfigError("where to? give --output")
    how = Baking(args.rounding, strict=not args.skip_missing)
    with bar("B", hidden=args.json) as progress:
        made, report = bake_files(recipe, args.output, how, hash_base=args.hash_base, progress=progress)
    left_out = [str(path) for path in made.left_out]
    if args.json:
        rows = {"written": str(args.output), "changed": made.changed, "kept": made.kept, "missing": made.missing}
        print(json_of({**rows, "left_out": left_out, **report.as_json()}))
        return
    print("\n".join(printing.lines(report, baked=True)))
    if made.missing:
        print(f"left out, the base does not have them: {len(made.missing)} layers, {first_few(made.missing)}")
    if left_out:
        print(f"not copied, the base's weights in another form: {first_few(left_out)}")
    print(f"{args.output}: {made.changed} tensors changed, {made.kept} as they were")


if __name__ == "__main__":
    program(main, sys.argv[1:])
