"""Outlay: what a planned run takes of time and of disks."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from imgadapt.training import captions
from imgadapt.training.buckets import View
from imgadapt.training.config import DreamBoothConfig, TrainConfig
from imgadapt.training.families import Family
from imgadapt.training.job import _FOLLOWED
from imgadapt.training.memory import Estimate
from imgadapt.training.trial import Trial

_TIMES, _SEEDS, _STEPS = 8, 2, 20  # of evaluate.py, pictures.py and `Family.draw`
_SNAPSHOTS, _PROMPTS = 4, 6  # of the report's grid
_HEADER = 500  # bytes of a file of tensors that are no tensors
_PNG = 1.8  # bytes a pixel of a picture that was drawn


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes to a folder's disk, by what they are, and how many are free."""

    folder: Path
    needed: Mapping[str, int]
    free: int

    @property
    def total(self) -> int:
        """All that is needed."""
        return sum(self.needed.values())


def durations(
    config: TrainConfig, family: Family, trial: Trial, trained: Sequence[View], held_out: int, *, live: bool
) -> Mapping[str, float]:
    """Seconds of the parts of a run, from what the largest bucket takes.

    trained: what is trained; held_out: pictures whose loss is watched beside. live: captions are encoded in every step.
    """
    share, watched = _area(trained), evaluations(config)
    pictures = len(trained) * variants(config) * trial.picture * share
    words = 0 if live else len(texts(config, trained)) * trial.caption
    followed = min(_FOLLOWED, len(trained)) + held_out
    drawn = (config.steps // config.sample_every if config.sample_every else 1) * _SEEDS * len(config.sample_prompts)
    if config.report:
        grid = 1 + min(_SNAPSHOTS, watched) * len(config.strengths)
        drawn += min(_PROMPTS, len(config.sample_prompts)) * grid
    passes = 1 if "guidance_embeds" in family._settings else 2  # Flux is told its guidance; for others it is a second
    one = _STEPS * passes * trial.look + trial.picture  # decoding takes about what encoding does
    if isinstance(config, DreamBoothConfig) and config.preservation == "classic":
        drawn += config.class_count
    return {
        "latents and text states": pictures + words,
        "steps": config.steps * _usual(config, trial) * share,
        "losses that are watched": (watched + 1) * _TIMES * followed * trial.look * share,
        "samples and report": drawn * one,
    }


def _area(trained: Sequence[View]) -> float:
    """Mean of the pictures' pixels, as a share of the largest bucket's."""
    pixels = [(view.size[0] * view.size[1], view.example.repeats) for view in trained]
    return sum(size * often for size, often in pixels) / (max(pixels)[0] * sum(often for _, often in pixels))


def _usual(config: TrainConfig, trial: Trial) -> float:
    """Seconds of a step. The one that was tried had all that may be in one; class-free preservation is not in each."""
    if not isinstance(config, DreamBoothConfig) or config.preservation != "class-free":
        return trial.step
    alone = max(0.0, trial.step - trial.look * config.batch_size) / 2
    return config.preservation_share * trial.step + (1 - config.preservation_share) * alone


def evaluations(config: TrainConfig) -> int:
    """How often losses are watched, and a snapshot kept (`Evidence`)."""
    return math.ceil(config.steps / (config.evaluate_every or max(50, config.steps // 5)))


def variants(config: TrainConfig) -> int:
    """Latents of each picture."""
    return (2 if config.flip else 1) * (config.crops if config.crop == "random" else 1)


def texts(config: TrainConfig, trained: Sequence[View]) -> set[str]:
    """All that captions are worded as."""
    wording = captions.Wording(
        shuffle=config.shuffle_tags, keep=config.keep_tags, tag_dropout=config.tag_dropout,
        dropout=config.caption_dropout, variants=config.caption_variants,
    )  # fmt: skip
    examples = dict.fromkeys(view.example for view in trained)
    return {text for example in examples for text in captions.every(example, wording, config.seed)}


def disks(config: TrainConfig, family: Family, trained: Sequence[View], step: Estimate, *, live: bool) -> list[Disk]:
    """What a new run writes, on the disk of its output and, where it is another folder, of its cache."""
    channels, factor = family.latent_shape
    places = sum(view.size[0] * view.size[1] // factor**2 for view in trained)
    masked = config.mask != "none"
    count = len(trained) * variants(config)
    latents = variants(config) * 4 * places * (channels + masked) + count * _HEADER
    words = len(texts(config, trained))
    states = sum(math.prod(shape) for shape in family.text_shapes.values()) * family.dtype.itemsize + _HEADER
    cache = {"latents": latents, **({} if live else {"text states": words * states})}
    state = step.adapter + step.optimizer + step.ema
    made = {
        "checkpoints": 3 * state,  # two are kept while a third is written
        "snapshots": evaluations(config) * step.adapter,
        "adapter files": (3 + len(config.exports)) * step.adapter,
    }
    if isinstance(config, DreamBoothConfig) and config.preservation == "classic" and config.class_folder is None:
        made["class pictures"] = round(config.class_count * _PNG * max(config.resolution or [family.native]) ** 2)
    if config.cache is None:
        return [_disk(config.output, {**cache, **made})]
    return [_disk(config.output, made), _disk(config.cache, cache)]


def _disk(folder: Path, needed: Mapping[str, int]) -> Disk:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return Disk(folder, needed, shutil.disk_usage(there).free)
