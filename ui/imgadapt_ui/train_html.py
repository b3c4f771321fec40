"""Trainings as HTML: what a check found, charts of a run, its samples."""

import math
from collections.abc import Sequence

from imgadapt.playground.trainings.runs import Check, Run
from imgadapt.training.report.charts import Chart, Line, number, svg
from imgadapt.training.report.readings import smooth, window
from imgadapt_ui import boxes
from imgadapt_ui.parts import duration, text, thumb

ACTIVE = ("starting", "training", "finishing")
_LOOKS = {"error": "bad", "warning": "warn", "ok": "good"}
_FIGURES = {"held_out": "held-out loss", "held_out_gain": "its gain", "seen": "training loss", "seen_gain": "its gain"}


def check(found: Check) -> str:
    """What a check found, the plan with its reasons, and the contact sheet."""
    rows = "".join(boxes.note(f"{level}: {said}", _LOOKS.get(level, "note")) for level, said in found.findings)
    findings = rows or boxes.note("The pictures have no faults that it knows.", "good")
    sheet = ""
    if found.sheet is not None:
        shown = thumb(found.sheet.id, "contact sheet of the pictures as they are trained on", 1024)
        sheet = boxes.figure("What the trainer will see", _linked(found.sheet.id, shown), "lab-sheet")
    return findings + boxes.more("The plan, and why", plan(found), shut=False) + sheet


def plan(found: Check) -> str:
    """What would be done: in a line or two, and as a table of settings, their values and reasons."""
    lines = "".join(boxes.note(line) for line in found.summary)
    rows = [
        boxes.row(name.replace("_", " "), f"<td>{text(value)}</td><td>{text(why)}</td>")
        for name, value, why in found.plan
    ]
    return lines + boxes.scroll(
        "the plan", boxes.table("lab-plan", boxes.heads(["setting", "planned", "because"]), rows)
    )


def _linked(id: str, inner: str) -> str:
    return f'<a href="/pictures/{text(id)}" target="_blank" rel="noopener">{inner}</a>'


def run(one: Run) -> str:
    """A run as it is now: how far, charts, figures, samples."""
    inner = head(one) + charts(one) + samples(one) + figures(one)
    return f'<div class="lab-run" data-state="{text(one.state)}" data-step="{one.step}">{inner}</div>'


def head(one: Run) -> str:
    """Name, state, bar, time left, message."""
    share = 100 * min(one.step / one.steps, 1.0) if one.steps else 0.0
    left = f" · {duration(one.eta)} left" if one.eta is not None and one.state in ACTIVE else ""
    loss = f" · loss {number(_last(one))}" if one.loss else ""
    return (
        f'<div class="lab-head"><b>{text(one.name)}</b><span class="lab-state">{text(one.state)}</span>'
        f"<span>step {one.step:,} of {one.steps:,}{loss}{left}</span></div>"
        f'<div class="lab-progress" role="progressbar" aria-label="steps of {text(one.name)}" aria-valuemin="0" '
        f'aria-valuemax="{one.steps}" aria-valuenow="{one.step}"><i style="width: {share:.1f}%"></i></div>'
        + boxes.note(one.message, "bad" if one.state == "failed" else "note")
    )


def _last(one: Run) -> float:
    values = [loss for _, loss, _ in one.loss if math.isfinite(loss)]
    return smooth(values, window(len(values)))[-1] if values else math.nan


def charts(one: Run) -> str:
    """The loss, raw and smoothed; the learning rate; the loss on pictures that are watched."""
    if not one.loss:
        return ""
    steps, losses, rates = ([float(row[k]) for row in one.loss] for k in range(3))
    raw = (steps, losses)
    line = Line("smoothed", steps, smooth(losses, window(len(losses))), look=2)
    drawn = [_chart("Loss", Chart("loss by step", lines=[line], dots=raw, size=(520, 220)))]
    watched = _watched(one)
    if watched:
        chart = Chart("loss on watched pictures by step", lines=watched, size=(520, 220))
        drawn.append(_chart("Loss on pictures that are watched", chart))
    chart = Chart("learning rate by step", lines=[Line("", steps, rates, look=3)], size=(520, 220))
    drawn.append(_chart("Learning rate", chart))
    return boxes.side(drawn)


def _chart(title: str, chart: Chart) -> str:
    """A chart under its title; of one step there is nothing to draw, so its numbers are said."""
    if len({x for line in chart.lines for x in line.x}) > 1:
        return boxes.figure(title, svg(chart))
    lines = [
        f"{line.name + ' ' if len(chart.lines) > 1 else ''}{number(line.y[0])} at step {line.x[0]:,.0f}"
        for line in chart.lines
    ]
    return boxes.figure(title, "".join(f'<p class="lab-number">{text(said)}</p>' for said in lines))


def _watched(one: Run) -> list[Line]:
    lines: list[Line] = []
    for key, look in (("held_out", 1), ("seen", 2)):
        rows = [row for row in one.evaluations if key in row and "step" in row]
        if rows:
            steps, values = [row["step"] for row in rows], [row[key] for row in rows]
            lines.append(Line(_FIGURES[key], steps, values, low=values, high=values, look=look))
    return lines


def figures(one: Run) -> str:
    """The evaluations as a table."""
    keys = [key for key in _FIGURES if any(key in row for row in one.evaluations)]
    if not keys:
        return ""
    rows = [
        boxes.row(
            f"{row.get('step', 0):.0f}", "".join(f"<td>{number(row[key]) if key in row else ''}</td>" for key in keys)
        )
        for row in one.evaluations
    ]
    inner = boxes.table("lab-figures", boxes.heads(["step", *(_FIGURES[key] for key in keys)]), rows)
    return boxes.more("Figures", boxes.scroll("figures", inner))


def samples(one: Run) -> str:
    """The pictures drawn meanwhile, a strip, the newest first."""
    if not one.samples:
        return ""
    shown = "".join(
        boxes.figure(f"step {step:,}", _linked(picture.id, thumb(picture.id, f"sample at step {step}")))
        for step, picture in sorted(one.samples, key=lambda row: -row[0])
    )
    strip = f'<div class="lab-strip">{shown}</div>'
    return "<h4>Samples</h4>" + boxes.scroll("samples", strip)


def listed(rows: Sequence[Run]) -> list[tuple[str, str]]:
    """Runs as choices: (what is shown, id)."""
    return [(f"{one.name} · {one.state} · {one.step:,}/{one.steps:,}", one.id) for one in rows]
