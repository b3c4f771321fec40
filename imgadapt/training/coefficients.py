"""Coefficients: layers of several adapters with learnt numbers on their columns, on a model and folded into a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from imgadapt import attaching, live
from imgadapt.arch import canonical
from imgadapt.combining.combine import part_of
from imgadapt.combining.entering import change_of
from imgadapt.combining.layers import Merged
from imgadapt.combining.lowrank import concat
from imgadapt.combining.terms import Dense, Pair, Term
from imgadapt.errors import ConfigError
from imgadapt.file import AdapterFile
from imgadapt.formats import Part
from imgadapt.sites import Site
from imgadapt.training.columns import Columns, folded
from imgadapt.training.families import Family


@dataclass(eq=False)
class _Layer:
    """One layer. terms: by adapter; columns: of those that are low-rank, (inputs,); biases: by adapter."""

    site: Site
    terms: dict[int, Term] = field(default_factory=dict[int, Term])
    biases: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    columns: dict[int, nn.Parameter] = field(default_factory=dict[int, nn.Parameter])


class Coefficients:
    """All layers of the adapters of a model that are named. Adapter i is put on once more, as `zip i`, at strength
    weights[i], with a coefficient for each column; what has no columns (norms, whole differences) as it is.

    Raises:
        ConfigError: an adapter's change depends on the base's weights (DoRA, OFT, ...), or none has columns.
    """

    def __init__(self, family: Family, names: Sequence[str], weights: Sequence[float]) -> None:
        self.weights = weights
        self.layers: dict[str, _Layer] = {}
        for i, name in enumerate(names):
            parts = dict(self._parts(family.pipeline, i, name))
            attaching.attach(family.pipeline, AdapterFile(parts), name=f"zip {i}", weight=weights[i], trainable=False)
            for key, _, slot in live.slots(family.pipeline, f"zip {i}"):
                if isinstance(slot.method, Columns):
                    columns: Any = slot.columns
                    self.layers[canonical(key)].columns[i] = columns.requires_grad_(True)
        self.parameters = [m for layer in self.layers.values() for m in layer.columns.values()]
        if not self.parameters:
            raise ConfigError("no adapter has a low-rank change of a layer; there are no columns to zip")

    def _parts(self, pipeline: Any, i: int, name: str) -> list[tuple[str, Part]]:
        made: list[tuple[str, Part]] = []
        for key, wrapper, slot in live.slots(pipeline, name):
            key, site = canonical(key), wrapper.site
            if slot.method.needs_weight:
                raise ConfigError(
                    f"{key} of {name} is {slot.method.name}, whose change depends on the base's weights and has no "
                    "columns of its own; make LoRA of it first (`imgadapt merge FILE --base BASE --rank 16`)"
                )
            tensors = {k: t.detach().float().cpu() for k, t in slot.tensors().items()}
            change = change_of(key, Part(slot.method, tensors), site, None)
            layer = self.layers.setdefault(key, _Layer(site))
            bias = {} if change.bias is None else {"bias": change.bias}
            if change.bias is not None:
                layer.biases[i] = change.bias
            if isinstance(change.term, Dense):
                layer.terms[i] = change.term
                made.append((key, Part(slot.method, tensors)))
                continue
            pair = layer.terms[i] = change.term.as_pair()
            t = {"up": pair.up, "down": pair.down, "columns": torch.ones(site.shape[1]), **bias}
            made.append((key, Part(Columns(pair.up.shape[1], bool(bias)), t)))
        return made

    def overlap(self) -> Tensor:
        """Mean of |mᵢ mⱼ| over the columns, pairs and layers that several adapters change."""
        found = [
            (layer.columns[i] * layer.columns[j]).abs().mean()
            for layer in self.layers.values()
            for i, j in combinations(sorted(layer.columns), 2)
        ]
        return torch.stack(found).mean() if found else torch.zeros(())

    def values(self) -> dict[str, dict[int, Tensor]]:
        """Layer -> adapter -> (inputs,), on the CPU."""
        return {
            name: {i: m.detach().float().cpu().clone() for i, m in sorted(layer.columns.items())}
            for name, layer in sorted(self.layers.items())
            if layer.columns
        }

    @torch.no_grad()
    def parts(self) -> Mapping[str, Part]:
        """The merged adapter: LoRA of all ranks together, with the coefficients and strengths in it."""
        made: dict[str, Part] = {}
        columns = self.values()
        for name, layer in sorted(self.layers.items()):
            terms: list[Term] = []
            for i, term in sorted(layer.terms.items()):
                own = Pair(term.up, folded(term.down, columns[name][i])) if isinstance(term, Pair) else term
                terms.append(own.scaled(self.weights[i]))
            biases = [self.weights[i] * bias for i, bias in sorted(layer.biases.items())]
            bias = torch.stack(biases).sum(0) if biases else None
            if all(isinstance(term, Pair) for term in terms):
                terms = [concat(terms)]
            made[name] = part_of(Merged(name, layer.site, tuple(terms), bias, (), torch.zeros(0, 0), 0.0))
        return made
