"""Rules that work on low-rank factors; what they give is again of low rank, and no dense change is ever made.

They see the inputs that have the layer: one that does not have it takes no part there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imgadapt.combining.entering import Change
from imgadapt.combining.lowrank import concat
from imgadapt.combining.rules import elements
from imgadapt.combining.rules.corespace import basis, canonical, frame, polar
from imgadapt.combining.rules.elements import Layer
from imgadapt.combining.rules.rule import Option, Rule
from imgadapt.combining.rules.scalar import SCALE
from imgadapt.combining.terms import Dense, Pair
from imgadapt.errors import ConfigError

Options = Mapping[str, Any]
_TIES = next(rule for rule in elements.RULES if rule.name == "ties")


@dataclass(frozen=True)
class _Aligned:
    """A layer's changes in another basis, for rules of elements that draw nothing."""

    name: str
    who: tuple[int, ...]
    changes: tuple[Change, ...]
    weights: Tensor
    keys: tuple[str, ...]
    seed: int = 0


def pairs_of(layer: Layer) -> list[Pair]:
    return [change.term.as_pair() for change in layer.changes]


def knots(layer: Layer, options: Options) -> Pair:
    """KnOTS-TIES: [change 1 ... change k] = U Σ [V1 ... Vk], TIES over the Σ Vi, U times what comes of it.

    With all changes as u s vt, U Σ is of the small [s u ...]: the vt are orthonormal. TIES trims layer by layer.
    """
    own = [canonical(pair) for pair in pairs_of(layer)]
    columns = torch.cat([c.u * c.s for c in own], 1)
    left = basis(columns)
    if not left.shape[1]:
        return _nothing(layer)
    aligned = [((left.t() @ c.u) * c.s @ c.vt).float() for c in own]
    changes = tuple(Change(Dense(a)) for a in aligned)
    there = _Aligned(layer.name, layer.who, changes, layer.weights, layer.keys)
    assert _TIES.elements is not None
    (merged,), _ = _TIES.elements(there, there, options)
    return Pair(left.float(), merged.rows(0, left.shape[1]))


def tsv_m(layer: Layer, options: Options) -> Pair:
    """TSV-M: singular vectors of all, side by side, made orthonormal (Procrustes); each keeps its singular values."""
    own = [canonical(pair).first(options["keep"]) for pair in pairs_of(layer)]
    if not sum(len(c.s) for c in own):
        return _nothing(layer)
    left, right = polar(torch.cat([c.u for c in own], 1)), polar(torch.cat([c.vt for c in own]).t())
    values = torch.cat([c.s * w for c, w in zip(own, layer.weights, strict=True)]) * options["scale"]
    return Pair((left * values).float(), right.t().float())


def iso_c(layer: Layer, options: Options) -> Pair:
    """Iso-C: the weighted sum with all its singular values made their mean; here of those that are not zero, as the
    paper's code gives the most of the norm to directions that no adapter has. `flatten`: how far they go to the mean.
    """
    total = canonical(concat([p.scaled(float(w)) for p, w in zip(pairs_of(layer), layer.weights, strict=True)]))
    if not len(total.s):
        return _nothing(layer)
    values = total.s.lerp(total.s.mean().expand_as(total.s), options["flatten"]) * options["scale"]
    return Pair((total.u * values).float(), total.vt.float())


def np_lora(layer: Layer, options: Options) -> Pair:
    """NP-LoRA: style + subject (1 - μ / (1 + μ) V Vᵀ), V the style's right singular vectors. With μ 0 it is the sum;
    the larger it is, the less of what the subject does with the style's inputs is left. `keep`: the share of the
    style's directions that V has.
    """
    pairs = [pair.scaled(float(w)) for pair, w in zip(pairs_of(layer), layer.weights, strict=True)]
    if len(pairs) == 1:
        return pairs[0]
    style, subject = pairs
    v = canonical(style).first(options["keep"]).vt
    less = options["mu"] / (1 + options["mu"])
    down = subject.down.double()
    return concat([style, Pair(subject.up, (down - less * (down @ v.t()) @ v).float())])


