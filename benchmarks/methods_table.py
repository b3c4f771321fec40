"""The table of benchmarks/methods.py's results, and the picture of what costs most and brings most.

    python benchmarks/methods_table.py benchmarks/methods.jsonl --picture docs/methods.svg --page docs/measured.md

Gain: the share of the base's held-out loss that an adapter takes away, the mean over tasks and seeds. Its interval is
of 2,000 draws of seeds and of pictures (of subjects, in both styles at once). All adapters, and the base, are looked at
by the same draws: so `to lora`, the gain less that of LoRA's middle size, is a difference of pairs, and far better
known than either. Drift: how far the loss on the base's own pictures, without the word, moved from the base's, in the
base's loss.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
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
FLOOR = 0.43  # of the picture
MARKS = ("<!-- of benchmarks/methods_table.py -->", "<!-- until here -->")


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
    for task, losses in base.items():
        drawn = np.random.default_rng(len(losses))  # tasks of as many pictures are of the same subjects
        of_base, adapted = np.array(losses), np.array([run[what] for run in runs[task]])
        some = drawn.integers(len(of_base), size=(DRAWS, len(of_base)))
        who = (drawn.random((DRAWS, SEEDS)) * len(adapted)).astype(int)
        ratio = adapted[who[:, :, None], some[:, None, :]].mean((1, 2)) / of_base[some].mean(1)
        made.append(1 - np.concatenate([[adapted.mean() / of_base.mean()], ratio]))
    return np.array(made)


def _interval(draws: Numbers) -> Interval:
    low, high = np.quantile(draws[1:], (0.025, 0.975))
    return float(draws[0]), float(low), float(high)


def front(rows: Sequence[Row], cost: Callable[[Row], float]) -> list[Row]:
    """Those than which none that costs less gains more, from cheap to dear."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda r: (cost(r), -r.gain[0])):
        if not kept or row.gain[0] > kept[-1].gain[0]:
            kept.append(row)
    return kept


def _size(row: Row) -> float:
    return row.bytes / 1000


def _drift(row: Row) -> float:
    return row.drift[0]


def table(rows: Sequence[Row]) -> str:
    """Markdown, the best first; bold: no smaller file is better."""
    tasks = list(rows[0].by_task)
    head = ["method", "rate", "numbers", "file", "gain (95 %)", "to lora (95 %)", *tasks, "drift", "step"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    best = set(map(id, front(rows, _size)))
    for row in rows:
        name = f"**{called(row)}**" if id(row) in best else called(row)
        cells = [
            name + ("" if row.seeds == SEEDS else " ¹"), f"{row.rate:.2g}", f"{row.numbers:,}",
            f"{row.bytes / 1000:,.0f} kB", f"{row.gain[0]:.3f} ({row.gain[1]:.3f} to {row.gain[2]:.3f})",
            f"{row.over[0]:+.3f} ({row.over[1]:+.3f} to {row.over[2]:+.3f})", *(f"{row.by_task[t]:.2f}" for t in tasks),
            f"{row.drift[0]:+.2f}", "" if row.ratio is None else f"{row.ratio:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def called(row: Row) -> str:
    """As --method has it, and what else it was told."""
    told = {
        "lora_gentle": "--learning-rate 2e-3",
        "lora_gentler": "--learning-rate 1e-3",
        "lora_fa": "--freeze-down",
        "lora_plus": "--lora-plus 4",
        "nested": "--nested-ranks all",
    }
    head = row.method.partition("(")[0]
    plain = head == "dora" or row.case in (head, f"{head}_default")
    return f"`{row.method}`" if plain else f"`{row.method} {told.get(row.case, f'--start {row.case}')}`"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Gain against the file's size, and against drift: of each method its sizes, joined; the fronts in colour. What
    gains less than most is below the picture, by name.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "imgadapt"  # the same file each time
    figure = Figure(figsize=(13, 7), layout="constrained")
    least = FLOOR - 0.004
    for number, (of, said) in enumerate(
        ((_size, "size of the file, kB"), (_drift, "drift: what the loss without the word rose by, in the base's"))
    ):
        axes: Any = figure.add_subplot(1, 2, number + 1)
        best = front(rows, of)
        labels: list[tuple[float, float, str, bool]] = []
        of_case: dict[str, list[Row]] = {}
        for row in rows:
            of_case.setdefault(row.case, []).append(row)
        for name, own in sorted(of_case.items()):
            own = sorted(own, key=lambda r: r.numbers)
            on = [row for row in own if row in best and row.gain[0] > FLOOR]
            colour = "tab:blue" if on else "0.75"
            axes.plot(
                [of(r) for r in own],
                [r.gain[0] for r in own],
                "o-",
                markersize=3,
                linewidth=0.8,
                color=colour,
                zorder=2 + bool(on),
            )
            for row in own:  # what is known of the difference to LoRA
                ends = [row.gain[0] - row.over[0] + end for end in row.over[1:]]
                axes.plot([of(row)] * 2, ends, linewidth=0.5, color=colour)
            shown = on or [row for row in own if row.gain[0] > FLOOR][-1:]
            labels += [(of(row), row.gain[0], name, bool(on)) for row in shown]
        axes.step(
            [of(r) for r in best],
            [r.gain[0] for r in best],
            where="post",
            color="tab:blue",
            linewidth=0.8,
            linestyle=":",
        )
        axes.set(xlabel=said, ylabel="gain: share of the base's held-out loss that is gone" if number == 0 else None)
        axes.set_ylim(least, max(row.gain[0] for row in rows) + 0.006)
        if number == 0:
            axes.set_xscale("log")
        axes.margins(x=0.14)
        axes.grid(alpha=0.25)
        _write(figure, axes, labels)
    figure.suptitle("blue: what costs less gains less; bars: 95 % of the difference to lora(rank=8)", fontsize=8)
    best_of = {row.case: row.gain[0] for row in reversed(rows)}
    if low := [f"{name} {gain:.2f}" for name, gain in sorted(best_of.items()) if gain <= FLOOR]:
        figure.supxlabel(f"below the picture: {', '.join(low)}", fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def _write(figure: Any, axes: Any, labels: Sequence[tuple[float, float, str, bool]]) -> None:
    """Names beside their points, those of the front first, each at the first place where no other name is."""
    figure.draw_without_rendering()
    taken: list[Any] = []
    places = [(4, 3), (4, -9), (-4, 3), (-4, -9), *((4, 3 + 8 * k) for k in (1, -2, 2, -3, 3))]
    for x, y, name, on in sorted(labels, key=lambda label: (not label[3], -label[1])):
        for across, up in places:
            text = axes.annotate(
                name, (x, y), xytext=(across, up), textcoords="offset points", fontsize=7, zorder=5,
                ha="left" if across > 0 else "right", color="0.1" if on else "0.5",
            )  # fmt: skip
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken) or (across, up) == places[-1]:
                taken.append(box)
                break
            text.remove()


def page(text: str, rows: Sequence[Row]) -> str:
    """A page with the table between its two marks."""
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{table(rows)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--picture", type=Path, help="an .svg or .png")
    parser.add_argument("--page", type=Path, help="a page whose table is made anew")
    args = parser.parse_args(argv)
    rows = read(args.results)
    if args.page:
        args.page.write_text(page(args.page.read_text("utf-8"), rows), "utf-8")
    else:
        print(table(rows))
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    program(main, sys.argv[1:])
