"""Report: what a merge did, layer by layer and in sums by component."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from imgadapt.combining.recipe import MergeRecipe


@dataclass(frozen=True)
class Row:
    """One layer: which inputs have it, the inner products of their changes (unweighted), the Frobenius norm of the
    merged change, the rank it is written at (None: whole), and the relative norm of what that leaves out.
    """

    layer: str
    who: tuple[int, ...]
    gram: Tensor
    norm: float
    rank: int | None
    residual: float


@dataclass
class Component:
    """Sums over a component's layers. matched: layers that two inputs or more have (or one, where there is but one
    input); alone: layers of one input only. cosines: (inputs, inputs) over all layers.
    """

    name: str
    matched: int
    alone: list[int]
    skipped: int
    norms: list[float]
    cosines: Tensor
    norm: float
    residual: float
    ranks: tuple[int, int] | None
    whole: int


@dataclass
class Report:
    """All rows of a merge. inputs: their names, in the order of `who`."""

    recipe: MergeRecipe
    inputs: Sequence[str]
    skipped: Sequence[str]
    rows: list[Row] = field(default_factory=list[Row])

    def add(self, row: Row) -> None:
        self.rows.append(row)

    @property
    def residual(self) -> float:
        """Relative Frobenius norm of all that was cut off."""
        total = sum(row.norm**2 for row in self.rows)
        return (sum((row.residual * row.norm) ** 2 for row in self.rows) / total) ** 0.5 if total else 0.0

    def components(self) -> list[Component]:
        """By component, and in the last row, where there are several, all of them."""
        names = list(dict.fromkeys(row.layer.partition(".")[0] for row in self.rows))
        made = [self._component(name, [r for r in self.rows if r.layer.startswith(f"{name}.")]) for name in names]
        return [*made, self._component("all", self.rows)] if len(made) > 1 else made

    def _component(self, name: str, rows: Sequence[Row]) -> Component:
        k = len(self.inputs)
        total = torch.zeros(k, k, dtype=torch.float64)
        for row in rows:
            index = torch.tensor(row.who)
            total[index[:, None], index[None]] += row.gram
        norms = total.diagonal().clamp(min=0).sqrt()
        cosines = total / (norms[:, None] * norms[None]).clamp(min=1e-300)
        squares = sum(row.norm**2 for row in rows)
        cut = sum((row.residual * row.norm) ** 2 for row in rows)
        ranks = [row.rank for row in rows if row.rank is not None]
        shared = min(2, k)
        return Component(
            name,
            sum(len(row.who) >= shared for row in rows),
            [sum(row.who == (i,) for row in rows) if k > 1 else 0 for i in range(k)],
            sum(s.startswith(f"{name}.") or name == "all" for s in self.skipped),
            norms.tolist(),
            cosines,
            squares**0.5,
            (cut / squares) ** 0.5 if squares else 0.0,
            (min(ranks), max(ranks)) if ranks else None,
            sum(row.rank is None for row in rows),
        )

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "rule": self.recipe.rule,
            "inputs": list(self.inputs),
            "residual": self.residual,
            "components": [
                {
                    "name": c.name, "matched": c.matched, "alone": c.alone, "skipped": c.skipped, "norms": c.norms,
                    "cosines": c.cosines.tolist(), "norm": c.norm, "residual": c.residual, "ranks": c.ranks,
                    "whole": c.whole,
                }
                for c in self.components()
            ],
            "layers": [
                {"layer": r.layer, "inputs": r.who, "norm": r.norm, "rank": r.rank, "residual": r.residual}
                for r in self.rows
            ],
        }  # fmt: skip
