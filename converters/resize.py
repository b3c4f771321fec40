"""Cut an adapter down to lower ranks: a rank for all layers, a rule for each, or an error or a size for the whole.

imgadapt resize style.safetensors style.r8.safetensors --rank 8
imgadapt resize style.safetensors style.small.safetensors --size 20     # megabytes; ranks go where they count most
imgadapt resize style.safetensors style.small.safetensors --error 0.05       # of the whole change's norm
imgadapt resize style.safetensors style.small.safetensors --sv-ratio 20 --max-rank 32
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from imgadapt import load, save
from imgadapt.cli import program
from imgadapt.combining.amounts import FROM_OTHERS, add_amounts, asked
from imgadapt.combining.checkpoints.base import open_base
from imgadapt.combining.combine import DTYPES
from imgadapt.combining.report import json_of
from imgadapt.combining.resizing import resize
from imgadapt.errors import ConfigError
from imgadapt.formats import FORMATS
from imgadapt.progress import bar


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FROM_OTHERS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path, help="an adapter of any tool")
    parser.add_argument("output", type=Path, help="the file to write")
    add_amounts(parser)
    parser.add_argument("--base", help="the base, for DoRA, OFT and others that read its weights")
    parser.add_argument("--keep-others", action="store_true", help="without it: leave those as they are")
    parser.add_argument("--format", choices=[form.name for form in FORMATS], help="to write; default: the input's")
    parser.add_argument("--dtype", choices=[*DTYPES], help="of the tensors; default: theirs")
    parser.add_argument("--json", action="store_true", help="the report, for scripts")
    args = parser.parse_args(argv)

    keep = asked(args)
    if args.output.resolve() == args.input.resolve():
        raise ConfigError(f"{args.output} is the input; wanted another name")
    base = open_base(args.base) if args.base else None
    with bar("layer", hidden=args.json) as progress:
        made, report = resize(
            load(args.input), keep, name=args.input.name, base=base, others=args.keep_others, progress=progress
        )
    path = save(made, args.output, format=args.format, dtype=DTYPES.get(args.dtype))
    if args.json:
        print(json_of({"written": str(path), **report.as_json()}))
        return
    sizes = [one.stat().st_size / 1e6 if one.is_file() else 0.0 for one in (args.input, path)]
    print(f"{args.input}: {keep.said()}")
    print("\n".join(report.lines()))
    print(f"{path}" + (f": {sizes[1]:.2f} MB of {sizes[0]:.2f}" if all(sizes) else ""))


if __name__ == "__main__":
    program(main, sys.argv[1:])
