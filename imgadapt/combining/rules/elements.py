"""Rules that look at each element of the changes: how those of each adapter are thinned out, how they come together.

The result is a whole matrix, the only one there is: the adapters' own changes are made from their factors, tile by tile
and as often as they are needed, and never lie in memory.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from imgadapt.combining.entering import Change
from imgadapt.combining.rules.rule import Option, Rule
from imgadapt.combining.rules.sparse import MAGNITUDE, MAGPRUNE, MIDDLE, NONE, RANDOM, Options, Sparsify, Tile
from imgadapt.combining.rules.tiles import Cuts, Source, largest, over
from imgadapt.combining.terms import Dense, Term


class Layer(Protocol):
    """As the engine has it."""

    @property
    def name(self) -> str: ...
    @property
    def who(self) -> tuple[int, ...]: ...
    @property
    def changes(self) -> tuple[Change, ...]: ...
    @property
    def weights(self) -> Tensor: ...
    @property
    def keys(self) -> tuple[str, ...]: ...


class Seeded(Protocol):
    @property
    def seed(self) -> int: ...


Consensus = Callable[[Sequence[Tensor], Sequence[float], Options], Tensor]
"""(thinned tiles, weights, options) -> the merged tile."""


@dataclass(frozen=True)
class Elementwise:
    """A row: how changes are thinned out, and how they come together."""

    sparsify: Sparsify
    consensus: Consensus

    def __call__(
        self,
        layer: Layer,
        recipe: Seeded,
        options: Options,
        *,
        cuts: Cuts | None = None,
        workers: int = 1,
        out: Tensor | None = None,
    ) -> tuple[tuple[Term, ...], Tensor | None]:
        """The merged change, (out, fan_in), and the bias's. cuts: of `prepare`; out: where the change is written."""
        weights = [float(w) for w in layer.weights]
        sources, biases = weights_of(layer), biases_of(layer)
        merge = partial(self._merged, seed=recipe.seed, options=options, cuts=cuts, workers=workers)
        bias = None
        if biases:
            bias = merge(biases, [weights[layer.who.index(s.who)] for s in biases], torch.empty(biases[0].term.shape))
        shape = layer.changes[0].term.shape
        out = torch.empty(shape) if out is None else out
        merge(sources, weights, out.view(sources[0].term.shape))
        return (Dense(out),), None if bias is None else bias[0]

    def prepare(self, layers: Callable[[], Iterable[Layer]], options: Options, workers: int) -> Cuts | None:
        """Where the elements that are kept end, if that depends on the whole of each adapter."""
        counts = self.sparsify.counts
        if counts is None or options.get("trim") != "model":
            return None

        def sources() -> Iterable[Source]:
            for layer in layers():
                yield from (*weights_of(layer), *biases_of(layer))

        return largest(sources, lambda source: source.who, lambda n: counts(options, n), workers)

    def _merged(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        out: Tensor,
        *,
        seed: int,
        options: Options,
        cuts: Cuts | None,
        workers: int,
    ) -> Tensor:
        counts = self.sparsify.counts
        if counts is not None and cuts is None:
            cuts = largest(lambda: sources, lambda s: s.key, lambda n: counts(options, n), workers)
        rescale = options.get("rescale", "none")

        def thinned(source: Source, start: int, values: Tensor) -> Tensor:
            tile = Tile(values, start, source, cuts[source.key] if cuts is not None else (), seed)
            keep, chance = self.sparsify.keep(tile, options)
            kept = values if keep is None else values * keep
            return kept / chance if rescale == "expected" else kept

        factors = [_level(source, partial(thinned, source), workers) if rescale == "l1" else 1.0 for source in sources]

        def work(start: int, stop: int) -> None:
            tiles = [thinned(source, start, source.term.rows(start, stop)) for source in sources]
            tiles = [tile if f == 1.0 else tile * f for tile, f in zip(tiles, factors, strict=True)]
            merged = self.consensus(tiles, weights, options)
            torch.mul(merged, options["scale"], out=out[start:stop])

        for _ in over(work, out.shape[0], out.shape[1], workers):
            pass
        return out


