"""Every method on the embedded base, each tuned by the same budget: what it learns, what it spoils, what it costs.

    python benchmarks/methods.py STYLES --output methods.jsonl --jobs 2            # goes on where it stopped
    python benchmarks/methods_table.py methods.jsonl --picture docs/methods.svg    # the table, and the Pareto picture

STYLES has a folder for each of --tasks, with train/, plain/ and held_out/, as train_scripts/demo_base/styles.py makes
them of the same 40 and 96 subjects; `character` is drawn here. Captions say `ohwx` in front. benchmarks/methods.toml
lists the methods, each at three sizes, and a rate that `--look` found. A method's rate is tuned at its middle size
from that of the table: five tries by factors of two, on 24 held-out subjects of the first task; small tries that rate
and double, large that rate and half. Then each size learns each task from three seeds: all middle sizes first, then
the others from one seed, then from the rest. Its loss is that on other held-out pictures (48 subjects; 6 of the
character); drift is the loss on `plain` pictures, without the word, over that of the base. Losses do not depend on how
busy the machine is; seconds do, and are measured by `--time`, a step of each in turn with LoRA's, in one process.
What the trainings print is in OUTPUT.log.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from imgadapt import collect, demo, detach, save
from imgadapt.cli import program
from imgadapt.demo import character
from imgadapt.errors import ImgadaptError, Interrupted, TrainingError
from imgadapt.training import families, objective, optimizers, recipe, rules
from imgadapt.training.config import TrainConfig
from imgadapt.training.data import scan
from imgadapt.training.evaluate import held_out_losses
from imgadapt.training.loop import Run, Terms
from imgadapt.training.material import Material
from imgadapt.training.processes import Processes
from imgadapt.training.starts import beginning

SIZES = ("small", "middle", "large")
WORD = "ohwx"


@dataclass(frozen=True)
class Case:
    """One method at one size."""

    name: str
    size: str
    method: str
    rate: float
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    fixed: bool = False
    """Whether the rate is this one, untuned."""

    @property
    def key(self) -> str:
        return f"{self.name} {self.size}"


def cases(path: Path) -> list[list[Case]]:
    """Of each method its sizes, the middle one first."""
    made: list[list[Case]] = []
    for name, row in tomllib.loads(path.read_text("utf-8")).items():
        sizes = ("middle",) if len(row["sizes"]) == 1 else SIZES
        of_size = {
            size: Case(name, size, method, row["rate"], row.get("settings", {}), row.get("fixed", False))
            for size, method in zip(sizes, row["sizes"], strict=True)
        }
        made.append([of_size[size] for size in ("middle", "small", "large") if size in of_size])
    return made


class Study:
    """The base, and the pictures of all tasks."""

    def __init__(self, styles: Path, tasks: Sequence[str], steps: int, batch: int, folder: Path) -> None:
        self.tasks, self.steps, self.batch, self.folder = tasks, steps, batch, folder
        self.processes = Processes()
        self.family = families.load("demo")
        shared = self.config(Case("lora", "middle", "lora", 1e-3), 1e-3, 0)
        self.train: dict[str, Material] = {}
        self.judging: dict[str, Material] = {}
        for task in tasks:
            if task == "character":
                character.draw(folder / "seen", character.SEEN, 12, 0)
                character.draw(folder / "held_out", character.HELD_OUT, 6, 1)
                seen, held_out = scan(folder / "seen"), scan(folder / "held_out")
            else:
                seen = scan(styles / task / "train", trigger=WORD)
                held_out = scan(styles / task / "held_out", trigger=WORD)
            self.train[task] = Material(shared, self.family, seen)
            self.judging[task] = Material(
                shared, self.family, held_out[1::2] if task != "character" else held_out, fixed=True
            )
            if task == tasks[0]:
                self.tuning = Material(shared, self.family, held_out[0::4], fixed=True)
        self.prior = Material(shared, self.family, scan(demo.STYLE / "plain")[::2], fixed=True)
        for material in (*self.train.values(), *self.judging.values(), self.tuning, self.prior):
            material.prepare(quiet=True)
        self.objective = objective.of(shared, self.family.schedule, self.family.sampling(8, 8))

    def config(self, case: Case, rate: float, seed: int) -> TrainConfig:
        """The settings of one training."""
        return TrainConfig.of({
            "folder": demo.STYLE / "train", "output": self.folder, "method": case.method, "learning_rate": rate,
            "steps": self.steps, "batch_size": self.batch, "targets": ["transformer", "convolution"], "seed": seed,
            "checkpoint_every": 10**6, "log_with": [], "warmup_steps": 5, **case.settings,
        })  # fmt: skip

    def losses(self, material: Material) -> list[float]:
        """Of each picture of it, the mean over four timesteps, of the model as it is."""
        found = held_out_losses(self.family, self.objective, material, timesteps=4).mean(1)
        return [round(loss, 6) for loss in found.tolist()]

    def learn(self, case: Case, rate: float, task: str, seed: int, *, below: float | None = None) -> dict[str, Any]:
        """Train anew, and look. below: look at the loss that rates are tuned on first, and at what is reported only if
        that is less than this.
        """
        material, pipeline = self.train[task], self.family.pipeline
        with tempfile.TemporaryDirectory(dir=self.folder) as output:
            config = self.config(case, rate, seed).model_copy(update={"output": Path(output)})
            torch.manual_seed(seed)
            recipe.put_on(config, pipeline)
            try:
                if config.start:
                    beginning.begin(
                        config, self.family, self.objective, material, self.processes, origin={}, originals={}
                    )
                    rules.hold(config, pipeline)
                rows, rule = recipe.tensors(pipeline), rules.of(config, pipeline)
                optimizer = optimizers.build(config, recipe.groups(config, rows))

                def loss(step: int, places: range) -> Terms:
                    batch = material.batch(step, places)
                    asked = self.objective.ask(batch.latents, seed, step, places, config.batch_size)
                    guess = self.family.predict(asked.noisy, batch.conditions, asked.times)
                    losses = self.objective.losses(guess, batch.latents, asked.noise, asked.times)
                    return Terms(losses.weighted, losses.raw, asked.times, batch.names)

                with Run(config, rows, optimizer, {}, self.processes, rule=rule) as run:
                    for step in run.steps():
                        run.learn(step, loss)
                found: dict[str, Any] = {}
                if below is not None:
                    found["tuned"] = statistics.fmean(self.losses(self.tuning))
                    if found["tuned"] >= below:
                        return found
                file = rule.file(collect(pipeline))
                path = save(file, Path(output) / "x.safetensors", format="imgadapt", dtype=torch.float16)
                return found | {
                    "losses": self.losses(self.judging[task]), "prior": self.losses(self.prior),
                    "numbers": sum(row.parameter.numel() for row in rows), "bytes": path.stat().st_size,
                }  # fmt: skip
            except Interrupted:
                raise
            except TrainingError as error:  # a rate at which it diverges
                return {"diverged": str(error)[:120]}
            finally:
                detach(pipeline)

    def base(self) -> dict[str, Any]:
        return {
            "losses": {task: self.losses(material) for task, material in self.judging.items()},
            "prior": self.losses(self.prior), "steps": self.steps, "batch": self.batch,
        }  # fmt: skip


class Found:
    """The rows of a file of results, one JSON a line, that several processes add to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in map(json.loads, lines)}

    def get(self, key: str) -> dict[str, Any] | None:
        return self.rows.get(key)

    def add(self, key: str, row: Mapping[str, Any]) -> dict[str, Any]:
        self.rows[key] = {"key": key, **row}
        with self.path.open("a", encoding="utf-8") as file:  # a line at a time, which appending keeps whole
            file.write(json.dumps(self.rows[key]) + "\n")
        return self.rows[key]


