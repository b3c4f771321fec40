"""Bottleneck: a small network beside a layer, or after it (Houlsby's adapters, arXiv 1902.00751)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imgadapt.errors import ConfigError, ShapeError, StateError
from imgadapt.methods.base import Tensors, Way
from imgadapt.methods.lora import Scaled
from imgadapt.sites import Site

Placement = Literal["parallel", "sequential"]
Nonlinearity = Literal["gelu", "relu", "silu", "tanh"]
NONLINEAR: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Bottleneck(Scaled):
    """The output changes by neck_up @ f(neck_down @ h + neck_down_b) + neck_up_b, f the nonlinearity.

    placement "parallel" (arXiv 2110.04366): h is the layer's input, neck_down (rank, in / groups, *kernel) with the
        layer's stride and padding, as LoRA's. "sequential" (Houlsby): h is the base's output, at each position, without
        the base's bias, whose place neck_down_b takes; neck_down is (rank, out). neck_up is (out, rank).
    bias: whether there are neck_down_b (rank,) and neck_up_b (out,).
    alpha: the change is multiplied by alpha / rank; None means rank. arXiv 2110.04366's s is this quotient.

    It is no change of the weight: it stays live, and neither merges nor becomes LoRA. Houlsby's stand after the
    projections that end a block: targets=["to_out.0", "ff.net.2"]. f is gelu there (google-research/adapter-bert).

    Raises:
        ConfigError: rank below 1, alpha not a finite positive number, an unknown placement or nonlinearity.
    """

    rank: int = 16
    alpha: float | None = None
    placement: Placement = "parallel"
    nonlinearity: Nonlinearity = "gelu"
    bias: bool = True

    name = "bottleneck"
    rate_over_lora = 1.4
    tensors = ("neck_down", "neck_up")
    optional = ("neck_down_b", "neck_up_b")
    kinds = ("linear", "conv")
    merges = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self.placement, self.nonlinearity)

    @property
    def ranked(self) -> dict[str, int]:
        return {"neck_up": 1}

    @classmethod
    def recognises(cls, names: set[str]) -> bool:
        return names in ({*cls.tensors}, {*cls.tensors, *cls.optional})

    def check(self, site: Site) -> str | None:
        return super().check(site) or too_wide(self.rank, self.placement, site)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        bias = {"neck_down_b": (self.rank,), "neck_up_b": (site.rows,)} if self.bias else {}
        down = (self.rank, *site.shape[1:]) if self.placement == "parallel" else (self.rank, site.rows)
        return {"neck_down": down, "neck_up": (site.rows, self.rank), **bias}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        made = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        nn.init.kaiming_uniform_(made["neck_down"], a=math.sqrt(5))
        return made

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        raise StateError(f"{self.name} {self.apart}: keep it live")

    def way(self, site: Site) -> Way:
        return way_of(self.placement)

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        return {name.removeprefix("neck_"): tensor for name, tensor in t.items()}

    def act(self, o: Tensors, site: Site, x: Tensor, y: Tensor | None, onto: Tensor | None) -> Tensor:
        return passed(o, site, x if self.placement == "parallel" else y, self.placement, self.nonlinearity, onto)

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        down, up = t["neck_down"].shape, t["neck_up"].shape
        if len(down) < 2 or len(up) != 2 or down[0] != up[1]:
            raise ShapeError(f"neck_down is {tuple(down)} and neck_up {tuple(up)}: their ranks differ")
        return cls(rank=down[0], alpha=alpha, bias="neck_down_b" in t)


def check_network(placement: str, nonlinearity: str) -> None:
    """Raises ConfigError unless both are known."""
    if placement not in get_args(Placement):
        raise ConfigError(f"placement is {placement!r}; it must be 'parallel' or 'sequential'")
    if nonlinearity not in get_args(Nonlinearity):
        raise ConfigError(f"nonlinearity is {nonlinearity!r}; it is one of {', '.join(NONLINEAR)}")


def too_wide(rank: int, placement: Placement, site: Site) -> str | None:
    """A bottleneck that is wider than what goes through it."""
    width = site.fan_in if placement == "parallel" else site.rows
    return f"rank {rank} is above {width}, the width of what goes through it" if rank > width else None


def way_of(placement: Placement) -> Way:
    parallel = placement == "parallel"
    return Way(act=True, input=parallel, output=not parallel, linear=("up", "up_b"))


def passed(
    o: Tensors, site: Site, h: Tensor | None, placement: Placement, nonlinearity: Nonlinearity, onto: Tensor | None
) -> Tensor:
    """up @ f(down @ h + down_b) + up_b, added to `onto` where given."""
    assert h is not None
    if placement == "parallel":
        inner, repeats = site.spread(h, o["down"]), site.groups
    else:
        site, repeats = replace(site, groups=1), 1
        inner = site.mix(h, o["down"], None)
    if "down_b" in o:
        inner = inner + site.along(o["down_b"].repeat(repeats))
    made = site.mix(NONLINEAR[nonlinearity](inner), o["up"], onto)
    return made + site.along(o["up_b"]) if "up_b" in o else made
