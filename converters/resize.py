"""Cut an adapter down to lower ranks: a rank for all layers, a rule for each, or an error or a size for the whole.

imgadapt resize style.safetensors style.r8.safetensors --rank 8
imgadapt resize style.safetensors style.small.safetensors --size 20     # megabytes; ranks go where they count most
imgadapt resize style.safetensors style.small.safetensors --error 0.05       # of the whole change's norm
imgadapt resize style.safetensors style.small.safetensors --sv-ratio 20 --max-rank 32
imgadapt resize nested.safetensors nested.r4.safetensors --first 4           # of an adapter trained with --nested-ranks
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imgadapt import load, save
from imgadapt.cli import program
from imgadapt.combining.amounts import AMOUNTS, FROM_OTHERS, add_amounts, asked
from imgadapt.combining.checkpoints.base import open_base
from imgadapt.combining.combine import DTYPES
from imgadapt.combining.first import first
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
    parser.add_argument("--first", type=int, help="instead: the first ranks of each layer as they are, without SVD")
    parser.add_argument("--base", help="the base, for DoRA, OFT and others that read its weights")
    parser.add_argument("--keep-others", action="store_true", help="without it: leave those as they are")
    parser.add_argument("--format", choices=[form.name for form in FORMATS], help="to write; default: the input's")
    parser.add_argument("--dtype", choices=[*DTYPES], help="of the tensors; default: theirs")
    parser.add_argument("--json", action="store_true", help="the report, for scripts")
    args = parser.parse_args(argv)

    if args.output.resolve() == args.input.resolve():
        raise ConfigError(f"{args.output} is the input; wanted another name")
    if args.first is not None:
        _first(args)
        return
    keep = asked(args)
    base = open_base(args.base) if args.base else None
    with bar("layer", hidden=args.json) as progress:
        made, report = resize(
            load(args.input), keep, name=args.input.name, base=base, others=args.keep_others, progress=progress
        )
    path = save(made, args.output, format=args.format, dtype=DTYPES.get(args.dtype))
    before, after = _bytes(args.input), _bytes(path)
    report.notes += _larger(before, after)
    if args.json:
        print(json_of({"written": str(path), "bytes": after, **report.as_json()}))
        return
    print(f"{args.input}: {keep.said()}")
    print("\n".join(report.lines()))
    print(f"{path}: {after / 1e6:.2f} MB of {before / 1e6:.2f}")


def _larger(before: int, after: int) -> list[str]:
    """A note where the file is larger than the one that it was made of."""
    why = "what is no LoRA there is one here, or its numbers are wider; ask for less, or for a --size"
    return [f"NOTE the output, {after:,} bytes, is larger than the input, {before:,}: {why}"] * (after > before)


def _bytes(path: Path) -> int:
    """Of a file, or of those in peft's folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))


def _first(args: Any) -> None:
    others = [name for name in (*AMOUNTS, "rank_conv", "max_rank", "base") if getattr(args, name) is not None]
    if others:
        raise ConfigError(f"--first keeps ranks as they are, and goes with no --{others[0].replace('_', '-')}")
    made = first(load(args.input), args.first)
    path = save(made, args.output, format=args.format, dtype=DTYPES.get(args.dtype))
    ranks = [part.method.file_rank or 0 for part in made.parts.values()]
    if args.json:
        print(json_of({"written": str(path), "layers": len(ranks), "rank": max(ranks)}))
    else:
        print(f"{path}: the first {max(ranks)} ranks of {len(ranks)} layers")
        print("".join(f"{note}\n" for note in _larger(_bytes(args.input), _bytes(path))), end="")


if __name__ == "__main__":
    program(main, sys.argv[1:])
