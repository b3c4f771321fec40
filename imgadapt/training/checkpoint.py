"""Checkpoints: adapter, optimiser and step in one file, whole or not there, verified when read."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imgadapt.errors import FormatError, TrainingError
from imgadapt.file import read_tensors, tensors_digest, write_tensors

_NAME = re.compile(r"step-(\d{7})\.safetensors")


def save(
    folder: Path,
    step: int,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, str],
    *,
    keep: int = 2,
) -> Path:
    """Write `step-NNNNNNN.safetensors` after `step` steps and drop all but the newest `keep`.

    Raises:
        OutputError: it cannot be written; earlier ones are untouched.
    """
    tensors = {f"parameter.{i}": p.detach() for i, p in enumerate(parameters)}
    for i, parameter in enumerate(parameters):
        state: Mapping[str, Any] = optimizer.state.get(parameter, {})
        tensors |= {f"optimizer.{i}.{key}": torch.as_tensor(value) for key, value in state.items()}
    path = folder / f"step-{step:07d}.safetensors"
    write_tensors(path, tensors, {**identity, "step": str(step), "sha256": tensors_digest(tensors)})
    for old in [other for other, at in _found(folder) if at < step][keep - 1 :]:
        old.unlink()
    return path


def resume(
    folder: Path,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, str],
) -> int:
    """Put the newest whole checkpoint into parameters and optimiser; returns its step, 0 when there is none.

    A torn or altered file is removed, and the one before it taken; so are temporary files of a killed run.

    Raises:
        TrainingError: the checkpoint is of a run with other settings, data or base.
    """
    for torn in folder.glob(".*.tmp"):
        torn.unlink()
    for path, step in _found(folder):
        try:
            tensors, metadata = read_tensors(path)
        except FormatError:
            path.unlink()
            continue
        if metadata.get("sha256") != tensors_digest(tensors):
            path.unlink()
            continue
        differing = [
            f"{key} was {metadata.get(key)}, is {value}"
            for key, value in identity.items()
            if metadata.get(key) != value
        ]
        if differing:
            raise TrainingError(
                f"{folder.parent} holds a run with other settings ({'; '.join(differing)}); "
                "choose another --output, or remove that folder to start anew"
            )
        with torch.no_grad():
            for i, parameter in enumerate(parameters):
                parameter.copy_(tensors[f"parameter.{i}"])
                prefix = f"optimizer.{i}."
                optimizer.state[parameter] = {
                    key.removeprefix(prefix): value.to(parameter.device if value.ndim else "cpu")
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
        return step
    return 0


def _found(folder: Path) -> Iterable[tuple[Path, int]]:
    """Checkpoints with their steps, newest first."""
    rows = [(path, match) for path in folder.glob("step-*.safetensors") if (match := _NAME.fullmatch(path.name))]
    return sorted(((path, int(match[1])) for path, match in rows), key=lambda row: -row[1])
