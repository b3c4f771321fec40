"""What each method learns of a style in equal steps, at its own best learning rate: held-out loss on the embedded base.

    python benchmarks/methods.py --output methods.json            # goes on where it stopped; then the table
    python benchmarks/methods.py --output methods.json --only lora dora --steps 150 --batch 8

40 pictures of the demo style, 96 held-out subjects. The rate is tuned on 48 of them, from three, extended while the
best one is at an end; the loss reported is that of the other 48, with the paired bootstrap interval of the gain.
The placebo is trained alike, on the same subjects as the base draws them. Losses do not depend on how busy the machine
is; seconds do.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from imgadapt import demo, detach
from imgadapt.atomic import write_bytes
from imgadapt.cli import program
from imgadapt.errors import TrainingError
from imgadapt.training import families, objective, optimizers, recipe
from imgadapt.training.config import TrainConfig
from imgadapt.training.data import scan
from imgadapt.training.evaluate import bootstrap, held_out_losses
from imgadapt.training.loop import Run, Terms
from imgadapt.training.material import Material
from imgadapt.training.processes import Processes

STEP = 2.5  # factor between learning rates that are tried beyond the three
METHODS: Mapping[str, tuple[str, Sequence[float]]] = {
    "lora": ("lora(rank=8)", (1e-3, 2e-3, 4e-3)),
    "dora": ("dora(lora(rank=8))", (1e-3, 2e-3, 4e-3)),
    "loha": ("loha(rank=8)", (2e-3, 4e-3, 8e-3)),
    "lokr": ("lokr(factor=8)", (2e-3, 5e-3, 1e-2)),
    "lokr-low": ("lokr(rank=4, factor=-1)", (2e-3, 5e-3, 1e-2)),
    "oft": ("oft(block_size=8)", (2e-3, 5e-3, 1e-2)),
    "boft": ("boft(block_size=4, factors=2)", (2e-3, 5e-3, 1e-2)),
    "glora": ("glora(rank=8)", (5e-4, 1e-3, 2e-3)),
    "ia3": ("ia3", (1e-2, 3e-2, 1e-1)),
    "full": ("full", (1e-4, 3e-4, 1e-3)),
    "norm": ("norm", (3e-3, 1e-2, 3e-2)),
}


class Study:
    """The base, the pictures of style and placebo, and the held-out ones in two halves."""

    def __init__(self, steps: int, batch: int, folder: Path) -> None:
        self.steps, self.batch, self.folder, self.processes = steps, batch, folder, Processes()
        self.family = families.load("demo")
        base = self.config("lora", 1e-3)
        self.material = {name: Material(base, self.family, scan(demo.STYLE / name)) for name in ("train", "plain")}
        held_out = scan(demo.STYLE / "held_out")
        self.tuning = Material(base, self.family, held_out[0::2], fixed=True)
        self.judging = Material(base, self.family, held_out[1::2], fixed=True)
        for material in (*self.material.values(), self.tuning, self.judging):
            material.prepare(quiet=True)
        self.objective = objective.of(base, self.family.schedule, self.family.sampling(8, 8))
        self.base = self.losses(self.judging)

    def config(self, method: str, rate: float) -> TrainConfig:
        """The settings of one training."""
        targets = ["norm*"] if method == "norm" else ["transformer", "convolution"]
        return TrainConfig.of({
            "folder": demo.STYLE / "train", "output": self.folder, "method": METHODS[method][0], "learning_rate": rate,
            "steps": self.steps, "batch_size": self.batch, "targets": targets, "checkpoint_every": 10**6,
            "log_with": [],
        })  # fmt: skip

    def losses(self, material: Material) -> torch.Tensor:
        """(pictures, timesteps) of the model as it is."""
        return held_out_losses(self.family, self.objective, material)

    def train(self, method: str, rate: float, pictures: str) -> dict[str, Any]:
        """Train anew; losses on both halves, numbers trained, seconds."""
        config = self.config(method, rate)
        torch.manual_seed(config.seed)
        recipe.put_on(config, self.family.pipeline)
        rows = recipe.tensors(self.family.pipeline)
        optimizer = optimizers.build(config, recipe.groups(config, rows))
        material = self.material[pictures]

        def loss(step: int, places: range) -> Terms:
            batch = material.batch(step, places)
            asked = self.objective.ask(batch.latents, config.seed, step, places, config.batch_size)
            guess = self.family.predict(asked.noisy, batch.conditions, asked.times)
            losses = self.objective.losses(guess, batch.latents, asked.noise, asked.times)
            return Terms(losses.weighted, losses.raw, asked.times, batch.names)

        start = time.monotonic()
        with tempfile.TemporaryDirectory(dir=self.folder) as output:
            own = config.model_copy(update={"output": Path(output)})
            with Run(own, rows, optimizer, {}, self.processes) as run:
                for step in run.steps():
                    run.learn(step, loss)
        seconds = time.monotonic() - start
        judged, tuned = self.losses(self.judging), self.losses(self.tuning).mean().item()
        detach(self.family.pipeline)
        gain, low, high = bootstrap(judged, self.base)
        numbers = sum(row.parameter.numel() for row in rows)
        return {
            "rate": rate, "tuned": tuned, "loss": judged.mean().item(), "gain": gain, "low": low, "high": high,
            "numbers": numbers, "seconds": seconds,
        }  # fmt: skip


def best(tried: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The run of the least tuning loss."""
    return min(tried.values(), key=lambda row: row["tuned"])


def study(study: Study, method: str, found: dict[str, Any], output: Path) -> None:
    """Tune a method's rate, and train its placebo; what is in `found` is not done again."""
    tried = found.setdefault(method, {"runs": {}})["runs"]
    rates = list(METHODS[method][1])
    while rates:
        rate = rates.pop(0)
        if f"{rate:.3g}" not in tried:
            try:
                tried[f"{rate:.3g}"] = study.train(method, rate, "train")
            except TrainingError as error:
                detach(study.family.pipeline)  # a rate at which it diverges
                tried[f"{rate:.3g}"] = {"rate": rate, "tuned": float("inf"), "diverged": str(error)[:80]}
            write_bytes(output, json.dumps(found, indent=1).encode())
        if not rates and len(tried) < 5:
            known, top = sorted(row["rate"] for row in tried.values()), best(tried)["rate"]
            if top in (known[0], known[-1]):
                rates = [top * STEP if top == known[-1] else top / STEP]
    if "placebo" not in found[method]:
        found[method]["placebo"] = study.train(method, best(tried)["rate"], "plain")
        write_bytes(output, json.dumps(found, indent=1).encode())


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON of all runs")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    found: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        made = Study(args.steps, args.batch, Path(folder))
        found.setdefault("base", {"loss": made.base.mean().item(), "steps": args.steps, "batch": args.batch})
        for method in args.only:
            study(made, method, found, args.output)
    rows = {name: best(row["runs"]) for name, row in found.items() if name != "base"}
    print(f"base {found['base']['loss']:.4f}")
    print(f"| method | rate | numbers | held-out loss | gain (95 %) | placebo | s |\n|{'---|' * 7}")
    for name, row in sorted(rows.items(), key=lambda item: item[1]["loss"]):
        placebo = found[name]["placebo"]["loss"]
        print(f"| `{METHODS[name][0]}` | {row['rate']:g} | {row['numbers']:,} | {row['loss']:.4f} | {row['gain']:.4f} "
              f"({row['low']:.4f} to {row['high']:.4f}) | {placebo:.4f} | {row['seconds']:.0f} |")  # fmt: skip


if __name__ == "__main__":
    program(main, sys.argv[1:])