def tuned(study: Study, case: Case, start: float, found: Found) -> float:
    """The best rate: at the middle size of three by factors of two and two more towards the better end, at the others
    of two. The training of the best one is also that of the first task and seed.
    """
    if case.fixed:
        return start
    tried: dict[float, float] = {}

    def attempt(rate: float) -> None:
        key = f"tune {case.key} {rate:.4g}"
        row = found.get(key)
        if row is None:
            least = min(tried.values(), default=float("inf"))
            made = study.learn(case, rate, study.tasks[0], 0, below=least)
            row = found.add(key, {"case": case.name, "size": case.size, "rate": rate, **made})
        tried[rate] = row.get("tuned", float("inf"))

    for factor in {"small": (1.0, 2.0), "middle": (1.0, 0.5, 2.0), "large": (1.0, 0.5)}[case.size]:
        attempt(start * factor)
    if case.size == "middle":
        for _ in range(2):
            best, known = min(tried, key=lambda r: tried[r]), sorted(tried)
            below, above = best / 2, best * 2
            wanted = [r for r in (above, below) if not any(abs(r / k - 1) < 1e-6 for k in known)]
            # at an end it goes on there; between two it looks half-way to the better neighbour
            attempt(wanted[0] if wanted else best * 2 ** (0.5 if tried[above] < tried[below] else -0.5))
    return min(tried, key=lambda r: tried[r])


@dataclass(frozen=True)
class Job:
    """Of one method, some seeds at some sizes."""

    middle: Case
    sizes: Sequence[Case]
    seeds: Sequence[int]


def jobs(chosen: Sequence[Sequence[Case]], seeds: int) -> Iterator[Job]:
    """What is to be done, the most telling first."""
    for sizes in chosen:
        yield Job(sizes[0], sizes[:1], range(seeds))
    for some in (range(1), range(1, seeds)):
        for sizes in chosen:
            if sizes[1:] and some:
                yield Job(sizes[0], sizes[1:], some)


