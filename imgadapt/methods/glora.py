"""GLoRA: a low-rank change of the weight and of what it is multiplied by (arXiv 2306.07967, as LyCORIS has it)."""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from imgadapt.errors import ShapeError
from imgadapt.methods.base import Tensors, Way
from imgadapt.methods.lora import Scaled, too_large
from imgadapt.sites import Site


@dataclass(frozen=True)
class GLoRA(Scaled):
    """delta = W @ a1 @ a2 + b1 @ b2, with a1 (in / groups, rank, *1), a2 (rank, in / groups, *1), b1 (out, rank, *1)
    and b2 (rank, in / groups, *kernel) (KohakuBlueleaf/LyCORIS modules/glora.py).

    alpha: the delta is multiplied by alpha / rank; None means rank.

    Raises:
        ConfigError: rank below 1, or alpha not a finite positive number.
    """

    rank: int = 8
    alpha: float | None = None

    name = "glora"
    rate_over_lora = 0.25
    tensors = ("a1", "a2", "b1", "b2")
    needs_weight = True

    @property
    def ranked(self) -> dict[str, int]:
        return {"a2": 0, "b2": 0}

    def check(self, site: Site) -> str | None:
        if site.kind == "embedding":
            return "its inputs are token ids, which no matrix changes"
        return super().check(site) or too_large(self.rank, site)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        r, inputs, ones = self.rank, site.shape[1], site.ones
        return {
            "a1": (inputs, r, *ones),
            "a2": (r, inputs, *ones),
            "b1": (site.rows, r, *ones),
            "b2": (r, inputs, *site.kernel),
        }

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        made = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        for name in ("a1", "b1"):  # LyCORIS'
            nn.init.kaiming_uniform_(made[name], a=math.sqrt(5))
        return made

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        assert weight is not None
        a1, a2 = t["a1"].flatten(1), t["a2"].flatten(1)
        turned = torch.einsum("oi...,ir,rj->oj...", weight, a1, a2)
        return turned + (t["b1"].flatten(1) @ t["b2"].flatten(1)).reshape(site.shape)

    def way(self, site: Site) -> Way:
        apart = site.kind in ("linear", "conv") and site.groups == 1
        return Way(pair=True, turn=True, linear=("a1", "up")) if apart else Way()

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        return {"a1": t["a1"].flatten(1), "a2": t["a2"].flatten(1), "up": t["b1"].flatten(1), "down": t["b2"]}

    def turn(self, o: Tensors, site: Site, x: Tensor, onto: Tensor | None) -> Tensor:
        if site.kind == "linear":
            return site.mix(x @ o["a2"].t(), o["a1"], onto)
        change = (o["a1"] @ (o["a2"] @ x.flatten(2))).view(x.shape)
        return change if onto is None else onto + change

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        ranks = {t["a1"].shape[1:2], t["a2"].shape[:1], t["b1"].shape[1:2], t["b2"].shape[:1]}
        if len(ranks) > 1 or any(tensor.ndim < 2 for tensor in t.values()):
            raise ShapeError(f"{', '.join(f'{n} {tuple(v.shape)}' for n, v in t.items())}: their ranks differ")
        return cls(rank=t["a2"].shape[0], alpha=alpha)
