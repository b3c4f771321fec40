"""Anchored: LoRA counted from where it started, so that it may start anywhere and change nothing."""

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
class Anchored(Scaled):
    """delta = up @ down - up_0 @ down_0, with down (rank, in / groups, *kernel) and up (out, rank, *1); up_0 and
    down_0, of the same shapes, are what those started from, and stay.

    What PiSSA (arXiv 2404.02948), OLoRA (2406.01775), CorDA (2406.05223) and LoRA-GA (2407.05000) train: they take
    scale * up_0 @ down_0 out of the base's weight, which here stays as it is. The gradients are theirs; computed as
    up @ (down - down_0) + (up - up_0) @ down_0 it is nothing, to the bit, when fresh. `training/starts` makes their
    starts; a fresh one of itself starts from random up and down. As LoRA it is one of rank 2 * rank, as in peft
    (tuners/lora, `path_initial_model_for_weight_conversion`).

    alpha: the delta is multiplied by alpha / rank; None means rank, so 1.
    rank_stabilised: by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).

    Raises:
        ConfigError: rank below 1, or alpha not a finite positive number.
    """

    rank: int = 16
    alpha: float | None = None
    rank_stabilised: bool = False

    name = "anchored"
    tensors = ("anchored_down", "anchored_up", "anchored_down_0", "anchored_up_0")
    frozen = ("anchored_down_0", "anchored_up_0")

    def check(self, site: Site) -> str | None:
        return super().check(site) or too_large(self.rank, site)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        down, up = (self.rank, *site.shape[1:]), (site.rows, self.rank, *site.ones)
        return {"anchored_down": down, "anchored_up": up, "anchored_down_0": down, "anchored_up_0": up}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        down, up = torch.empty(shapes["anchored_down"]), torch.empty(shapes["anchored_up"])
        for tensor in (down, up):
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        return self.started(down, up)

    @staticmethod
    def started(down: Tensor, up: Tensor) -> dict[str, Tensor]:
        """The tensors of an adapter that starts from these."""
        return {
            "anchored_down": down, "anchored_up": up,
            "anchored_down_0": down.clone(), "anchored_up_0": up.clone(),
        }  # fmt: skip

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        up, down = self._pair(t)
        return (up @ down.flatten(1)).reshape(site.shape)

    def way(self, site: Site) -> Way:
        return Way(pair=True, linear=("up",))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        up, down = self._pair(t)
        return {"up": up, "down": down}

    def _pair(self, t: Tensors) -> tuple[Tensor, Tensor]:
        """up (out, 2 * rank), down (2 * rank, in / groups, *kernel)."""
        up, up_0 = t["anchored_up"].flatten(1), t["anchored_up_0"].flatten(1)
        down, down_0 = t["anchored_down"], t["anchored_down_0"]
        return torch.cat([up, up - up_0], 1), torch.cat([down - down_0, down_0])

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        up, down = t["anchored_up"], t["anchored_down"]
        if up.ndim < 2 or down.ndim < 2 or up.shape[1] != down.shape[0] or math.prod(up.shape[2:]) != 1:
            raise ShapeError(
                f"anchored_up is {tuple(up.shape)} and anchored_down {tuple(down.shape)}: no low-rank pair"
            )
        for name, tensor in (("anchored_up_0", up), ("anchored_down_0", down)):
            if t[name].shape != tensor.shape:
                raise ShapeError(f"{name} is {tuple(t[name].shape)}, and what started from it {tuple(tensor.shape)}")
        return cls(rank=down.shape[0], alpha=alpha)

    def pair(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        """Of rank 2 * rank, or where that is more than the weight has, of its own: the delta and an identity."""
        up, down = self._pair(t)
        down, most = down.flatten(1), min(site.rows, site.fan_in)
        if len(down) <= most:
            return up, down
        whole, one = up @ down, torch.eye(most, dtype=up.dtype, device=up.device)
        return (whole, one) if site.fan_in == most else (one, whole)
