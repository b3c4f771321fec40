"""Shrunk: the report of an adapter that was cut to lower ranks, from another adapter or from two checkpoints."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from imgadapt.combining.report import Report, Row
from imgadapt.errors import first_few


@dataclass
class Shrunk(Report):
    """A `Report` of one input. said: how much was asked for. kept: layers that are as they were. notes: what else there
    is to know, a sentence each.
    """

    said: str = ""
    kept: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])

    def lines(self) -> Iterator[str]:
        """The report as text, a line a component."""
        yield "component        layers rank to      mean  whole  norm kept  residual"
        for component in self.components():
            rows = [r for r in self.rows if component.name == "all" or r.layer.startswith(f"{component.name}.")]
            ranks = "-".rjust(5) + " " * 13
            if component.ranks is not None:
                low, high = component.ranks
                ranks = f"{low:>5} to {high:<3}{_mean(rows):>6.1f}"
            kept, left = max(0.0, 1 - component.residual**2) ** 0.5, component.residual
            yield f"{component.name:<16}{len(rows):>7}{ranks}{component.whole:>7}{kept:>11.2%}{left:>10.3g}"
        if self.kept:
            yield f"{len(self.kept)} layers are as they were: {first_few(self.kept)}"
        yield from self.notes

    def as_json(self) -> dict[str, Any]:
        made = super().as_json()
        components = [
            {**row, "mean_rank": _mean([r for r in self.rows if row["name"] in ("all", r.layer.partition(".")[0])])}
            for row in made["components"]
        ]
        return {**made, "components": components, "keep": self.said, "kept": self.kept, "notes": self.notes}


def _mean(rows: Sequence[Row]) -> float:
    ranks = [row.rank for row in rows if row.rank is not None]
    return sum(ranks) / max(1, len(ranks))
