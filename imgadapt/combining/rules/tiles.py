"""Tiles: dense changes in blocks of rows, made from their factors again each time; exact thresholds over them.

A tile's size depends on the width of the matrix only. Products of matrices may round otherwise in blocks of another
height, so it is no setting: what may vary is how many tiles are in flight.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from imgadapt.combining.terms import Term
from imgadapt.combining.threads import in_order

Result = TypeVar("Result")

_ELEMENTS = 2**18  # a megabyte: several of them stay in a core's cache
_LOW = 15  # bits of a magnitude below the coarse histogram's 16
_NONE, _ALL = 2**31 - 1, -1


def height(columns: int) -> int:
    """Rows of a tile."""
    return max(1, _ELEMENTS // max(1, columns))


def spans(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 row of each tile."""
    step = height(columns)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def over(work: Callable[[int, int], Result], rows: int, columns: int, workers: int) -> Iterator[Result]:
    """work(first row, last + 1) of every tile, in order; so many at a time, each in one thread."""
    if workers < 2 or rows <= height(columns):
        for start, stop in spans(rows, columns):
            yield work(start, stop)
    else:
        yield from in_order(lambda span: work(*span), spans(rows, columns), workers)


@dataclass(frozen=True)
class Source:
    """One tensor of one adapter's change. who: which adapter; digest: of it; name: the layer's, or layer + ".bias"."""

    who: int
    digest: str
    name: str
    term: Term

    @property
    def key(self) -> tuple[int, str]:
        return self.who, self.name

    def over(self, work: Callable[[Tensor], Result], workers: int) -> Iterator[Result]:
        """work of every tile's values, in order."""
        return over(lambda start, stop: work(self.term.rows(start, stop)), *self.term.shape, workers)


@dataclass(frozen=True)
class Cut:
    """The largest elements of a tensor: those whose magnitude is above `bits` (of an fp32), and of those that equal it
    the first ones: `equal` of each tile, or all of them, or none.
    """

    bits: int
    equal: tuple[int, ...]

    def keeps(self, values: Tensor, start: int) -> Tensor:
        """(rows, columns), bool; start: the tile's first row."""
        found = magnitude(values)
        first = self.equal[0 if len(self.equal) == 1 else start // height(values.shape[1])]
        if first == _ALL:
            return found >= self.bits
        keep = found > self.bits
        if first:
            keep.view(-1)[(found == self.bits).flatten().nonzero()[:first, 0]] = True
        return keep


def magnitude(values: Tensor) -> Tensor:
    """|values| as whole numbers of the same order: their 31 bits, int32. NaN is above infinity."""
    return values.contiguous().view(torch.int32) & 0x7FFFFFFF


Cuts = Mapping[tuple[int, str], Sequence[Cut]]


def largest(
    sources: Callable[[], Iterable[Source]],
    group: Callable[[Source], Hashable],
    counts: Callable[[int], Sequence[int]],
    workers: int,
) -> Cuts:
    """Where the n largest of each group of tensors are, exactly: tensor -> a cut for each n. Elements of one magnitude
    are taken in the order of the sources, and of a tensor's elements.

    sources: gives them anew for each of two or three passes. counts: elements of a group -> each n. No sort, no dense
    matrix: the bits of an fp32's magnitude sort as it does, so a histogram of the upper 16 finds the bin of the n-th,
    and one of the lower 15 within the bin the number itself.
    """
    coarse: dict[Hashable, Tensor] = {}
    for source in sources():
        found = source.over(lambda v: torch.bincount((magnitude(v) >> _LOW).flatten(), minlength=2**16), workers)
        _add(coarse, group(source), found)
    wanted = {key: counts(int(total.sum())) for key, total in coarse.items()}
    bins = {key: [_where(coarse[key], n) for n in wanted[key]] for key in coarse}
    fine: dict[Hashable, Tensor] = {}
    for source in sources():
        for b in {b for b, _ in bins[group(source)] if b is not None}:
            _add(fine, (group(source), b), source.over(lambda v, b=b: _within(v, b), workers))
    edges = {key: [_edge(fine, key, b, left) for b, left in bins[key]] for key in coarse}
    shares = _shares(sources, group, edges, workers)
    return {
        source.key: [
            Cut(bits, shares.get((source.key, k), (_ALL if left == there else 0,)))
            for k, (bits, left, there) in enumerate(edges[group(source)])
        ]
        for source in sources()
    }


def _add(totals: dict[Hashable, Tensor], key: Hashable, found: Iterable[Tensor]) -> None:
    for counted in found:
        totals[key] = totals[key] + counted if key in totals else counted


def _within(values: Tensor, b: int) -> Tensor:
    found = magnitude(values).flatten()
    return torch.bincount(found[found >> _LOW == b] & (2**_LOW - 1), minlength=2**_LOW)


def _where(histogram: Tensor, n: int) -> tuple[int | None, int]:
    """The bin of the n-th largest, and how many of its own are among them; None: there are none."""
    if n < 1:
        return None, 0
    above = histogram.flip(0).cumsum(0)
    k = int(torch.searchsorted(above, n))  # the first that reaches it
    return len(histogram) - 1 - k, n - (int(above[k - 1]) if k else 0)


def _edge(fine: Mapping[Hashable, Tensor], key: Hashable, b: int | None, left: int) -> tuple[int, int, int]:
    """The n-th largest's bits, how many that equal it are taken, and how many there are."""
    if b is None:
        return _NONE, 0, 0
    low, left = _where(fine[key, b], left)
    assert low is not None
    return b << _LOW | low, left, int(fine[key, b][low])


def _shares(
    sources: Callable[[], Iterable[Source]],
    group: Callable[[Source], Hashable],
    edges: Mapping[Hashable, Sequence[tuple[int, int, int]]],
    workers: int,
) -> dict[tuple[tuple[int, str], int], tuple[int, ...]]:
    """(Tensor, cut) -> how many equal to the edge are taken in each tile, where some are and some are not."""
    rest = {(key, k): left for key, own in edges.items() for k, (_, left, there) in enumerate(own) if 0 < left < there}
    made: dict[tuple[tuple[int, str], int], tuple[int, ...]] = {}
    for source in sources() if rest else ():
        for k, (bits, _, _) in enumerate(edges[group(source)]):
            if (group(source), k) not in rest:
                continue
            there = list(source.over(lambda v, bits=bits: int((magnitude(v) == bits).sum()), workers))
            left = rest[group(source), k]
            taken = [
                min(n, max(0, left - before)) for n, before in zip(there, accumulate(there, initial=0), strict=False)
            ]
            rest[group(source), k] = left - sum(taken)
            made[source.key, k] = tuple(taken)
    return made
