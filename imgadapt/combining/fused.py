"""Fused layers merged as one: where a tool's files have q, k and v as one layer, its result has one rank, not three.

Each of our layers cut for itself to rank r would come to 3 r in such a file, most of it zeros.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from imgadapt.arch import Architecture, Slice
from imgadapt.combining.entering import Change
from imgadapt.combining.terms import Dense, Pair, Term
from imgadapt.formats import Format
from imgadapt.sites import Site


def groups(
    architecture: Architecture | None,
    form: Format | None,
    names: Collection[str],
    alike: Callable[[Sequence[Slice]], bool],
) -> dict[str, tuple[Slice, ...]]:
    """Name of a fused layer of the format -> which of its rows are which of the layers named, in their order there.

    alike: whether layers may be merged as one (their weights are the same, and their sizes the architecture's).
    """
    if architecture is None or form is None or not form.native or architecture.name in form.except_for:
        return {}
    made: dict[str, tuple[Slice, ...]] = {}
    for native, slices in architecture.native.items():
        if native in names:  # a part that only the whole weight can split
            continue
        own = sorted((s for s in slices if s.layer in names), key=lambda s: s.first)
        single = len({s.layer for s in own}) == len(own) and all(s.start == 0 for s in own)
        if len(own) > 1 and single and alike(own):
            made[native] = tuple(own)
    return made


def over(sites: Sequence[Site]) -> Site:
    """The site of layers with the same inputs as one."""
    return replace(sites[0], shape=(sum(site.rows for site in sites), *sites[0].shape[1:]))


def stacked(changes: Sequence[Change | None], sites: Sequence[Site]) -> Change:
    """Changes of layers with the same inputs as one of all their rows; None: it has none there."""
    rows, there = [site.rows for site in sites], [change for change in changes if change is not None]
    zeros = [torch.zeros(n) for n in rows]
    biased = any(change.bias is not None for change in there)
    bias = torch.cat([z if c is None or c.bias is None else c.bias for c, z in zip(changes, zeros, strict=True)])
    return Change(_term([None if c is None else c.term for c in changes], rows), bias if biased else None)


def _term(terms: Sequence[Term | None], rows: Sequence[int]) -> Term:
    there = [term for term in terms if term is not None]
    if any(not isinstance(term, Pair) and term.rank > min(term.shape) // 2 for term in there):
        blank = torch.zeros(1, there[0].shape[1])
        made = [blank.expand(n, -1) if t is None else t.rows(0, n) for t, n in zip(terms, rows, strict=True)]
        return Dense(torch.cat(made))
    pairs = [None if term is None else term.as_pair() for term in terms]
    first = next(pair for pair in pairs if pair is not None)
    if all(pair is None or torch.equal(pair.down, first.down) for pair in pairs):
        rank = first.down.shape[0]
        ups = [torch.zeros(n, rank) if p is None else p.up for p, n in zip(pairs, rows, strict=True)]
        return Pair(torch.cat(ups), first.down)
    ups = [torch.zeros(n, 0) if p is None else p.up for p, n in zip(pairs, rows, strict=True)]
    return Pair(torch.block_diag(*ups), torch.cat([pair.down for pair in pairs if pair is not None]))


Rows = Mapping[str, tuple[list[Term], Tensor | None]]


def split(terms: Sequence[Term], bias: Tensor | None, slices: Sequence[Slice]) -> Rows:
    """Layer -> its rows of a merged fused layer: terms, and the bias."""
    made: dict[str, tuple[list[Term], Tensor | None]] = {}
    start = 0
    for s in slices:
        rows = slice(start, start + s.rows)
        own: list[Term] = [
            Pair(term.up[rows], term.down) if isinstance(term, Pair) else Dense(term.rows(rows.start, rows.stop))
            for term in terms
        ]
        made[s.layer] = own, None if bias is None else bias[rows]
        start += s.rows
    return made
