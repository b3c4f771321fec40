"""Boxes: the pieces of HTML that tables, charts and strips stand in. What is called `inner` is HTML, all else text."""

from collections.abc import Iterable

from imgadapt_ui.parts import text


def scroll(name: str, inner: str) -> str:
    """A box that scrolls sideways by itself, by keyboard too, so that the page does not."""
    return f'<div class="lab-scroll" tabindex="0" role="region" aria-label="{text(name)}">{inner}</div>'


def figure(caption: str, inner: str, look: str = "") -> str:
    """Something with a title over it."""
    return f'<figure class="{look}"><figcaption>{text(caption)}</figcaption>{inner}</figure>'


def side(figures: Iterable[str]) -> str:
    """Figures side by side, as many as there is room for."""
    return f'<div class="lab-side">{"".join(figures)}</div>'


def more(name: str, inner: str, *, shut: bool = True) -> str:
    """What is shown when it is asked for."""
    return f'<details class="lab-more"{"" if shut else " open"}><summary>{text(name)}</summary>{inner}</details>'


def note(said: str, look: str = "note") -> str:
    """A line that stands out. look: good, note, warn, bad."""
    return f'<p class="lab-note lab-{look}">{text(said)}</p>' if said else ""


def label(name: str) -> str:
    """A row's or column's name, cut where it is long, whole when it is pointed at."""
    return f'<span class="lab-label" title="{text(name)}">{text(name)}</span>'


def heads(names: Iterable[str]) -> str:
    """Cells of a table's head."""
    return "".join(f'<th scope="col">{label(name)}</th>' for name in names)


def row(name: str, cells: str) -> str:
    """A row of a table. cells: HTML."""
    return f'<tr><th scope="row">{label(name)}</th>{cells}</tr>'


def table(look: str, head: str, rows: Iterable[str]) -> str:
    """A table of rows. head, rows: HTML."""
    return f'<table class="{look}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
