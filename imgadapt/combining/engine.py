"""Engine: merges one layer at a time, in any order, for an adapter's file or for a checkpoint."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

from imgadapt.arch import Architecture, Slice
from imgadapt.combining.cutting import bias_of, truncated, whole
from imgadapt.combining.entering import Base, Change, change_of, site_of
from imgadapt.combining.fused import groups, over, split, stacked
from imgadapt.combining.layers import Input, Layer, Merged, order_of
from imgadapt.combining.lowrank import Spectrum, concat, spectrum
from imgadapt.combining.recipe import MergeRecipe
from imgadapt.combining.rules.corespace import Frame, frame
from imgadapt.combining.rules.rotations import is_rotation, powers
from imgadapt.combining.rules.rule import Elements, Factors, Rule, Scalar
from imgadapt.combining.rules.turning import check, merged_rotation, ready
from imgadapt.combining.terms import Dense, Pair, Term, gram
from imgadapt.combining.threads import in_order, one_thread_each
from imgadapt.errors import StateError
from imgadapt.formats import Format
from imgadapt.sites import Site

__all__ = ["Engine", "Input", "Layer", "Merged", "truncated", "whole"]

Row = TypeVar("Row")
Result = TypeVar("Result")


class Engine:
    """A recipe with its inputs read.

    Raises:
        ConfigError, ShapeError: see `change_of`; when the layer is asked for.
        StateError: a merged change is not finite.
    """

    def __init__(
        self,
        recipe: MergeRecipe,
        inputs: Sequence[Input],
        architecture: Architecture | None,
        base: Base | None = None,
        form: Format | None = None,
    ) -> None:
        """form: the format that the result is for: what is one layer there is merged as one."""
        self.recipe, self.base, self.architecture = recipe, base, architecture
        self.order = order_of(inputs, recipe.row.ordered)
        self.inputs = [inputs[k] for k in self.order]
        self.parts = [ready(i.file.parts, base, recipe.row) for i in self.inputs]
        self.options = recipe.row.checked(recipe.options)
        every = {name for own in self.parts for name in own}
        used = [
            name
            for name in every
            if any(name in own and i.weight(name) != 0 for i, own in zip(self.inputs, self.parts, strict=True))
        ]
        self.skipped = sorted(every - set(used))
        check(recipe.row, self.parts, used)
        self.fused = {} if recipe.row.rotations or recipe.row.apart else groups(architecture, form, used, self._alike)
        inside = {s.layer for slices in self.fused.values() for s in slices}
        self.names = sorted([*self.fused, *(name for name in used if name not in inside)])
        self._used, self._lock = sorted(used), Lock()
        self._prepared: list[Any] = []

    def _alike(self, slices: Sequence[Slice]) -> bool:
        """Whether these layers are of the same weights, and as large as there, so that they may be merged as one."""
        if any(len({i.weight(s.layer) for s in slices}) > 1 for i in self.inputs):
            return False
        there = [next((s, own[s.layer]) for own in self.parts if s.layer in own) for s in slices]
        return all(site_of(s.layer, part, self.architecture, self.base).rows == s.rows for s, part in there)

    def layer(self, name: str) -> Layer:
        """What goes into a layer, or into a fused one."""
        return self._fused_layer(name) if name in self.fused else self._single_layer(name)

    def ranks(self, name: str) -> list[int]:
        """A layer's ranks in the inputs that have it, at a weight; where a method has none, the most that there are."""
        layers = [s.layer for s in self.fused.get(name, ())] or [name]
        found: list[int] = []
        for one, parts in zip(self.inputs, self.parts, strict=True):
            own = {layer: parts[layer] for layer in layers if layer in parts and one.weight(layer) != 0}
            there = list(own.values())
            sites = [site_of(layer, part, self.architecture, self.base) for layer, part in own.items()]
            wide = [min(site.rows, site.fan_in) for site in sites]
            ranks = [p.method.file_rank or most for p, most in zip(there, wide, strict=True)]
            found += [max(ranks)] if there else []
        return found

    def _single_layer(self, name: str) -> Layer:
        who = [k for k, own in enumerate(self.parts) if name in own and self.inputs[k].weight(name) != 0]
        site = site_of(name, self.parts[who[0]][name], self.architecture, self.base)
        changes = [change_of(name, self.parts[k][name], site, self.base, self.inputs[k].name) for k in who]
        return self._layer(name, site, who, changes, name)

    def _fused_layer(self, name: str) -> Layer:
        layers = [s.layer for s in self.fused[name]]
        sites = [
            next(site_of(layer, own[layer], self.architecture, self.base) for own in self.parts if layer in own)
            for layer in layers
        ]
        who = [k for k, own in enumerate(self.parts) if any(layer in own for layer in layers)]
        who = [k for k in who if self.inputs[k].weight(layers[0]) != 0]
        changes: list[Change] = []
        for k in who:
            own = self.parts[k]
            there = [
                change_of(layer, own[layer], site, self.base, self.inputs[k].name) if layer in own else None
                for layer, site in zip(layers, sites, strict=True)
            ]
            changes.append(stacked(there, sites))
        return self._layer(name, over(sites), who, changes, layers[0])

    def _layer(self, name: str, site: Site, who: Sequence[int], changes: Sequence[Change], weighed: str) -> Layer:
        """weighed: the layer of the model whose weights are taken."""
        every = torch.tensor([i.weight(weighed) for i in self.inputs], dtype=torch.float64)
        keys = tuple(self.inputs[k].digest for k in who)
        return Layer(name, site, tuple(who), tuple(changes), every[list(who)], keys, every)

    def apart(self, made: Merged) -> list[Merged]:
        """A merged layer as the layers it is of the model: itself, those that it fuses, or none where nothing is
        left of it; pairs are made one.
        """
        if made.part is not None:
            return [made]
        if not made.terms:
            return []
        if all(isinstance(term, Pair) for term in made.terms):
            made = replace(made, terms=(concat(made.terms),))
        if made.name not in self.fused:
            return [made]
        rows = split(made.terms, made.bias, self.fused[made.name])
        return [
            replace(
                made,
                name=layer,
                site=replace(made.site, shape=(terms[0].shape[0], *made.site.shape[1:])),
                terms=tuple(terms),
                bias=bias,
            )
            for layer, (terms, bias) in rows.items()
        ]

    @torch.no_grad()
    def merge(self, name: str, workers: int = 1) -> Merged:
        """A layer, merged by the rule, exactly; it is not cut yet. workers: threads that rules of elements may take."""
        if self._turned(name):
            every = torch.tensor([i.weight(name) for i in self.inputs], dtype=torch.float64)
            parts = [own.get(name) if w else None for own, w in zip(self.parts, every.tolist(), strict=True)]
            return merged_rotation(name, parts, every, self.recipe.row, self.options, (self.architecture, self.base))
        layer, row = self.layer(name), self.recipe.row
        products = gram(layer.terms)
        biases = [change.bias for change in layer.changes if change.bias is not None]
        if not all(bool(torch.isfinite(t).all()) for t in (products, *biases)):  # rules might leave out what is not
            raise StateError(f"{layer.name}: the merged change is not finite; {self._blame(layer)}")
        square: Tensor | None = None
        if row.elements is not None:
            terms, bias = self._by_elements(row.elements, layer, workers)
        elif row.factors is not None:
            terms, bias = self._by_factors(row, row.factors, layer)
        elif row.scalar is not None and not row.linear and name in self.fused:
            terms, bias = self._numbers_apart(row.scalar, layer)
        else:
            weights = powers(row, layer.every, self.options)[list(layer.who)] if row.rotations else layer.weights
            factors = weights if row.scalar is None else self._numbers(row.scalar, layer, products)
            terms = [term.scaled(float(f)) for term, f in zip(layer.terms, factors, strict=True)]
            bias = bias_of(layer, factors)
            smaller = bool((factors.abs() <= 1).all())  # so that no number becomes infinite in fp32
            square = factors @ products @ factors if smaller else None
        energy = float(gram(terms).sum() if square is None else square)
        if not math.isfinite(energy) or (bias is not None and not bool(torch.isfinite(bias).all())):
            raise StateError(f"{name}: the merged change is not finite; {self._blame(layer)}")
        return Merged(name, layer.site, tuple(terms), bias, layer.who, products, max(0.0, energy) ** 0.5)

    def _turned(self, name: str) -> bool:
        """Whether it is merged as a rotation; what a rule of rotations finds beside them is summed by weight."""
        return self.recipe.row.rotations is not None and any(
            name in own and is_rotation(own[name]) and i.weight(name) != 0
            for i, own in zip(self.inputs, self.parts, strict=True)
        )

    def _by_factors(self, row: Rule, merge: Factors, layer: Layer) -> tuple[Sequence[Term], Tensor | None]:
        """Norms and biases, which have no factors, are added up at the rule's scale, or go by a rule of elements."""
        flat, weights = len(layer.site.shape) < 2, layer.weights * self.options.get("scale", 1.0)
        if row.beside is None:
            sums = [t.scaled(float(w)) for t, w in zip(layer.terms, weights, strict=True)] if flat else ()
            return sums or [merge(layer, self.options)], bias_of(layer, weights)
        if flat:
            return row.beside(layer, self.recipe, self.options)
        own = [(k, change.bias[:, None]) for k, change in enumerate(layer.changes) if change.bias is not None]
        if not own:
            return [merge(layer, self.options)], None
        index, changes = [k for k, _ in own], tuple(Change(Dense(bias)) for _, bias in own)
        who, keys = tuple(layer.who[k] for k in index), tuple(layer.keys[k] for k in index)
        biases = replace(layer, who=who, changes=changes, weights=layer.weights[index], keys=keys)
        (bias,), _ = row.beside(biases, self.recipe, self.options)
        return [merge(layer, self.options)], bias.rows(0, bias.shape[0])[:, 0]

    def _numbers(self, rule: Scalar, layer: Layer, products: Tensor) -> Tensor:
        """What each change of a layer is multiplied by."""
        index = torch.tensor(layer.who)
        every = torch.zeros(len(self.inputs), len(self.inputs), dtype=torch.float64)
        every[index[:, None], index[None]] = products
        return rule(layer.every, every, self.options)[index]

    def _numbers_apart(self, rule: Scalar, layer: Layer) -> tuple[list[Term], Tensor | None]:
        """Each of a fused layer's layers has its own numbers: whatever format the result is for, it is the same."""
        own = [self._single_layer(s.layer) for s in self.fused[layer.name]]
        numbers = [self._numbers(rule, one, gram(one.terms)) for one in own]
        made: list[Change] = []
        for k in layer.who:
            there = [(one, one.who.index(k), f) if k in one.who else None for one, f in zip(own, numbers, strict=True)]
            scaled = [None if t is None else t[0].changes[t[1]].scaled(float(t[2][t[1]])) for t in there]
            made.append(stacked(scaled, [one.site for one in own]))
        biases = [change.bias for change in made if change.bias is not None]
        return [change.term for change in made], torch.stack(biases).sum(0) if biases else None

    def _by_elements(self, merge: Elements, layer: Layer, workers: int) -> tuple[Sequence[Term], Tensor | None]:
        """A fused layer's layers are merged each for itself: whatever format the result is for, it is the same."""
        with self._lock:
            if not self._prepared:
                self._prepared.append(merge.prepare(partial(map, self._seen, self._used), self.options, workers))
        if layer.name not in self.fused:
            return self._elementwise(merge, layer, workers)
        own = [self._single_layer(s.layer) for s in self.fused[layer.name]]
        out, rows, made = torch.empty(layer.changes[0].term.shape if self._dense else (0, 0)), 0, list[Change]()
        for one in own:
            terms, bias = self._elementwise(merge, one, workers, out[rows : rows + one.site.rows])
            made.append(Change(terms[0], bias))
            rows += one.site.rows
        biases = [torch.zeros(one.site.rows) if c.bias is None else c.bias for one, c in zip(own, made, strict=True)]
        bias = torch.cat(biases) if any(change.bias is not None for change in made) else None
        return [Dense(out) if self._dense else stacked(made, [one.site for one in own]).term], bias

    def _elementwise(
        self, merge: Elements, layer: Layer, workers: int, out: Tensor | None = None
    ) -> tuple[Sequence[Term], Tensor | None]:
        there, shared = self._in_space(layer)
        cuts = self._prepared[0]
        if shared is None:
            return merge(layer, self.recipe, self.options, cuts=cuts, workers=workers, out=out)
        (core,), bias = merge(there, self.recipe, self.options, cuts=cuts, workers=workers)
        return [shared.lifted(core.rows(0, core.shape[0]))], bias

    def _seen(self, name: str) -> Layer:
        return self._in_space(self._single_layer(name))[0]

    def _in_space(self, layer: Layer) -> tuple[Layer, Frame | None]:
        """A layer in the recipe's space, and how to come back; norms have no other."""
        if self.recipe.space == "delta" or len(layer.site.shape) < 2:
            return layer, None
        shared = frame([term.as_pair() for term in layer.terms])
        changes = [replace(c, term=Dense(core.float())) for c, core in zip(layer.changes, shared.cores, strict=True)]
        return replace(layer, changes=tuple(changes)), shared

    def _blame(self, layer: Layer) -> str:
        broken = [
            self.inputs[k].name
            for k, change in zip(layer.who, layer.changes, strict=True)
            if not bool(torch.isfinite(gram([change.term])).all())
            or (change.bias is not None and not bool(torch.isfinite(change.bias).all()))
        ]
        return f"{', '.join(broken)} has NaN or infinity there" if broken else "lower the weights"

    def merged(self, names: Sequence[str] | None = None) -> Iterator[Merged]:
        """All layers, or those named, in order. By rules of elements each is a dense matrix: let go of it before the
        next is asked for.
        """
        return self.each(self.merge, self.names if names is None else names)

    def spectra(self) -> Iterator[tuple[Merged, Spectrum | None]]:
        """All layers with their singular values, without vectors and terms; None for norms."""
        return self.each(self._spectrum, self.names)

    def cut(self, ranks: Callable[[str], int | None]) -> Iterator[Merged]:
        """All layers, each cut to a rank; None: as it is."""

        def one(name: str, workers: int) -> Merged:
            made, rank = self.merge(name, workers), ranks(name)
            return made if rank is None or len(made.site.shape) < 2 else truncated(made, rank, workers)

        return self.each(one, self.names)

    @property
    def _dense(self) -> bool:
        return self.recipe.row.elements is not None and self.recipe.space == "delta"

    def each(self, work: Callable[[Row, int], Result], rows: Sequence[Row]) -> Iterator[Result]:
        """work(row, threads) of each, in order: several layers at a time, or, where each becomes a dense matrix, one
        at a time by all threads.
        """
        with one_thread_each() as workers:
            if not self._dense:
                yield from in_order(lambda row: work(row, 1), rows, workers)
            else:
                for row in rows:
                    yield work(row, workers)

    @torch.no_grad()
    def _spectrum(self, name: str, workers: int) -> tuple[Merged, Spectrum | None]:
        made = self.merge(name, workers)
        found = spectrum(made.terms, vectors=False, workers=workers) if len(made.site.shape) > 1 else None
        return replace(made, terms=()), found
