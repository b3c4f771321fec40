"""A subject and its class: the words of both, and pictures of the class."""

import re
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from imgadapt import live
from imgadapt.atomic import make_folder, write_bytes
from imgadapt.errors import ConfigError, OutputError
from imgadapt.training import pictures
from imgadapt.training.config import DreamBoothConfig
from imgadapt.training.data import digest, fingerprint, has_words, scan
from imgadapt.training.job import Job
from imgadapt.training.listing import SUFFIXES
from imgadapt.training.material import Material

_ARTICLES = ("a ", "an ", "the ")
_AT_ONCE = 8  # class pictures that are drawn together
T = TypeVar("T", bound=DreamBoothConfig)


def with_caption(config: T) -> T:
    """The config with a caption for pictures that have none: `ohwx man` of the trigger `ohwx` and the class `a man`.
    kohya's folder names, `10_ohwx man`, are captions already.

    Raises:
        ConfigError: there is no trigger, and no caption; or classic preservation without a class.
    """
    if config.trigger is None and config.caption is None:
        raise ConfigError("a subject needs a word of its own: --trigger ohwx (or --caption 'a photo of ohwx man')")
    if config.preservation == "classic" and config.class_prompt is None:
        raise ConfigError("classic preservation needs what the subject is one of: --class-prompt 'a man'")
    if config.caption is not None or has_words(config.folder):
        return config
    kind = config.class_prompt or ""
    for article in _ARTICLES:
        kind = kind.removeprefix(article)
    return config.model_copy(update={"caption": f"{config.trigger} {kind}".strip()})


def without(caption: str, config: DreamBoothConfig) -> str:
    """A caption as it would be of any other of the class: the class's words, or the caption without the trigger."""
    if config.class_prompt is not None:
        return config.class_prompt
    trigger = (config.trigger or "").strip()
    if not trigger:
        return ""
    # in whatever case, and as a word of its own, as `captions.says` finds it: it would be kept as part of the class
    words = re.sub(rf"(?<!\w){re.escape(trigger)}(?!\w)", " ", caption, flags=re.IGNORECASE).split()
    return " ".join(words).replace(" ,", ",").strip(" ,")


def class_words(config: DreamBoothConfig, job: Job) -> None:
    """Encode the class's words for all captions before the first step: none then has to bring text encoders back."""
    texts = list(dict.fromkeys(without(text, config) for text in job.material.texts()))
    job.origin["class"] = digest(texts)
    if job.processes.main:
        job.material.prepare_texts(texts)
    job.processes.wait()


def class_pictures(config: DreamBoothConfig, job: Job) -> Material:
    """The class's pictures as the base takes them; the folder is filled up to `class_count` by drawing `class_prompt`.

    Picture number k is drawn from seed k, so that a broken-off drawing goes on with the same ones.
    """
    assert config.class_prompt is not None
    folder = config.class_folder or config.output / "class"
    if job.processes.main:
        _fill(config, job, folder)
    job.processes.wait()
    examples = scan(folder, config.class_prompt)
    job.origin["class"] = digest([fingerprint(examples), config.class_prompt])
    own = config.model_copy(update={"seed": config.seed + 1})
    material = Material(own, job.family, examples, live=job.live_text)
    job.prepare(material)
    return material


def _fill(config: DreamBoothConfig, job: Job, folder: Path) -> None:
    try:
        make_folder(folder)
        there = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
    except (OutputError, OSError) as error:
        raise OutputError(f"cannot write class pictures to {folder}: {error}") from error
    lacking = config.class_count - len(there)
    if lacking <= 0:
        return
    names = {path.name for path in there}
    wanted = [k for k in range(config.class_count * 2) if f"class-{k:05d}.png" not in names][:lacking]
    job.say(f"drawing {len(wanted)} pictures of '{config.class_prompt}' into {folder}")
    prompt, side = config.class_prompt or "", max(config.resolution or [job.family.native])
    with live.disabled(job.family.pipeline):
        for first in tqdm(range(0, len(wanted), _AT_ONCE), "class pictures", leave=False):
            seeds = wanted[first : first + _AT_ONCE]
            for seed, image in zip(seeds, job.family.draw([prompt] * len(seeds), seeds, side=side), strict=True):
                write_bytes(folder / f"class-{seed:05d}.png", pictures.png(image))
