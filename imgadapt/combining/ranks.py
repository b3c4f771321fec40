"""How much of each layer is kept: ranks that meet an error, an energy or a file size for the whole adapter.

Layers compete: each singular value is worth its square and costs out + fan_in numbers, and the best per number are
taken first. Per layer, they come in order of their size, so this is the best choice up to the last value taken.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Choice:
    """A layer's singular values (largest first) and what one of them costs to keep, in numbers (out + fan_in).

    outside: the squared norm of what no rank keeps. fixed: numbers that the first one takes besides (names of tensors).
    """

    values: torch.Tensor
    cost: int
    outside: float = 0.0
    fixed: int = 0


def ranks_for(
    layers: Mapping[str, Choice], *, error: float | None = None, energy: float | None = None, numbers: int | None = None
) -> dict[str, int]:
    """Layer -> rank, 0 for none at all, so that the relative Frobenius error of the whole is at most `error`, or at
    least `energy` of its squared norm is kept, or no more than `numbers` are stored.
    """
    total = math.fsum(float((c.values.double() ** 2).sum()) + c.outside for c in layers.values())
    wanted = total if error is None and energy is None else total * (energy if energy is not None else 1 - error**2)  # pyright: ignore[reportOptionalOperand] # one of them is given
    gains = torch.cat([c.values.double() ** 2 / c.cost for c in layers.values()])
    owner = torch.cat([torch.full((len(c.values),), k) for k, c in enumerate(layers.values())])
    costs, fixed = [c.cost for c in layers.values()], [c.fixed for c in layers.values()]
    order = gains.argsort(descending=True, stable=True)
    taken = [0] * len(layers)
    kept, used = 0.0, 0
    for index, gain in zip(owner[order].tolist(), gains[order].tolist(), strict=True):
        if gain <= 0 or (numbers is None and kept >= wanted * (1 - 1e-12)):
            break
        takes = costs[index] + (0 if taken[index] else fixed[index])
        if numbers is not None and used + takes > numbers:
            continue
        taken[index] += 1
        kept += gain * costs[index]
        used += takes
    return dict(zip(layers, taken, strict=True))


def rank_of(values: torch.Tensor, rule: str, bound: float) -> int:
    """The least rank of one layer by a rule of kohya's and LyCORIS' tools, in exact terms: `ratio`: values of at least
    the largest over `bound` (sv_ratio); `cumulative`: their sum is at least `bound` of all (sv_cumulative); `fro`: the
    root of their squares' sum is (sv_fro); `threshold`: values of at least `bound`; `quantile`: that share of them.
    """
    v = values.double()
    if not len(v) or not float(v[0]) > 0:
        return 1
    if rule in ("ratio", "threshold"):
        least = float(v[0]) / bound if rule == "ratio" else bound
        return max(1, int((v >= least).sum()))
    if rule == "quantile":
        return max(1, int((v > torch.quantile(v, bound)).sum()))
    share = (v if rule == "cumulative" else v**2).cumsum(0)
    reached = share / share[-1] >= (bound if rule == "cumulative" else bound**2) * (1 - 1e-12)
    return int(reached.to(torch.int8).argmax()) + 1
