"""The files of a training: written as other tools read them, read back, and proved to act as what was trained."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from imgadapt import attaching, live
from imgadapt import targets as where
from imgadapt.errors import ConfigError, TrainingError, first_few
from imgadapt.file import AdapterFile, load, plan, save
from imgadapt.formats import FORMATS
from imgadapt.formats.writing import Step
from imgadapt.training import probe
from imgadapt.training.families import Family

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_ROUNDING = 3e-6  # of sums in another order, as where ranks are left out: what is learnt below it cannot be told
_USUAL = ("diffusers", "kohya", "lycoris")
_LAYERS_ONLY = ("diffusers", "peft")  # their readers refuse a file that has words, too


def formats(file: AdapterFile, wanted: Sequence[str] = ()) -> list[str]:
    """The formats to write: those that are wanted, or diffusers' and the first of kohya's tools that say it exactly.

    The first is one that holds all there is (words and layers together, or a word in several text encoders), as the
    method that was trained.

    Raises:
        ConfigError: a wanted one is not known.
    """
    known = [form.name for form in FORMATS]
    if wrong := [name for name in wanted if name not in known]:
        raise ConfigError(f"no format '{wrong[0]}'; there are: {', '.join(known)}")
    if wanted:
        return list(wanted)
    if file.prompts:
        return ["imgadapt"]
    if not file.parts:
        one = all(len(embedding.vectors) == 1 for embedding in file.embeddings.values())
        return ["diffusers", "kohya"] if one else ["kohya"]
    plans = {name: plan(file, name) for name in _USUAL}
    able = [name for name, steps in plans.items() if all(step.loss in ("exact", "aligned") for step in steps)]
    other = {name for name in able if any(_another(file, step) for step in plans[name])}
    kohya = sorted((name for name in able if name != "diffusers"), key=lambda name: name in other)
    chosen = [*(name for name in able if name == "diffusers"), *kohya[:1]]
    first = [name for name in chosen if name not in other and not (file.embeddings and name in _LAYERS_ONLY)]
    return [*first, *(name for name in chosen if name not in first)] or ["imgadapt"]


def _another(file: AdapterFile, step: Step) -> bool:
    """Whether it is written as another method, which is the same but larger: LoHa as LoRA of its rank squared."""
    trained = {type(file.parts[name].method) for name in step.layers}
    return any(type(part.method) not in trained for part in step.parts.values())


def part_of(file: AdapterFile, glob: str) -> AdapterFile:
    """The layers of a file that a target names.

    Raises:
        ConfigError: there are none.
    """
    parts = {name: part for name, part in file.parts.items() if where.matches(name, glob)}
    if not parts:
        raise ConfigError(f"exports: no trained layer matches '{glob}'")
    return replace(file, parts=parts)


def emptied(file: AdapterFile, exports: Mapping[str, str]) -> list[str]:
    """Exports whose layers were targets, and have no ranks any more."""
    return [name for name, glob in exports.items() if not any(where.matches(layer, glob) for layer in file.parts)]


def check(file: AdapterFile, wanted: Sequence[str], exports: Mapping[str, str]) -> None:
    """Before the training: can what will be trained be written so?

    Raises:
        ConfigError: a format is not known or has no word for a layer, or an export has no layers.
    """
    for name in formats(file, wanted):
        if file.prompts and name not in ("imgadapt", "peft"):
            raise ConfigError(f"formats: {name} has no word for {file.prompts.kind.name}; wanted imgadapt")
        if steps := [step for step in plan(file, name) if step.loss == "impossible"]:
            raise ConfigError(
                f"formats: {len(steps)} of {len(file.parts)} layers cannot be written as {name} "
                f"({first_few([step.name for step in steps])}): {steps[0].reason}. Leave it out, or choose another"
            )
    taken = {*(form.name for form in FORMATS), "words"}
    for name, glob in exports.items():
        if name in taken or not re.fullmatch(r"\w[\w. -]*", name):
            raise ConfigError(
                f"exports: '{name}' cannot be in a file's name, adapter.{name}.safetensors; choose another"
            )
        part_of(file, glob)


def write(
    file: AdapterFile,
    folder: Path,
    wanted: Sequence[str],
    exports: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """Write `adapter.safetensors` and `adapter.FORMAT.safetensors` for the formats after the first, and the exports.

    Words are among the layers ("bundled") where the format's readers take that, else in `adapter.words.safetensors`.
    """
    names = formats(file, wanted)
    paths = [
        folder / ("adapter.safetensors" if k == 0 else f"adapter.{name}.safetensors") for k, name in enumerate(names)
    ]
    for path, name in zip(paths, names, strict=True):
        save(_fitting(file, name), path, format=name, dtype=dtype)
    if any(_fitting(file, name) is not file for name in names):
        words = replace(file, parts={})
        path = folder / "adapter.words.safetensors"
        paths.append(save(words, path, format=formats(words)[0], dtype=dtype))
    for name, glob in exports.items():
        path = folder / f"adapter.{name}.safetensors"
        save(_fitting(part_of(file, glob), names[0]), path, format=names[0], dtype=dtype)
    return paths


def _fitting(file: AdapterFile, format: str) -> AdapterFile:
    both = bool(file.parts and file.embeddings)
    return replace(file, embeddings={}) if both and format in _LAYERS_ONLY else file


def prove(
    family: Family,
    paths: Sequence[Path],
    taken: Mapping[str, torch.Tensor],
    words: Collection[str] = (),
    dtype: torch.dtype = torch.float32,
) -> float:
    """Attach each file to the bare base and compare its prediction with the live model's; the largest difference.

    The trained adapter is taken off, and nothing is put in its place. words: those that were trained; a file that has
    no name for its word gets it, and layers without words are proved with the file that has the words alone. dtype: of
    the files' tensors, whose rounding is allowed for.

    Raises:
        TrainingError: the base is not what it was before the training, or a file acts otherwise than the live model.
    """
    if live.adapters(family.pipeline):
        attaching.detach(family.pipeline)
    base, worst = probe.error(family, taken), 0.0
    size = max(1.0, float(taken["prediction"].abs().max()))
    for path, file in _whole({path: load(path) for path in paths}, words).items():
        attaching.attach(family.pipeline, file, name="proof")
        error = probe.error(family, taken)
        attaching.detach(family.pipeline)
        limit = max(_TOLERANCE[family.dtype], _TOLERANCE[dtype]) * size
        little = base > 0 and error > max(base / 2, _ROUNDING * size)  # a file without what was learnt would do
        if not error <= limit or little:
            raise TrainingError(
                f"{path}, read back, acts otherwise than what was trained: predictions differ by {error:.2e}"
            )
        worst = max(worst, error)
    if base == 0:
        raise TrainingError(f"{paths[0]} changes nothing: the base alone predicts the same to the bit")
    return worst


def _whole(files: Mapping[Path, AdapterFile], words: Collection[str]) -> dict[Path, AdapterFile]:
    """What is to be attached for each file; one of words alone goes with those of layers alone, if there are any."""
    named = {path: _named(file, words) for path, file in files.items()}
    alone = [file.embeddings for file in named.values() if not (file.parts or file.prompts)]
    layers = [path for path, file in named.items() if file.parts and not file.embeddings]
    if not (words and alone and layers):
        return named
    named |= {path: replace(named[path], embeddings=alone[0]) for path in layers}
    return {path: file for path, file in named.items() if file.parts or file.prompts}


def _named(file: AdapterFile, words: Collection[str]) -> AdapterFile:
    """A file with its one word under the name that was trained: some forms have none, and tools go by the file's."""
    if len(words) != 1 or len(file.embeddings) != 1:
        return file
    (word,), (embedding,) = words, file.embeddings.values()
    return replace(file, embeddings={word: replace(embedding, token=word)})
