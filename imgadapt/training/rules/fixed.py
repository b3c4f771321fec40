"""LoRA-FA: down stays as it began, and up's gradient is put right for it (arXiv 2308.03303)."""

from collections.abc import Sequence

import torch

from imgadapt.slot import Slot
from imgadapt.training.rules.rule import Rule

_DELTA = 1e-8  # peft's


class FixedDown(Rule):
    """The gradient g (out, rank) of up becomes g (A Aᵀ)^-1 / scale², with A (rank, fan_in) the down that is not
    trained: a step of plain descent then changes the weight as nearly as it can like one of the whole weight.

    It is what peft's optimiser does (optimizers/lorafa.py), there in bf16 and in AdamW; here for any optimiser, in fp32
    and on convolutions, too. Without down's gradient a layer keeps its h (..., rank) for the backward pass and not its
    input.
    """

    def __init__(self, rows: Sequence[tuple[str, Slot]]) -> None:
        self._rows = [(slot, _inverse(slot)) for _, slot in rows]

    def correct(self) -> None:
        for slot, inverse in self._rows:
            gradient = slot._parameters["up"].grad  # pyright: ignore[reportOptionalMemberAccess] # LoRA has it
            if gradient is not None:
                gradient.copy_((gradient.flatten(1) @ inverse / slot.strength**2).reshape(gradient.shape))


@torch.no_grad()
def _inverse(slot: Slot) -> torch.Tensor:
    down = slot.tensors(torch.float64)["down"].flatten(1)
    gram = down @ down.t() + _DELTA * torch.eye(len(down), dtype=down.dtype, device=down.device)
    return torch.linalg.pinv(gram, hermitian=True).float()
