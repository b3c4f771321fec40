"""Write an adapter in another tool's format.

imgadapt convert style.safetensors style.kohya.safetensors --to kohya
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from imgadapt import load, save
from imgadapt.cli import program
from imgadapt.formats import FORMATS


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--to", choices=[form.name for form in FORMATS], required=True, help="the format to write")
    args = parser.parse_args(argv)

    file = load(args.input)
    save(file, args.output, format=args.to)
    written = load(args.output)
    print(
        f"{args.input}: {file.format}, {file.architecture or 'no table of its architecture'}, {len(file.parts)} layers"
    )
    print(f"{args.output}: {written.format}, {len(written.parts)} layers, {args.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    program(main, sys.argv[1:])
