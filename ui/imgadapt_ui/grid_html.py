"""Grids, pairs and block effects as HTML."""

import base64
import io
from collections.abc import Sequence

from PIL import Image

from imgadapt.playground.grids.analyser import BlockEffect
from imgadapt.playground.grids.grids import Cell, Grid, GridPlan
from imgadapt.playground.pictures.comparing import Difference
from imgadapt_ui import boxes
from imgadapt_ui.parts import duration, text

LARGEST = 768
"""Pixels of the longer side of a difference map in the page."""
LEGEND = "Δ: mean difference to the base, in levels of 255. Press a picture to see where they differ."


def table(grid: Grid, chosen: int | None = None, *, drawing: bool = False) -> str:
    """The grid as tables, one for each value of z, in boxes that scroll by themselves.

    chosen: index of the cell that is looked at; drawing: whether the missing cells are on their way.
    """
    cells = {cell.place: cell for cell in grid.cells}
    columns, lines, sheets = (grid.labels[k] or ("",) for k in range(3))
    parts: list[str] = []
    for z, sheet in enumerate(sheets):
        rows = [
            boxes.row(
                line,
                "".join(
                    _cell(cells.get((x, y, z)), f"{column}, {line}", chosen, drawing)
                    for x, column in enumerate(columns)
                ),
            )
            for y, line in enumerate(lines)
        ]
        inner = boxes.table("lab-grid", f"<td></td>{boxes.heads(columns)}", rows)
        head = f"<h4>{text(sheet)}</h4>" if sheet else ""
        parts.append(head + boxes.scroll(f"grid {grid.request.name} {sheet}".strip(), inner))
    if any(cell.difference is not None and cell.difference.changed for cell in grid.cells):
        parts.append(f'<p class="lab-legend">{text(LEGEND)}</p>')
    return "".join(parts)


def _cell(cell: Cell | None, said: str, chosen: int | None, drawing: bool) -> str:
    if cell is None:
        return "<td></td>"
    if cell.picture is None:
        return f'<td><div class="lab-wait{" lab-busy" if drawing else ""}"></div><small>&nbsp;</small></td>'
    picture, pressed = cell.picture, "true" if cell.index == chosen else "false"
    return (
        f'<td><button type="button" class="lab-cell" data-cell="{cell.index}" aria-pressed="{pressed}" '
        f'aria-label="{text(said.strip(", "))}"><img loading="lazy" src="/pictures/{text(picture.id)}?side=256" alt="" '
        f'width="{picture.width}" height="{picture.height}"></button><small>{_short(cell.difference)}</small></td>'
    )


def _short(difference: Difference | None) -> str:
    if difference is None:
        return "&nbsp;"
    if not difference.changed:
        return '<span class="lab-same" title="equal to the base to the bit">0 = base</span>'
    return f'<span title="mean absolute difference to the base, in levels of 255">Δ {difference.mean:.2f}</span>'


def base_of(grid: Grid, cell: Cell) -> Cell | None:
    """The cell that `cell` is compared with; None where there is none."""
    return next((one for one in grid.cells if one.index == cell.base), None)


def named(grid: Grid, cell: Cell) -> str:
    """A cell by its labels."""
    found = [names[at] for names, at in zip(grid.labels, cell.place, strict=True) if at < len(names)]
    return " · ".join(name for name in found if name)


def missing(grid: Grid) -> int:
    """How many cells are not drawn yet."""
    return sum(cell.picture is None for cell in grid.cells)


def estimate(plan: GridPlan) -> str:
    """What a grid will take, in a line."""
    time = "time not known yet" if plan.seconds is None else f"about {duration(plan.seconds)}"
    return (
        f"{_count(plan.cells, 'cell')} · {_count(plan.swaps, 'adapter change')} · {_count(plan.encodes, 'prompt')} "
        f"encoded · {_count(plan.batches, 'batch', 'batches')} · {time}"
    )


def _count(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def pair(cell: Cell, base: Cell | None, heat: Image.Image | None, title: str) -> str:
    """A cell over its base with a handle between them, the map of their difference, and numbers."""
    if cell.picture is None:
        return ""
    shown = f"/pictures/{text(cell.picture.id)}"
    ratio = f"aspect-ratio: {cell.picture.width} / {cell.picture.height}"
    if base is None or base.picture is None:
        return boxes.side([boxes.figure(title, f'<img class="lab-big" style="{ratio}" src="{shown}" alt="">')])
    slide = (
        f'<div class="lab-slide" style="{ratio}"><img src="/pictures/{text(base.picture.id)}" alt="base">'
        f'<img class="lab-over" src="{shown}" alt="{text(title)}"><span>base</span><span>this cell</span>'
        '<input type="range" min="0" max="100" step="0.5" value="50" '
        'aria-label="how much of the base is shown, from the left"></div>'
    )
    figures = [boxes.figure(title, slide)]
    if heat is not None:
        drawn = f'<img class="lab-big" style="{ratio}" src="{_uri(heat)}" alt="where they differ: white the most">'
        figures.append(boxes.figure("Difference: black is none, white the most", drawn))
    return numbers(cell.difference) + boxes.side(figures)


def numbers(difference: Difference | None) -> str:
    """A difference in words and figures."""
    if difference is None:
        return ""
    if not difference.changed:
        return boxes.note("Equal to the base to the bit.", "good")
    noise = "" if difference.psnr is None else f" · PSNR {difference.psnr:.1f} dB"
    return boxes.note(
        f"mean difference {difference.mean:.2f} of 255 · largest {difference.largest} · "
        f"changed pixels {difference.changed:.1%}{noise}"
    )


def _uri(image: Image.Image) -> str:
    data, shrunk = io.BytesIO(), image.convert("RGB")
    shrunk.thumbnail((LARGEST, LARGEST))
    shrunk.save(data, "WEBP", lossless=True)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def effects(found: Sequence[BlockEffect]) -> str:
    """The effects of blocks as bars: alone, what is lacking without, and the share of the norm."""
    if not found:
        return ""
    most = max(max(one.only, one.without) for one in found) or 1.0

    def bar(value: float, share: float, look: int) -> str:
        width = 100 * min(max(share, 0.0), 1.0)
        inner = f'<span class="lab-bar"><i class="lab-c{look}" style="width: {width:.1f}%"></i></span>'
        return f"<td>{inner}<small>{value:.1%}</small></td>"

    rows = [
        boxes.row(
            one.block,
            bar(one.only, one.only / most, 1) + bar(one.without, one.without / most, 2) + bar(one.norm, one.norm, 3),
        )
        for one in found
    ]
    head = boxes.heads(["block", "alone", "lost without it", "share of norm"])
    return boxes.scroll("effects of blocks", boxes.table("lab-bars", head, rows))
