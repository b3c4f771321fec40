"""Checkpoints: all that a run goes on from in one file, whole or not there, verified when read."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from imgadapt.errors import FormatError, OutputError, TrainingError
from imgadapt.tensors import read_tensors, tensors_digest, write_tensors

_NAME = re.compile(r"step-(\d{7})\.safetensors")
_TENSOR = "$tensor"


class Stateful(Protocol):
    """What a run goes on from: optimisers and the like."""

    def state_dict(self) -> Any:
        """Nested dictionaries and lists of tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take it over."""
        ...


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    states: Mapping[str, Stateful],
    identity: Mapping[str, str],
    *,
    keep: int = 2,
) -> Path:
    """Write `step-NNNNNNN.safetensors` after `step` steps and drop all but the newest `keep`.

    Raises:
        OutputError: it cannot be written; earlier ones are untouched.
    """
    held = {f"tensor.{name}": tensor.detach() for name, tensor in tensors.items()}
    told = {name: _flat(state.state_dict(), f"state.{name}", held) for name, state in states.items()}
    path = folder / f"step-{step:07d}.safetensors"
    content = {**identity, "step": str(step), "states": json.dumps(told)}
    write_tensors(path, held, {**content, "sha256": tensors_digest(held) + _digest(content)})
    try:
        for old in [other for other, at in _found(folder) if at < step][keep - 1 :]:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} is written, but an older one cannot be removed: {error}") from error
    return path


def resume(
    folder: Path, tensors: Mapping[str, Tensor], states: Mapping[str, Stateful], identity: Mapping[str, str]
) -> int:
    """Put the newest whole checkpoint into tensors and states; returns its step, 0 when there is none.

    A torn or altered file is passed over for the one before it, and set aside as `.torn`.

    Raises:
        TrainingError: the checkpoint is of a run with other settings, data or base; or all of them are torn; or the
            disk does not give it.
        OutputError: a torn one cannot be set aside.
    """
    torn = 0
    for path, step in _found(folder):
        try:
            held, metadata = read_tensors(path)
            content = {key: value for key, value in metadata.items() if key != "sha256"}
            whole = metadata.get("sha256") == tensors_digest(held) + _digest(content)
        except FormatError as error:
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
                raise TrainingError(f"{error}; it may be whole: try again when the disk is well") from error
            held, metadata, whole = {}, {}, False
        if not whole:
            _set_aside(path)
            torn += 1
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
            for name, tensor in tensors.items():
                tensor.copy_(held[f"tensor.{name}"])
        told = json.loads(metadata["states"])
        for name, state in states.items():
            state.load_state_dict(_nested(told[name], held))
        return step
    if torn:
        raise TrainingError(f"{folder}: none of its {torn} checkpoints is whole; remove the folder to start anew")
    return 0


def _set_aside(path: Path) -> None:
    try:
        path.rename(path.with_suffix(".torn"))
    except FileNotFoundError:  # another process of the run was first
        return
    except OSError as error:
        raise OutputError(f"{path} is torn, and cannot be set aside: {error.strerror}") from error


def _flat(value: Any, name: str, held: dict[str, Tensor]) -> Any:
    """A nested state as JSON; its tensors go into `held`."""
    if isinstance(value, Tensor):
        held[name] = value.detach()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {"$map": [[key, _flat(inner, f"{name}.{key}", held)] for key, inner in value.items()]}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        rows = [_flat(inner, f"{name}.{k}", held) for k, inner in enumerate(value)]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        return {"$tuple": rows} if isinstance(value, tuple) else rows
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name}: {type(value).__name__} cannot be kept in a checkpoint")


def _nested(value: Any, held: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_nested(inner, held) for inner in value]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return held[value[_TENSOR]].clone()  # pyright: ignore[reportUnknownArgumentType] # not the file's pages
    if "$tuple" in value:
        return tuple(_nested(inner, held) for inner in value["$tuple"])  # pyright: ignore[reportUnknownVariableType]
    return {key: _nested(inner, held) for key, inner in value["$map"]}  # pyright: ignore[reportUnknownVariableType]


def _digest(content: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _found(folder: Path) -> Iterable[tuple[Path, int]]:
    """Checkpoints with their steps, newest first."""
    rows = [(path, match) for path in folder.glob("step-*.safetensors") if (match := _NAME.fullmatch(path.name))]
    return sorted(((path, int(match[1])) for path, match in rows), key=lambda row: -row[1])
