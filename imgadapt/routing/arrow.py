"""Arrow: each layer asks which adapter its input is like, without training (arXiv 2405.11157)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from imgadapt.methods.base import above_zero, positive
from imgadapt.routing.router import Router, Sizes
from imgadapt.routing.xlora import chosen
from imgadapt.sites import Site
from imgadapt.slot import Slot


@dataclass(frozen=True)
class Arrow(Router):
    """strengths = softmax(|prototype · h| / temperature) over the `top_k` largest, h the layer's input averaged over a
    sample's places; an adapter's prototype is the direction of the input that its change answers most: the first
    right singular vector of its delta; of a convolution's, summed over the kernel, as of a constant picture.

    Source: arXiv 2405.11157; peft/tuners/lora/arrow.py, which asks for each token.
    """

    top_k: int | None = None
    temperature: float = 1.0

    name: ClassVar[str] = "arrow"
    by_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        above_zero("temperature", self.temperature, "1")
        if self.top_k is not None:
            positive("top_k", self.top_k)

    def shapes(self, sizes: Sizes) -> Mapping[str, tuple[int, ...]]:
        return {}

    def init(self, sizes: Sizes) -> dict[str, Tensor]:
        return {}

    def of_input(self, prototypes: Tensor, there: Tensor, x: Tensor) -> Tensor:
        logits = (x @ prototypes.t()).abs().masked_fill(~there, -torch.inf)
        return chosen(logits, self.top_k, self.temperature)


@torch.no_grad()
def prototype(slot: Slot, site: Site, weight: Tensor | None) -> Tensor:
    """The first right singular vector of an adapter's delta on a layer, (in,), of length 1 before it is summed over a
    kernel: from its factors, where it has such.
    """
    t = slot.tensors(torch.float32)
    pair = None if slot.method.constant_names else slot.method.pair(t, site)
    if pair is not None:
        up, down = pair
        matrix = torch.linalg.qr(up.float()).R @ down.float()
    else:
        matrix = slot.method.delta(t, site, None if weight is None else weight.float()).flatten(1)
    first = torch.linalg.svd(matrix, full_matrices=False).Vh[0]
    return first.view(site.shape[1], -1).sum(1)
