"""DyLoRA: ranks in an order, so that the first of them are a good adapter, however many (arXiv 2210.07558)."""

from collections.abc import Sequence

import torch

from imgadapt.slot import Slot
from imgadapt.training import noise
from imgadapt.training.config import TrainConfig
from imgadapt.training.rules.rule import Rule


class Nested(Rule):
    """In a step the first b ranks act and learn, b even from 1 to the layer's rank, by one draw for all layers.

    "last": of the b ranks only the last one learns (the paper's frozen DyLoRA); an optimiser's momentum moves others.
    The paper multiplies by alpha / b; here it is alpha / rank in every step, so that what is cut off leaves the rest as
    it is. Afterwards `Method.only`, or `imgadapt resize --first`, keeps the first ranks.
    """

    def __init__(self, config: TrainConfig, rows: Sequence[tuple[str, Slot]]) -> None:
        self._config = config
        self._rows = [(slot, _ranks(slot)) for _, slot in rows]

    def begin(self, step: int) -> None:
        drawn = noise.chance(self._config.seed, step, "ranks")
        for slot, first in self._rows:
            first.copy_(torch.arange(len(first), device=first.device) < 1 + int(drawn * len(first)))
            slot.restrict(first)

    def end(self) -> None:
        for slot, _ in self._rows:
            slot.restrict(None)

    def shape(self) -> None:
        if self._config.nested_ranks != "last":
            return
        for slot, first in self._rows:
            last = first - first.roll(-1) * (torch.arange(len(first), device=first.device) < len(first) - 1)
            for name, axis in slot.method.cut.items():
                parameter = slot._parameters[name]
                if parameter is not None and parameter.grad is not None:
                    parameter.grad.mul_(last.reshape([-1 if d == axis else 1 for d in range(parameter.ndim)]))


def _ranks(slot: Slot) -> torch.Tensor:
    name, axis = next(iter(slot.method.cut.items()))
    parameter = getattr(slot, name)
    return torch.ones(parameter.shape[axis], device=parameter.device)
