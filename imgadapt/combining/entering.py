"""What one adapter changes at one layer, as a term: how each method's tensors enter sums."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from imgadapt.arch import Architecture
from imgadapt.combining.terms import Dense, Kron, Pair, Term
from imgadapt.errors import ConfigError, ShapeError
from imgadapt.formats import Part
from imgadapt.formats.splitting import inputs_of, rows_of
from imgadapt.methods import Method
from imgadapt.sites import Site


class Base(Protocol):
    """A model's weights by canonical layer names (`unet.conv_in`), read when they are asked for."""

    @property
    def names(self) -> Collection[str]: ...
    def site(self, name: str) -> Site: ...
    def weight(self, name: str) -> tuple[Tensor, Site]:
        """The weight as methods see it (an embedding's is (width, entries)), and its site."""
        ...

    def bias(self, name: str) -> Tensor | None: ...


@dataclass(frozen=True)
class Change:
    """What an adapter changes at a layer at strength 1: the weight, and the bias (out,), where it does.

    scale: of LoRA, whose pair is its own factors: what `up` has been multiplied by.
    """

    term: Term
    bias: Tensor | None = None
    scale: float | None = None

    def scaled(self, factor: float) -> "Change":
        return Change(self.term.scaled(factor), None if self.bias is None else self.bias * factor)


@torch.no_grad()
def change_of(name: str, part: Part, site: Site, base: Base | None, of: str = "") -> Change:
    """Methods that are pairs enter as such (LoRA, LoHa, low-rank LoKr), full LoKr as a Kronecker product: exactly,
    without the dense change. What reads the weight (DoRA, OFT, BOFT, GLoRA, IA3) is evaluated on the base's. of: the
    input, for errors.

    Raises:
        ConfigError: it reads the weight, and there is no base; or it is no change of a weight.
        ShapeError: its tensors do not fit the layer.
    """
    method, t = part.method, {key: tensor.float() for key, tensor in part.tensors.items()}
    if not method.merges:
        raise ConfigError(f"{f'{of}: ' if of else ''}{name}: {no_change(method)}; attach it beside what is merged")
    if base is None and (method.needs_weight or getattr(method, "absolute", False)):
        raise ConfigError(_needs_base(name, part, of))
    # NaN is found in the result; shapes would only be found by luck
    if wrong := method.fits({key: _shaped(tensor, key, method, site) for key, tensor in t.items()}, site):
        raise ShapeError(f"{name}: {wrong}; is the file for another base?")
    t = {key: _shaped(tensor, key, method, site) for key, tensor in t.items()}
    bias = method.bias_delta(t)
    bias = None if bias is None else bias * method.scale
    if method.needs_weight:
        assert base is not None
        weight, site = base.weight(name)
        if tuple(weight.shape) != site.shape or wrong_size(part, site):
            raise ShapeError(f"{name}: the base's weight is {tuple(weight.shape)}, the adapter is for another")
        t = method.whole(t, site, weight.float())
        pair = method.pair(t, site)  # of what the base's weight is not in itself
        if pair is not None and pair[0].shape[1] < min(site.rows, site.fan_in):
            return Change(Pair(pair[0] * method.scale, pair[1]), bias)
        if method.name == "glora":  # W a1 a2 + b1 b2
            up = torch.cat([weight.float().flatten(1) @ t["a1"].flatten(1), t["b1"].flatten(1)], 1)
            if not site.kernel:
                down = torch.cat([t["a2"].flatten(1), t["b2"].flatten(1)])
                return Change(Pair(up * method.scale, down), bias)
        change = method.delta(t, site, weight.float()) * method.scale
        return Change(Dense(change.flatten(1) if change.ndim > 1 else change[:, None]), bias)
    if "w2" in t:
        first = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
        return Change(Kron(first * method.scale, t["w2"].flatten(1)), bias)
    pair = method.pair(t, site)
    if pair is not None:
        own = method.name == "lora" and "mid" not in t
        return Change(Pair(pair[0] * method.scale, pair[1]), bias, method.scale if own else None)
    of_weight = getattr(method, "of_weight", None)
    if of_weight is not None:  # read where it lies
        raw: Any = part.tensors[of_weight]
        return Change(Dense(raw.flatten(1) if raw.ndim > 1 else raw[:, None]), bias)
    change = method.delta(t, site, None) * method.scale
    return Change(Dense(change.flatten(1) if change.ndim > 1 else change[:, None]), bias)


