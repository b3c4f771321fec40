"""Parts of a file that need the model's weights to become adapters of its layers.

A fused layer's adapter that mixes its rows is evaluated on the whole weight, put together from its layers'; weights
that a file sets become differences from the base's.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from imgadapt.errors import ShapeError, TargetError, first_few
from imgadapt.formats import Part
from imgadapt.formats.splitting import by_layer, taken
from imgadapt.methods import DoRA, Full, Method
from imgadapt.sites import Site

Weights = Callable[[str], tuple[Tensor, Site]]
"""Canonical layer name -> its pristine weight as methods see it, and its site."""


def settled(
    parts: Mapping[str, Part], live: Collection[str], weight: Weights, bias: Callable[[str], Tensor | None]
) -> dict[str, Part]:
    """The same parts, none of them whole or absolute.

    Raises:
        TargetError: a fused layer's layers are not all in the model.
        ShapeError: they are of other sizes there.
    """
    made: dict[str, Part] = {}
    for name, part in parts.items():
        if part.slices:
            if both := [s.layer for s in part.slices if s.layer in parts]:
                raise TargetError(f"the file has {name}, which {both[0]} is part of, and {both[0]} itself")
            made |= _split(name, part, live, weight)
        elif name in live:
            made[name] = _on(part, name, weight, bias)
        else:
            made[name] = part
    return made


def _on(part: Part, name: str, weight: Weights, bias: Callable[[str], Tensor | None]) -> Part:
    method, tensors = part.method.settled(part.tensors, lambda: weight(name)[0], lambda: bias(name))
    return part if method is part.method and tensors is part.tensors else Part(method, tensors)


@torch.no_grad()
def _split(name: str, part: Part, live: Collection[str], weight: Weights) -> dict[str, Part]:
    """DoRA's norm over all rows goes into a magnitude for each layer; anything else becomes a whole difference."""
    layers = by_layer(part.slices)
    if missing := [layer for layer in layers if layer not in live]:
        raise TargetError(
            f"{name} is {len(layers)} layers fused, and {part.method.name} mixes their rows: {first_few(missing)} are "
            "not in this model"
        )
    weights = {layer: weight(layer)[0].float() for layer in layers}
    for layer, own in layers.items():
        if len(weights[layer]) != sum(s.rows for s in own):
            raise ShapeError(
                f"{layer}: it has {len(weights[layer])} rows, and {name} of the file gives it {own[0].rows}"
            )
    order = sorted(part.slices, key=lambda s: s.first)
    whole = torch.cat([weights[s.layer][s.start : s.start + s.rows] for s in order])
    method, t = part.method, {key: tensor.to(whole.device).float() for key, tensor in part.tensors.items()}
    site = Site(tuple(whole.shape), "conv" if whole.ndim > 2 else "linear", bias="bias")
    if wrong := method.fits(t, site):
        raise ShapeError(f"{name} (fused): {wrong}; is the file for another base?")
    if reason := method.check(site):
        raise TargetError(f"{name} (fused): {method.name} cannot act on it: {reason}")
    changed = method.scale * method.delta(t, site, whole)
    if isinstance(method, DoRA) and method.inner.name == "lora":
        return _dora(method, t, whole, changed, layers, part.tensors)
    bias = method.bias_delta(t)
    made = {"diff": changed, **({} if bias is None else {"diff_b": method.scale * bias})}
    return {
        layer: Part(*taken(Full(bias=bias is not None), made, [(s.first, s.rows) for s in own]))
        for layer, own in layers.items()
    }


def _dora(
    method: DoRA,
    t: Mapping[str, Tensor],
    whole: Tensor,
    changed: Tensor,
    layers: Mapping[str, Sequence[Any]],
    raw: Mapping[str, Tensor],
) -> dict[str, Part]:
    """A norm over inputs of all rows: each layer keeps its LoRA, and a magnitude that makes up for the other rows."""
    inner: Method = method.inner
    value = whole + inner.scale * inner.delta(
        {k: v for k, v in t.items() if k != "magnitude"}, Site(tuple(whole.shape)), None
    )
    over = [d for d in range(whole.ndim) if d != 1]
    norm = torch.linalg.vector_norm(value, dim=over).clamp(min=torch.finfo(torch.float32).tiny)
    made: dict[str, Part] = {}
    for layer, own in layers.items():
        rows = torch.cat([value.narrow(0, s.first, s.rows) for s in own])
        magnitude = t["magnitude"] / norm * torch.linalg.vector_norm(rows, dim=over)
        up = torch.cat([raw["up"].narrow(0, s.first, s.rows) for s in own])
        made[layer] = Part(method, {**raw, "up": up, "magnitude": magnitude})
    return made
