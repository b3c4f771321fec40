"""Sizes that pictures of other shapes are trained in, so that a batch is of one size and little is cut off.

The bucket of a picture is the one whose aspect is nearest as a ratio (|log|, as in NovelAI's notes): a difference of
aspects, as kohya's sd-scripts take it (`BucketManager.select_bucket`), favours wide pictures over tall ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from imgadapt.errors import ConfigError, DataError
from imgadapt.training.data import Example

Size = tuple[int, int]  # (width, height), pixels

FULL = 0.85  # least share of the resolution's area that a bucket fills
FURTHER = 0.10  # most share of a picture that is cut off to make a bucket large enough


@dataclass(frozen=True)
class View:
    """An example in one bucket. size: (width, height), pixels."""

    example: Example
    size: Size

    @property
    def enlarged(self) -> float:
        """Factor by which the picture is resized to cover the bucket; above 1 it gets no sharper by that."""
        return max(self.size[0] / self.example.width, self.size[1] / self.example.height)

    @property
    def cut(self) -> float:
        """Share [0, 1) of the picture's area that is cropped away to fit, or of the bucket's that is padded."""
        return 1 - math.exp(-_distance(self.example, self.size))


@dataclass(frozen=True)
class Bucket:
    """What is in one size. entries: pictures, each as often as it repeats; cut: mean share cropped away, [0, 1);
    enlarged: how many of the pictures are smaller than the size."""

    size: Size
    pictures: int
    entries: int
    cut: float
    enlarged: int


def sizes(resolution: int, step: int, ratio: float = 2.0) -> list[Size]:
    """The buckets (width, height) of a resolution, from tall to wide.

    Both sides are multiples of `step`, the area is at most resolution^2 and at least 85 % of it, and width / height is
    within [1 / ratio, ratio]. The largest square is always among them; of those with one aspect only the largest is.

    resolution: side of a square of the wanted area, pixels. step: pixels; 8 times the patch of a model (64 for SD).

    Raises:
        ConfigError: the resolution is smaller than a step, or ratio is below 1.
    """
    if step < 1 or resolution < step:
        raise ConfigError(f"resolution {resolution}: wanted at least {max(step, 1)} pixels, one step of this base")
    if ratio < 1:
        raise ConfigError(f"ratio {ratio}: wanted at least 1 (a square), as width / height of the widest bucket")
    most = resolution**2 // step**2
    side = resolution // step
    largest: dict[Size, Size] = {(1, 1): (side, side)}
    for width in range(1, math.isqrt(math.floor(most * ratio)) + 1):
        for height in range(math.ceil(width / ratio), min(math.floor(width * ratio), most // width) + 1):
            if width * height * step**2 >= FULL * resolution**2:
                shared = math.gcd(width, height)
                aspect = width // shared, height // shared
                largest[aspect] = max(largest.get(aspect, (0, 0)), (width, height))
    made = [(width * step, height * step) for width, height in largest.values()]
    return sorted(made, key=lambda size: (size[0] / size[1], size))


def views(
    examples: Sequence[Example], resolutions: Sequence[int], step: int, *, square: bool = False, batch: int = 1
) -> list[View]:
    """Every example in the nearest bucket of each resolution that it is large enough for.

    All are taken at the smallest resolution, enlarged if need be (`View.enlarged` > 1 says so), and at the others where
    they are not enlarged. None is dropped. The order is that of the examples, then of the resolutions.

    square: the square bucket only. batch: buckets with fewer entries than this are joined to the nearest other one of
    their resolution, where that cuts at most 10 % more off each picture and makes none larger than it was taken; 1: no.

    Raises:
        ConfigError: there is no resolution, or as in `sizes`.
        DataError: there are no examples.
    """
    if not examples:
        raise DataError("no pictures: there is nothing to put into buckets")
    if not resolutions:
        raise ConfigError("resolution: wanted one or more, in pixels; got none")
    taken: dict[tuple[int, Size], View] = {}
    for place, resolution in enumerate(sorted(set(resolutions))):
        legal = sizes(resolution, step, 1.0 if square else 2.0)
        nearest = {k: View(example, _nearest(example, legal)) for k, example in enumerate(examples)}
        if place:
            nearest = {k: view for k, view in nearest.items() if view.enlarged <= 1}
        for k, view in _joined(nearest, batch).items():
            taken.setdefault((k, view.size), view)  # two resolutions may share a size
    return [view for _, view in sorted(taken.items(), key=lambda item: item[0][0])]


def table(views: Sequence[View]) -> list[Bucket]:
    """What is in each size, from tall to wide."""
    rows: list[Bucket] = []
    for size, members in sorted(_grouped(views).items(), key=lambda item: (item[0][0] / item[0][1], item[0])):
        cut = sum(view.cut for view in members) / len(members)
        rows.append(Bucket(size, len(members), _entries(members), cut, sum(view.enlarged > 1 for view in members)))
    return rows


def describe(views: Sequence[View]) -> str:
    """The table as text, a line a size."""
    lines = [f"{'size':>11}  pictures  with repeats  cut off"]
    for row in table(views):
        size = f"{row.size[0]} x {row.size[1]}"
        line = f"{size:>11}  {row.pictures:8d}  {row.entries:12d}  {row.cut:7.1%}"
        lines.append(line + (f"  ({row.enlarged} enlarged)" if row.enlarged else ""))
    return "\n".join(lines)


def _distance(example: Example, size: Size) -> float:
    return abs(math.log(example.width * size[1] / (example.height * size[0])))


def _nearest(example: Example, legal: Sequence[Size]) -> Size:
    # rounded, so that a tall picture and the same one lying take buckets of one shape
    return min(legal, key=lambda size: (round(_distance(example, size), 9), -size[0] * size[1], size))


def _grouped(views: Sequence[View]) -> dict[Size, list[View]]:
    groups: dict[Size, list[View]] = {}
    for view in views:
        groups.setdefault(view.size, []).append(view)
    return groups


def _entries(members: Sequence[View]) -> int:
    return sum(view.example.repeats for view in members)


def _joined(placed: Mapping[int, View], batch: int) -> dict[int, View]:
    """The same examples with the smallest buckets joined to others, until each is large enough or joins none."""
    made = dict(placed)
    while True:
        groups = _grouped(list(made.values()))
        small = sorted((_entries(members), size) for size, members in groups.items() if _entries(members) < batch)
        moves = ((size, other) for _, size in small for other in _by_distance(size, list(groups)))
        move = next((m for m in moves if all(_bearable(view, m[1]) for view in groups[m[0]])), None)
        if move is None:
            return made
        made = {k: View(view.example, move[1]) if view.size == move[0] else view for k, view in made.items()}


def _by_distance(size: Size, others: Sequence[Size]) -> list[Size]:
    aspect = size[0] / size[1]
    return sorted((s for s in others if s != size), key=lambda s: (abs(math.log(aspect * s[1] / s[0])), s))


def _bearable(view: View, size: Size) -> bool:
    moved = View(view.example, size)
    return moved.cut - view.cut <= FURTHER and (moved.enlarged <= 1 or view.enlarged > 1)
