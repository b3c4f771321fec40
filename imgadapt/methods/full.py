"""Full: a difference of the whole weight, and of the bias; Norm: the same for norms (LyCORIS `full`, `norm`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from imgadapt.errors import FormatError, ShapeError
from imgadapt.methods.base import Method, Peft, Tensors
from imgadapt.sites import Site


@dataclass(frozen=True)
class Full(Method):
    """delta = diff, of the weight's shape; the bias, where the layer has one, changes by `diff_b` (out,).

    bias: whether it has diff_b. A layer without bias has none, whatever is asked.
    absolute: the tensors are the weight and the bias themselves, as some files have them; `attach` makes them into
        differences from the base.
    """

    bias: bool = True
    absolute: bool = False

    name = "full"
    rate_over_lora = 0.15
    tensors = ("diff",)
    optional = ("diff_b",)
    of_weight: ClassVar[str] = "diff"
    of_bias: ClassVar[str] = "diff_b"

    def at(self, site: Site) -> Self:
        return replace(self, bias=self.bias and site.bias is not None, absolute=False)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        bias = {self.of_bias: (site.rows,)} if self.bias else {}
        return {self.of_weight: site.shape, **bias}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}

    def settled(
        self, t: Tensors, weight: Callable[[], Tensor], bias: Callable[[], Tensor | None]
    ) -> tuple[Method, Tensors]:
        if not self.absolute:
            return self, t
        value, own = t[self.of_weight], weight()
        if value.shape != own.shape:
            raise ShapeError(f"it sets a weight of {tuple(value.shape)}, this layer's is {tuple(own.shape)}")
        made = {self.of_weight: value.float() - own.float().to(value.device)}
        if self.of_bias in t:
            old = bias()
            if old is None or old.shape != t[self.of_bias].shape:
                there = "none" if old is None else f"of {tuple(old.shape)}"
                raise ShapeError(f"it sets a bias of {tuple(t[self.of_bias].shape)}, and this layer has {there}")
            made[self.of_bias] = t[self.of_bias].float() - old.float().to(value.device)
        return replace(self, absolute=False), made

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        return t[self.of_weight]

    def bias_delta(self, t: Tensors) -> Tensor | None:
        return t.get(self.of_bias)

    def fits(self, t: Tensors, site: Site) -> str | None:
        if self.of_bias in t and site.bias is None:
            return f"{self.of_bias} is there, and this layer has no bias"
        return super().fits(t, site)

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        weight, bias = t[cls.of_weight].shape, t[cls.of_bias].shape if cls.of_bias in t else None
        if not weight or (cls is not Full and len(weight) > 1) or bias not in (None, weight[:1]):
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in t.items())
            raise ShapeError(f"{shapes} are no weight and bias of {'a norm' if cls is not Full else 'a layer'}")
        return cls(bias=cls.of_bias in t)


@dataclass(frozen=True)
class Norm(Full):
    """A norm's weight changes by `w_norm` (channels,), its bias, where it has one, by `b_norm`."""

    name = "norm"
    rate_over_lora = 5.0
    tensors = ("w_norm",)
    optional = ("b_norm",)
    of_weight = "w_norm"
    of_bias = "b_norm"
    kinds = ("norm",)


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple[Method, dict[str, Tensor]]:
    """Whole weights, of norms or, where they were named, of other layers."""
    weight, bias = t["ln_tuning_layers.weight"], t.get("ln_tuning_layers.bias")
    kind = Norm if weight.ndim == 1 else Full
    made = {kind.of_weight: weight, **({} if bias is None else {kind.of_bias: bias})}
    return replace(kind.infer(made, None), absolute=True), made


def _write(method: Norm, t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not method.absolute:
        raise FormatError("peft's LN_TUNING has the norms' weights themselves, and this is what they differ by")
    ends = {"ln_tuning_layers.weight": t["w_norm"]}
    return {**ends, **({"ln_tuning_layers.bias": t["b_norm"]} if "b_norm" in t else {})}, {}


Norm.peft = Peft("LN_TUNING", ("ln_tuning_layers.weight", "ln_tuning_layers.bias"), _read, _write)
