"""LoRA: a low-rank change of the weight (arXiv 2106.09685)."""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from imgadapt.errors import ShapeError
from imgadapt.methods.base import Method, Tensors, Way, above_zero, positive
from imgadapt.sites import Site


def scale_of(alpha: float | None, rank: int, *, stabilised: bool = False) -> float:
    """alpha / rank, or alpha / sqrt(rank) when stabilised (rsLoRA, arXiv 2312.03732); alpha None means rank."""
    return (rank if alpha is None else alpha) / (math.sqrt(rank) if stabilised else rank)


def check_alpha(alpha: float | None) -> None:
    """Raises ConfigError unless alpha is None or a finite number above 0."""
    above_zero("alpha", alpha, "alpha = rank")


class Scaled(Method):
    """Methods that have a rank and an alpha, whose delta is multiplied by alpha / rank, or alpha / sqrt(rank)."""

    rank: int
    alpha: float | None
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        positive("rank", self.rank)
        check_alpha(self.alpha)

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, stabilised=self.rank_stabilised)

    @property
    def file_rank(self) -> int:
        return self.rank


@dataclass(frozen=True)
class LoRA(Scaled):
    """delta = up @ down, with down (rank, in / groups, *kernel) and up (out, rank, *1).

    alpha: the delta is multiplied by alpha / rank; None means rank, so 1.
    rank_stabilised: by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).
    tucker: on convolutions with a kernel above 1, down is (rank, in / groups, *1) and a core `mid`
        (rank, rank, *kernel) stands between (LoCon's `use_tucker`, KohakuBlueleaf/LyCORIS modules/locon.py).
    bias: the layer's bias changes, too, by `bias` (out,) at the same scale (peft's `lora_bias`).

    Raises:
        ConfigError: rank below 1, or alpha not a finite positive number.
    """

    rank: int = 16
    alpha: float | None = None
    rank_stabilised: bool = False
    tucker: bool = False
    bias: bool = False

    name = "lora"
    tensors = ("down", "up")
    optional = ("mid", "bias")

    @property
    def ranked(self) -> dict[str, int]:
        return {"down": 0}

    @property
    def cut(self) -> dict[str, int]:
        return {} if self.tucker else {"down": 0, "up": 1}

    def check(self, site: Site) -> str | None:
        return super().check(site) or too_large(self.rank, site)

    def at(self, site: Site) -> Self:
        return replace(
            self, tucker=self.tucker and math.prod(site.kernel) > 1, bias=self.bias and site.bias is not None
        )

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        up, bias = (site.rows, self.rank, *site.ones), {"bias": (site.rows,)} if self.bias else {}
        if self.tucker:
            core = (self.rank, self.rank, *site.kernel)
            return {"down": (self.rank, site.shape[1], *site.ones), "mid": core, "up": up, **bias}
        return {"down": (self.rank, *site.shape[1:]), "up": up, **bias}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        made = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        for name in made.keys() - {"up", "bias"}:
            nn.init.kaiming_uniform_(made[name], a=math.sqrt(5))
        return made

    def fits(self, t: Tensors, site: Site) -> str | None:
        if self.bias and site.bias is None:
            return "bias is there, and this layer has none"
        return super().fits(t, site)

    def bias_delta(self, t: Tensors) -> Tensor | None:
        return t.get("bias")

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        up, down = self._pair(t)
        return (up @ down.flatten(1)).reshape(site.shape)

    def accumulate(self, total: Tensor, t: Tensors, site: Site, weight: Tensor | None, gain: float) -> None:
        if total.ndim > 2 and not total.is_contiguous():  # channels_last: flattening it is a copy
            return super().accumulate(total, t, site, weight, gain)
        up, down = self._pair(t)
        total.flatten(1).addmm_(up, down.flatten(1), alpha=gain)
        return None

    def way(self, site: Site) -> Way:
        return Way(pair=True, linear=("up", "bias"))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        up, down = self._pair(t)
        return {"up": up, "down": down, **({"bias": t["bias"]} if "bias" in t else {})}

    def _pair(self, t: Tensors) -> tuple[Tensor, Tensor]:
        """up (out, rank), down (rank, in / groups, *kernel)."""
        down = t["down"]
        if "mid" in t:
            down = torch.einsum("rs...,si->ri...", t["mid"], down.flatten(1))
        return t["up"].flatten(1), down

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        up, down = t["up"], t["down"]
        if up.ndim < 2 or down.ndim < 2 or up.shape[1] != down.shape[0]:
            raise ShapeError(f"up is {tuple(up.shape)} and down {tuple(down.shape)}: their ranks differ")
        if math.prod(up.shape[2:]) != 1:
            raise ShapeError(f"up is {tuple(up.shape)}; a kernel can be in down only")
        if "mid" in t and (t["mid"].shape[:2] != (down.shape[0],) * 2 or math.prod(down.shape[2:]) != 1):
            raise ShapeError(f"mid is {tuple(t['mid'].shape)} and down {tuple(down.shape)}, of rank {down.shape[0]}")
        if "bias" in t and t["bias"].shape != up.shape[:1]:
            raise ShapeError(f"bias is {tuple(t['bias'].shape)}, and there are {up.shape[0]} outputs")
        return cls(rank=down.shape[0], alpha=alpha, tucker="mid" in t, bias="bias" in t)

    def pair(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        up, down = self._pair(t)
        return up, down.flatten(1)


def too_large(rank: int, site: Site) -> str | None:
    """A rank that no matrix of this size has."""
    most = min(site.rows, site.fan_in)
    return (
        f"rank {rank} is above {most}, the most that a {site.rows} x {site.fan_in} weight has" if rank > most else None
    )
