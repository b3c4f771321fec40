"""Write an adapter, or a folder of them, in another tool's format.

imgadapt convert style.safetensors style.kohya.safetensors --to kohya
imgadapt convert ./adapters ./for_comfyui --to comfyui --dtype bf16
imgadapt convert style.safetensors --to diffusers --plan        # what it costs, and nothing is written
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from imgadapt import load, plan, save
from imgadapt.cli import program
from imgadapt.errors import ConfigError, ImgadaptError
from imgadapt.formats import FORMATS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ENDS = (".safetensors", ".pt", ".bin", ".ckpt")


def pairs(source: Path, target: Path | None, to: str) -> Iterator[tuple[Path, Path]]:
    """(file to read, file to write)."""
    if source.is_dir() and not (source / "adapter_config.json").is_file():
        out = target or source.with_name(f"{source.name}.{to}")
        for path in sorted(source.rglob("*")):
            if path.suffix in ENDS and out not in path.parents:
                yield path, (out / path.relative_to(source)).with_suffix(".safetensors")
        return
    yield source, target or source.with_name(f"{source.stem}.{to}.safetensors")


def convert(source: Path, target: Path, args: Any) -> dict[str, Any]:
    """One file; what became of it."""
    row: dict[str, Any] = {"file": str(source)}
    try:
        file = load(source)
        steps = plan(file, args.to)
        reasons = [f"{step.name}: {step.reason}" for step in steps if step.reason]
        row |= {"from": file.format, "base": file.architecture, "layers": len(file.parts), "to": args.to}
        row |= {"loss": Counter(step.loss for step in steps), "reasons": reasons[:20]}
        if not args.plan:
            target.parent.mkdir(parents=True, exist_ok=True)
            save(file, target, format=args.to, dtype=DTYPES.get(args.dtype), dense=args.dense)
            written = load(target)
            if len(written.parts) != len(file.parts) and not args.dense:
                raise ImgadaptError(f"{target} has {len(written.parts)} layers where {source} has {len(file.parts)}")
            row["written"] = str(target)
    except ImgadaptError as error:
        row["error"] = str(error)
    return row


def main(argv: Sequence[str]) -> None:
    formats = "\n".join(f"  {form.name:<18}{form.about}" for form in FORMATS)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"formats:\n{formats}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path, help="a file, peft's folder, or a folder of files")
    parser.add_argument("output", type=Path, nargs="?", help="default: beside the input")
    parser.add_argument("--to", choices=[form.name for form in FORMATS], required=True, help="the format to write")
    parser.add_argument("--dtype", choices=[*DTYPES], help="of the tensors; default: theirs")
    parser.add_argument("--dense", action="store_true", help="whole differences for what the format has no word for")
    parser.add_argument("--plan", action="store_true", help="say what it costs, write nothing")
    parser.add_argument("--json", action="store_true", help="the report, for scripts")
    args = parser.parse_args(argv)

    todo = list(pairs(args.input, args.output, args.to))
    if not todo:
        raise ConfigError(f"{args.input} has no files that end in {', '.join(ENDS)}")
    rows: list[dict[str, Any]] = []
    for k, (source, target) in enumerate(todo, 1):
        row = convert(source, target, args)
        rows.append(row)
        if not args.json:
            start = f"[{k}/{len(todo)}] " if len(todo) > 1 else ""
            if "error" in row:
                print(f"{start}{source}: {row['error']}", file=sys.stderr)
                continue
            losses = ", ".join(f"{count} {loss}" for loss, count in row["loss"].items()) or "words only"
            base = row["base"] or "no table of its base"
            print(f"{start}{source}: {row['from']}, {base}, {row['layers']} layers -> {args.to}: {losses}")
            for reason in row["reasons"][:3]:
                print(f"  {reason}")
            if "written" in row:
                print(f"  {target}, {target.stat().st_size / 1e6:.2f} MB" if target.is_file() else f"  {target}")
    failed = [row for row in rows if "error" in row]
    if args.json:
        print(json.dumps(rows, indent=1))
    elif len(rows) > 1:
        print(f"{len(rows) - len(failed)} of {len(rows)} files {'looked at' if args.plan else 'written'}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    program(main, sys.argv[1:])