def subspace(layer: Layer, options: Options) -> Pair:
    """Compress, then merge: the sum of the changes in the first directions that all of them share. `keep`: how many,
    over the highest rank among them.
    """
    shared = frame([p.scaled(float(w)) for p, w in zip(pairs_of(layer), layer.weights, strict=True)])
    if not shared.left.shape[1]:
        return _nothing(layer)
    size = max(1, round(options["keep"] * max(shared.ranks)))
    core = torch.stack([core[:size, :size] for core in shared.cores]).sum(0) * options["scale"]
    return Pair((shared.left[:, :size] @ core).float(), shared.right[:size].float())


def legacy_factor_sum(layer: Layer, options: Options) -> Pair:
    """What peft's 'linear' and kohya's merge_lora make: (Σ b_i up_i)(Σ a_i down_i), which is not the changes' sum.

    With s = alpha / rank: peft a = b = √|w s|; kohya (without --concat) a = b = |w| √s, so its changes go by w². Both
    give the sign of w to `down`. peft's result of rsLoRA is √rank times as much, as it takes the scale twice.

    Raises:
        ConfigError: an input is not LoRA, or has another rank.
    """
    pairs = pairs_of(layer)
    ranks = [pair.up.shape[1] for pair in pairs]
    if any(change.scale is None for change in layer.changes):
        raise ConfigError(f"{layer.name}: legacy_factor_sum adds the factors of LoRA, and one adapter has none there")
    if len(set(ranks)) > 1:
        raise ConfigError(
            f"{layer.name}: legacy_factor_sum adds factors, so all must have one rank, and they have {ranks}; "
            "take rule 'svd' for the sum of the changes"
        )
    up, down = torch.zeros_like(pairs[0].up), torch.zeros_like(pairs[0].down)
    for pair, change, weight in zip(pairs, layer.changes, layer.weights.tolist(), strict=True):
        assert change.scale is not None
        share = abs(weight) * change.scale**0.5 if options["tool"] == "kohya" else abs(weight * change.scale) ** 0.5
        up += pair.up * (share / change.scale)  # change.scale is in `up`
        down += pair.down * (share if weight >= 0 else -share)
    return Pair(up, down)


def _nothing(layer: Layer) -> Pair:
    rows, columns = layer.changes[0].term.shape
    return Pair(torch.zeros(rows, 1), torch.zeros(1, columns))


_KEEP = "the share of {} that is kept"
_TOOL = Option("peft", "whose sum of factors", choices=("peft", "kohya"))
_ALIGNED = {name: option for name, option in _TIES.options.items() if name != "trim"}

RULES = (
    Rule("knots", "TIES in the basis that all changes share: what they do to outputs is aligned first",
         "arXiv 2410.19735", factors=knots, options=_ALIGNED, beside=_TIES.elements),
    Rule("tsv_m", "the sum, with singular vectors of different adapters made orthogonal: they disturb each other less",
         "arXiv 2412.00081", factors=tsv_m,
         options={"keep": Option(1.0, _KEEP.format("each adapter's rank")), "scale": SCALE},
         linear=True),
    Rule("iso_c", "the sum, with all its singular values made equal: small shared directions count as large ones",
         "arXiv 2502.04959", factors=iso_c,
         options={"flatten": Option(1.0, "how far singular values go to their mean"), "scale": SCALE}),
    Rule("np_lora", "style + subject, the subject less where the style's directions are; the style comes first",
         "arXiv 2511.11051", factors=np_lora,
         options={"mu": Option(0.5, "how much: 0 is the sum", 0.0, 1e6),
                  "keep": Option(1.0, _KEEP.format("the style's directions"))},
         least=2, most=2, ordered=True, linear=True),
    Rule("subspace", "the sum within the first directions that all share: of low rank before it is summed up",
         "arXiv 2606.03723", factors=subspace,
         options={"keep": Option(1.0, "how many directions, over the highest rank among the adapters", 0.0, 100.0),
                  "scale": SCALE}),
    Rule("legacy_factor_sum", "the sum of factors, not of changes, as peft's 'linear' and kohya's merge_lora give it",
         "peft 0.21.2, tuners/lora/model.py; sd-scripts, networks/merge_lora.py", factors=legacy_factor_sum,
         options={"tool": _TOOL}, apart=True),
)  # fmt: skip
