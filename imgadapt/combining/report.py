"""Report: what a merge did, layer by layer and in sums by component."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from imgadapt.combining.recipe import MergeRecipe


@dataclass(frozen=True)
class Row:
    """One layer: which inputs have it, the inner products of their changes (unweighted), the Frobenius norm of the
    merged change, the rank it is written at (None: it has none; 0: nothing is left), and the relative norm of what that
    leaves out. method, numbers: what it is in the file, and how many numbers that takes.
    """

    layer: str
    who: tuple[int, ...]
    gram: Tensor
    norm: float
    rank: int | None
    residual: float
    method: str = "lora"
    numbers: int = 0


@dataclass
class Component:
    """Sums over a component's layers. matched: layers that two inputs or more have (or one, where there is but one
    input); alone: layers of one input only. cosines: (inputs, inputs) over all layers. whole: layers that are whole
    differences, and the numbers that they take.
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
    whole_numbers: int


@dataclass
class Report:
    """All rows of a merge. inputs: their names, in the order of `who`; about: a line on each; layers: how many each has
    (none: it has words only). skipped: layers whose weight is 0 in all inputs that have them.
    """

    recipe: MergeRecipe
    inputs: Sequence[str]
    skipped: Sequence[str]
    layers: Sequence[int]
    rows: list[Row] = field(default_factory=list[Row])
    about: Sequence[str] = ()

    def add(self, row: Row) -> None:
        self.rows.append(row)

    @property
    def residual(self) -> float:
        """Relative Frobenius norm of all that was cut off."""
        return _residual(self.rows)

    def components(self) -> list[Component]:
        """By component, and in the last row, where there are several, all of them."""
        names = list(dict.fromkeys(row.layer.partition(".")[0] for row in self.rows))
        made = [self._component(name, [r for r in self.rows if r.layer.startswith(f"{name}.")]) for name in names]
        return [*made, self._component("all", self.rows)] if len(made) > 1 else made

    @property
    def total(self) -> Component:
        """All layers."""
        return self._component("all", self.rows)

    def _component(self, name: str, rows: Sequence[Row]) -> Component:
        k = len(self.inputs)
        total = torch.zeros(k, k, dtype=torch.float64)
        for row in rows:
            index = torch.tensor(row.who)
            total[index[:, None], index[None]] += row.gram
        norms = total.diagonal().clamp(min=0).sqrt()
        cosines = total / (norms[:, None] * norms[None]).clamp(min=1e-300)
        ranks = [row.rank for row in rows if row.rank]
        whole = [row.numbers for row in rows if row.method == "full"]
        shared = min(2, k)
        return Component(
            name,
            sum(len(row.who) >= shared for row in rows),
            [sum(row.who == (i,) for row in rows) if k > 1 else 0 for i in range(k)],
            sum(s.startswith(f"{name}.") or name == "all" for s in self.skipped),
            norms.tolist(),
            cosines,
            sum(row.norm**2 for row in rows) ** 0.5,
            _residual(rows),
            (min(ranks), max(ranks)) if ranks else None,
            len(whole),
            sum(whole),
        )

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "rule": self.recipe.rule,
            "inputs": list(self.inputs),
            "weights": [entry.weight for entry in self.recipe.inputs],
            "about": list(self.about),
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


def json_of(rows: Mapping[str, Any]) -> str:
    """A report's entries as JSON, each on a line, and of lists of tables (layers) each table."""
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {_json_value(value)}" for key, value in rows.items()) + "\n}"


def _json_value(value: Any) -> str:
    tables: list[Any] = value if isinstance(value, list) and value and isinstance(value[0], dict) else []  # pyright: ignore[reportUnknownVariableType] # JSON
    return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in tables) + "\n ]" if tables else json.dumps(value)


def _residual(rows: Sequence[Row]) -> float:
    total = sum(row.norm**2 for row in rows)
    return (sum((row.residual * row.norm) ** 2 for row in rows) / total) ** 0.5 if total else 0.0
