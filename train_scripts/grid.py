"""Draw a grid: pictures over one, two or three axes, all from the same noise, with their differences to the base.

    imgadapt grid "a fox" --adapter ink.safetensors --x weight=0:1:0.25 --y seed=1..4 --output grid.zip

Axes are adapter, weight, seed, prompt, blocks, rule, checkpoint, steps, guidance and sampler; `weight@NAME=...` is
about one adapter of several. Values: `0, 0.5, 1`, `0:1:0.25`, `1..5`, `random 4` seeds; adapters by name (`a+b` is a
stack), of --adapter and --adapters; prompts, blocks and adapters may have lines. The zip has a page that works alone,
the pictures and grid.json. With --home, the folder of a playground, the grid stays there: it is resumed where it was
stopped, and the page of the playground shows it.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from imgadapt.atomic import atomically
from imgadapt.cli import adapter, program
from imgadapt.errors import ConfigError, FormatError, ImgadaptError
from imgadapt.playground.desk import Done, Failed, Progress, Ticket
from imgadapt.playground.grids.grids import AXES, Grid, GridRequest, Grids
from imgadapt.playground.samplers import SAMPLERS
from imgadapt.playground.session import Playground
from imgadapt.playground.settings import Settings
from imgadapt.progress import bar
from imgadapt.stopping import scratch


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", help="may have <lora:name:weight> tags")
    for name in "xyz":
        parser.add_argument(f"--{name}", required=name == "x", metavar="AXIS=VALUES", help=f"one of {', '.join(AXES)}")
    parser.add_argument("--base", default="demo", help="'demo', a diffusers folder, or a checkpoint file [demo]")
    parser.add_argument("--adapter", action="append", type=adapter, default=[], metavar="FILE[:STRENGTH]")
    parser.add_argument("--adapters", action="append", type=Path, default=[], metavar="DIR", help="for names in axes")
    parser.add_argument("--output", type=Path, default=Path("grid.zip"), help="zip to write [grid.zip]")
    parser.add_argument("--name", default="", help="the page's title")
    parser.add_argument("--no-baseline", action="store_true", help="no pictures without adapters")
    parser.add_argument("--negative", default="", help="what not to draw")
    parser.add_argument("--seed", type=int, default=0, help="of all cells; -1: any, the same for all [0]")
    parser.add_argument("--steps", type=int, default=20, help="sampler steps [20]")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance [the base's own]")
    parser.add_argument("--sampler", default="base", help=f"{', '.join(SAMPLERS)} [base: its own]")
    parser.add_argument("--width", type=int, help="pixels [the base's own]")
    parser.add_argument("--height", type=int, help="pixels [the base's own]")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the base [fp32]")
    parser.add_argument("--home", type=Path, help="a playground's folder, where the grid stays [none: it does not]")
    args = parser.parse_args(argv)
    for path in (*(path for path, _ in args.adapter), *args.adapters):
        if not path.exists():
            raise FormatError(f"{path}: no such file")
    with scratch() as folder:
        settings = Settings(
            args.home or folder, base=args.base, hub=True, dtype=args.dtype,
            adapters=(*(path.absolute() for path, _ in args.adapter), *args.adapters),
            device="cuda" if torch.cuda.is_available() else "cpu",
        )  # fmt: skip
        playground = Playground(settings)
        try:
            draw(args, playground)
        finally:
            playground.close()


def draw(args: argparse.Namespace, playground: Playground) -> None:
    grids, request = Grids(playground), asked(args, playground)
    plan = grids.plan(request)
    print(f"{plan.cells} cells in {plan.batches} batches; other adapters on the base {plan.swaps} times")
    begun = next((g for g in grids.recent(count=1000) if g.request == request and unfinished(g)), None)
    if begun is not None:
        print(f"going on with the grid that was begun: {unfinished(begun)} cells are missing")
    grid = followed(grids.start(request) if begun is None else grids.resume(begun.id))
    with atomically(args.output) as file, grids.export(grid.id).open("rb") as made:
        shutil.copyfileobj(made, file)
    records = [cell.picture.record for cell in grid.cells if cell.picture and cell.picture.record]
    for note in dict.fromkeys(note for record in records for note in record.get("notes", ())):
        print(f"note: {note}")
    print(f"{args.output}: {len(grid.cells)} cells, index.html shows them")


def asked(args: argparse.Namespace, playground: Playground) -> GridRequest:
    uses = [{"adapter": playground.library.at(path).id, "weight": strength} for path, strength in args.adapter]
    names = ("prompt", "negative", "seed", "steps", "guidance", "sampler", "width", "height")
    common = {name: value for name in names if (value := getattr(args, name)) is not None}
    common |= {"adapters": uses, "base": playground.bases.first.id}
    rows = {name: axis(getattr(args, name), playground) for name in "xyz" if getattr(args, name) is not None}
    return GridRequest.of({"common": common, "name": args.name, "baseline": not args.no_baseline, **rows})


def axis(text: str, playground: Playground) -> dict[str, Any]:
    """`weight=0:1:0.5`, `weight@name=...`."""
    about, equals, values = text.partition("=")
    kind, _, name = (part.strip() for part in about.partition("@"))
    if not equals or kind not in AXES:
        raise ConfigError(f"'{text[:60]}' is no axis; write one as weight=0:1:0.25, of {', '.join(AXES)}")
    return {"kind": kind, "values": values, **({"adapter": playground.library.named(name).id} if name else {})}


def unfinished(grid: Grid) -> int:
    return sum(cell.picture is None for cell in grid.cells)


def followed(ticket: Ticket[Grid]) -> Grid:
    """Wait for the end, with a bar of steps."""
    try:
        with bar("step") as step:
            for event in ticket.events():
                if isinstance(event, Progress):
                    step(event.what, event.done, event.total)
                elif isinstance(event, Failed):
                    raise ImgadaptError(event.message)
                elif isinstance(event, Done):
                    return event.result
    except BaseException:
        ticket.cancel()
        ticket.ended.wait(60)
        raise
    raise AssertionError("events end with Done or Failed")


if __name__ == "__main__":
    program(main, sys.argv[1:])
