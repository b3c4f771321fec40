"""Prefix tuning: learned keys and values of each cross-attention (arXiv 2101.00190)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from imgadapt.methods.base import above_zero
from imgadapt.prompting.kind import Place, Prompting


@dataclass(frozen=True)
class PrefixTuning(Prompting):
    """K' = [K; keys], V' = [V; values], after to_k and to_v, with `keys` and `values` (n, inner) of each attention.

    A fresh one is no no-op: keys are normal with this spread and values zero, so that attention to them takes a little
    from the text.

    Source: arXiv 2101.00190 (there made by a network while training, for stability; here not). peft's prefix_tuning has
    one table for all layers, of one width, which has no place for a UNet's.
    """

    spread: float = 0.02

    name: ClassVar[str] = "prefix_tuning"
    rate_over_lora: ClassVar[float] = 60.0
    shared: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero("spread", self.spread, "0.02")

    def shapes(self, place: Place) -> Mapping[str, tuple[int, ...]]:
        return {"keys": (self.tokens, place.inner), "values": (self.tokens, place.inner)}

    def init(self, place: Place) -> dict[str, Tensor]:
        shape = self.tokens, place.inner
        return {"keys": torch.randn(shape) * self.spread, "values": torch.zeros(shape)}
