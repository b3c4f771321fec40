"""HiRA: the weight times a low-rank matrix, elementwise (ICLR 2025, openreview TwJrTz9cRS)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from imgadapt.errors import ShapeError
from imgadapt.methods.base import Method, Peft, Tensors, positive
from imgadapt.methods.lora import too_large
from imgadapt.sites import Site


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple["HiRA", dict[str, Tensor]]:
    down, up = (next(v for k, v in t.items() if k in (f"hira_{end}", f"hira_embedding_{end}")) for end in "AB")
    own = {"hira_down": down, "hira_up": up}
    return HiRA.infer(own, None), own


def _write(method: "HiRA", t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {"hira_A": t["hira_down"], "hira_B": t["hira_up"]}, {"r": method.rank}


@dataclass(frozen=True)
class HiRA(Method):
    """delta = W * (up @ down), elementwise, with down (rank, in / groups, *kernel) and up (out, rank, *1), as LoRA's.

    Of high rank where W is. There is no scale (peft tuners/hira has none). What it changes goes into the one product
    with the weight: acting on activations would take `rank` products with W, the delta costs a product of
    out * in * rank in all, whatever the tokens. Grouped convolutions, which peft refuses, are as LoRA has them.

    Raises:
        ConfigError: rank below 1.
    """

    rank: int = 32

    name = "hira"
    rate_over_lora = 5.0
    tensors = ("hira_down", "hira_up")
    needs_weight = True
    peft = Peft("HIRA", ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"), _read, _write)

    def __post_init__(self) -> None:
        positive("rank", self.rank)

    @property
    def file_rank(self) -> int:
        return self.rank

    @property
    def ranked(self) -> dict[str, int]:
        return {"hira_down": 0}

    def check(self, site: Site) -> str | None:
        return super().check(site) or too_large(self.rank, site)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"hira_down": (self.rank, *site.shape[1:]), "hira_up": (site.rows, self.rank, *site.ones)}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        made = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        nn.init.kaiming_uniform_(made["hira_down"], a=math.sqrt(5))
        return made

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        assert weight is not None
        return weight * self._factor(t, site)

    def accumulate(self, total: Tensor, t: Tensors, site: Site, weight: Tensor | None, gain: float) -> None:
        assert weight is not None
        total.addcmul_(weight, self._factor(t, site), value=gain)

    def _factor(self, t: Tensors, site: Site) -> Tensor:
        return (t["hira_up"].flatten(1) @ t["hira_down"].flatten(1)).reshape(site.shape)

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        up, down = t["hira_up"], t["hira_down"]
        if up.ndim < 2 or down.ndim < 2 or up.shape[1] != down.shape[0] or math.prod(up.shape[2:]) != 1:
            raise ShapeError(f"hira_up is {tuple(up.shape)} and hira_down {tuple(down.shape)}: their ranks differ")
        return cls(rank=down.shape[0])
