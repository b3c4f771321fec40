"""Status: what is on a model, as rows and as a table."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imgadapt import targets as where
from imgadapt.layer import AdapterLayer
from imgadapt.live import slots
from imgadapt.prompting import stack as prompts
from imgadapt.slot import Slot, Strength


@dataclass(frozen=True)
class Row:
    """One adapter on one layer.

    norm: Frobenius norm of what is added to the weight at strength 1, scale included, NaN where there is no such; of a
        learned prompt: of what attention reads. state: "merged", "live", "off"
        (its strength is 0, or a swapped-in file does not have this layer) or "disabled".
    requantised: relative error of storing the merged weight in the base's quantisation; None if it is plain.
    """

    layer: str
    adapter: str
    method: str
    rank: int | None
    scale: float
    weight: Strength
    norm: float
    state: str
    requantised: float | None


@dataclass(frozen=True)
class Status:
    """All adapters on all layers; `print(status(model))` is a table of the adapters, `.rows` has every layer."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "no adapters"
        head = ("adapter", "component", "method", "rank", "scale", "weight", "layers", "norm", "state")
        lines = [head, *self._summed()]
        if costs := [row.requantised for row in self.rows if row.requantised is not None]:
            return (
                f"{_table(lines)}\nmerged into quantised weights: up to {max(costs):.1%} of a weight lost to their grid"
            )
        return _table(lines)

    def _summed(self) -> list[tuple[str, ...]]:
        """A line for each adapter and component."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.adapter, row.layer.partition(".")[0]), []).append(row)
        return [
            (
                adapter,
                component,
                _said([row.method for row in rows]),
                _said([row.rank for row in rows if row.rank is not None] or ["-"]),
                _said([row.scale for row in rows]),
                _said(["per sample" if isinstance(row.weight, Tensor) else row.weight for row in rows]),
                str(len(rows)),
                f"{sum(row.norm**2 for row in rows) ** 0.5:.4g}",
                _said([row.state for row in rows]),
            )
            for (adapter, component), rows in groups.items()
        ]


def _table(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def _said(values: list[Any]) -> str:
    """`8`, `4-16`, or `live, off`."""
    several = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    if len(several) > 1 and not any(isinstance(value, str) for value in several):
        return f"{several[0]:g}-{several[-1]:g}"
    return ", ".join(value if isinstance(value, str) else f"{value:g}" for value in several)


def status(model: Any) -> Status:
    """Which adapters are on the model, where, how strong; norms are computed anew, from all tensors.

    model: a diffusers pipeline, a mapping of component names to modules, or one module.
    """
    rows = [
        Row(
            name,
            slot.name,
            slot.method.name,
            slot.method.file_rank,
            slot.method.scale,
            slot.weight,
            _norm(layer, slot),
            _state(layer, slot),
            layer.requantised if layer.merged else None,
        )
        for name, layer, slot in slots(model)
    ]
    return Status((*rows, *_prompts(where.components(model))))


def _prompts(parts: Mapping[str, nn.Module]) -> Iterator[Row]:
    """A row for each attention that reads a learned prompt."""
    stack = prompts.of(parts)
    for one in stack.attached if stack else ():
        norms = {key: prompts.size(one, key) for key in one.parameters}
        for reader, strength in one.strengths.items():
            off = not isinstance(strength, Tensor) and strength == 0
            state = "disabled" if stack and not stack.enabled else "off" if off else "live"
            norm = norms[reader if reader in norms else reader.partition(".")[0]]
            yield Row(reader, one.name, one.kind.name, None, 1.0, strength, norm, state, None)


def _state(layer: AdapterLayer, slot: Slot) -> str:
    if not layer.enabled:
        return "disabled"
    if not slot.on:
        return "off"
    return "merged" if layer.merged else "live"


@torch.no_grad()
def _norm(layer: AdapterLayer, slot: Slot) -> float:
    """‖scale * delta‖; of a pair from its two small Gram matrices: ‖UD‖² = ⟨UᵀU, DDᵀ⟩."""
    if not slot.method.merges:
        return math.nan
    t = slot.tensors(torch.float32)
    weight = layer.pristine().float() if slot.method.needs_weight else None
    if slot.way.pair and not slot.method.needs_weight and (pair := slot.method.pair(t, layer.site)) is not None:
        up, down = (factor.double() for factor in pair)
        square = ((up.t() @ up) * (down @ down.t())).sum().clamp(min=0)
    else:
        square = slot.method.delta(t, layer.site, weight).double().square().sum()
    return slot.method.scale * float(square.sqrt())
