"""The table of benchmarks/methods.py's results, and the picture of what costs most and brings most.

    python benchmarks/methods_table.py methods.jsonl --picture docs/methods.svg

Gain: by how much of the base's held-out loss an adapter lowers it, the mean over tasks and seeds; its interval is of
2,000 draws, of seeds and of pictures, with the base's loss of the same pictures beside each. Drift: how far the loss on
the base's own pictures, without the word, moved from the base's, in the base's loss.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from imgadapt.cli import program

Numbers = npt.NDArray[np.float64]
DRAWS = 2000


@dataclass(frozen=True)
class Row:
    """One method at one size. gain: (middle, low, high); by_task: of each task; ratio: of LoRA's step, if measured."""

    case: str
    size: str
    method: str
    rate: float
    gain: tuple[float, float, float]
    by_task: Mapping[str, float]
    drift: tuple[float, float, float]
    numbers: int
    bytes: int
    ratio: float | None


def read(path: Path) -> list[Row]:
    """All methods and sizes of which every task has a run, the best first."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    found: dict[str, dict[str, Any]] = {line["key"]: line for line in lines}
    base = found["base"]
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in found.values():
        if line["key"].startswith("run "):
            runs.setdefault((line["case"], line["size"]), []).append(line)
    rows = [_row(base, key, of_it, found.get(f"time {key[0]} {key[1]}")) for key, of_it in runs.items()]
    return sorted((row for row in rows if row is not None), key=lambda row: -row.gain[0])


def _row(
    base: Mapping[str, Any], key: tuple[str, str], runs: Sequence[Mapping[str, Any]], timed: Mapping[str, Any] | None
) -> Row | None:
    tasks: Mapping[str, list[float]] = base["losses"]
    by_task = {task: [run for run in runs if run["task"] == task and "losses" in run] for task in tasks}
    if not all(by_task.values()):
        return None
    drawn = np.random.default_rng(0)
    gains = {
        t: _gain(np.array(tasks[t]), np.array([r["losses"] for r in of_it]), drawn) for t, of_it in by_task.items()
    }
    prior = np.array(base["prior"])
    drifts = {t: -_gain(prior, np.array([r["prior"] for r in of_it]), drawn) for t, of_it in by_task.items()}
    one = next(iter(by_task.values()))[0]
    return Row(
        *key, one["method"], one["rate"],
        _interval(gains), {t: float(g[0]) for t, g in gains.items()}, _interval(drifts),
        one["numbers"], one["bytes"], None if timed is None else timed["ratio"],
    )  # fmt: skip


def _gain(base: Numbers, adapted: Numbers, drawn: np.random.Generator) -> Numbers:
    """1 - adapted / base; first as it is, then for each draw. base (pictures,), adapted (seeds, pictures)."""
    seeds, pictures = adapted.shape
    some = drawn.integers(pictures, size=(DRAWS, pictures))
    who = drawn.integers(seeds, size=(DRAWS, seeds))
    both = adapted[who[:, :, None], some[:, None, :]].mean((1, 2)) / base[some].mean(1)
    return np.concatenate([[1 - adapted.mean() / base.mean()], 1 - both])


def _interval(of_tasks: Mapping[str, Numbers]) -> tuple[float, float, float]:
    mean = np.mean(list(of_tasks.values()), 0)
    low, high = np.quantile(mean[1:], (0.025, 0.975))
    return float(mean[0]), float(low), float(high)


def best_for_their_size(rows: Sequence[Row]) -> list[Row]:
    """Those that no smaller one beats, from small to large."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda r: (r.numbers, -r.gain[0])):
        if not kept or row.gain[0] > kept[-1].gain[0]:
            kept.append(row)
    return kept


def table(rows: Sequence[Row]) -> str:
    """Markdown, the best first."""
    tasks = list(rows[0].by_task)
    head = ["method", "rate", "numbers", "file", "gain (95 %)", *tasks, "drift", "step"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    front = set(map(id, best_for_their_size(rows)))
    for row in rows:
        name = f"**`{row.method}`**" if id(row) in front else f"`{row.method}`"
        name += "" if row.case in row.method.replace("(", " ").split() else f" {row.case}"
        cells = [
            name, f"{row.rate:.2g}", f"{row.numbers:,}", f"{row.bytes / 1000:,.0f} kB",
            f"{row.gain[0]:.3f} ({row.gain[1]:.3f} to {row.gain[2]:.3f})", *(f"{row.by_task[t]:.2f}" for t in tasks),
            f"{row.drift[0]:+.2f}", "" if row.ratio is None else f"{row.ratio:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Gain against numbers trained, a line through the sizes of a method, the front in front."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "imgadapt"  # the same file each time
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes: Any = figure.add_subplot()
    front = best_for_their_size(rows)
    of_case: dict[str, list[Row]] = {}
    for row in rows:
        of_case.setdefault(row.case, []).append(row)
    for name, own in sorted(of_case.items()):
        own = sorted(own, key=lambda r: r.numbers)
        on = any(row in front for row in own)
        x, y = [r.numbers for r in own], [r.gain[0] for r in own]
        error = [[max(0.0, r.gain[0] - r.gain[1]) for r in own], [max(0.0, r.gain[2] - r.gain[0]) for r in own]]
        colour = None if on else "0.72"
        axes.errorbar(x, y, error, marker="o", markersize=4, linewidth=1.4 if on else 0.8, elinewidth=0.6, color=colour)
        axes.annotate(
            name, (x[-1], y[-1]), (4, 2), textcoords="offset points", fontsize=8, color="0.1" if on else "0.5"
        )
    axes.step(
        [r.numbers for r in front], [r.gain[0] for r in front], where="post", color="0.2", linewidth=0.8, linestyle=":"
    )
    axes.set(xscale="log", xlabel="trained numbers", ylabel="share of the base's held-out loss that is gone")
    axes.grid(alpha=0.25)
    figure.savefig(path, metadata={"Date": None})


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--picture", type=Path, help="an .svg or .png")
    args = parser.parse_args(argv)
    rows = read(args.results)
    print(table(rows))
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    program(main, sys.argv[1:])