def no_change(method: Method) -> str:
    """Of one that does not merge."""
    way = "; imgadapt convert --average-times makes LoRA of it, as near as one comes" if method.timed else ""
    return f"{method.name} {method.apart}, so it cannot be merged, cut or written as LoRA{way}"


def _needs_base(name: str, part: Part, of: str) -> str:
    method: Any = part.method
    what = f"what {method.name} changes" if method.needs_weight else "the file sets the weights, and what that changes"
    rotates = method.name in ("oft", "boft")
    rules = ", or merge rotations as rotations: --rule compose, polar, geodesic or ortho" if rotates else ""
    where = f"{of}: {name}" if of else name
    return f"{where}: {what} depends on the base's weights; give the base it was trained on (--base){rules}"


def _shaped(tensor: Tensor, key: str, method: Any, site: Site) -> Tensor:
    """Files of linear layers may have kernels of 1, and the other way round."""
    wanted = method.shapes(site).get(key) if method.name != "lokr" else None
    if wanted is None or tuple(tensor.shape) == wanted or tensor.numel() != math.prod(wanted):
        return tensor
    return tensor.reshape(wanted)


def wrong_size(part: Part, site: Site) -> bool:
    rows, inputs = rows_of(part.method, part.tensors), inputs_of(part.method, part.tensors)
    return rows not in (None, site.rows) or inputs not in (None, site.fan_in)


def site_of(name: str, part: Part, architecture: Architecture | None, base: Base | None = None) -> Site:
    """The layer's site, from the base, the architecture's table, or else as far as the tensors tell: models of other
    widths (the embedded base) have layers of the same names.

    Raises:
        ShapeError: neither tells.
    """
    if base is not None and name in base.names:
        return base.site(name)
    rows, inputs = rows_of(part.method, part.tensors), inputs_of(part.method, part.tensors)
    shape = architecture.shape_of(name) if architecture is not None else None
    if shape and not (rows in (None, shape[0]) and inputs in (None, math.prod(shape[1:]))) and rows and inputs:
        kernel = shape[2:] if inputs % math.prod(shape[2:]) == 0 else ()
        shape = (rows, inputs // math.prod(kernel), *kernel)
    shape = part.shape or shape or _shape_from(part)
    if shape is None:
        raise ShapeError(f"{name}: no table has this layer, and its tensors do not tell its size; give the base")
    kind: Any = "conv" if len(shape) > 2 else "linear" if len(shape) == 2 else "norm"
    return Site(shape, kind, bias="bias")


def _shape_from(part: Part) -> tuple[int, ...] | None:
    t, rows, inputs = part.tensors, rows_of(part.method, part.tensors), inputs_of(part.method, part.tensors)
    for key in ("mid", "core_1", "t2"):
        if key in t and rows is not None and inputs is not None:
            kernel = tuple(t[key].shape[2:])
            return (rows, inputs // math.prod(kernel), *kernel)
    for key in ("down", "w2", "diff", "b2"):
        if key in t and rows is not None and inputs is not None and t[key].ndim > 2:
            kernel = tuple(t[key].shape[2:])
            return (rows, inputs // math.prod(kernel), *kernel)
    if "w_norm" in t or ("diff" in t and t["diff"].ndim == 1):
        return (rows,) if rows is not None else None
    return None if rows is None or inputs is None else (rows, inputs)