def do(study: Study, job: Job, found: Found) -> None:
    """All that is to be known, save what is found already."""
    start = tuned(study, job.middle, job.middle.rate, found)
    for case in job.sizes:
        rate = start if case is job.middle else tuned(study, case, start, found)
        tried = found.get(f"tune {case.key} {rate:.4g}") or {}
        about = {"case": case.name, "size": case.size, "method": case.method, "rate": rate}
        for task in study.tasks:
            for seed in job.seeds:
                key = f"run {case.key} {task} {seed}"
                if found.get(key) is None:
                    same = (task, seed) == (study.tasks[0], 0) and "losses" in tried
                    made = (
                        {k: tried[k] for k in ("losses", "prior", "numbers", "bytes")}
                        if same
                        else study.learn(case, rate, task, seed)
                    )
                    found.add(key, {**about, "task": task, "seed": seed, **made})


_study: list[Study] = []  # of this process


def begin(styles: Path, tasks: Sequence[str], steps: int, batch: int, folder: Path, output: Path) -> None:
    """In a process of its own: make ready."""
    torch.set_num_threads(1)
    sys.stderr = open(f"{output}.log", "a", encoding="utf-8")  # noqa: SIM115  of the process
    _study.append(Study(styles, tasks, steps, batch, Path(tempfile.mkdtemp(dir=folder))))


def work(job: Job, output: Path) -> str:
    about = f"{job.middle.name}: {', '.join(case.size for case in job.sizes)}, seeds {[*job.seeds]}"
    try:
        do(_study[0], job, Found(output))
    except Interrupted:
        raise
    except ImgadaptError as error:
        return f"{about}: {error}"
    return f"{about}: done"


def look(study: Study, case: Case) -> float:
    """A rate to start from, of the table's and others by factors of four: that of the least tuning loss."""
    losses: dict[float, float] = {}
    rates, best = [case.rate], case.rate
    while rates:
        for rate in rates:
            losses[rate] = study.learn(case, rate, study.tasks[0], 0, below=0.0).get("tuned", float("inf"))
        best = min(losses, key=lambda r: losses[r])
        rates = [r for r in (best * 4, best / 4) if not any(abs(r / k - 1) < 1e-6 for k in losses)]
    return best


def step_times(study: Study, chosen: Sequence[Case], rounds: int) -> Iterator[tuple[Case, float]]:
    """Seconds of a step over those of LoRA's middle size, the median of rounds in which both are measured."""
    for case in chosen:
        ratios: list[float] = []
        for _ in range(rounds):
            ours, theirs = (_step(study, c) for c in (case, Case("lora", "middle", "lora(rank=8)", 1e-3)))
            ratios.append(ours / theirs)
        yield case, statistics.median(ratios)


def _step(study: Study, case: Case, count: int = 4) -> float:
    """Seconds of a forward and a backward, without the optimiser, the least of a few."""
    recipe.put_on(study.config(case, 1e-3, 0), study.family.pipeline)
    batch = study.train[study.tasks[0]].batch(0, range(study.batch))
    asked = study.objective.ask(batch.latents, 0, 0, range(study.batch), study.batch)
    seconds: list[float] = []
    for _ in range(count):
        start = time.perf_counter()
        guess = study.family.predict(asked.noisy, batch.conditions, asked.times)
        study.objective.losses(guess, batch.latents, asked.noise, asked.times).weighted.sum().backward()
        seconds.append(time.perf_counter() - start)
    detach(study.family.pipeline)
    return min(seconds)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("styles", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="a line of JSON for each training")
    parser.add_argument("--methods", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--only", nargs="+", default=[], help="methods; all when not given")
    parser.add_argument("--tasks", nargs="+", default=["duotone", "ink", "character"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, a thread each")
    parser.add_argument("--time", type=int, metavar="ROUNDS", help="measure the steps instead")
    parser.add_argument(
        "--look", action="store_true", help="say a rate to start from for the table (--steps 12) instead"
    )
    args = parser.parse_args(argv)
    chosen = [sizes for sizes in cases(args.methods) if not args.only or sizes[0].name in args.only]
    found = Found(args.output)
    with tempfile.TemporaryDirectory() as folder:
        if args.time or args.look or found.get("base") is None:
            study = Study(args.styles, args.tasks, args.steps, args.batch, Path(folder))
            if args.look:
                for sizes in chosen:
                    print(f"{sizes[0].name:24} {look(study, sizes[0]):.3g}", flush=True)
                return
            if args.time:
                for case, ratio in step_times(study, [case for sizes in chosen for case in sizes], args.time):
                    found.add(f"time {case.key}", {"case": case.name, "size": case.size, "ratio": ratio})
                    print(f"{case.key:24} {ratio:.2f} x LoRA's step")
                return
            found.add("base", study.base())
        shared = (args.styles, args.tasks, args.steps, args.batch, Path(folder), args.output)
        with multiprocessing.get_context("spawn").Pool(args.jobs, begin, shared) as pool:
            for told in pool.imap_unordered(partial(work, output=args.output), jobs(chosen, args.seeds)):
                print(told, flush=True)


if __name__ == "__main__":
    program(main, sys.argv[1:])
