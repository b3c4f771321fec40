"""Prompt tuning: learned tokens after those of the text (arXiv 2104.08691)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from imgadapt.methods.base import above_zero
from imgadapt.prompting.kind import Place, Prompting


@dataclass(frozen=True)
class PromptTuning(Prompting):
    """context' = [context; tokens], with `tokens` (n, width), read by every cross-attention of the denoiser.

    A fresh one is no no-op: its tokens are normal with this spread, near zero beside a text's, which have about 1; what
    attention gives them it takes from the text.

    Source: arXiv 2104.08691, there before the text of a language model; peft/tuners/prompt_tuning.
    """

    spread: float = 0.02

    name: ClassVar[str] = "prompt_tuning"
    rate_over_lora: ClassVar[float] = 60.0
    shared: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero("spread", self.spread, "0.02")

    def shapes(self, place: Place) -> Mapping[str, tuple[int, ...]]:
        return {"tokens": (self.tokens, place.context)}

    def init(self, place: Place) -> dict[str, Tensor]:
        return {"tokens": torch.randn(self.tokens, place.context) * self.spread}
