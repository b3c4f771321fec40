"""first: an adapter's first ranks, as they are: what training in nested ranks (DyLoRA) is for."""

from dataclasses import replace

import torch

from imgadapt.errors import ConfigError, first_few
from imgadapt.file import AdapterFile
from imgadapt.formats import Part
from imgadapt.methods.base import positive

_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


def first(file: AdapterFile, rank: int) -> AdapterFile:
    """The first ranks of every layer, or all where it has no more, at the scale that they have.

    Raises:
        ConfigError: a rank below 1, or a layer of a method whose ranks do not stand alone.
    """
    positive("first", rank)
    if other := [f"{name} ({part.method.name})" for name, part in file.parts.items() if not part.method.cut]:
        raise ConfigError(f"{len(other)} layers have no ranks that stand alone: {first_few(other)}")
    parts = {name: _first(part, rank) for name, part in file.parts.items()}
    return replace(file, parts=parts, metadata={k: v for k, v in file.metadata.items() if k not in _STALE})


def _first(part: Part, rank: int) -> Part:
    if part.method.file_rank is not None and part.method.file_rank <= rank:
        return part
    method, tensors = part.method.only(part.tensors, torch.arange(rank))
    return replace(part, method=method, tensors=tensors, source=None)
