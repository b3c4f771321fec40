"""SVDiff: the weight's singular values shifted (arXiv 2303.11305)."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from imgadapt.errors import ShapeError
from imgadapt.methods.base import Method, Tensors, Way
from imgadapt.sites import Site


@dataclass(frozen=True)
class SVDiff(Method):
    """W' = U diag(relu(S + spectral)) V with W = U diag(S) V, flattened to (out, inputs).

    `spectral` (min(out, inputs),): in the order of S, largest first. U, S and V are made of the base's weight. The
    signs that an SVD is free to choose cancel; where singular values are equal, vectors are not the weight's own, and
    where they are nearer than the rounding of W, another machine's may be others: a file is for the very weights,
    rounded alike, that it was trained on.

    The delta is built and goes into the one product with the weight: min(out, inputs) / tokens + 1/2 of the layer's
    forward and backward. A pair, of full rank, would be two of them, less only below 2/3 min(out, inputs) tokens. Of an
    embedding, which has few, it is a pair.
    """

    name = "svdiff"
    rate_over_lora = 10.0
    tensors = ("spectral",)
    needs_weight = True

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"spectral": (min(site.rows, site.fan_in),)}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}

    @property
    def constant_names(self) -> frozenset[str]:
        return frozenset(("svdiff_u", "svdiff_s", "svdiff_v"))

    def constants(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        assert weight is not None
        u, s, v = torch.linalg.svd(weight.flatten(1).float(), full_matrices=False)
        return {"svdiff_u": u, "svdiff_s": s, "svdiff_v": v.reshape(-1, *site.shape[1:])}

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        o = self.operands(t, site, weight)
        return (o["up"] @ o["down"].flatten(1)).reshape(site.shape)

    def way(self, site: Site) -> Way:
        return Way(pair=True, linear=("up",)) if site.kind == "embedding" else Way()

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        t = self.whole(t, site, weight)
        shift = torch.relu(t["svdiff_s"] + t["spectral"]) - t["svdiff_s"]
        return {"up": t["svdiff_u"] * shift, "down": t["svdiff_v"]}

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        if t["spectral"].ndim != 1:
            raise ShapeError(f"spectral is {tuple(t['spectral'].shape)}, wanted (singular values,)")
        return cls()
