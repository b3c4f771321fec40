"""The files of a training: written as other tools read them, read back, and proved to act as what was trained."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from imgadapt import attaching, live
from imgadapt import targets as where
from imgadapt.errors import ConfigError, TrainingError
from imgadapt.file import AdapterFile, load, plan, save
from imgadapt.formats import FORMATS
from imgadapt.training import probe
from imgadapt.training.families import Family

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_USUAL = ("diffusers", "kohya", "lycoris")


def formats(file: AdapterFile, wanted: Sequence[str] = ()) -> list[str]:
    """The formats to write: those that are wanted, or diffusers' and the first of kohya's tools that say it exactly.

    Raises:
        ConfigError: a wanted one is not known.
    """
    known = [form.name for form in FORMATS]
    if wrong := [name for name in wanted if name not in known]:
        raise ConfigError(f"no format '{wrong[0]}'; there are: {', '.join(known)}")
    if wanted:
        return list(wanted)
    able = [name for name in _USUAL if file.parts and all(s.loss in ("exact", "aligned") for s in plan(file, name))]
    chosen = [name for name in able if name == "diffusers"] + [name for name in able if name != "diffusers"][:1]
    return chosen or ["imgadapt"]


def part_of(file: AdapterFile, glob: str) -> AdapterFile:
    """The layers of a file that a target names.

    Raises:
        ConfigError: there are none.
    """
    parts = {name: part for name, part in file.parts.items() if where.matches(name, glob)}
    if not parts:
        raise ConfigError(f"exports: no trained layer matches '{glob}'")
    return replace(file, parts=parts)


def write(file: AdapterFile, folder: Path, wanted: Sequence[str], exports: Mapping[str, str]) -> list[Path]:
    """Write `adapter.safetensors` and `adapter.FORMAT.safetensors` for the formats after the first, and the exports."""
    names = formats(file, wanted)
    paths = [
        folder / ("adapter.safetensors" if k == 0 else f"adapter.{name}.safetensors") for k, name in enumerate(names)
    ]
    for path, name in zip(paths, names, strict=True):
        save(file, path, format=name)
    for name, glob in exports.items():
        save(part_of(file, glob), folder / f"adapter.{name}.safetensors", format=names[0])
    return paths


def prove(family: Family, paths: Sequence[Path], taken: Mapping[str, torch.Tensor]) -> float:
    """Attach each file to the bare base and compare its prediction with the live model's; the largest difference.

    The trained adapter is taken off, and nothing is put in its place.

    Raises:
        TrainingError: the base is not what it was before the training, or a file acts otherwise than the live model.
    """
    if live.adapters(family.pipeline):
        attaching.detach(family.pipeline)
    base, worst = probe.error(family, taken), 0.0
    for path in paths:
        attaching.attach(family.pipeline, load(path), name="proof")
        error = probe.error(family, taken)
        attaching.detach(family.pipeline)
        if not error <= _TOLERANCE[family.dtype] * max(1.0, float(taken["prediction"].abs().max())):
            raise TrainingError(
                f"{path}, read back, acts otherwise than what was trained: predictions differ by {error:.2e}"
            )
        worst = max(worst, error)
    if base == 0:
        raise TrainingError(f"{paths[0]} changes nothing: the base alone predicts the same to the bit")
    return worst
