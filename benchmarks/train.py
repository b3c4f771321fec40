"""Time whole training steps, and take their memory: imgadapt's run against diffusers' example script with peft.

    python benchmarks/train.py                          # embedded base, batch 8, every method, 9 rounds of 3 steps
    python benchmarks/train.py --methods lora dora --batch 16 --rounds 15 --memory
    python benchmarks/random_base.py sd1 /tmp/sd1   # and then
    python benchmarks/train.py --base /tmp/sd1 --side 256 --batch 1 --steps 1

Ours is what `imgadapt style` does in a step, log and all (cached latents and text). Theirs is the loop of diffusers'
train_text_to_image_lora.py on cached latents and text, its unet adapted by peft, with the same layers, rank, alpha,
batch and precision. Both run in one process, in turns; a figure is the median over rounds of ours / theirs.
--memory: peak of the resident set above that of the loaded base, each tool in a process of its own.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
from torch.nn import functional as F

from imgadapt import demo
from imgadapt.cli import program
from imgadapt.training import families
from imgadapt.training.config import TrainConfig
from imgadapt.training.job import Job
from imgadapt.training.loop import Terms
from imgadapt.training.memory import resident

ENDS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
BAR = {"lora": 1.0, "oft": 1.0}  # at most so much of their time; the others half of it
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {  # ours, peft's class, its settings
    "lora": ("lora(rank=8, alpha=4)", "LoraConfig", {"r": 8, "lora_alpha": 4}),
    "dora": ("dora(lora(rank=8, alpha=4))", "LoraConfig", {"r": 8, "lora_alpha": 4, "use_dora": True}),
    "loha": ("loha(rank=8, alpha=4)", "LoHaConfig", {"r": 8, "alpha": 4}),
    "lokr": ("lokr(rank=8, alpha=4, factor=8)", "LoKrConfig", {"r": 8, "alpha": 4, "decompose_factor": 8}),
    "oft": ("oft(block_size=16)", "OFTConfig", {"r": 0, "oft_block_size": 16}),
    "boft": ("boft(block_size=4, factors=2)", "BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
}
Step = Callable[[int], None]


@dataclass(frozen=True)
class Case:
    """What both train: a method on a base, at a side in pixels (0: the base's own), in batches; how many threads."""

    method: str
    base: str
    side: int
    batch: int
    threads: int


def ours(case: Case, output: Path) -> Step:
    """A step of a run of imgadapt's."""
    torch.set_num_threads(case.threads)
    batch = case.batch
    few = output / "pictures"  # one is enough to be timed, and evaluations of a large base are not
    few.mkdir()
    for path in sorted((demo.STYLE / "train").glob("axe.*")):
        shutil.copy(path, few)
    config = TrainConfig.of({
        "folder": few, "output": output, "method": METHODS[case.method][0], "targets": ENDS, "steps": 10**6,
        "batch_size": batch, "learning_rate": 1e-4, "log_with": [], "report": False, "base": case.base,
        "resolution": [case.side] if case.side else [],
    })  # fmt: skip
    job = Job(config)
    run = job.run()
    run.__enter__()

    def loss(step: int, places: range) -> Terms:
        material = job.material.batch(step, places)
        asked = job.objective.ask(material.latents, config.seed, step, places, batch)
        guess = job.family.predict(asked.noisy, material.conditions, asked.times)
        losses = job.objective.losses(guess, material.latents, asked.noise, asked.times)
        return Terms(losses.weighted, losses.raw, asked.times, material.names)

    return lambda step: run.learn(step, loss)


def theirs(case: Case) -> Step:
    """A step of diffusers' script: add_noise, unet, mse_loss, backward, clip_grad_norm_, AdamW, a constant schedule."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler

    torch.set_num_threads(case.threads)
    family = families.load(case.base)
    pipe, unet, batch = family.pipeline, family.pipeline.unet, case.batch
    _, kind, options = METHODS[case.method]
    peft.inject_adapter_in_model(getattr(peft, kind)(target_modules=ENDS, **options), unet)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-3)
    schedule = get_scheduler("constant", optimizer)
    schedule_of_base: Any = DDPMScheduler.from_config(pipe.scheduler.config)
    (channels, factor), states = family.latent_shape, family.blank(batch)["states"]
    places = (case.side or family.native) // factor
    latents = torch.randn(batch, channels, places, places)
    velocity = family.schedule.prediction == "v_prediction"
    unet.train()

    def step(number: int) -> None:
        noise = torch.randn_like(latents)
        times = torch.randint(0, 1000, (batch,))
        guess = unet(schedule_of_base.add_noise(latents, noise, times), times, states, return_dict=False)[0]
        target = schedule_of_base.get_velocity(latents, noise, times) if velocity else noise
        loss = F.mse_loss(guess.float(), target.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.detach().item()  # for the progress bar

    return step


def ratio(case: Case, rounds: int, steps: int) -> tuple[float, float, float]:
    """(median ratio, our and their seconds a step)."""
    with tempfile.TemporaryDirectory() as folder:
        tools = {"ours": ours(case, Path(folder)), "theirs": theirs(case)}
        times: dict[str, list[float]] = {name: [] for name in tools}
        for turn in range(rounds + 1):
            for name in random.sample(list(tools), 2):
                start = time.perf_counter()
                for k in range(steps):
                    tools[name](turn * steps + k)
                times[name].append((time.perf_counter() - start) / steps)
        mine, other = times["ours"][1:], times["theirs"][1:]  # the first round warms up
        return median(a / b for a, b in zip(mine, other, strict=True)), median(mine), median(other)


def memory(case: Case, tool: str) -> float:
    """MiB that a run takes at most above the process that has loaded the base."""
    given = {"methods": case.method, "base": case.base, "side": case.side, "batch": case.batch, "threads": case.threads}
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, __file__, *flags, "--probe", tool]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(said.stdout.strip().splitlines()[-1])


def probe(case: Case, tool: str) -> None:
    """Print the MiB, in a process that does nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        step = ours(case, Path(folder)) if tool == "ours" else theirs(case)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew: loading is not what is measured
        before = resident("VmRSS")
        for number in range(6):
            step(number)
        print((resident("VmHWM") - before) / 2**20)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--base", default="demo", help="demo, or the folder of an SD1 [demo]")
    parser.add_argument("--side", type=int, default=0, help="pixels; the base's own when not given")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="steps a round [3]")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--probe", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.probe:
        probe(Case(args.methods[0], args.base, args.side, args.batch, args.threads), args.probe)
        return
    rows: dict[str, dict[str, float]] = {}
    for method in args.methods:
        case = Case(method, args.base, args.side, args.batch, args.threads)
        value, mine, other = ratio(case, args.rounds, args.steps)
        rows[method] = {"ratio": value, "ours_ms": mine * 1e3, "theirs_ms": other * 1e3, "bar": BAR.get(method, 0.5)}
        if args.memory:
            used = [memory(case, tool) for tool in ("ours", "theirs")]
            rows[method] |= dict(zip(("ours_mib", "theirs_mib"), used, strict=True))
        print(method, "  ".join(f"{name} {figure:.3g}" for name, figure in rows[method].items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    program(main, sys.argv[1:])