def weights_of(layer: Layer) -> list[Source]:
    """What is thinned out of a layer's weight; of a norm's, as one row."""
    rows = zip(layer.who, layer.keys, layer.changes, strict=True)
    sources = [Source(who, digest, layer.name, change.term) for who, digest, change in rows]
    if layer.changes[0].term.shape[1] > 1:
        return sources
    return [replace(s, term=Dense(s.term.rows(0, s.term.shape[0]).t().contiguous())) for s in sources]


def biases_of(layer: Layer) -> list[Source]:
    """Of those adapters that change the bias, as one row each."""
    rows = zip(layer.who, layer.keys, layer.changes, strict=True)
    return [Source(who, key, f"{layer.name}.bias", Dense(c.bias[None])) for who, key, c in rows if c.bias is not None]


def _level(source: Source, thinned: Callable[[int, Tensor], Tensor], workers: int) -> float:
    """What makes the sum of magnitudes what it was before."""

    def sums(start: int, stop: int) -> tuple[float, float]:
        values = source.term.rows(start, stop)
        before = float(values.abs().sum(dtype=torch.float64))
        return before, float(thinned(start, values).abs().sum(dtype=torch.float64))

    found = list(over(sums, *source.term.shape, workers))
    before, after = (math.fsum(column) for column in zip(*found, strict=True))
    return before / after if before > 0 and after > 0 else 1.0


def added(tiles: Sequence[Tensor], weights: Sequence[float], options: Options) -> Tensor:
    """The sum of tiles times their weights."""
    total = tiles[0] * weights[0]
    for tile, weight in zip(tiles[1:], weights[1:], strict=True):
        total += tile * weight
    return total


def _agreeing(tiles: Sequence[Tensor], weights: Sequence[float], options: Options) -> tuple[list[Tensor], list[Tensor]]:
    """Weighted tiles, and 1 where their elements have the sign that was elected (0 has none; a draw elects +), else 0.

    In sums and products of fp32: `torch.where` takes 20 times as long.
    """
    weighted = [tile * weight for tile, weight in zip(tiles, weights, strict=True)]
    voting = weighted if options["elect"] == "weighted" else tiles
    votes = voting if options["vote"] == "sum" else [v.sign() for v in voting]
    sign = (added(votes, [1.0] * len(votes), options) >= 0).float().mul_(2).sub_(1)
    return weighted, [(v * sign > 0).float() for v in voting]


def elected(tiles: Sequence[Tensor], weights: Sequence[float], options: Options) -> Tensor:
    """A sign is elected for each element; those of that sign are added up and divided as `divide` says."""
    weighted, agree = _agreeing(tiles, weights, options)
    total = added([w * a for w, a in zip(weighted, agree, strict=True)], [1.0] * len(tiles), options)
    if options["divide"] == "none":
        return total
    shares = [1.0 if options["divide"] == "count" else abs(weight) for weight in weights]
    by = added(agree, shares, options)
    return total / (by + (by == 0))


def strongest(tiles: Sequence[Tensor], weights: Sequence[float], options: Options) -> Tensor:
    """A sign is elected for each element; the largest of that sign is taken."""
    weighted, agree = _agreeing(tiles, weights, options)
    made = weighted[0] * agree[0]
    for w, a in zip(weighted[1:], agree[1:], strict=True):
        own = w * a
        made = torch.where(own.abs() > made.abs(), own, made)
    return made


