"""Charts as SVG, from numbers alone; the page's style sheet colours them for light, dark and print."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

MOST = 1500  # dots and corners of a line that a chart has at most


@dataclass(frozen=True)
class Line:
    """A line through (x, y), with a band from low to high around it. look: 1 to 3, a colour of the style sheet."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    look: int = 1


@dataclass(frozen=True)
class Chart:
    """What a chart shows.

    title: said to those who do not see it. dots: faint points (x, y). levels: dashed heights with names. mark: a place
    (x, name). size: of the drawing, in its own units, which are pixels when it is shown as wide as that.
    """

    title: str
    lines: Sequence[Line] = ()
    dots: tuple[Sequence[float], Sequence[float]] = ((), ())
    levels: Sequence[tuple[float, str]] = ()
    mark: tuple[float, str] | None = None
    x_name: str = "step"
    size: tuple[int, int] = (680, 240)


def svg(chart: Chart) -> Markup:
    """The chart as an `<svg>`; dots that are farther off than 1.5 times the span of 90 % of them stand at the edge."""
    (width, height), small = chart.size, chart.size[0] < 400
    named = [line for line in chart.lines if line.name]
    left, right, top, bottom = (40 if small else 58), 10, (20 if named or chart.mark else 8), (20 if small else 36)
    x_low, x_high = _span([x for line in chart.lines for x in line.x] + list(chart.dots[0]))
    y_low, y_high = _heights(chart)

    def px(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def py(y: float) -> float:
        y = min(max(y, y_low), y_high)
        return top + (y_high - y) / (y_high - y_low) * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(chart.title)}" class="chart">']
    for y in ticks(y_low, y_high, height // 36):
        parts.append(f'<path class="grid" d="M{left} {py(y):.1f}H{width - right}"/>')
        parts.append(f'<text x="{left - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in ticks(x_low, x_high, width // 75):
        parts.append(f'<text x="{px(x):.1f}" y="{height - bottom + 15}" text-anchor="middle">{number(x)}</text>')
    if not small:
        parts.append(
            f'<text class="axis" x="{width - right}" y="{height - 4}" text-anchor="end">{escape(chart.x_name)}</text>'
        )
    for y, name in chart.levels:
        parts.append(f'<path class="level" d="M{left} {py(y):.1f}H{width - right}"/>')
        parts.append(
            f'<text class="axis" x="{0.8 * width:.0f}" y="{py(y) + 14:.1f}" text-anchor="end">{escape(name)}</text>'
        )
    if chart.dots[0]:
        points = "".join(f"M{px(x):.1f} {py(y):.1f}h0" for x, y in _thinned(*chart.dots))
        parts.append(f'<path class="dots" d="{points}"/>')
    for line in chart.lines:
        if line.low:
            there = [f"{px(x):.1f} {py(y):.1f}" for x, y in _thinned(line.x, line.high)]
            back = [f"{px(x):.1f} {py(y):.1f}" for x, y in _thinned(line.x, line.low)]
            parts.append(f'<path class="band s{line.look}" d="M{"L".join(there + back[::-1])}Z"/>')
    for line in chart.lines:
        corners = "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in _thinned(line.x, line.y))
        parts.append(f'<path class="line s{line.look}" d="M{corners}"/>')
        if line.low:  # measured at few steps: each can be pointed at
            for x, y, low, high in zip(line.x, line.y, line.low, line.high, strict=True):
                said = f"{line.name}, {chart.x_name} {number(x)}: {number(y)} ({number(low)} to {number(high)})"
                parts.append(
                    f'<circle class="s{line.look}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.5">'
                    f"<title>{escape(said)}</title></circle>"
                )
    if chart.mark:
        x, name = chart.mark
        side = "end" if px(x) > width * 0.7 else "start"
        parts.append(f'<path class="mark" d="M{px(x):.1f} {top}V{height - bottom}"/>')
        parts.append(f'<text class="name" x="{px(x):.1f}" y="{top - 6}" text-anchor="{side}">{escape(name)}</text>')
    parts.extend(_legend(named, left))
    return Markup("".join(parts) + "</svg>")


def _legend(lines: Sequence[Line], left: float) -> Iterator[str]:
    at = left
    for line in lines:
        yield f'<path class="line s{line.look}" d="M{at:.0f} 10h16"/>'
        yield f'<text class="name" x="{at + 21:.0f}" y="14">{escape(line.name)}</text>'
        at += 40 + 6.6 * len(line.name)


def _heights(chart: Chart) -> tuple[float, float]:
    fixed = [y for line in chart.lines for y in (*line.y, *line.low, *line.high)] + [y for y, _ in chart.levels]
    dots = sorted(chart.dots[1])
    if dots:
        low, high = dots[len(dots) // 20], dots[-1 - len(dots) // 20]
        room = 1.5 * (high - low)
        fixed += [y for y in dots if low - room <= y <= high + room]
    low, high = _span(fixed)
    room = 0.04 * (high - low)
    return (low - room if low < 0 or low - room > 0 else low), high + room


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Least and greatest; apart from one another in any case."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    return (low, high) if high > low else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)


def _thinned(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """Every so many of the points, and the last one, without those that are not finite."""
    rows = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    every = -(-len(rows) // MOST) or 1
    kept = rows[::every]
    return kept if not rows or kept[-1] == rows[-1] else [*kept, rows[-1]]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Up to about `count` round numbers from low to high."""
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * k for k in (1, 2, 5, 10) if size * k >= raw * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number as a reader wants it: `0.0123`, `1,200`, `2e-4`."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return text.replace("e-0", "e-").replace("e+0", "e")
