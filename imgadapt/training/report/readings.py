"""Readings: what the logs of a run say, as columns of numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgadapt.training.log import read_lines

_FIGURES = ("loss", "raw", "lr", "grad_norm")
_OWN = (*_FIGURES, "step", "seconds", "t", "losses", "pieces")


@dataclass(frozen=True)
class Readings:
    """The columns of `log.jsonl`, a value a step, and of `evaluations.jsonl`.

    steps: counted from 1, so that a step and an evaluation after it have the same number. further: other terms of the
    loss. times, losses, at: of the pictures that the log has (those of one process), with the step that each was in.
    seconds: of all runs that it took, one after the other. evaluations: by step. remarks: what is missing.
    """

    steps: Sequence[int]
    figures: Mapping[str, Sequence[float]]
    further: Mapping[str, Sequence[float]]
    times: Sequence[float]
    losses: Sequence[float]
    at: Sequence[int]
    seconds: float
    evaluations: Sequence[Mapping[str, float]]
    remarks: Sequence[str]

    @property
    def skipped(self) -> int:
        """Steps whose gradient was not finite, which fp16 skips."""
        return sum(not math.isfinite(norm) for norm in self.figures["grad_norm"])

    def clipped(self, most: float) -> int:
        """Steps whose gradient was longer than that and was cut."""
        return sum(math.isfinite(norm) and norm > most for norm in self.figures["grad_norm"])

    def followed(self, name: str) -> list[Mapping[str, float]]:
        """The evaluations that have the loss `name`: "seen" or "held_out"."""
        wanted = {name, f"{name}_gain", f"{name}_gain_low", f"{name}_gain_high"}
        return [row for row in self.evaluations if wanted <= row.keys()]

    @property
    def best(self) -> Mapping[str, float] | None:
        """The evaluation of the least held-out loss, the earliest if several have it."""
        return min(self.followed("held_out"), key=lambda row: (row["held_out"], row["step"]), default=None)


@dataclass(frozen=True)
class Bin:
    """The plain losses of pictures whose time was in [low, high): with their steps, and the means of the first and the
    last quarter of the run (None: there was none).
    """

    low: float
    high: float
    at: Sequence[int]
    losses: Sequence[float]
    early: float | None
    late: float | None


def read(folder: Path) -> Readings:
    """The logs in a run's folder; what is not there is said in `remarks`."""
    remarks: list[str] = []
    log = _rows(folder / "log.jsonl", ("step", *_FIGURES), "no loss, rate or gradient to show", remarks)
    evaluations = _rows(folder / "evaluations.jsonl", ("step",), "no curve of an evaluation to show", remarks)
    samples = [(t, loss, int(r["step"]) + 1) for r in log for t, loss in zip(r.get("t", ()), r.get("losses", ()))]  # noqa: B905 # a torn pair is no reason to fail
    further = sorted({key for row in log for key in row if key not in _OWN and isinstance(row[key], int | float)})
    seconds = [float(row.get("seconds", 0.0)) for row in log]
    return Readings(
        [int(row["step"]) + 1 for row in log],
        {key: [float(row[key]) for row in log] for key in _FIGURES},
        {key: [float(row.get(key, math.nan)) for row in log] for key in further},
        *([row[k] for row in samples] for k in range(3)),
        seconds=sum(b - a if b >= a else b for a, b in zip([0.0, *seconds], seconds, strict=False)),
        evaluations=evaluations,
        remarks=remarks,
    )


def _rows(path: Path, wanted: Sequence[str], without: str, remarks: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        remarks.append(f"There is no {path.name}, so there is {without}.")
        return []
    rows = [row for row in read_lines(path) if all(isinstance(row.get(key), int | float) for key in wanted)]
    lines = sum(bool(line.strip()) for line in path.read_text("utf-8", "replace").splitlines())
    if lines > len(rows):
        remarks.append(f"{lines - len(rows)} of {lines} lines of {path.name} are not whole and are left out.")
    if not lines:
        remarks.append(f"{path.name} is empty, so there is {without}.")
    return rows


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Means of the last `window` values up to each, of fewer at the beginning; what is not finite is left out."""
    made: list[float] = []
    for k in range(len(values)):
        some = [value for value in values[max(0, k + 1 - window) : k + 1] if math.isfinite(value)]
        made.append(math.fsum(some) / len(some) if some else math.nan)
    return made


def window(count: int) -> int:
    """Over how many values a curve of `count` is smoothed: a tenth, 50 at most."""
    return max(1, min(50, count // 10))


def bins(readings: Readings, total: float, count: int = 10) -> list[Bin]:
    """The losses by time, in bins of equal width. total: the times are in [0, total]."""
    rows: list[list[tuple[int, float]]] = [[] for _ in range(count)]
    for step, t, loss in zip(readings.at, readings.times, readings.losses, strict=True):
        rows[min(count - 1, max(0, int(t / total * count)))].append((step, loss))
    first, last = (readings.steps[0], readings.steps[-1]) if readings.steps else (0, 0)
    quarter = (last - first + 1) / 4
    return [
        Bin(
            k * total / count,
            (k + 1) * total / count,
            [step for step, _ in some],
            [loss for _, loss in some],
            _mean([loss for step, loss in some if step < first + quarter]),
            _mean([loss for step, loss in some if step > last - quarter]),
        )
        for k, some in enumerate(rows)
    ]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
