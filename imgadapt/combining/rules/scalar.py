"""Rules that give each input one number, from its weight and the inner products of the changes.

They get all inputs, also those that do not have the layer: their rows of the inner products are zero, and what they are
multiplied by is not used. A negative weight is the positive one of the change turned round.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from imgadapt.combining.rules.rule import Option, Rule

_PARALLEL = 0.9995  # above it mergekit's slerp, too, is linear
_STEPS, _STILL = 200, 1e-13


def weighted(weights: Tensor, gram: Tensor, options: Mapping[str, Any]) -> Tensor:
    """As they are."""
    return weights


def task_arithmetic(weights: Tensor, gram: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Times one scale for all, the paper's lambda."""
    return weights * options["scale"]


def slerp(weights: Tensor, gram: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Along the arc from one change to the other, t = |w2| / (|w1| + |w2|) of it; with one input, that.

    `magnitude`: "each": sin((1 - t) Ω) / sin Ω and sin(t Ω) / sin Ω of the changes as they are (Shoemake 1985;
    mergekit), so the larger one pulls more; "mean": of their directions, and the norm goes linearly from one to the
    other (sd-mecha). Changes that are nearly parallel or opposite, or one of which is zero or missing: the straight
    line between them.
    """
    share, signs, norms = _shares(weights), weights.sign(), _norms(gram)
    if len(weights) < 2 or float(norms.min()) == 0:
        return signs * share * options["scale"]
    cosine = float(signs.prod() * gram[0, 1] / norms.prod())
    if not abs(cosine) <= _PARALLEL:
        return signs * share * options["scale"]
    angle = math.acos(cosine)
    arc = torch.sin(share * angle) / math.sin(angle)
    if options["magnitude"] == "mean":
        arc = arc * (share * norms).sum() / norms
    return signs * arc * options["scale"]


def karcher(weights: Tensor, gram: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The direction whose squared angles to all directions, times their shares |w| / sum |w|, are least (Karcher's mean
    on the sphere), by steps along the mean of the logarithms, with the mean of the norms. A zero or missing change
    counts in the mean of the norms only. Directions that cancel each other have no mean: it is the linear one.
    """
    share, signs, norms = _shares(weights), weights.sign(), _norms(gram)
    there = norms > 0
    if not bool(there.any()):
        return signs * share * options["scale"]
    p = share[there] / share[there].sum().clamp(min=1e-300)
    units = (signs / norms.clamp(min=1e-300))[there]
    cosines = gram[there][:, there] * units[:, None] * units[None]
    mean = _sphere_mean(p, cosines)
    if mean is None:
        return signs * share * options["scale"]
    made = torch.zeros_like(weights)
    made[there] = units * mean * (share * norms).sum() * options["scale"]
    return made


def _sphere_mean(p: Tensor, cosines: Tensor) -> Tensor | None:
    """Coefficients of the mean in the directions; None where they cancel."""
    a = p.clone()
    size = float(a @ cosines @ a)
    if not size > 1e-12:
        return None
    a = a / size**0.5
    for _ in range(_STEPS):
        near = (cosines @ a).clamp(-1, 1)
        angle, sine = near.acos(), (1 - near**2).sqrt()
        pull = p * torch.where(sine > 1e-7, angle / sine.clamp(min=1e-7), (near > 0).double())
        step = pull - (pull @ near) * a
        length = max(0.0, float(step @ cosines @ step)) ** 0.5
        if length < _STILL:
            break
        a = math.cos(length) * a + math.sin(length) / length * step
        a = a / float(a @ cosines @ a) ** 0.5
    return a


def model_stock(weights: Tensor, gram: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The mean, times t = k c / (1 + (k - 1) c): c is the mean cosine between the changes, k their number. With shares
    p = |w| / sum |w| that are not equal, pairs count p_i p_j and k is 1 / sum p², which is the same by the paper's own
    derivation. t is 0 where they have nothing in common (c <= 0) and 1 where only one input has the layer. A missing
    change is zero in the mean, and in neither c nor k.
    """
    share, signs, norms = _shares(weights), weights.sign(), _norms(gram)
    there = (norms > 0) & (share > 0)
    t = 1.0
    if int(there.sum()) > 1:
        p, units = share[there] / share[there].sum(), (signs / norms.clamp(min=1e-300))[there]
        cosines = gram[there][:, there] * units[:, None] * units[None]
        alone = float((p**2).sum())
        c = (float(p @ cosines @ p) - float(p**2 @ cosines.diagonal())) / (1 - alone)
        c = min(1.0, max(0.0, c))
        t = c / (alone + (1 - alone) * c)
    return signs * share * t * options["scale"]


def cosine_adaptive(weights: Tensor, gram: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Weights lowered where changes point the same way, so that what two of them share counts once:
    w_i h_ii / (h_ii + strength * sum of max(0, h_ij) over the others), h_ij = w_i w_j <change_i, change_j>.

    Orthogonal and opposite changes keep their weights, k equal ones come to one of them, and a weak copy takes little
    from a strong one. A missing change takes nothing.
    """
    h = gram * weights[:, None] * weights[None]
    own = h.diagonal()
    others = h.clamp(min=0).sum(1) - own.clamp(min=0)
    lowered = own / (own + options["strength"] * others).clamp(min=1e-300)
    return weights * torch.where(own > 0, lowered, 1.0)


def _shares(weights: Tensor) -> Tensor:
    return weights.abs() / weights.abs().sum().clamp(min=1e-300)


def _norms(gram: Tensor) -> Tensor:
    return gram.diagonal().clamp(min=0).sqrt()


SCALE = Option(1.0, "the merged change times this", 0.0, 100.0)
_MAGNITUDE = Option(
    "each",
    "each: changes as they are; mean: their directions, with the norm in between",
    choices=("each", "mean"),
)
_STRENGTH = Option(1.0, "how much of what two share is taken off")

_DEFINITION = "the definition"

RULES = (
    Rule("weighted", "the sum of all changes times their weights", _DEFINITION, weighted, linear=True, in_core=True),
    Rule("concat", "the same, factors side by side: ranks add up", _DEFINITION, weighted, linear=True, in_core=True),
    Rule("svd", "the same, as the best approximation of the rank asked for", "Eckart and Young 1936", weighted,
         linear=True, in_core=True),
    Rule("task_arithmetic", "the sum times one scale for all", "arXiv 2212.04089", task_arithmetic,
         options={"scale": SCALE}, linear=True, in_core=True),
    Rule("slerp", "a point on the arc between two changes; the weights' shares say which",
         "Shoemake 1985; mergekit's slerp and flat nuslerp", slerp, options={"magnitude": _MAGNITUDE, "scale": SCALE},
         least=2, most=2, relative=True, in_core=True),
    Rule("karcher", "the mean direction of any number of changes on the sphere, with their mean norm",
         "Karcher 1977; mergekit's karcher", karcher, options={"scale": SCALE}, relative=True, in_core=True),
    Rule("model_stock", "the mean, smaller where changes disagree: for several trainings of one thing",
         "arXiv 2403.19522", model_stock, options={"scale": SCALE}, relative=True, in_core=True),
    Rule("cosine_adaptive", "the sum, with weights lowered where changes point the same way",
         "imgadapt; after supermerger's cosine modes", cosine_adaptive, options={"strength": _STRENGTH}, in_core=True),
)  # fmt: skip
