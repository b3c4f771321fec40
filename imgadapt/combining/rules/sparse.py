"""Ways to keep some elements of a change and none of the others: by size, by chance, by both."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imgadapt.combining.rules.masks import mask_key, uniform
from imgadapt.combining.rules.tiles import Cut, Source, magnitude

Options = Mapping[str, Any]
_INDEX = 32  # bits of a place in a row


@dataclass(frozen=True)
class Tile:
    """Rows start ... of a tensor: values (rows, columns), its cuts, and the seed of what is random."""

    values: Tensor
    start: int
    source: Source
    cuts: Sequence[Cut]
    seed: int

    def kept(self, chance: float | Tensor) -> Tensor:
        """Which elements are kept, each with its chance, (rows, columns), bool."""
        rows, columns = self.values.shape
        key = mask_key(self.seed, self.source.digest, self.source.name)
        return uniform(key, self.start * columns, rows * columns).view(rows, columns) < chance


@dataclass(frozen=True)
class Sparsify:
    """counts: options, elements of a group of tensors -> at how many of the largest each cut is; None: it has none.
    keep: the elements kept, and what they are divided by so that their expectation is what it was (1: nothing).
    """

    keep: Callable[[Tile, Options], tuple[Tensor | None, float | Tensor]]
    counts: Callable[[Options, int], Sequence[int]] | None = None


def share(density: float, elements: int) -> int:
    """How many elements a density keeps: rounded down, as peft's and mergekit's, but one at least."""
    return min(elements, max(1, int(density * elements)))


def _all(tile: Tile, options: Options) -> tuple[Tensor | None, float | Tensor]:
    return None, 1.0


def _largest(tile: Tile, options: Options) -> tuple[Tensor | None, float | Tensor]:
    return tile.cuts[0].keeps(tile.values, tile.start), 1.0


def _middle(tile: Tile, options: Options) -> tuple[Tensor | None, float | Tensor]:
    outliers, rest = tile.cuts
    return rest.keeps(tile.values, tile.start) & ~outliers.keeps(tile.values, tile.start), 1.0


def _middle_counts(options: Options, elements: int) -> Sequence[int]:
    top = int(options["gamma"] * elements)
    return top, min(elements, top + share(options["density"], elements))


def _random(tile: Tile, options: Options) -> tuple[Tensor | None, float | Tensor]:
    return tile.kept(options["density"]), options["density"]


def _magprune(tile: Tile, options: Options) -> tuple[Tensor | None, float | Tensor]:
    """A chance from density - epsilon, of a row's smallest, to density + epsilon, of its largest."""
    columns = tile.values.shape[1]
    order = magnitude(tile.values).to(torch.int64) << _INDEX | torch.arange(columns)
    place = np.sort(order.numpy(), axis=1) & (2**_INDEX - 1)  # of one magnitude: by their order in the row
    ranks = torch.empty_like(tile.values)
    spread = torch.linspace(-1, 1, columns) if columns > 1 else torch.zeros(1)
    ranks.scatter_(1, torch.from_numpy(place), spread.expand_as(ranks))
    chance = options["density"] + options["epsilon"] * ranks
    return tile.kept(chance), chance


NONE = Sparsify(_all)
MAGNITUDE = Sparsify(_largest, lambda options, n: [share(options["density"], n)])
MIDDLE = Sparsify(_middle, _middle_counts)
RANDOM = Sparsify(_random)
MAGPRUNE = Sparsify(_magprune)
