"""LoRA-XS: a small square matrix between the weight's largest singular directions (arXiv 2405.17604)."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from imgadapt.errors import ShapeError
from imgadapt.methods import singular
from imgadapt.methods.base import Tensors, Way
from imgadapt.methods.lora import Scaled, too_large
from imgadapt.sites import Site


@dataclass(frozen=True)
class LoRAXS(Scaled):
    """delta = loraxs_up @ loraxs_r @ loraxs_down, with loraxs_r (rank, rank) trained, and of W's `rank` largest
    singular values and vectors: loraxs_up = U S (out, rank), loraxs_down = Vᵀ (rank, in / groups, *kernel), which stay.

    alpha: the delta is multiplied by alpha / rank; None means rank.

    The directions are in the file, which is as large as a LoRA's: an SVD chooses signs, and another machine, or a base
    that was rounded, others. loraxs_r is zero when fresh (the paper's is of deviation 1e-5).

    Raises:
        ConfigError: rank below 1, or alpha not a finite positive number.
    """

    rank: int = 32
    alpha: float | None = None

    name = "loraxs"
    rate_over_lora = 0.62
    tensors = ("loraxs_r", "loraxs_up", "loraxs_down")
    frozen = ("loraxs_up", "loraxs_down")
    starts_from_weight = True

    @property
    def ranked(self) -> dict[str, int]:
        return {"loraxs_r": 0}

    def check(self, site: Site) -> str | None:
        return super().check(site) or too_large(self.rank, site)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        r = self.rank
        return {"loraxs_r": (r, r), "loraxs_up": (site.rows, r), "loraxs_down": (r, *site.shape[1:])}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        assert weight is not None
        u, s, v = (tensor.cpu() for tensor in singular.largest(weight, self.rank))
        square = torch.zeros(self.rank, self.rank)
        return {"loraxs_r": square, "loraxs_up": u * s, "loraxs_down": v.reshape(self.rank, *site.shape[1:])}

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        return (t["loraxs_up"] @ t["loraxs_r"] @ t["loraxs_down"].flatten(1)).reshape(site.shape)

    def way(self, site: Site) -> Way:
        return Way(pair=True, linear=("up",))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        return {"up": t["loraxs_up"] @ t["loraxs_r"], "down": t["loraxs_down"]}

    def pair(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        return t["loraxs_up"] @ t["loraxs_r"], t["loraxs_down"].flatten(1)

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        square = t["loraxs_r"]
        if square.ndim != 2 or square.shape[0] != square.shape[1]:
            raise ShapeError(f"loraxs_r is {tuple(square.shape)}, wanted (rank, rank)")
        return cls(rank=len(square), alpha=alpha)
