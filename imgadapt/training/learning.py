"""Whether anything is learnt: a run whose adapter changes nothing after its first steps would only seem to go well."""

from collections.abc import Sequence

import torch

from imgadapt.errors import TrainingError, first_few
from imgadapt.training.recipe import Tensor

LOOKED_AT = 20  # steps done when it is looked at
_LEAST = 1e-9  # in a tensor that starts at zero; less changes no prediction in fp32


def still(rows: Sequence[Tensor], start: Sequence[torch.Tensor]) -> list[str]:
    """The layers whose change is what it was at the start.

    start: the tensors as they were. Of each layer those that started at zero are looked at, where there are any, for
    weight decay alone moves all others.
    """
    moved: dict[str, dict[bool, bool]] = {}
    for row, before in zip(rows, start, strict=True):
        zero, changed = not before.any(), bool((row.parameter.detach() - before).abs().max() > _LEAST)
        own = moved.setdefault(row.layer, {})
        own[zero] = own.get(zero, False) or changed
    return [layer for layer, own in moved.items() if not own.get(True, own.get(False))]


def check(rows: Sequence[Tensor], start: Sequence[torch.Tensor], rate: float) -> str | None:
    """What is odd after `LOOKED_AT` steps at this learning rate: some layers have learnt nothing. None: nothing is.

    Raises:
        TrainingError: no layer has.
    """
    idle, layers = still(rows, start), {row.layer for row in rows}
    if len(idle) == len(layers):
        raise TrainingError(
            f"nothing was learnt in {LOOKED_AT} steps: the change of {first_few(idle)} is still zero; is the learning "
            f"rate ({rate:g}) too small to count, or what it multiplies frozen?"
        )
    if idle:
        count = f"{len(idle)} of {len(layers)} layers"
        return f"after {LOOKED_AT} steps the change of {count} is still zero: {first_few(idle)}"
    return None
