"""Merging as HTML: the cosines of a stack, the error by rank, the report."""

from collections.abc import Sequence

from imgadapt.playground.merges.lab import LabReport
from imgadapt.training.report.charts import Chart, Line, svg
from imgadapt_ui import boxes
from imgadapt_ui.parts import text


def report(found: LabReport) -> str:
    """A report of a merge: whether the live stack is the same, cosines, error by rank, and its lines."""
    said = (
        boxes.note("The live stack at these weights draws what the merged file will.", "good")
        if found.exact
        else boxes.note("The live stack draws something else: this rule, space or rank changes what is merged.", "warn")
    )
    figures: list[str] = []
    if len(found.names) > 1:
        figures.append(boxes.figure("Cosines of the changes", cosines(found.names, found.cosines)))
    if found.residuals:
        figures.append(boxes.figure("Relative error when cut to a rank", residuals(found.residuals)))
    lines = "\n".join(found.lines)
    whole = boxes.more("The whole report", f"<pre>{text(lines)}</pre>") if lines else ""
    return said + boxes.side(figures) + whole


def cosines(names: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """A matrix of cosines: one colour for alike, one for opposed, the stronger the farther from 0."""
    rows = [boxes.row(name, "".join(map(_cosine, line))) for name, line in zip(names, values, strict=True)]
    return boxes.scroll("cosines", boxes.table("lab-matrix", f"<td></td>{boxes.heads(names)}", rows))


def _cosine(value: float) -> str:
    look = 1 if value >= 0 else 2
    return f'<td class="lab-c{look}" style="--much: {min(abs(value), 1.0):.3f}">{value:+.3f}</td>'


def residuals(found: Sequence[tuple[int, float]]) -> str:
    """The error that is left when the merge is cut to a rank, as a chart with its numbers below."""
    ranks, errors = [float(rank) for rank, _ in found], [error for _, error in found]
    line = Line("", ranks, errors, low=errors, high=errors)
    drawn = svg(Chart("relative error of the merge by rank", lines=[line], x_name="rank", size=(480, 200)))
    said = " · ".join(f"rank {rank}: {error:.1%}" for rank, error in found)
    return f"{drawn}<small>{said}</small>"
