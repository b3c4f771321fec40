"""Time a grid of 16 pictures: imgadapt's playground against diffusers with peft, one by one with set_adapters.

    python benchmarks/grid.py                       # embedded base, 20 steps, 7 rounds
    python benchmarks/grid.py --steps 12 --rounds 15 --threads 1

Two grids: four weights x four seeds of one adapter, and four adapters x four seeds. Ours is what `imgadapt grid` does,
from the request to pictures on disk, with the adapters on the base already, as theirs are (load_lora_weights). Both
draw the same prompts, seeds, steps, sampler and guidance, in turns in one process; a figure is the median over rounds
of theirs / ours, and the pictures of both must agree to a few levels. Exit status 1 where the bar is not met.
"""

import argparse
import io
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from imgadapt import attach, collect, demo, detach, parameters, save
from imgadapt.cli import program
from imgadapt.methods import LoRA
from imgadapt.playground.grids.grids import GridRequest, Grids
from imgadapt.playground.session import Playground
from imgadapt.playground.settings import Settings

BAR = 2.0
LEVELS = 3.0  # mean difference of 255 that pictures of the two may have
PROMPT, GUIDANCE = "a fox", 4.0
WEIGHTS, SEEDS, NAMES = (0.25, 0.5, 0.75, 1.0), (1, 2, 3, 4), ("ant", "bee", "cat", "dog")
Draw = Callable[[str], list[Image.Image]]
"""A grid's name -> its 16 pictures, seed by seed."""


def adapters(folder: Path) -> None:
    """Four LoRAs on the transformer layers, as kohya's files."""
    pipe = demo.pipeline()
    for k, name in enumerate(NAMES):
        torch.manual_seed(k)
        attach(pipe, LoRA(rank=8, alpha=8.0), targets=["transformer"])
        with torch.no_grad():
            for parameter in parameters(pipe):
                parameter += 0.05 * torch.randn_like(parameter)
        save(collect(pipe), folder / f"{name}.safetensors", format="kohya")
        detach(pipe)


def ours(playground: Playground, steps: int) -> Draw:
    """Grids through the playground, without a base column, which theirs does not draw."""
    grids = Grids(playground)
    ids = [playground.library.named(name).id for name in NAMES]
    axes = {
        "weights": {"kind": "weight", "values": ", ".join(map(str, WEIGHTS))},
        "adapters": {"kind": "adapter", "values": "\n".join(ids)},
    }

    def draw(grid: str) -> list[Image.Image]:
        common = {"prompt": PROMPT, "steps": steps, "guidance": GUIDANCE, "adapters": [{"adapter": ids[0]}]}
        seeds = {"kind": "seed", "values": ", ".join(map(str, SEEDS))}
        request = GridRequest.of({"common": common, "x": axes[grid], "y": seeds, "baseline": False})
        made = grids.start(request).result()
        return [Image.open(cell.picture.path).convert("RGB") for cell in made.cells if cell.picture is not None]

    return draw


def theirs(folder: Path, steps: int) -> Draw:
    """One by one: set_adapters, a call of the pipeline, a PNG."""
    pipe: Any = demo.pipeline()
    for name in NAMES:
        pipe.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=name)

    def draw(grid: str) -> list[Image.Image]:
        columns = [(NAMES[0], w) for w in WEIGHTS] if grid == "weights" else [(name, 1.0) for name in NAMES]
        made: list[Image.Image] = []
        for seed in SEEDS:
            for name, weight in columns:
                pipe.set_adapters([name], [weight])
                made += pipe(
                    PROMPT,
                    num_inference_steps=steps,
                    guidance_scale=GUIDANCE,
                    generator=torch.Generator().manual_seed(seed),
                ).images
                made[-1].save(io.BytesIO(), "PNG")
        return made

    return draw


def ratio(tools: dict[str, Draw], grid: str, rounds: int) -> tuple[float, float, float, float]:
    """(theirs / ours, our and their seconds, mean difference of their pictures)."""
    times: dict[str, list[float]] = {name: [] for name in tools}
    drawn: dict[str, list[Image.Image]] = {}
    for _ in range(rounds + 1):
        for name in random.sample(list(tools), 2):
            start = time.perf_counter()
            drawn[name] = tools[name](grid)
            times[name].append(time.perf_counter() - start)
    mine, other = times["ours"][1:], times["theirs"][1:]  # the first round warms up
    apart = [
        float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean())
        for a, b in zip(drawn["ours"], drawn["theirs"], strict=True)
    ]
    return median(b / a for a, b in zip(mine, other, strict=True)), median(mine), median(other), max(apart)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    missed = False
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "adapters"
        folder.mkdir()
        adapters(folder)
        playground = Playground(Settings(Path(root) / "home", adapters=(folder,)))
        tools = {"ours": ours(playground, args.steps), "theirs": theirs(folder, args.steps)}
        for grid in ("weights", "adapters"):
            times, mine, other, apart = ratio(tools, grid, args.rounds)
            missed |= times < BAR or apart > LEVELS
            print(f"{grid} x seeds: {times:.2f} times as fast ({mine:.2f} s against {other:.2f} s); "
                  f"pictures differ by {apart:.2f} of 255 at most")  # fmt: skip
        playground.close()
    if missed:
        print(f"the bar is {BAR:g} times, and {LEVELS:g} levels")
        raise SystemExit(1)


if __name__ == "__main__":
    program(main, sys.argv[1:])
