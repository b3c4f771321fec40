"""X-LoRA: a small network tells the adapters' strengths from time and prompt (arXiv 2402.07148)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from imgadapt.errors import ConfigError
from imgadapt.methods.base import above_zero, positive
from imgadapt.routing.router import Router, Seen, Sizes, Tensors

_WAVES = 16  # sines and cosines of the time
_WIDEST = 2**14


@dataclass(frozen=True)
class XLoRA(Router):
    """strengths = softmax(W2 silu(W1 [waves(t), norm(context)] + b1) / temperature), of each sample; W2 from zero, so
    that it begins with the average.

    per_layer: strengths of each layer's own; else all layers have the same. top_k: the k largest alone, softmax over
    these.

    Source: arXiv 2402.07148; peft/tuners/xlora, which sees the hidden states of a first pass without adapters, and
    tells each token's. Here the denoiser's inputs tell each sample's, which costs no second pass.
    """

    hidden: int = 64
    per_layer: bool = False
    top_k: int | None = None
    temperature: float = 1.0

    name: ClassVar[str] = "xlora"

    def __post_init__(self) -> None:
        positive("hidden", self.hidden)
        above_zero("temperature", self.temperature, "1")
        if self.top_k is not None:
            positive("top_k", self.top_k)
        if self.hidden > _WIDEST:
            raise ConfigError(f"hidden is {self.hidden}; it must be {_WIDEST} or less")

    def shapes(self, sizes: Sizes) -> Mapping[str, tuple[int, ...]]:
        out = sizes.adapters * (sizes.layers if self.per_layer else 1)
        seen = 2 * _WAVES + sizes.context
        return {"in": (self.hidden, seen), "in_bias": (self.hidden,), "out": (out, self.hidden), "out_bias": (out,)}

    def init(self, sizes: Sizes) -> dict[str, Tensor]:
        made = {name: torch.zeros(shape) for name, shape in self.shapes(sizes).items()}
        made["in"].uniform_(-1, 1).div_(math.sqrt(made["in"].shape[1]))
        return made

    def strengths(self, t: Tensors, sizes: Sizes, seen: Seen, *, training: bool) -> Tensor:
        angles = seen.share[:, None] * torch.arange(1, _WAVES + 1, device=seen.share.device) * math.pi
        features = torch.cat([angles.sin(), angles.cos(), F.layer_norm(seen.context, seen.context.shape[1:])], 1)
        logits = F.linear(F.silu(F.linear(features, t["in"], t["in_bias"])), t["out"], t["out_bias"])
        return chosen(logits.view(len(logits), -1, sizes.adapters), self.top_k, self.temperature)


def chosen(logits: Tensor, top_k: int | None, temperature: float) -> Tensor:
    """Softmax over the last axis, over its `top_k` largest alone; zero elsewhere."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return (logits / temperature).softmax(-1)
