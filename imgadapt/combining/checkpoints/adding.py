"""Merged changes added to tensors as they are stored: summed in fp32 or better, block by block, and rounded once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from imgadapt.combining.checkpoints.rounding import stochastic
from imgadapt.combining.engine import whole
from imgadapt.combining.terms import Dense, Pair, Term
from imgadapt.merging import add_product, wider

_BLOCK = 2**20  # elements summed at a time

Chance = Callable[[int, int], Tensor]
"""(first element, how many) -> a number in [0, 1) for each of these elements of the tensor."""


@torch.no_grad()
def add(values: Tensor, terms: Sequence[Term], start: int = 0, chance: Chance | None = None) -> bool:
    """values (rows, fan_in) += rows `start` and on of the terms' sum, in place; whether that is finite in values'
    dtype (if not, values are not to be used). chance: rounded at random, see `stochastic`; None: to the nearest.
    """
    rows = len(values)
    pairs = [term for term in terms if isinstance(term, Pair)]
    if chance is None and len(pairs) == len(terms):
        up = torch.cat([pair.up[start : start + rows] for pair in pairs], 1)
        limits = add_product(values, up, torch.cat([pair.down for pair in pairs]), values)
        return _within(limits, values.dtype) and _sound(values)
    fan_in, step = values.shape[1], max(1, _BLOCK // values.shape[1])
    wide, fine = wider(values.dtype), True
    for first in range(0, rows, step):
        block = values[first : first + step]
        total = block.to(wide, copy=True)
        for term in terms:
            total += term.rows(start + first, start + first + len(block))
        if chance is not None and values.dtype.itemsize < 4:
            total = stochastic(total, values.dtype, chance(first * fan_in, total.numel()))
        fine = fine and _within(total, values.dtype)
        block.copy_(total)
    return fine


def _within(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether all are numbers that the dtype holds."""
    return bool((values.abs() <= torch.finfo(dtype).max).all())


def _sound(values: Tensor) -> bool:
    """Whether there is no NaN or infinity: its sum tells, fast, unless that is beyond the range itself."""
    return values.dtype.itemsize < 2 or bool(values.sum().isfinite()) or bool(values.isfinite().all())


def turned(terms: Sequence[Term]) -> list[Term]:
    """The same change, transposed."""
    pairs = [term for term in terms if isinstance(term, Pair)]
    if len(pairs) == len(terms):
        return [Pair(pair.down.t(), pair.up.t()) for pair in pairs]
    return [Dense(whole(terms).t())]
