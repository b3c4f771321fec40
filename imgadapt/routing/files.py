"""Routers in files: `router.NAME` for each tensor; the kind, its settings, adapters and layers in the metadata."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imgadapt.errors import ConfigError, FormatError
from imgadapt.formats.layer_config import LONGEST_JSON
from imgadapt.routing.arrow import Arrow
from imgadapt.routing.poly import Poly
from imgadapt.routing.router import Router
from imgadapt.routing.xlora import XLoRA
from imgadapt.tensors import read_tensors, write_tensors

KEY = "imgadapt_router"
_START = "router."
KINDS: Mapping[str, type[Router]] = {kind.name: kind for kind in (Arrow, XLoRA, Poly)}


@dataclass(frozen=True)
class RouterFile:
    """A router, trained: its kind, its tensors, and the adapters and layers that its strengths are of, in order."""

    router: Router
    tensors: Mapping[str, Tensor]
    adapters: tuple[str, ...]
    layers: tuple[str, ...]


def save_router(file: RouterFile, path: str | PathLike[str]) -> Path:
    """Write a router; the adapters are files of their own.

    Raises:
        FormatError: NaN or infinity in it. OutputError: it cannot be written.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in file.tensors.values()):
        raise FormatError(f"NaN or infinity in the router; {path} is not written")
    told = {
        "router": file.router.name,
        "settings": asdict(file.router),
        "adapters": file.adapters,
        "layers": file.layers,
    }
    tensors = {f"{_START}{name}": tensor for name, tensor in file.tensors.items()}
    write_tensors(Path(path), tensors, {KEY: json.dumps(told, sort_keys=True)})
    return Path(path)


def load_router(path: str | PathLike[str]) -> RouterFile:
    """Read what `save_router` wrote.

    Raises:
        FormatError: there is no such file, or it is none.
    """
    tensors, metadata = read_tensors(Path(path))
    text = metadata.get(KEY, "")
    try:
        told: Any = json.loads(text if len(text) <= LONGEST_JSON else "")
        router = KINDS[told["router"]](**told["settings"])
        names = [[str(name) for name in told[key]] for key in ("adapters", "layers")]
    except (ValueError, TypeError, KeyError, RecursionError, ConfigError) as error:
        raise FormatError(f"{path}: no router that imgadapt wrote: the metadata '{KEY}' has {error!r}") from error
    if any(not key.startswith(_START) or not t.is_floating_point() for key, t in tensors.items()):
        raise FormatError(f"{path}: other tensors than a router's")
    if not all(bool(torch.isfinite(tensor.float()).all()) for tensor in tensors.values()):
        raise FormatError(f"{path}: NaN or infinity in it; the training that made it diverged")
    own = {key.removeprefix(_START): tensor for key, tensor in tensors.items()}
    return RouterFile(router, own, tuple(names[0]), tuple(names[1]))
