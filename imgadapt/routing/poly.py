"""Poly: which adapters act in which layer, learnt, whatever the prompt (arXiv 2202.13914)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from imgadapt.methods.base import above_zero
from imgadapt.routing.router import Router, Seen, Sizes, Tensors


@dataclass(frozen=True)
class Poly(Router):
    """strengths = z / sum(z) of each layer, z = sigmoid(logits), `logits` (layers, adapters) from zero. In training z
    is Gumbel-sigmoid, sigmoid((logits + log u - log(1 - u)) / temperature), u uniform, anew in each forward.

    Source: arXiv 2202.13914 (one row of its task-skill matrix: the task is what it is trained on);
    peft/tuners/poly/router.py.
    """

    temperature: float = 1.0

    name: ClassVar[str] = "poly"

    def __post_init__(self) -> None:
        above_zero("temperature", self.temperature, "1")

    def shapes(self, sizes: Sizes) -> Mapping[str, tuple[int, ...]]:
        return {"logits": (sizes.layers, sizes.adapters)}

    def init(self, sizes: Sizes) -> dict[str, Tensor]:
        return {"logits": torch.zeros(sizes.layers, sizes.adapters)}

    def strengths(self, t: Tensors, sizes: Sizes, seen: Seen, *, training: bool) -> Tensor:
        logits = t["logits"]
        if training:
            u = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            logits = (logits + u.log() - (1 - u).log()) / self.temperature
        z = logits.sigmoid()
        return (z / (z.sum(-1, keepdim=True) + 1e-12)).expand(len(seen.share), -1, -1)
