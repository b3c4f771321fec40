"""LoRA: a low-rank change of the weight (arXiv 2106.09685)."""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from imgadapt.errors import ConfigError, ShapeError
from imgadapt.methods.base import Method, Tensors
from imgadapt.sites import Site


@dataclass(frozen=True)
class LoRA(Method):
    """delta = up @ down, with down (rank, in / groups, *kernel) and up (out, rank, *1).

    alpha: the delta is multiplied by alpha / rank; None means rank, so 1.
    rank_stabilised: by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).

    Raises:
        ConfigError: rank below 1, or alpha not a finite positive number.
    """

    rank: int = 16
    alpha: float | None = None
    rank_stabilised: bool = False

    name = "lora"
    tensors = ("down", "up")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}; it must be 1 or more")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"alpha is {self.alpha}; it must be a finite number above 0, or None for alpha = rank")

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / math.sqrt(self.rank) if self.rank_stabilised else alpha / self.rank

    def check(self, site: Site) -> str | None:
        return None  # every linear layer and convolution has a weight to factor

    def init(self, site: Site) -> dict[str, Tensor]:
        ones = tuple(1 for _ in site.kernel)
        down = torch.empty(self.rank, *site.shape[1:])
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        return {"down": down, "up": torch.zeros(site.rows, self.rank, *ones)}

    def delta(self, t: Tensors, site: Site) -> Tensor:
        return (t["up"].flatten(1) @ t["down"].flatten(1)).reshape(site.shape)

    def act(self, t: Tensors, site: Site, x: Tensor) -> Tensor:
        return site.mix(site.spread(x, t["down"]), t["up"].flatten(1))

    def fits(self, t: Tensors, site: Site) -> str | None:
        ones = tuple(1 for _ in site.kernel)
        for name, wanted in (("down", (self.rank, *site.shape[1:])), ("up", (site.rows, self.rank, *ones))):
            if tuple(t[name].shape) != wanted:
                return f"{name} is {tuple(t[name].shape)}, this layer takes {wanted}"
        return None

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        up, down = t["up"], t["down"]
        if up.ndim < 2 or down.ndim < 2 or up.shape[1] != down.shape[0]:
            raise ShapeError(f"up is {tuple(up.shape)} and down {tuple(down.shape)}: their ranks differ")
        return cls(rank=down.shape[0], alpha=alpha)

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        return t["up"].flatten(1), t["down"].flatten(1)
