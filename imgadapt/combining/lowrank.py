"""Low-rank sums: exact concatenation, and the best approximation of a lower rank without a dense matrix.

B = Q_b R_b and Aᵀ = Q_a R_a make the singular values of B A those of the small R_b R_aᵀ: the result is the best of its
rank (Eckart and Young 1936), for O((out + in) r² + r³) operations instead of O(out in min(out, in)).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from imgadapt.combining.terms import Dense, Kron, Pair, Term, gram
from imgadapt.combining.threads import in_order

_OVER = 16  # how many more than asked a randomised factorisation looks for
_PASSES = 3
_TALL, _WIDE = 256, 2048  # blocks of dense matrices

Result = TypeVar("Result")


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a change, largest first, fp64, and what turns the first few of them into factors.

    left @ u (out, k) and vt @ right (k, fan_in) are the singular vectors; left and right None: u and vt are they.
    rest: the sum of squares of what the values leave out (a randomised factorisation finds the first ones only).
    """

    values: Tensor
    u: Tensor
    vt: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    rest: float = 0.0

    @property
    def energy(self) -> float:
        """The squared Frobenius norm of the change."""
        return float((self.values**2).sum()) + self.rest

    def residual(self, rank: int) -> float:
        """Relative Frobenius norm of what the best approximation of this rank leaves out."""
        left_out = float((self.values[rank:] ** 2).sum()) + self.rest
        return (left_out / self.energy) ** 0.5 if self.energy > 0 else 0.0

    def truncated(self, rank: int) -> Pair:
        """The best approximation of a rank: singular values shared evenly by both factors, fp32. The sign of each
        column of up is that its largest element is positive: it does not depend on how it was found.
        """
        rank = max(1, min(rank, len(self.values)))
        root = self.values[:rank].sqrt()
        u, vt = (self.u[:, :rank] * root).float(), (root[:, None] * self.vt[:rank]).float()
        up = u if self.left is None else self.left @ u
        down = vt if self.right is None else vt @ self.right
        sign = torch.gather(up, 0, up.abs().argmax(0, keepdim=True)).sign()
        sign = torch.where(sign == 0, torch.ones_like(sign), sign)
        return Pair(up * sign, down * sign.t())


def concat(terms: Sequence[Term]) -> Pair:
    """The sum as one pair, exactly; its rank is the sum of theirs. Both factors of each get the same norm."""
    pairs = [balanced(term.as_pair()) for term in terms]
    if len(pairs) == 1:
        return pairs[0]
    return Pair(torch.cat([pair.up for pair in pairs], 1), torch.cat([pair.down for pair in pairs]))


def balanced(pair: Pair) -> Pair:
    """The same change with factors of one Frobenius norm, a power of two apart at most, so that no digit is lost."""
    up, down = (float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (pair.up, pair.down))
    if not (up > 0 and down > 0):
        return pair
    factor = 2.0 ** round(float(torch.log2(torch.tensor(down / up, dtype=torch.float64))) / 2)
    return Pair(pair.up * factor, pair.down / factor)


def spectrum(terms: Sequence[Term], rank: int | None = None, *, vectors: bool = True, workers: int = 1) -> Spectrum:
    """Of the sum of terms. rank: how many values are wanted, if not all: where the change is of nearly full rank, these
    are found by random projections (arXiv 0909.4061, seeded), to a few parts in a thousand; elsewhere exactly.

    vectors: whether they are wanted, too; without them nothing of the change's size is made, nor kept.
    workers: threads, which change no bit.
    """
    if len(terms) == 1 and isinstance(terms[0], Kron):
        return _of_kron(terms[0], vectors)
    shape, total = terms[0].shape, sum(term.rank for term in terms)
    if vectors and rank is not None and total > min(shape) // 2 and 2 * (rank + _OVER) < min(shape):
        return _projected(terms, rank + _OVER, workers)
    if total >= min(shape):
        whole = terms[0] if len(terms) == 1 else None
        if not isinstance(whole, Dense):
            whole = Dense(sum(term.rows(0, shape[0]) for term in terms[1:]) + terms[0].rows(0, shape[0]))
        return _exactly(whole, (min(shape) if rank is None else rank) if vectors else 0, workers)
    pair = concat(terms)
    left, core_up = torch.linalg.qr(pair.up)
    right, core_down = torch.linalg.qr(pair.down.t())
    core = core_up.double() @ core_down.double().t()
    if not vectors:
        return _bare(torch.linalg.svdvals(core), shape)
    u, s, vt = torch.linalg.svd(core)
    return Spectrum(s, u, vt, left, right.t())


def _bare(values: Tensor, shape: tuple[int, int]) -> Spectrum:
    """Without vectors."""
    return Spectrum(values, torch.empty(shape[0], 0), torch.empty(0, shape[1]))


