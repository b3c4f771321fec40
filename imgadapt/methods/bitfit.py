"""BitFit: only the bias learns (arXiv 2106.10199)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from imgadapt.errors import ShapeError
from imgadapt.methods.base import Method, Peft, Tensors, Way, linear_only
from imgadapt.sites import Site


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple["BitFit", dict[str, Tensor]]:
    return BitFit(), {"bitfit": t["beft_bias"].flatten()}


def _write(method: "BitFit", t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    linear_only(method, shape)
    return {"beft_bias": t["bitfit"][None]}, {}


@dataclass(frozen=True)
class BitFit(Method):
    """The bias changes by `bitfit` (out,), the weight by nothing.

    Of linear layers, convolutions, norms and fused projections that have a bias; presets and globs that end in `*` pass
    by those that have none. peft's BEFT (tuners/beft, `beft_bias` (1, out)) is this on linear layers; it gives one to
    layers without bias, too, and cannot merge it: such files are refused here.
    """

    name = "bitfit"
    rate_over_lora = 7.1
    tensors = ("bitfit",)
    kinds = ("linear", "conv", "norm", "fused")
    peft = Peft("BEFT", ("beft_bias",), _read, _write)

    def check(self, site: Site) -> str | None:
        return super().check(site) or ("it has no bias" if site.bias is None else None)

    def passes(self, site: Site) -> bool:
        return site.bias is None

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"bitfit": (site.rows,)}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        return {"bitfit": torch.zeros(site.rows)}

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        return t["bitfit"].new_zeros(site.shape)

    def accumulate(self, total: Tensor, t: Tensors, site: Site, weight: Tensor | None, gain: float) -> None:
        return None

    def bias_delta(self, t: Tensors) -> Tensor | None:
        return t["bitfit"]

    def way(self, site: Site) -> Way:
        return Way(bias=True, linear=("bias",))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        return {"bias": t["bitfit"]}

    def fits(self, t: Tensors, site: Site) -> str | None:
        return super().fits(t, site) or (
            f"{self.name} changes a bias, this layer has none" if site.bias is None else None
        )

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        if t["bitfit"].ndim != 1:
            raise ShapeError(f"bitfit is {tuple(t['bitfit'].shape)}, wanted (outputs,)")
        return cls()
