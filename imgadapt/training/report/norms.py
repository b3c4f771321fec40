"""Norms: how much of each layer's weight an adapter changes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from imgadapt import attaching, live, overview
from imgadapt.file import AdapterFile
from imgadapt.summary import block_of

LARGE = 0.5  # of the weight: a change beyond this mostly replaces the layer


@dataclass(frozen=True)
class Norm:
    """Frobenius norms of a layer's change at strength 1, scale included, and of its weight; of a block: the roots of
    the sums of their squares.
    """

    name: str
    delta: float
    weight: float
    layers: int = 1

    @property
    def share(self) -> float:
        """Change over weight; infinite where the weight is zero and the change is not."""
        if self.weight == 0:
            return float("inf") if self.delta else 0.0
        return self.delta / self.weight


@torch.no_grad()
def measure(pipeline: Any, file: AdapterFile) -> list[Norm]:
    """The norms of each layer that the file is for, in the model's order. The pipeline is as before afterwards."""
    if not file.parts:
        return []
    attaching.attach(pipeline, replace(file, embeddings={}, prompts=None), name="measured")
    try:
        rows = [row for row in overview.status(pipeline) if row.adapter == "measured"]
        layers = {name: layer for name, layer, _ in live.slots(pipeline, "measured")}
        return [Norm(row.layer, row.norm, float(layers[row.layer].pristine().float().norm())) for row in rows]
    finally:
        attaching.detach(pipeline, "measured")


def blocks(rows: Sequence[Norm]) -> list[Norm]:
    """The layers put together by block, in their order."""
    by_block: dict[str, list[Norm]] = {}
    for row in rows:
        by_block.setdefault(block_of(row.name), []).append(row)
    return [
        Norm(name, sum(r.delta**2 for r in some) ** 0.5, sum(r.weight**2 for r in some) ** 0.5, len(some))
        for name, some in by_block.items()
    ]


def largest(rows: Sequence[Norm], count: int = 10) -> list[Norm]:
    """The layers that change most, in shares of their weight."""
    return sorted(rows, key=lambda row: -row.share)[:count]


def suspicious(rows: Sequence[Norm]) -> tuple[list[Norm], list[Norm]]:
    """(layers whose change is above `LARGE` of their weight, layers that did not change at all)."""
    return [row for row in rows if row.share > LARGE], [row for row in rows if row.delta == 0]
