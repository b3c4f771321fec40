"""The whole job on the embedded base: train a style, load it, see and prove the difference.

    imgadapt demo --output demo_out

Trains a LoRA on 40 pictures of a style and, with the same budget, a placebo on the same subjects as the base draws
them. Writes style.safetensors, style.kohya.safetensors, grid.png, metrics.json and report.html. No network, no GPU.
"""

import argparse
import base64
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from matplotlib.figure import Figure
from PIL import Image

from imgadapt import attach, demo, detach, load, save, set_weights
from imgadapt.atomic import write_bytes
from imgadapt.cli import program
from imgadapt.errors import Interrupted, TrainingError
from imgadapt.stopping import Stopped, unbroken
from imgadapt.training import families, objective, pictures, probe
from imgadapt.training.config import TrainConfig
from imgadapt.training.data import scan
from imgadapt.training.evaluate import bootstrap, held_out_losses
from imgadapt.training.material import Material

RECIPE = ["--rank", "8", "--batch-size", "16", "--learning-rate", "2e-3", "--targets", "transformer", "convolution"]
STRENGTHS = (0.5, 1.0)
COLUMNS = 10


def train(folder: Path, output: Path, steps: int, seed: int) -> float:
    """`imgadapt style`, as a user runs it; returns the seconds of its steps (a finished run is not done again)."""
    command = [sys.executable, "-m", "imgadapt", "style", os.fspath(folder), "--output", os.fspath(output)]
    command += ["--steps", str(steps), "--seed", str(seed), "--no-report", *RECIPE]
    process = None
    try:
        with unbroken():  # or it would go on alone
            process = subprocess.Popen(command, start_new_session=True)  # Ctrl-C comes here only
        status = process.wait()
    except Stopped as stopped:
        if process is not None:
            process.send_signal(stopped.number)  # it saves and ends
            process.wait()
        raise Interrupted(f"{stopped}; run the same command to go on", stopped.number) from None
    if status:
        raise TrainingError(f"the training of {folder.name} ended with status {status}; see above")
    return float(json.loads((output / "log.jsonl").read_text("utf-8").splitlines()[-1])["seconds"])


def curve(logs: Mapping[str, Path]) -> str:
    """Loss over steps as SVG, smoothed over 15 steps."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="training loss")
    for name, path in logs.items():
        losses = torch.tensor([json.loads(line)["loss"] for line in path.read_text("utf-8").splitlines()])
        window = min(15, len(losses))
        axes.plot(range(window, len(losses) + 1), losses.unfold(0, window, 1).mean(1).tolist(), label=name)
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue().decode().partition("\n")[2]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_out"), help="folder to write [demo_out]")
    parser.add_argument("--steps", type=int, default=120, help="training steps of style and placebo [120]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    start = time.monotonic()
    out: Path = args.output

    print(f"1/4 training the style on {demo.STYLE / 'train'}", flush=True)
    runs = {"style": out / "style_run", "placebo": out / "placebo_run"}
    seconds = train(demo.STYLE / "train", runs["style"], args.steps, args.seed)
    print("2/4 training the placebo: the same subjects, drawn as the base draws them", flush=True)
    train(demo.STYLE / "plain", runs["placebo"], args.steps, args.seed)

    print("3/4 loading the files into fresh pipelines", flush=True)
    trained = load(runs["style"] / "adapter.safetensors")
    files = [save(trained, out / "style.safetensors"), save(trained, out / "style.kohya.safetensors", format="kohya")]
    live = probe.load(runs["style"] / "probe.safetensors")
    errors: list[float] = []
    for path in files:
        fresh = families.load("demo")
        attach(fresh.pipeline, load(path))
        errors.append(probe.error(fresh, live))

    print("4/4 drawing and measuring", flush=True)
    family = families.load("demo")
    held_out = scan(demo.STYLE / "held_out")
    config = TrainConfig.of({"folder": demo.STYLE / "held_out", "cache": out / "cache"})
    material = Material(config, family, held_out, fixed=True)
    asked = objective.of(config, family.schedule, objective.Sampling())
    shown = held_out[:: len(held_out) // COLUMNS][:COLUMNS]
    prompts, seeds = [example.captions[0] for example in shown], list(range(COLUMNS))
    losses = {"base": held_out_losses(family, asked, material)}
    rows: dict[str, list[Image.Image]] = {"base": family.draw(prompts, seeds)}
    attach(family.pipeline, trained)
    losses["adapted"] = held_out_losses(family, asked, material)
    for strength in STRENGTHS:
        set_weights(family.pipeline, {"default": strength})
        rows[f"style at {strength:g}"] = family.draw(prompts, seeds)
    rows["true pictures"] = [Image.open(example.path) for example in shown]
    detach(family.pipeline)
    attach(family.pipeline, load(runs["placebo"] / "adapter.safetensors"))
    losses["placebo"] = held_out_losses(family, asked, material)
    rows["placebo at 1"] = family.draw(prompts, seeds)

    gaps = {name: bootstrap(losses["adapted"], losses[name]) for name in ("base", "placebo")}
    metrics: dict[str, Any] = {f"held_out_loss_{name}": round(x.mean().item(), 5) for name, x in losses.items()}
    metrics |= {f"gap_to_{name}": dict(zip(("mean", "low", "high"), row, strict=True)) for name, row in gaps.items()}
    metrics |= {"max_abs_error_reload": max(errors), "held_out_pictures": len(held_out), "steps": args.steps}
    grid = pictures.png(pictures.sheet(list(rows.values()), list(rows), prompts, scale=2))
    write_bytes(out / "grid.png", grid)
    metrics |= {"seconds_train": round(seconds, 1), "seconds_total": round(time.monotonic() - start, 1)}
    write_bytes(out / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    template = jinja2.Environment(autoescape=True).from_string(Path(__file__).with_name("demo_report.html").read_text())
    page = template.render(
        metrics=metrics, gaps=gaps, grid=base64.b64encode(grid).decode(), size=files[0].stat().st_size,
        curve=curve({name: folder / "log.jsonl" for name, folder in runs.items()}), recipe=" ".join(RECIPE),
    )  # fmt: skip
    write_bytes(out / "report.html", page.encode())
    print(json.dumps(metrics, indent=2), f"\n\nLook at {out / 'report.html'} and {out / 'grid.png'}.")
    if max(errors) > 1e-5 or min(low for _, low, _ in gaps.values()) <= 0:
        raise TrainingError("the demo did not prove its point: see the figures above")


if __name__ == "__main__":
    program(main, sys.argv[1:])
