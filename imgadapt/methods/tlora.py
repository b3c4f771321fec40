"""T-LoRA: low rank, and the lower the more noise there is (arXiv 2507.05964)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor, nn

from imgadapt.errors import ConfigError, ShapeError, StateError
from imgadapt.methods.base import Tensors, Way, above_zero, positive
from imgadapt.methods.lora import LoRA, Scaled, too_large
from imgadapt.sites import Site

_TIE = 1e-4  # a rank that rounding takes away is not: timesteps are thousandths


@dataclass(frozen=True)
class TLoRA(Scaled):
    """At time t of T the first r(t) = floor(((T - t) / T)^power * (rank - min_rank)) + min_rank ranks act (in
    ControlGenAI/T-LoRA tlora/trainer_sdxl.py): all where there is no noise, the first `min_rank` in pure noise.

    orthogonal: up @ diag(lambda) @ down less what that was at the start, with orthonormal rows of tlora_down
        (rank, in / groups, *kernel), orthonormal columns of tlora_up (out, rank), and as tlora_lambda (rank,) the least
        singular values of a random matrix (theirs in tlora/model/lora.py, `OrthogonalLoRALinearLayer`, `last`). What
        they were is in the file, too (tlora_down0, tlora_up0, tlora_lambda0), and is not trained.
        False: LoRA's up @ down.
    alpha: the change is multiplied by alpha / rank; None means rank. It does not depend on t.

    The time is that which the denoiser is called with (`moment.py`). A layer outside of one has all ranks, always. No
    weight has this change: it is not merged, and it is a LoRA only on the average (`averaged`).

    Raises:
        ConfigError: rank or min_rank below 1, min_rank above rank, power or alpha not a finite positive number.
    """

    rank: int = 16
    alpha: float | None = None
    min_rank: int = 1
    power: float = 1.0
    orthogonal: bool = True

    name = "tlora"
    tensors = ("tlora_down", "tlora_up")
    optional = ("tlora_lambda", "tlora_down0", "tlora_up0", "tlora_lambda0")
    kinds = ("linear", "conv")
    frozen = ("tlora_down0", "tlora_up0", "tlora_lambda0")
    merges = False
    apart = "acts with another rank at each timestep"
    timed = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("min_rank", self.min_rank)
        above_zero("power", self.power, "1")
        if self.min_rank > self.rank:
            raise ConfigError(f"min_rank is {self.min_rank}; it cannot be above the rank, {self.rank}")

    @classmethod
    def recognises(cls, names: set[str]) -> bool:
        return names in ({*cls.tensors}, {*cls.tensors, *cls.optional})

    def check(self, site: Site) -> str | None:
        return super().check(site) or too_large(self.rank, site)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        down, up = (self.rank, *site.shape[1:]), (site.rows, self.rank)
        made = {"tlora_down": down, "tlora_up": up}
        if self.orthogonal:
            made |= {"tlora_lambda": (self.rank,), "tlora_down0": down, "tlora_up0": up, "tlora_lambda0": (self.rank,)}
        return made

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        made = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        if not self.orthogonal:
            nn.init.kaiming_uniform_(made["tlora_down"], a=math.sqrt(5))
            return made
        # the singular vectors of a matrix of normal numbers are as random as these
        down = torch.linalg.qr(torch.randn(site.fan_in, self.rank)).Q.t().reshape(made["tlora_down"].shape)
        up = torch.linalg.qr(torch.randn(site.rows, self.rank)).Q
        first = {"tlora_down": down, "tlora_up": up, "tlora_lambda": torch.tensor(_least(*_sides(site), self.rank))}
        return {**{k: v.contiguous() for k, v in first.items()}, **{f"{k}0": v.clone() for k, v in first.items()}}

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        raise StateError(f"T-LoRA {self.apart}: there is no one change of the weight")

    def way(self, site: Site) -> Way:
        return Way(pair=True, linear=("up",))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        """up (out, r) and down (r, ...), as many ranks as `acting` gives; of a fresh one exactly no change."""
        up, down = t["tlora_up"], t["tlora_down"]
        if not self.orthogonal:
            return {"up": up, "down": down}
        up, up0 = up * t["tlora_lambda"], t["tlora_up0"] * t["tlora_lambda0"]
        return {"up": torch.cat([up - up0, up0], 1), "down": torch.cat([down, down - t["tlora_down0"]])}

    def acting(self, share: Tensor) -> Tensor:
        """Which ranks of the operands act: 1 or 0, (n, ranks), at times t / T (n,) in [0, 1]."""
        free = self.rank - self.min_rank
        count = ((1 - share.double()).clamp(0, 1) ** self.power * free + _TIE).floor() + self.min_rank
        mask = (torch.arange(self.rank, device=share.device) < count[:, None]).float()
        return torch.cat([mask, mask], 1) if self.orthogonal else mask

    def averaged(self, t: Tensors, site: Site) -> tuple[LoRA, dict[str, Tensor], float, float]:
        """The LoRA that is nearest to it over all times alike, and two mean squares over the times: of what that lacks,
        and of the whole change, both unscaled.

        Rank i acts in a share q_i of the times, so the mean is up @ diag(q) @ down; the ranks are nested, so i and j
        act together in min(q_i, q_j).
        """
        free = self.rank - self.min_rank
        late = (torch.arange(self.rank, dtype=torch.float64) - self.min_rank + 1).clamp(min=0) / max(1, free)
        q = 1 - late ** (1 / self.power)
        o = self.operands({name: tensor.double() for name, tensor in t.items()}, site, None)
        q = torch.cat([q, q]) if self.orthogonal else q
        up, down = o["up"], o["down"].flatten(1)
        products = (up.t() @ up) * (down @ down.t())
        together = torch.minimum(q[:, None], q)
        lost, whole = ((together - q[:, None] * q) * products).sum(), (together * products).sum()
        rank = len(q)
        made = {"up": (up * q).reshape(*up.shape, *site.ones).float(), "down": o["down"].float()}
        return LoRA(rank, self.scale * rank), made, max(0.0, float(lost)), max(0.0, float(whole))

    def resized(self, rank: int) -> Self:
        return self  # with more ranks, others would act at a time

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        up, down = t["tlora_up"], t["tlora_down"]
        if up.ndim != 2 or down.ndim < 2 or up.shape[1] != down.shape[0]:
            raise ShapeError(f"tlora_up is {tuple(up.shape)} and tlora_down {tuple(down.shape)}: their ranks differ")
        orthogonal = "tlora_lambda" in t
        for name, like in _STARTS.items() if orthogonal else ():
            if t[name].shape != (t[like].shape if like else up.shape[1:]):
                raise ShapeError(f"{name} is {tuple(t[name].shape)}, of rank {up.shape[1]}")
        return cls(rank=up.shape[1], alpha=alpha, orthogonal=orthogonal)


_STARTS: Mapping[str, str] = {
    "tlora_down0": "tlora_down", "tlora_up0": "tlora_up", "tlora_lambda": "", "tlora_lambda0": "",
}  # fmt: skip


def _sides(site: Site) -> tuple[int, int]:
    return max(site.rows, site.fan_in), min(site.rows, site.fan_in)


@lru_cache(1024)
def _least(long: int, short: int, rank: int) -> tuple[float, ...]:
    """The `rank` least singular values, falling, of a matrix of normal numbers with deviation 1 / rank."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        matrix = torch.linalg.qr(torch.randn(long, short, generator=generator) / rank, "r").R
        return tuple(torch.linalg.svdvals(matrix)[-rank:].tolist())
