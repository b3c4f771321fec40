"""Preflight: all that can be known of a training before it is run: its pictures, and what it takes of memory, disk and
time."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from imgadapt.errors import ConfigError, TrainingError
from imgadapt.training import fit, ladder, lint, memory, outlay, subject, trial, words
from imgadapt.training import plan as planning
from imgadapt.training.buckets import View
from imgadapt.training.config import TrainConfig
from imgadapt.training.data import Example
from imgadapt.training.families import Family, hub
from imgadapt.training.families.sketch import tokenizer_of
from imgadapt.training.finding import Finding
from imgadapt.training.job import pictures
from imgadapt.training.plan import Kind, Plan
from imgadapt.training.swap import repeated
from imgadapt.training.trial import Trial

_SETTLED: Mapping[Kind, Callable[[Any], TrainConfig]] = {
    "character": subject.with_caption,
    "concept": words.settled,
}
"""What the programs do first with their settings."""


@dataclass(frozen=True)
class Preflight:
    """What is known.

    config: the plan's, as its program takes it. tokens: least and most of the captions, and how many the base reads,
    where its tokenizers are there. room: bytes that are free for it. changes: with which it fits, where it does not.
    trial: None, and then `untried` says why. times: seconds by what they are for; none without a trial.
    """

    plan: Plan
    config: TrainConfig
    device: torch.device
    examples: Sequence[Example]
    held_out: Sequence[Example]
    findings: Sequence[Finding]
    views: Sequence[View]
    tokens: tuple[int, int, int] | None
    need: fit.Need
    room: int
    changes: Sequence[ladder.Change]
    disks: Sequence[outlay.Disk]
    trial: Trial | None = None
    untried: str = ""
    times: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def fits(self) -> bool:
        """Whether memory is enough."""
        return ladder.fits(max(self.need.peak, (self.trial and self.trial.peak) or 0), self.room)

    @property
    def curable(self) -> bool:
        """Whether it would be, with the changes."""
        return bool(self.changes) and ladder.fits(self.changes[-1].peak, self.room)

    @property
    def faults(self) -> list[str]:
        """Why it cannot be run as it is; none where it can."""
        errors = [f.text for f in self.findings if f.level == "error"]
        full = [disk for disk in self.disks if disk.total > disk.free]
        return [
            *errors,
            *([] if self.fits else ["it does not fit into memory"]),
            *(f"there is no space for it on the disk of {disk.folder}" for disk in full),
        ]


def look(
    given: Mapping[str, Any],
    kind: Kind | None,
    device: torch.device,
    *,
    step: bool = True,
    room: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Preflight:
    """Look at a training. given, kind: as `plan.of` takes them. step: try real ones, where the base is on this machine.

    room: bytes of memory, in the place of those that are free. say: is told what is being done; it may take minutes.

    Raises:
        ConfigError, DataError: what is asked cannot be, pictures cannot be read or have no captions.
    """
    say("looking at the pictures")
    made = planning.of(given, kind)
    config = settled(made)
    examples, held_out = pictures(config)
    on_cpu = device.type == "cpu"
    predictor = fit.Predictor(examples, device=device.type)
    family = predictor.family(config)
    predictor.base = memory.process() if on_cpu and sys.platform == "linux" else 0  # after what the sketch imports
    live = fit.learns_text(config, family)
    findings, views, tokens = seen(config, family, examples, held_out)
    say("simulating a step")
    need, room = predictor.need(config), ladder.available(device) if room is None else room
    changes: list[ladder.Change] = []
    if not ladder.fits(need.peak, room):
        say("it does not fit: simulating what may be changed")
        sides = [side // family.step * family.step for side in (family.native * 3 // 4, family.native // 2)]
        blocks = 0 if device.type == "cpu" else len(repeated(family.denoiser))
        changes = ladder.ladder(config, room, predictor.peak, predictor.floor, sides=sides, blocks=blocks)
    untried = _untried(config, step=step, fits=not changes)
    tried: Trial | None = None
    if not untried:
        say("trying real steps")
        try:
            tried = trial.run(config, max(views, key=lambda view: view.size[0] * view.size[1]))
        except TrainingError as error:
            findings, untried = [Finding("error", str(error)), *findings], "it failed"
    times = outlay.durations(config, family, tried, views, len(held_out), live=live) if tried else {}
    return Preflight(
        made, config, device, examples, held_out, findings, views,
        tokens, need, room, changes, outlay.disks(config, family, views, need.step, live=live), tried, untried, times,
    )  # fmt: skip


def settled(made: Plan) -> TrainConfig:
    """A plan's settings as its program takes them."""
    return _SETTLED.get(made.kind, lambda config: config)(made.config)


def seen(
    config: TrainConfig, family: Family, examples: Sequence[Example], held_out: Sequence[Example]
) -> tuple[list[Finding], list[View], tuple[int, int, int] | None]:
    """What the pictures alone tell: (findings, views, tokens), as in Preflight. family: a sketch will do.

    Raises:
        ConfigError, DataError: see `fit.bucketed`, `lint.examine`.
    """
    views, counted = fit.bucketed(config, family, examples), tokenizer_of(family)
    findings = lint.examine(
        [*examples, *(held_out if config.held_out_count else ())], config.folder,
        tokens=counted[0] if counted else None, limit=counted[1] if counted else None,
        resolution=min(config.resolution or [family.native]), trigger=config.trigger,
        alpha_counts=config.mask == "alpha", elsewhere=_elsewhere(config, held_out),
    )  # fmt: skip
    lengths = [counted[0](text) for e in examples for text in e.captions] if counted else []
    return findings, views, (min(lengths), max(lengths), counted[1]) if counted else None


def _elsewhere(config: TrainConfig, held_out: Sequence[Example]) -> list[Path]:
    folders = [config.output, config.cache, config.held_out, getattr(config, "class_folder", None)]
    return [folder for folder in folders if folder is not None]


def _untried(config: TrainConfig, *, step: bool, fits: bool) -> str:
    """Why no real step is tried; empty where one is."""
    if not step:
        return "--no-step"
    if not fits:
        return "it would not fit"
    if config.base == "demo" or Path(config.base).expanduser().exists():
        return ""
    try:
        folder = hub.folder(config.base)
    except ConfigError as error:
        return str(error)
    if not [*folder.glob("unet/*.safetensors"), *folder.glob("transformer/*.safetensors")]:
        name = hub.NAMES.get(config.base, config.base)
        return f"base {config.base} is here without its weights; bring them with: {hub.command(name)}"
    return ""
