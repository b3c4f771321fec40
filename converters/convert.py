"""Write an adapter, or a folder of them, in another tool's format.

imgadapt convert style.safetensors style.kohya.safetensors --to kohya
imgadapt convert ./adapters ./for_comfyui --to comfyui --dtype bf16
imgadapt convert style.safetensors --to diffusers --plan        # what it costs, and nothing is written
imgadapt convert --pickle style.pt --to diffusers               # of someone whom you trust
imgadapt convert tlora.safetensors --to kohya --average-times   # T-LoRA as one LoRA; says what that loses
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from imgadapt import PTuning, load, plan, save
from imgadapt.cli import program
from imgadapt.errors import ConfigError, ImgadaptError, first_few, shortened
from imgadapt.file import outline
from imgadapt.formats import FORMATS
from imgadapt.summary import NO_CONFIG, alpha_unsaid
from imgadapt.untimed import untimed

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_LONGEST = 2000  # characters of a line
ENDS = (".safetensors", ".pt", ".bin", ".ckpt")


def pairs(source: Path, target: Path | None, to: str) -> Iterator[tuple[Path, Path]]:
    """(file to read, file to write)."""
    if source.is_dir() and not (source / "adapter_config.json").is_file():
        out = target or source.resolve().with_name(f"{source.resolve().name}.{to}")
        if out.resolve() in (source.resolve(), *source.resolve().parents):
            raise ConfigError(f"{out} is the input, or what it lies in; wanted another folder")
        taken: dict[Path, Path] = {}
        for path in sorted(source.rglob("*")):
            folder = path.name.startswith("adapter_model.") and (path.parent / "adapter_config.json").is_file()
            if path.suffix.lower() not in ENDS or out.resolve() in path.resolve().parents:
                continue
            target = (out / path.relative_to(source)).with_suffix(".safetensors")
            if folder and path.parent != source:  # peft's
                path, target = path.parent, target.parent.with_suffix(".safetensors")
            if target in taken:
                raise ConfigError(f"{path} and {taken[target]} would both be written as {target}")
            taken[target] = path
            yield path, target
        return
    target = target or source.with_name(f"{source.stem}.{to}.safetensors")
    if target.resolve() == source.resolve():
        raise ConfigError(f"{target} is the input; wanted another name")
    yield source, target


def convert(source: Path, target: Path, args: Any) -> dict[str, Any]:
    """One file; what became of it."""
    file = load(source, pickle=args.pickle)
    lost = None
    if args.average_times:
        file, lost = untimed(file)
    steps = plan(file, args.to)
    by_reason: dict[str, list[str]] = {}
    for step in steps:
        if step.reason:
            by_reason.setdefault(step.reason, []).append(step.name)
    row: dict[str, Any] = {"from": file.format, "base": file.architecture, "layers": len(file.parts), "to": args.to}
    if alpha_unsaid(file):
        row["note"] = NO_CONFIG
    if lost is not None:
        row["lost"] = round(lost, 6)
    row |= {"loss": Counter(step.loss for step in steps), "reasons": by_reason}
    row["only"] = file.prompts.kind.name if file.prompts else "words only"
    if file.prompts and args.to != "imgadapt" and isinstance(file.prompts.kind, PTuning):
        row["note"] = f"{args.to} has the tokens alone: the network that makes them in training is left out"
    if not args.plan:
        save(file, target, format=args.to, dtype=DTYPES.get(args.dtype), dense=args.dense)
        outline(target)  # it can be read back, or that is said now
        row["written"] = str(target)
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
    parser.add_argument("--average-times", action="store_true", help="T-LoRA as the LoRA nearest to it over all times")
    parser.add_argument("--plan", action="store_true", help="say what it costs, write nothing")
    parser.add_argument("--pickle", action="store_true", help="read .pt and .bin, too, as data only")
    parser.add_argument("--json", action="store_true", help="the report, for scripts")
    args = parser.parse_args(argv)

    todo = list(pairs(args.input, args.output, args.to))
    if not todo:
        raise ConfigError(f"{args.input} has no files that end in {', '.join(ENDS)}")
    rows: list[dict[str, Any]] = []
    for k, (source, target) in enumerate(todo, 1):
        row: dict[str, Any] = {"file": str(source)}
        rows.append(row)
        try:
            row |= convert(source, target, args)
        except ImgadaptError as error:
            if len(todo) == 1 and not args.json:
                raise
            row["error"] = str(error)
        if not args.json:
            start = f"[{k}/{len(todo)}] " if len(todo) > 1 else ""
            if "error" in row:
                said = row["error"] if str(source) in row["error"] else f"{source}: {row['error']}"
                print(shortened(f"{start}{said}", _LONGEST), file=sys.stderr)
                continue
            losses = ", ".join(f"{count} {loss}" for loss, count in row["loss"].items()) or row["only"]
            base = row["base"] or "no table of its base"
            what = f"{row['from']}, {base}, {row['layers']} layers -> {args.to}: {losses}"
            print(shortened(f"{start}{source}: {what}", _LONGEST))
            if "lost" in row:
                print(f"  one LoRA for all times: {row['lost']:.1%} of the change is lost (root mean square over them)")
            if "note" in row:
                print(f"  {row['note']}")
            for reason, names in row["reasons"].items():
                print(shortened(f"  {reason} ({first_few(names)})", _LONGEST))
            if "written" in row:
                size = f", {target.stat().st_size / 1e6:.2f} MB" if target.is_file() else ""
                print(shortened(f"  {target}{size}", _LONGEST))
    failed = [row for row in rows if "error" in row]
    if args.json:
        print(json.dumps(rows, indent=1))
    elif len(rows) > 1:
        print(f"{len(rows) - len(failed)} of {len(rows)} files {'looked at' if args.plan else 'written'}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    program(main, sys.argv[1:])
