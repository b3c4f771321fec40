"""Untimed: an adapter that acts otherwise at each time as the LoRA that is nearest to it over all of them."""

import math
from dataclasses import replace

from imgadapt.errors import ConfigError
from imgadapt.file import AdapterFile
from imgadapt.formats import Part
from imgadapt.methods import TLoRA
from imgadapt.sites import Site


def untimed(file: AdapterFile) -> tuple[AdapterFile, float]:
    """T-LoRA's layers as LoRA, for tools that know no T-LoRA, and what is lost: the root mean square over the times of
    what the LoRA lacks, over that of the whole change (1: all of it). Other layers stay as they are.

    The LoRA is the mean over the times, each rank weighed by the share of them at which it acts.

    Raises:
        ConfigError: there is no such layer.
    """
    rows = {name: _averaged(part) for name, part in file.parts.items() if part.method.timed}
    if not rows:
        raise ConfigError("no layer of the adapter depends on the time: nothing is to be averaged")
    parts = {name: rows[name][0] if name in rows else part for name, part in file.parts.items()}
    lost, whole = sum(row[1] for row in rows.values()), sum(row[2] for row in rows.values())
    return replace(file, parts=parts), math.sqrt(lost / whole) if whole else 0.0


def _averaged(part: Part) -> tuple[Part, float, float]:
    method, t = part.method, part.tensors
    assert isinstance(method, TLoRA)
    shape = (t["tlora_up"].shape[0], *t["tlora_down"].shape[1:])
    made, tensors, lost, whole = method.averaged(t, Site(shape, "conv" if len(shape) > 2 else "linear"))
    dtype, square = t["tlora_up"].dtype, method.scale**2
    lora = Part(made, {k: v.to(dtype) for k, v in tensors.items()}, shape=part.shape)
    return lora, lost * square, whole * square
