"""A training's start: made once, kept beside the checkpoints that go on from it, and put on the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imgadapt import attaching
from imgadapt.errors import FormatError, OutputError
from imgadapt.file import AdapterFile, load, save
from imgadapt.slot import Dropout
from imgadapt.tensors import tensors_digest
from imgadapt.training import noise, rules
from imgadapt.training.config import TrainConfig
from imgadapt.training.data import digest
from imgadapt.training.families import Family
from imgadapt.training.material import Material
from imgadapt.training.objective import Objective
from imgadapt.training.processes import Processes
from imgadapt.training.starts import SHOWN, made
from imgadapt.training.starts.shown import stratified

_FOR = "start_for"  # metadata: what a kept start was made for


def begin(
    config: TrainConfig,
    family: Family,
    objective: Objective,
    material: Material,
    processes: Processes,
    *,
    origin: Mapping[str, str],
    originals: Mapping[str, Tensor],
) -> tuple[str, str]:
    """Put the start that a config asks for in the place of the fresh adapter; (what there is to say, its digest).

    It is read where an earlier run of these settings and data (origin) kept it, so that what goes on is the same to the
    bit. One process makes it, all read it. originals: see `starts.made`.

    Raises:
        ConfigError, StateError: see `starts.made`.
        OutputError: it cannot be kept.
    """
    assert config.start is not None
    path, said = config.output / "checkpoints" / "start.safetensors", "as it was kept"
    purpose = digest([f"{key} {value}" for key, value in sorted(config.identity(origin).items())])
    if processes.main and kept(path, purpose) is None:
        show = stratified(family, objective, material, samples=config.start_samples, seed=config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(noise.number(config.seed, "start"))
            file, said = made(
                family.pipeline, config.start, seed=config.seed,
                show=show if config.start in SHOWN else None, originals=originals,
            )  # fmt: skip
        keep(file, path, purpose)
    processes.wait()
    file = kept(path, purpose)
    if file is None:
        raise OutputError(f"{path} was written, and cannot be read back")
    put_on(family.pipeline, file, dropout=Dropout(config.dropout, config.rank_dropout, config.module_dropout))
    rules.hold(config, family.pipeline)
    tensors = {f"{layer}.{key}": t for layer, part in file.parts.items() for key, t in part.tensors.items()}
    return f"it starts from {config.start}" + (f": {said}" if said else ""), tensors_digest(tensors)


def put_on(model: Any, file: AdapterFile, *, name: str = "default", dropout: Dropout | float = 0.0) -> None:
    """A start in the place of the adapter `name`, to be trained.

    Raises:
        StateError: there is no such adapter.
        TargetError, ShapeError: the file is for another model.
    """
    attaching.detach(model, name)
    attaching.attach(model, file, name=name, dropout=dropout, trainable=True)


def keep(file: AdapterFile, path: Path, purpose: str) -> None:
    """Write a start.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {path.parent}: {error.strerror}") from error
    save(AdapterFile(file.parts, metadata={_FOR: purpose}), path, format="imgadapt")


def kept(path: Path, purpose: str) -> AdapterFile | None:
    """The start that was made for this, if it is there, whole."""
    if not path.exists():
        return None
    try:
        file = load(path)
    except FormatError:
        return None
    return file if file.metadata.get(_FOR) == purpose else None
