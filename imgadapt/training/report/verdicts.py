"""Verdicts: what the numbers of a run mean, in plain words, each with the numbers that it comes from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from imgadapt.errors import first_few
from imgadapt.training.report.charts import number
from imgadapt.training.report.norms import LARGE, Norm, suspicious
from imgadapt.training.report.readings import Readings

_FEW = 4  # pictures from which an interval says little
_RISE = 0.05  # of the best gain: a rise of the held-out loss that counts, and a fall that is worth more steps
_BY_HEART = 2.0  # times the gain on held-out pictures: that on the training pictures is learnt by heart


@dataclass(frozen=True)
class Verdict:
    """One finding. mark: "good", "bad" or "note"."""

    mark: Literal["good", "bad", "note"]
    text: str


def verdicts(
    readings: Readings,
    norms: Sequence[Norm],
    *,
    pictures: Mapping[str, int],
    max_grad_norm: float,
    pieces: tuple[int, int],
) -> list[Verdict]:
    """All findings, the weightiest first.

    pictures: how many "seen" and "held_out" have; pieces: in how many a batch was computed at first, and in the end.
    """
    return [
        *_against_base(readings, pictures.get("held_out", 0)),
        *_over_time(readings),
        *_by_heart(readings),
        *_steps(readings, max_grad_norm, pieces),
        *_layers(norms),
    ]


def _against_base(readings: Readings, count: int) -> Iterator[Verdict]:
    rows = readings.followed("held_out")
    if not rows:
        yield Verdict(
            "note",
            "Nothing here says whether it beats the base on pictures that it has not seen: none were held out. Train "
            "with --held-out-count 3, or with --held-out FOLDER.",
        )
        return
    gain, low, high = (rows[-1][f"held_out_gain{end}"] for end in ("", "_low", "_high"))
    said = f"by {number(abs(gain))} (95 % interval of the gain: {number(low)} to {number(high)}) on {_pictures(count)}"
    if low > 0:
        mark = "good" if count >= _FEW else "note"
        yield Verdict(mark, f"It beats the base on held-out pictures: its loss is lower {said}.")
    elif high < 0:
        yield Verdict("bad", f"It is worse than the base on held-out pictures: its loss is higher {said}.")
    else:
        way = "lower" if gain >= 0 else "higher"
        yield Verdict("note", f"It cannot be told from the base on held-out pictures: its loss is {way} {said}.")
    if count < _FEW:
        yield Verdict("note", f"{_pictures(count)} held out: too few for the interval to mean much; {_FEW} or more do.")


def _over_time(readings: Readings) -> Iterator[Verdict]:
    rows, best = readings.followed("held_out"), readings.best
    if best is None or len(rows) < 2:
        return
    last, gain, step = rows[-1], best["held_out_gain"], f"{int(best['step']):,}"
    if gain <= 0:
        yield Verdict("bad", f"No checkpoint is better than the base on held-out pictures; step {step} is the nearest.")
        return
    if best["step"] == last["step"]:
        fall = rows[-2]["held_out"] - last["held_out"]
        if fall > _RISE * gain:
            yield Verdict(
                "note",
                f"The held-out loss was still falling when the run ended (by {number(fall)} since step "
                f"{int(rows[-2]['step']):,}): more steps may help.",
            )
        else:
            yield Verdict("good", f"The held-out loss has levelled off: the last step, {step}, is the best.")
        return
    rise = last["held_out"] - best["held_out"]
    told = f"by {number(rise)}, {rise / gain:.0%} of its best gain, since step {step}"
    if rise > _RISE * gain:
        yield Verdict(
            "bad",
            f"The held-out loss rises again, {told}: that is overfitting. Use best.safetensors, which is step {step}.",
        )
    else:
        yield Verdict("note", f"The held-out loss has levelled off: it rose {told}, which best.safetensors is.")


def _by_heart(readings: Readings) -> Iterator[Verdict]:
    held, seen = readings.followed("held_out"), readings.followed("seen")
    if not held or not seen:
        return
    ours, theirs = seen[-1]["seen_gain"], held[-1]["held_out_gain"]
    said = f"the gain is {number(ours)} on training pictures and {number(theirs)} on held-out ones"
    if ours > 0 and ours > _BY_HEART * theirs:
        yield Verdict(
            "bad",
            f"Training loss is far below held-out loss: {said}. It learns its pictures by heart: fewer steps, a lower "
            "rank or more pictures help.",
        )
    elif ours > 0:
        yield Verdict("good", f"What is learnt carries over: {said} ({theirs / ours:.0%}).")


def _steps(readings: Readings, most: float, pieces: tuple[int, int]) -> Iterator[Verdict]:
    count = len(readings.steps)
    if not count:
        return
    skipped, cut = readings.skipped, readings.clipped(most)
    if skipped:
        mark = "bad" if skipped > max(5, 0.02 * count) else "note"
        yield Verdict(mark, f"{_steps_of(skipped, count)} skipped: fp16 overflowed in the gradient.")
    else:
        yield Verdict("good", f"No step was skipped, of {count:,}.")
    if cut > count / 2:
        yield Verdict("note", f"{_steps_of(cut, count)} cut to the gradient norm {number(most)} (--max-grad-norm).")
    if pieces[1] > pieces[0]:
        yield Verdict(
            "note",
            f"Memory ran out: batches were cut into {pieces[1]} pieces instead of {pieces[0]}, with the same result.",
        )


def _layers(norms: Sequence[Norm]) -> Iterator[Verdict]:
    large, still = suspicious(norms)
    if large:
        worst = sorted(large, key=lambda row: -row.share)
        yield Verdict(
            "bad",
            f"{_layers_of(large, norms)} changed by more than {LARGE:.0%} of the weight: "
            f"{first_few([f'{row.name} ({row.share:.0%})' for row in worst])}. A lower learning rate or fewer steps "
            "help.",
        )
    if still:
        yield Verdict(
            "bad", f"{_layers_of(still, norms)} not changed at all: {first_few([row.name for row in still])}."
        )


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count:,} pictures"


def _steps_of(count: int, whole: int) -> str:
    return f"{count:,} of {whole:,} steps {'was' if count == 1 else 'were'}"


def _layers_of(some: Sequence[Norm], every: Sequence[Norm]) -> str:
    return f"{len(some):,} of {len(every):,} layers {'is' if len(some) == 1 else 'are'}"
