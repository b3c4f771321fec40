"""LoHa: the elementwise product of two low-rank changes (FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859)."""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from imgadapt.errors import ShapeError
from imgadapt.methods.base import Tensors, Way
from imgadapt.methods.lora import Scaled, too_large
from imgadapt.sites import Site


@dataclass(frozen=True)
class LoHa(Scaled):
    """delta = (up_1 @ down_1) * (up_2 @ down_2), with up_* (out, rank) and down_* (rank, in / groups * kernel).

    It has rank up to rank². alpha: the delta is multiplied by alpha / rank; None means rank.
    tucker: on convolutions with a kernel above 1, up_* is (rank, out), down_* (rank, in / groups) and core_1, core_2
        (rank, rank, *kernel) stand between (KohakuBlueleaf/LyCORIS modules/loha.py).
    rank_stabilised: alpha / sqrt(rank) instead.

    Acts as one low-rank pair of rank²: (A₁B₁)∘(A₂B₂) = (A₁•A₂)(B₁⊙B₂), with row- and column-wise Khatri-Rao products.
    Where that would cost more than the layer itself, the delta is built.

    Raises:
        ConfigError: rank below 1, or alpha not a finite positive number.
    """

    rank: int = 8
    alpha: float | None = None
    tucker: bool = False
    rank_stabilised: bool = False

    name = "loha"
    rate_over_lora = 1.2
    tensors = ("up_1", "down_1", "up_2", "down_2")
    optional = ("core_1", "core_2")

    @property
    def ranked(self) -> dict[str, int]:
        return {"down_1": 0, "down_2": 0}

    def check(self, site: Site) -> str | None:
        return super().check(site) or too_large(self.rank, site)

    def at(self, site: Site) -> Self:
        return replace(self, tucker=self.tucker and math.prod(site.kernel) > 1)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        r = self.rank
        if self.tucker:
            a, b, core = (r, site.rows), (r, site.shape[1]), (r, r, *site.kernel)
            return {"up_1": a, "down_1": b, "up_2": a, "down_2": b, "core_1": core, "core_2": core}
        a, b = (site.rows, r), (r, site.fan_in)
        return {"up_1": a, "down_1": b, "up_2": a, "down_2": b}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        std = {"up_1": 0.1, "down_1": 1.0, "up_2": 0.0, "down_2": 1.0, "core_1": 0.1, "core_2": 0.1}  # LyCORIS'
        return {name: nn.init.normal_(torch.empty(shape), std=std[name]) for name, shape in self.shapes(site).items()}

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        first, second = ((up @ down.flatten(1)) for up, down in self._pairs(t))
        return (first * second).reshape(site.shape)

    def way(self, site: Site) -> Way:
        # forward and both gradients through a pair of rank r² against the one dense gradient of a built delta
        thin = 3 * self.rank**2 * (site.rows + site.fan_in) <= site.rows * site.fan_in
        return Way(pair=True, linear=("up",)) if thin else Way()

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        (up_1, down_1), (up_2, down_2) = self._pairs(t)
        up = (up_1[:, :, None] * up_2[:, None]).flatten(1)
        down = (down_1.flatten(1)[:, None] * down_2.flatten(1)[None]).flatten(0, 1)
        return {"up": up, "down": down.reshape(len(down), *site.shape[1:])}

    def _pairs(self, t: Tensors) -> list[tuple[Tensor, Tensor]]:
        """Two of up (out, rank) and down (rank, in / groups [, *kernel])."""
        if "core_1" not in t:
            return [(t["up_1"], t["down_1"]), (t["up_2"], t["down_2"])]
        rows = ((t[f"up_{k}"], t[f"core_{k}"], t[f"down_{k}"]) for k in (1, 2))
        return [(a.t(), torch.einsum("rs...,si->ri...", core, b)) for a, core, b in rows]

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        ranks = {tuple(t[name].shape)[:1] for name in ("down_1", "down_2")}
        if len(ranks) > 1 or any(t[name].ndim != 2 for name in cls.tensors) or ("core_1" in t) != ("core_2" in t):
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in t.items())
            raise ShapeError(f"{shapes} are no two low-rank matrices of one rank")
        return cls(rank=t["down_1"].shape[0], alpha=alpha, tucker="core_1" in t)

    def pair(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        made = self.operands(t, site, None)
        return made["up"], made["down"].flatten(1)