def _exactly(term: Dense, count: int, workers: int) -> Spectrum:
    """All values of a dense change and so many vectors, from the products of its rows (or columns, if they are fewer)
    in fp64: values are exact to 1e-8 of the first one, and there is no copy of the change.
    """
    flat = term.values.shape[0] <= term.values.shape[1]
    values = term.values if flat else term.values.t()
    products = _products(values, workers)
    if count == 0:
        found = torch.linalg.eigvalsh(products).flip(0).clamp(min=0).sqrt() * abs(term.factor)
        return _bare(found, term.shape)
    squares, u = torch.linalg.eigh(products)
    found = squares.flip(0).clamp(min=0).sqrt() * abs(term.factor)
    u = u.flip(1)[:, :count].float()
    vt = torch.empty(u.shape[1], values.shape[1])
    for k in range(0, values.shape[1], _WIDE):
        torch.mm(u.t(), values[:, k : k + _WIDE].float(), out=vt[:, k : k + _WIDE])
    tiny = float(found[0]) * 1e-12
    vt *= torch.where(found > tiny, term.factor / found.clamp(min=max(tiny, 1e-300)), 0.0)[:count, None].float()
    return Spectrum(found, u, vt) if flat else Spectrum(found, vt.t(), u.t())


def _products(values: Tensor, workers: int) -> Tensor:
    """values @ valuesᵀ, fp64, block by block."""
    size, wide = values.shape
    made = torch.empty(size, size, dtype=torch.float64)

    def one(block: tuple[int, int]) -> None:
        a, b = (slice(k, k + _TALL) for k in block)
        made[a, b] = 0
        for k in range(0, wide, _WIDE):
            made[a, b] += values[a, k : k + _WIDE].double() @ values[b, k : k + _WIDE].double().t()

    blocks = [(a, b) for a in range(0, size, _TALL) for b in range(a, size, _TALL)]
    for _ in in_order(one, blocks, workers) if workers > 1 else map(one, blocks):
        pass
    return made.triu() + made.triu(1).t()


def _of_kron(term: Kron, vectors: bool) -> Spectrum:
    """Singular values of a Kronecker product are the products of those of its factors."""
    if not vectors:
        first, second = (torch.linalg.svdvals(w.double()) for w in (term.first, term.second))
        return _bare((first[:, None] * second).flatten().sort(descending=True).values, term.shape)
    (u1, s1, v1), (u2, s2, v2) = (torch.linalg.svd(w.double(), full_matrices=False) for w in (term.first, term.second))
    values, order = (s1[:, None] * s2[None]).flatten().sort(descending=True, stable=True)
    i, j = order // len(s2), order % len(s2)
    u = (u1[:, i][:, None] * u2[:, j][None]).flatten(0, 1)
    vt = (v1[i][:, :, None] * v2[j][:, None]).flatten(1)
    return Spectrum(values, u, vt)


def _projected(terms: Sequence[Term], size: int, workers: int) -> Spectrum:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(terms[0].shape[1], size, generator=generator)
    q = torch.empty(0)
    for k in range(_PASSES):
        q, _ = torch.linalg.qr(_sum([_times(term, x, workers) for term in terms]))
        if k < _PASSES - 1:
            x, _ = torch.linalg.qr(_sum([_under(term, q, workers) for term in terms]).t())
    small = _sum([_under(term, q, workers) for term in terms])  # (size, fan_in)
    right, r = torch.linalg.qr(small.t())
    u, s, vt = torch.linalg.svd(r.double().t())
    energy = float(gram(terms).sum())
    return Spectrum(s, u, vt, q, right.t(), max(0.0, energy - float((s**2).sum())))


def _times(term: Term, x: Tensor, workers: int) -> Tensor:
    """term @ x; of a dense one by blocks of rows: threads change no bit, other dtypes are not copied whole."""
    if not isinstance(term, Dense):
        return term.times(x)
    made = torch.empty(term.shape[0], x.shape[1])

    def one(k: int) -> None:
        torch.mm(term.values[k : k + _TALL].float(), x, out=made[k : k + _TALL])

    for _ in _blocks(one, term, workers):
        pass
    return made * term.factor


def _under(term: Term, x: Tensor, workers: int) -> Tensor:
    """xᵀ @ term."""
    if not isinstance(term, Dense):
        return term.under(x)
    made = torch.zeros(x.shape[1], term.shape[1])
    for part in _blocks(lambda k: x[k : k + _TALL].t() @ term.values[k : k + _TALL].float(), term, workers):
        made += part
    return made * term.factor


def _blocks(work: Callable[[int], Result], term: Dense, workers: int) -> Iterator[Result]:
    firsts = range(0, term.shape[0], _TALL)
    return in_order(work, firsts, workers) if workers > 1 else map(work, firsts)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
