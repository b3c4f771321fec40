"""Merge adapters of any methods, ranks and formats into one.

imgadapt merge style.safetensors:0.8 hero.safetensors:-0.5 --rule svd --rank 16 --output both.safetensors
imgadapt merge style.safetensors hero.safetensors --rule ties --density 0.3 --rank 32 --output both.safetensors
imgadapt merge style.safetensors hero.safetensors --blocks style=OUTALL --te hero=0 --mask 'attn2=0.5' --dry-run
imgadapt merge recipe.toml --output both.safetensors
imgadapt merge --list                                        # rules and their options
imgadapt merge --verify both.safetensors --look-in ./loras   # is it what its recipe makes of its inputs?
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imgadapt import __version__, load, save
from imgadapt.atomic import write_bytes
from imgadapt.cli import program
from imgadapt.combining import printing, verify
from imgadapt.combining.asking import add_arguments, recipe_of
from imgadapt.combining.files import digest_of, merge_files
from imgadapt.combining.recipe import MergeRecipe
from imgadapt.combining.recipes import KEY, text_for
from imgadapt.combining.report import json_of
from imgadapt.errors import ConfigError, shortened
from imgadapt.progress import bar


def check(args: argparse.Namespace) -> None:
    """--verify."""
    with bar("layer", hidden=args.json) as progress:
        found = verify.verify(args.verify, args.look_in, base=args.base, progress=progress)
    if args.json:
        apart = found.difference if math.isfinite(found.difference) else None  # JSON has no infinity
        row: dict[str, Any] = {"identical": found.identical, "difference": apart, "reasons": found.reasons}
        print(json.dumps(row | {"inputs": [str(path) for path in found.found]}, indent=1))
    else:
        print("\n".join(verify.said(args.verify, found)))
    if not found.identical:
        raise SystemExit(1)


def target(args: argparse.Namespace, recipe: MergeRecipe) -> Path | None:
    """Where it is written; None: nowhere.

    Raises:
        ConfigError: nowhere is said, or it is an input; the recipe would be written over one, or over the output.
    """
    output: Path | None = None if args.dry_run else args.output
    if output is None and not args.dry_run:
        raise ConfigError("where to? give --output FILE, or --dry-run to see the report only")
    inputs = {Path(entry.path).resolve() for entry in recipe.inputs}
    for path in (path for path in (output, args.save_recipe) if path is not None):
        if path.resolve() in inputs:
            raise ConfigError(f"{path} is an input; wanted another name")
    if output is not None and args.save_recipe is not None and output.resolve() == args.save_recipe.resolve():
        raise ConfigError(f"{output} cannot be both the adapter and --save-recipe; wanted two names")
    return output


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser)
    parser.add_argument("--output", "-o", type=Path, help="the file to write (a folder, with --format peft)")
    parser.add_argument("--save-recipe", type=Path, metavar="TOML", help="write down what is merged and how")
    parser.add_argument("--dry-run", action="store_true", help="merge and report, write no adapter")
    parser.add_argument("--verify", type=Path, metavar="FILE", help="merge again by the file's own recipe, and compare")
    parser.add_argument(
        "--look-in", type=Path, metavar="FOLDER", help="with --verify: where inputs and the base may be, by their hash"
    )
    parser.add_argument("--list", action="store_true", help="the rules and their options")
    parser.add_argument("--json", action="store_true", help="the report, for scripts")
    args = parser.parse_args(argv)

    if args.list:
        print("\n".join(printing.table()))
        return
    if args.verify is not None:
        check(args)
        return
    recipe = recipe_of(args)
    output = target(args, recipe)
    with bar("layer", hidden=args.json) as progress:
        made, report = merge_files(recipe, progress=progress)
    written: dict[str, Any] = {}
    if output is not None:
        path = save(made, output, format=recipe.format)
        size = sum(f.stat().st_size for f in ([path] if path.is_file() else path.iterdir()))
        written = {"written": str(path), "format": load(path).format, "bytes": size, "sha256": digest_of(path)}
    if args.save_recipe is not None:
        write_bytes(args.save_recipe, text_for(report.recipe, args.save_recipe, __version__).encode())
    if args.json:
        more = {"notes": printing.notes(report), "recipe": made.metadata[KEY]}
        print(json_of({**written, **more, **report.as_json()}))
        return
    print("\n".join(printing.lines(report)))
    if made.embeddings:
        print(shortened(f"words: {', '.join(made.embeddings)}", 1000))
    if written:
        size, sha256 = f"{written['bytes'] / 1e6:.2f} MB", f"SHA-256 {written['sha256'][:12]}..."
        print(f"{written['written']}: {written['format']}, {size}, {sha256}")
        if recipe.format is None and made.format not in (None, written["format"]):
            print(f"NOTE {made.format} has no word for all of it; --format says another than imgadapt's own")


if __name__ == "__main__":
    program(main, sys.argv[1:])
