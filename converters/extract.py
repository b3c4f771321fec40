"""Make an adapter of what a fine-tuned checkpoint changed of its base; both are diffusers' folders or single files.

imgadapt extract tuned.safetensors base.safetensors style.safetensors --rank 16
imgadapt extract tuned.safetensors ./base style.safetensors --rank 32 --rank-conv 8 --targets transformer text
imgadapt extract tuned.safetensors base.safetensors style.safetensors --size 200     # megabytes; slower
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from imgadapt import load, save
from imgadapt.cli import program
from imgadapt.combining.amounts import FROM_OTHERS, add_amounts, asked
from imgadapt.combining.checkpoints.base import base_path
from imgadapt.combining.checkpoints.extracting import Settings, extract
from imgadapt.combining.combine import DTYPES
from imgadapt.combining.report import json_of
from imgadapt.errors import ConfigError
from imgadapt.formats import FORMATS
from imgadapt.progress import bar


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FROM_OTHERS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tuned", type=base_path, help="the fine-tuned checkpoint")
    parser.add_argument("base", type=base_path, help="the checkpoint that it came from; or demo, the embedded base")
    parser.add_argument("output", type=Path, help="the file to write")
    add_amounts(parser)
    parser.add_argument(
        "--targets", nargs="+", help="layers: presets, globs; '!' before one leaves it out; default: all"
    )
    parser.add_argument("--embeddings", action="store_true", help="embeddings of tokens become LoRA, too")
    parser.add_argument("--no-whole", action="store_true", help="LoRA even where the whole difference is hardly larger")
    parser.add_argument("--allow-missing", action="store_true", help="layers that only one of them has are left out")
    parser.add_argument("--no-hashes", action="store_true", help="without the files' SHA-256 in the metadata")
    parser.add_argument(
        "--format", choices=[form.name for form in FORMATS], help="default: kohya, or lycoris with norms"
    )
    parser.add_argument("--dtype", choices=[*DTYPES], default="fp16", help="of the tensors; default: fp16")
    parser.add_argument("--json", action="store_true", help="the report, for scripts")
    args = parser.parse_args(argv)

    keep = asked(args)
    if args.output.resolve() in (args.tuned.resolve(), args.base.resolve()):
        raise ConfigError(f"{args.output} is an input; wanted another name")
    settings = Settings(
        args.targets, not args.no_whole, args.embeddings, args.format, DTYPES[args.dtype], not args.allow_missing,
        not args.no_hashes,
    )  # fmt: skip
    with bar("layer", hidden=args.json) as progress:
        made, report = extract(args.tuned, args.base, keep, settings, progress=progress)
    path = save(made, args.output, format=args.format)
    load(path)  # it can be read back, or that is said now
    if args.json:
        print(json_of({"written": str(path), **report.as_json()}))
        return
    print(f"{args.tuned} - {args.base}: {keep.said()}")
    print("\n".join(report.lines()))
    print(f"{path}" + (f": {path.stat().st_size / 1e6:.2f} MB" if path.is_file() else ""))


if __name__ == "__main__":
    program(main, sys.argv[1:])
