"""Prompting: what every kind of learned prompt is, and Prompts: a trained one, as files have it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from imgadapt.errors import ConfigError
from imgadapt.methods.base import positive

Tensors = Mapping[str, Tensor]
MOST = 4096
"""Tokens of one adapter: attention's cost grows with them, and a text has 77 to 512."""


@dataclass(frozen=True)
class Place:
    """What reads the tokens: one cross-attention (`unet....attn2`), or a whole denoiser (`unet`), its context.

    context: width of what keys are made of; inner: of the keys of all heads; heads; both 0 of a denoiser.
    """

    name: str
    context: int
    inner: int = 0
    heads: int = 0


@dataclass(frozen=True)
class Prompting(ABC):
    """One kind of learned prompt with its settings. It changes no weight: it adds what attention reads.

    tokens: how many there are.
    """

    tokens: int = 8

    name: ClassVar[str]
    shared: ClassVar[bool]
    """Whether all cross-attentions read the same tokens, at the denoiser's place; else each has its own."""
    appended: ClassVar[bool] = True
    """Whether they stand among the text's tokens, so that a strength s is log(s) on their logits; else s multiplies."""
    joint: ClassVar[bool] = False
    """Whether transformers in which text and picture attend together (SD3, Flux) can read them."""

    rate_over_lora: ClassVar[float] = 1.0
    """Its best learning rate, by default settings, in LoRA's (benchmarks/methods.py, on the embedded base)."""

    def __post_init__(self) -> None:
        positive("tokens", self.tokens)
        if self.tokens > MOST:
            raise ConfigError(f"tokens is {self.tokens}; it must be {MOST} or less")

    @abstractmethod
    def shapes(self, place: Place) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor that attention reads there."""

    @abstractmethod
    def init(self, place: Place) -> dict[str, Tensor]:
        """Fresh fp32 tensors, drawn from torch's global generator: what is trained."""

    def making(self, place: Place) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor that `shapes`'s are made of while training; empty: they are trained themselves."""
        return {}

    def made(self, t: Tensors) -> Tensors:
        """What attention reads, of what is trained."""
        return t

    def fits(self, t: Tensors, place: Place) -> str | None:
        """What is wrong with a file's tensors for this place; None if they fit."""
        wanted = self.shapes(place)
        for name, shape in wanted.items():
            if name not in t:
                return f"{name} is missing, this place takes {shape}"
        further = self.making(place)
        every = {**wanted, **(further if t.keys() - wanted.keys() else {})}
        if t.keys() != every.keys():
            return f"{', '.join(sorted(t.keys() ^ every.keys()))}: {self} has {', '.join(every)}"
        wrong = [
            f"{name} is {tuple(t[name].shape)}, wanted {every[name]}" for name in every if t[name].shape != every[name]
        ]
        return wrong[0] if wrong else None


@dataclass(frozen=True)
class Prompts:
    """A learned prompt: its kind, and by place (canonical) the tensors that attention reads, and what makes them."""

    kind: Prompting
    tensors: Mapping[str, Tensors]
