"""Exporting: a grid as a zip for anyone: a page that needs nothing else, the pictures as they are, and JSON."""

import json
import zipfile
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from imgadapt.atomic import atomically
from imgadapt.errors import ConfigError
from imgadapt.playground.grids.cells import Cell, Grid
from imgadapt.playground.grids.shelf import told

_TEMPLATE = Path(__file__).with_name("grid.html")
_SIDE = 192
"""Pixels of a picture's width in the page, until it is asked for more."""
_SMALL = 256
"""Pixels below which pictures are enlarged without blur."""


def write(grid: Grid, path: Path, names: Mapping[str, str]) -> None:
    """names: of adapters, by id.

    Raises:
        ConfigError: nothing of it is drawn yet. OutputError: it cannot be written.
    """
    drawn = [cell for cell in grid.cells if cell.picture is not None]
    if not drawn:
        raise ConfigError("nothing of this grid is drawn yet")
    files = {cell.picture.id: (_file(cell), cell.picture.path) for cell in reversed(drawn) if cell.picture}
    said: dict[str, Any] = {**told(grid), "adapters": dict(names)}
    for row, cell in zip(said["cells"], grid.cells, strict=True):
        row["request"] = cell.again.model_dump(mode="json")
        row["file"] = files[row["picture"]][0] if row["picture"] else None
    with atomically(path) as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("index.html", page(grid, {id: name for id, (name, _) in files.items()}, names))
        archive.writestr("grid.json", json.dumps(said, ensure_ascii=False, indent=1))
        for name, source in files.values():
            archive.write(source, name)


def page(grid: Grid, files: Mapping[str, str], names: Mapping[str, str]) -> str:
    """files: a picture's id -> where it is, seen from the page."""
    first = next(cell.picture for cell in grid.cells if cell.picture is not None)
    common = grid.cells[0].request
    prompt = "" if _axis(grid, "prompt") else common.prompt
    about = [
        grid.more.get("base name", ""),
        f"{first.width} x {first.height} pixels",
        "" if _axis(grid, "steps") else f"{common.steps} steps",
        "" if _axis(grid, "sampler") or common.sampler == "base" else common.sampler,
        "" if _axis(grid, "guidance") or common.guidance is None else f"guidance {common.guidance:g}",
        "" if _axis(grid, "seed") else f"seed {common.seed}",
        f"adapters: {', '.join(names.values())}" if names else "",
        f"negative: {common.negative}" if common.negative else "",
        "all pictures of a seed begin with the same noise; the number under a picture is its mean difference to the "
        "base, in levels of 255",
    ]
    tables = "".join(_table(grid, z, files) for z in range(len(grid.labels[2])))
    return Template(_TEMPLATE.read_text("utf-8")).substitute(
        title=escape(grid.request.name or prompt or "Grid"),
        about=escape("; ".join(part for part in about if part) + "."),
        side=min(_SIDE, max(64, first.width * 2)),
        ratio=f"{first.width / first.height:.4f}",
        rendering="pixelated" if first.width < _SMALL else "auto",
        tables=tables,
    )


def _table(grid: Grid, z: int, files: Mapping[str, str]) -> str:
    columns, rows, sheets = grid.labels
    cells = {cell.place: cell for cell in grid.cells}
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(row)}</th>'
        + "".join(_cell(grid, cells[x, y, z], files) for x in range(len(columns)))
        + "</tr>"
        for y, row in enumerate(rows)
    )
    title = f"<h2>{escape(sheets[z])}</h2>" if sheets[z] else ""
    return f'{title}<div class="box"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(grid: Grid, cell: Cell, files: Mapping[str, str]) -> str:
    if cell.picture is None:
        return '<td><div class="none">not drawn</div></td>'
    x, y, z = cell.place
    said = " · ".join(label for label in (grid.labels[0][x], grid.labels[1][y], grid.labels[2][z]) if label)
    picture = cell.picture
    number, base = "", ""
    if (found := cell.difference) is not None:
        number = f"{found.mean:.2f}" if found.changed else '<span class="same">0: the base</span>'
        said += f" · difference {found.mean:.3f}, largest {found.largest}, {found.changed:.1%} of pixels"
    if cell.base is not None and (other := grid.cells[cell.base].picture) is not None:
        base = f' data-base="{escape(files[other.id])}"'
    return (
        f'<td><button data-at="{x},{y},{z}" data-said="{escape(said)}"{base}><img loading="lazy" '
        f'src="{escape(files[picture.id])}" width="{picture.width}" height="{picture.height}" alt="{escape(said)}">'
        f"</button>{number}</td>"
    )


def _file(cell: Cell) -> str:
    x, y, z = cell.place
    return f"pictures/x{x:03}-y{y:03}-z{z:03}.png"


def _axis(grid: Grid, kind: str) -> bool:
    return any(axis is not None and axis.kind == kind for axis in (grid.request.x, grid.request.y, grid.request.z))
