"""The table of benchmarks/methods.py's results, and the picture of what costs most and brings most.

    python benchmarks/methods_table.py methods.jsonl --picture docs/methods.svg

Gain: the share of the base's held-out loss that an adapter takes away, the mean over tasks and seeds. Its interval is
of 2,000 draws of seeds and of pictures. All adapters, and the base, are looked at by the same draws: so `to lora`, the
gain less that of LoRA's middle size, is a difference of pairs, and far better known than either. Drift: how far the
loss on the base's own pictures, without the word, moved from the base's, in the base's loss.
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
SEEDS = 3  # that a draw is the mean of
REFERENCE = ("lora", "middle")


Interval = tuple[float, float, float]
"""The mean, and the ends of 95 % of its draws."""


@dataclass(frozen=True)
class Row:
    """One method at one size. over: its gain less LoRA's; by_task: gain of each task; ratio: of LoRA's step, if it was
    measured; seeds: of each task, the least.
    """

    case: str
    size: str
    method: str
    rate: float
    gain: Interval
    over: Interval
    by_task: Mapping[str, float]
    drift: Interval
    numbers: int
    bytes: int
    ratio: float | None
    seeds: int


def read(path: Path) -> list[Row]:
    """All methods and sizes of which every task has a run, the best first."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    found: dict[str, dict[str, Any]] = {line["key"]: line for line in lines}
    base = found["base"]
    runs: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for line in found.values():
        if line["key"].startswith("run ") and "losses" in line:
            runs.setdefault((line["case"], line["size"]), {}).setdefault(line["task"], []).append(line)
    whole = {key: of_it for key, of_it in runs.items() if of_it.keys() == base["losses"].keys()}
    gains = {key: _draws(base["losses"], of_it, "losses") for key, of_it in whole.items()}
    against = gains[REFERENCE].mean(0)
    prior: Any = dict.fromkeys(base["losses"], base["prior"])
    rows: list[Row] = []
    for key, of_it in whole.items():
        one = next(iter(of_it.values()))[0]
        mean, timed = gains[key].mean(0), found.get(f"time {key[0]} {key[1]}")
        rows.append(
            Row(
                *key, one["method"], one["rate"], _interval(mean), _interval(mean - against),
                dict(zip(base["losses"], gains[key][:, 0].tolist(), strict=True)),
                _interval(-_draws(prior, of_it, "prior").mean(0)), one["numbers"], one["bytes"],
                None if timed is None else timed["ratio"], min(map(len, of_it.values())),
            )
        )  # fmt: skip
    return sorted(rows, key=lambda row: -row.gain[0])


def _draws(base: Mapping[str, Sequence[float]], runs: Mapping[str, Sequence[Mapping[str, Any]]], what: str) -> Numbers:
    """Of each task 1 - adapted / base, (tasks, 1 + DRAWS): as it is, and for each draw, the same for every method."""
    made: list[Numbers] = []
    for number, (task, losses) in enumerate(base.items()):
        drawn = np.random.default_rng(number)
        of_base, adapted = np.array(losses), np.array([run[what] for run in runs[task]])
        some = drawn.integers(len(of_base), size=(DRAWS, len(of_base)))
        who = (drawn.random((DRAWS, SEEDS)) * len(adapted)).astype(int)
        ratio = adapted[who[:, :, None], some[:, None, :]].mean((1, 2)) / of_base[some].mean(1)
        made.append(1 - np.concatenate([[adapted.mean() / of_base.mean()], ratio]))
    return np.array(made)


def _interval(draws: Numbers) -> Interval:
    low, high = np.quantile(draws[1:], (0.025, 0.975))
    return float(draws[0]), float(low), float(high)


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
    head = ["method", "rate", "numbers", "file", "gain (95 %)", "to lora (95 %)", *tasks, "drift", "step"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    front = set(map(id, best_for_their_size(rows)))
    for row in rows:
        name = f"**`{row.method}`**" if id(row) in front else f"`{row.method}`"
        name += "" if row.case in row.method.replace("(", " ").split() else f" {row.case}"
        cells = [
            name, f"{row.rate:.2g}", f"{row.numbers:,}", f"{row.bytes / 1000:,.0f} kB",
            f"{row.gain[0]:.3f} ({row.gain[1]:.3f} to {row.gain[2]:.3f})",
            f"{row.over[0]:+.3f} ({row.over[1]:+.3f} to {row.over[2]:+.3f})", *(f"{row.by_task[t]:.2f}" for t in tasks),
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