_SCALE = Option(1.0, "the merged change times this (the papers' lambda)", 0.0, 100.0)
_ELECT = Option("weighted", "whether weights count in the vote for each element's sign", choices=("weighted", "plain"))
_VOTE = Option("sum", "votes are the elements, or one for each adapter", choices=("sum", "count"))
_DIVIDE = Option(
    "count",
    "what the sum of those that agree is divided by: how many they are, their weights, or nothing",
    choices=("count", "weights", "none"),
)
_TRIM = Option("layer", "whether each layer keeps its share, or each adapter as a whole", choices=("layer", "model"))
_RESCALE = Option(
    "expected",
    "what is kept is divided by its chance, or brought to the sum of magnitudes before (mergekit's), or left",
    choices=("expected", "l1", "none"),
)


def _density(default: float) -> Option:
    return Option(default, "the share of elements that is kept", 1e-6, 1.0)


def _gamma(options: Mapping[str, Any]) -> str | None:
    density, gamma = options["density"], options["gamma"]
    if density + gamma > 1 + 1e-9:
        return f"density {density:g} and gamma {gamma:g} are more than all; gamma can be {1 - density:g} at most"
    return None


def _epsilon(options: Mapping[str, Any]) -> str | None:
    density, epsilon = options["density"], options["epsilon"]
    most = min(density, 1 - density)
    if epsilon and not epsilon < most:
        return (
            f"chances are density - epsilon to density + epsilon, within 0 and 1: with density {density:g}, epsilon "
            + (f"must be below {most:g}" if most > 0 else "must be 0")
            + f", not {epsilon:g}"
        )
    return None


def _row(
    name: str,
    about: str,
    source: str,
    sparsify: Sparsify,
    consensus: Consensus,
    own: Mapping[str, Option],
    wrong: Callable[[Mapping[str, Any]], str | None] | None = None,
) -> Rule:
    made = Elementwise(sparsify, consensus)
    election = {} if consensus is added else {"elect": _ELECT, "vote": _VOTE}
    division = {"divide": _DIVIDE} if consensus is elected else {}
    options = {**own, **election, **division, "scale": _SCALE}
    return Rule(name, about, source, elements=made, options=options, wrong=wrong, in_core=True)


_TIES, _DARE, _DELLA, _CRUMBS = "arXiv 2306.01708", "arXiv 2311.03099", "arXiv 2406.11617", "arXiv 2312.06795"
_CHANCE = {"density": _density(0.5), "rescale": _RESCALE}
_BOTH = {
    "density": _density(0.5),
    "epsilon": Option(0.15, "how far chances are from density", 0.0, 0.5),
    "rescale": _RESCALE,
}
_INNER = {"density": _density(0.5), "gamma": Option(0.01, "the share of the largest that is left out"), "trim": _TRIM}

RULES = (
    _row("ties", "the largest elements of each, and of these only those of the sign that weighs more", _TIES,
         MAGNITUDE, elected, {"density": _density(0.5), "trim": _TRIM}),
    _row("magnitude_prune", "the sum of the largest elements of each", "peft's magnitude_prune",
         MAGNITUDE, added, {"density": _density(0.5), "trim": _TRIM}),
    _row("dare_linear", "the sum of random elements of each, made larger for those that are left out", _DARE,
         RANDOM, added, _CHANCE),
    _row("dare_ties", "random elements of each, and of these only those of the sign that weighs more", _DARE,
         RANDOM, elected, _CHANCE),
    _row("della", "random elements, more of the larger, and of these only those of the sign that weighs more", _DELLA,
         MAGPRUNE, elected, _BOTH, _epsilon),
    _row("della_linear", "the sum of random elements, the larger ones more often", _DELLA,
         MAGPRUNE, added, _BOTH, _epsilon),
    _row("breadcrumbs", "the sum of each without its largest and its smallest elements", _CRUMBS,
         MIDDLE, added, _INNER, _gamma),
    _row("breadcrumbs_ties", "the same, and of what is left only those of the sign that weighs more", _CRUMBS,
         MIDDLE, elected, _INNER, _gamma),
    _row("emr_unified", "of each element the largest of the sign that weighs more", "arXiv 2405.17461",
         NONE, strongest, {}),
)  # fmt: skip
