"""Look at a training before it is run: its pictures and captions, memory, disk and time, and what is wrong with them.

    imgadapt check ./photos --base sdxl --kind character --trigger ohwx --class-prompt "a man"
    imgadapt check ./paintings --no-step --json             # do not try a real step; figures for other programs

Takes the flags of `imgadapt train`, and trains nothing. Real steps on the largest bucket are tried where the base is on
this machine. OUTPUT/check/crops.png shows what is cut off. Exit status 1: there are errors, or it does not fit.
"""

import argparse
import dataclasses
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imgadapt.atomic import write_bytes
from imgadapt.cli import program
from imgadapt.errors import ImgadaptError
from imgadapt.training import buckets, flags, pictures, plan, preflight, sheets
from imgadapt.training.config import TrainConfig
from imgadapt.training.preflight import Preflight
from imgadapt.training.processes import Processes

ROWS = 8  # buckets that are listed


def size(count: float) -> str:
    """Bytes, for people."""
    if count < 1e9:
        return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
    return f"{count / 1e9:.1f} GB"


def span(seconds: float) -> str:
    """Seconds, for people."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def parts(values: Mapping[str, float], say: Any) -> str:
    return ", ".join(f"{name} {say(value)}" for name, value in values.items() if value)


def say(text: str) -> None:
    """What is being done, for those who wait, and not among what is printed."""
    print(f"{text} ...", file=sys.stderr, flush=True)


def row(name: str, text: str) -> None:
    """A line, or a few, with what it is about in front."""
    print(textwrap.fill(text, 118, initial_indent=f"{name:<10}", subsequent_indent=" " * 10, break_on_hyphens=False))


def tell(found: Preflight, crops: Path) -> None:
    """One screen."""
    config, need, trial = found.config, found.need, found.trial
    rank = f" of rank {config.rank}" if config.rank else ""
    row(found.plan.kind, f"{config.method}{rank} on {config.base}: {config.steps} steps of {config.batch_size}, "
        f"{config.optimizer}, {config.precision}, into {config.output}")  # fmt: skip
    held = f", and {len(found.held_out)} held out" if found.held_out else ""
    counts = "; tokens are not counted: the base's tokenizers are not on this machine"
    if found.tokens:
        counts = "; captions have {} to {} tokens, and the base reads {}".format(*found.tokens)
    row("pictures", f"{len(found.examples)} in {config.folder}{held}{counts}; what is cut off: {crops}")
    for finding in found.findings:
        row(f"  {finding.level}", finding.text)
    head, *lines = buckets.describe(found.views).splitlines()
    print(f"{'buckets':<10}{head}")
    for line in lines[:ROWS]:
        print(f"{'':<10}{line}")
    if len(lines) > ROWS:
        print(f"{'':<10}and {len(lines) - ROWS} more")
    measured = f", measured {size(trial.peak)}" if trial and trial.peak else ""
    row("memory", f"{size(need.step.peak)} in the steps{measured} ({parts(need.step.parts, size)})")
    for when, peak in need.further.items():
        if peak > need.step.peak:
            row("", f"{size(peak)} {when}")
    verdict = "it fits" if found.fits else "it does not fit; change" if found.curable else "it does not fit in any way"
    row("", f"{size(found.room)} are free on this {'machine' if found.device.type == 'cpu' else 'GPU'}: {verdict}")
    for change in found.changes:
        print(f"{'':<12}{change.flags:<24}{size(change.peak):>8}  {change.text}")
    for disk in found.disks:
        row("disk", f"{size(disk.total)} of {size(disk.free)} free at {disk.folder}: {parts(disk.needed, size)}")
    if trial:
        pace = f"{span(found.times['steps'] / config.steps)} a step ({trial.device})"
        row("time", f"about {span(sum(found.times.values()))}, at {pace}: {parts(found.times, span)}")
    else:
        row("time", f"not known, no real step was tried: {found.untried}")


def figures(found: Preflight, crops: Path) -> dict[str, Any]:
    """The same for programs: bytes, seconds, pixels."""
    trial, need = found.trial, found.need
    return {
        "kind": found.plan.kind, "config": found.config.model_dump(mode="json"),
        "pictures": len(found.examples), "held_out": len(found.held_out), "crops": str(crops),
        "tokens": dict(zip(("least", "most", "read"), found.tokens, strict=True)) if found.tokens else None,
        "findings": [{"level": f.level, "text": f.text, "paths": [str(p) for p in f.paths]} for f in found.findings],
        "buckets": [dataclasses.asdict(bucket) for bucket in buckets.table(found.views)],
        "memory": {
            "predicted": need.step.peak, "measured": trial.peak if trial else None, "parts": need.step.parts,
            "beside": need.further, "available": found.room, "fits": found.fits,
            "changes": [{"settings": c.settings, "peak": c.peak, "text": c.text} for c in found.changes],
        },
        "disk": [{"folder": str(d.folder), "needed": d.needed, "free": d.free} for d in found.disks],
        "step": dataclasses.asdict(trial) if trial else None, "untried": found.untried, "seconds": found.times,
        "faults": found.faults,
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    kinds: list[type[TrainConfig]] = [settings for _, settings in plan.PROGRAMS.values()]
    parser = flags.parser(__doc__ or "", *kinds)
    parser.add_argument("--kind", choices=plan.PROGRAMS, help="guessed when not given")
    parser.add_argument("--no-step", action="store_true", help="do not load the base and try a real step")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    args: argparse.Namespace = parser.parse_args(argv)
    try:
        found = preflight.look(flags.given(args, *kinds), args.kind, Processes().device, step=not args.no_step, say=say)
        crops = found.config.output / "check" / "crops.png"
        config = found.config
        sheet = sheets.contact_sheet(
            found.views, config.crop, use_mask=config.mask, variants=config.crops, seed=config.seed
        )
        write_bytes(crops, pictures.png(sheet))
    except ImgadaptError as error:
        if args.json:
            print(json.dumps({"faults": [str(error)]}))
            raise SystemExit(1) from None
        raise
    if args.json:
        print(json.dumps(figures(found, crops), indent=1))
    else:
        tell(found, crops)
        ends = f"not ready: {'; '.join(found.faults)}" if found.faults else "ready: imgadapt train, with the same flags"
        print(f"\n{ends}" + (f"; add {' '.join(c.flags for c in found.changes)}" if found.curable else ""))
    if found.faults:
        raise SystemExit(1)


if __name__ == "__main__":
    program(main, sys.argv[1:])
