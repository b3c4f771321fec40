"""Gated prompts: attention to learned tokens, apart from that to the text, behind a gate (arXiv 2303.16199)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from imgadapt.methods.base import above_zero
from imgadapt.prompting.kind import Place, Prompting


@dataclass(frozen=True)
class GatedPrompts(Prompting):
    """heads' = heads + s tanh(gate) softmax(Q to_k(prompt)^T / sqrt(d)) to_v(prompt), before to_out; `prompt`
    (n, width) of each attention, `gate` (heads,) from zero: a fresh one is a no-op to the bit. The strength is linear.

    Source: LLaMA-Adapter, arXiv 2303.16199 and llama/model.py there (a gate a head, tanh); peft's adaption_prompt has
    one gate a layer, for Llama only.
    """

    spread: float = 1.0

    name: ClassVar[str] = "gated_prompts"
    rate_over_lora: ClassVar[float] = 60.0
    shared: ClassVar[bool] = False
    appended: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero("spread", self.spread, "1")

    def shapes(self, place: Place) -> Mapping[str, tuple[int, ...]]:
        return {"prompt": (self.tokens, place.context), "gate": (place.heads,)}

    def init(self, place: Place) -> dict[str, Tensor]:
        prompt = torch.randn(self.tokens, place.context) * self.spread
        return {"prompt": prompt, "gate": torch.zeros(place.heads)}
