"""Columns: a low-rank change whose columns are scaled by learnt numbers, for as long as they are learnt."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from imgadapt.methods.base import Method, Tensors, Way, positive
from imgadapt.sites import Site


@dataclass(frozen=True)
class Columns(Method):
    """up @ down @ diag(columns): ZipLoRA's merger coefficients (arXiv 2311.13600), one for each input, of a convolution
    one for each input channel. up (out, rank), down (rank, inputs * kernel), columns (inputs,).

    bias: the layer's bias changes, too, by `bias` (out,), which no coefficient scales. It is in no file: what is learnt
    is folded into `down`, which is LoRA again.

    Raises:
        ConfigError: rank below 1.
    """

    rank: int
    bias: bool = False

    name = "columns"
    tensors = ("up", "down", "columns")
    optional = ("bias",)

    def __post_init__(self) -> None:
        positive("rank", self.rank)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        bias = {"bias": (site.rows,)} if self.bias else {}
        own = {"up": (site.rows, self.rank), "down": (self.rank, site.fan_in), "columns": (site.shape[1],)}
        return {**own, **bias}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        return {k: (torch.ones if k == "columns" else torch.zeros)(shape) for k, shape in self.shapes(site).items()}

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        return (t["up"] @ folded(t["down"], t["columns"])).reshape(site.shape)

    def bias_delta(self, t: Tensors) -> Tensor | None:
        return t.get("bias")

    def way(self, site: Site) -> Way:
        return Way(pair=True, linear=("up", "bias"))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        down = folded(t["down"], t["columns"]).reshape(-1, *site.shape[1:])
        return {"up": t["up"], "down": down, **({"bias": t["bias"]} if "bias" in t else {})}

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        return cls(t["up"].shape[1], "bias" in t)


def folded(down: Tensor, columns: Tensor) -> Tensor:
    """down (rank, inputs * kernel) with its columns scaled, (inputs,)."""
    return (down.unflatten(1, (len(columns), -1)) * columns[:, None]).flatten(1)
