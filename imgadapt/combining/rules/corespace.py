"""Core space (arXiv 2509.17786): the bases that changes of low rank share, and each as a small matrix in them.

Each change is taken by its singular value decomposition first, so the bases depend on the changes alone and not on how
they are written as factors: rules that look at each element then give the same for the same changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imgadapt.combining.terms import Pair

_NOTHING = 1e-6  # of the largest singular value: rounding of fp32 factors


@dataclass(frozen=True)
class Canonical:
    """A change by its singular values, u (out, r), s (r,), vt (r, fan_in), those that are not zero; fp64."""

    u: Tensor
    s: Tensor
    vt: Tensor

    def first(self, share: float) -> "Canonical":
        """The largest, so many of all, one at least."""
        count = max(1, round(share * len(self.s)))
        return Canonical(self.u[:, :count], self.s[:count], self.vt[:count])


@dataclass(frozen=True)
class Frame:
    """left (out, R), right (R', fan_in): orthonormal bases of all changes; cores (R, R'): left @ core @ right is each
    change, exactly. Basis vectors are ordered by how much of the changes they carry. ranks: of the changes. fp64.
    """

    left: Tensor
    right: Tensor
    cores: tuple[Tensor, ...]
    ranks: tuple[int, ...]

    def lifted(self, core: Tensor) -> Pair:
        """left @ core @ right, fp32; through the thinner side."""
        if not self.left.shape[1]:
            return Pair(torch.zeros(self.left.shape[0], 1), torch.zeros(1, self.right.shape[1]))
        core = core.double()
        if core.shape[0] <= core.shape[1]:
            return Pair(self.left.float(), (core @ self.right).float())
        return Pair((self.left @ core).float(), self.right.float())


def canonical(pair: Pair) -> Canonical:
    """Of up @ down."""
    left, up = torch.linalg.qr(pair.up.double())
    right, down = torch.linalg.qr(pair.down.double().t())
    u, s, vt = torch.linalg.svd(up @ down.t(), full_matrices=False)
    count = int((s > _NOTHING * s[:1]).sum())
    u, vt = left @ u[:, :count], vt[:count] @ right.t()
    sign = _signs(u)
    return Canonical(u * sign, s[:count], vt * sign[:, None])


def frame(pairs: Sequence[Pair]) -> Frame:
    """The bases are the singular vectors of all factors u √s side by side, and of all √s vt."""
    own = [canonical(pair) for pair in pairs]
    left = basis(torch.cat([c.u * c.s.sqrt() for c in own], 1))
    right = basis(torch.cat([c.vt * c.s.sqrt()[:, None] for c in own]).t()).t()
    cores = tuple(((left.t() @ c.u) * c.s) @ (c.vt @ right.t()) for c in own)
    if not left.shape[1]:  # all of them are zero
        cores = tuple(torch.zeros(1, 1, dtype=torch.float64) for _ in own)
    return Frame(left, right, cores, tuple(len(c.s) for c in own))


def basis(columns: Tensor) -> Tensor:
    """Left singular vectors, the first first; where a value is zero there is none."""
    q, r = torch.linalg.qr(columns)
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    u = q @ u[:, : int((s > _NOTHING * s[:1]).sum())]
    return u * _signs(u)


def polar(columns: Tensor) -> Tensor:
    """The nearest columns that are orthonormal, U (UᵀU)^-½; where they depend on each other, by its pseudoinverse."""
    q, r = torch.linalg.qr(columns)
    u, s, vt = torch.linalg.svd(r, full_matrices=False)
    count = int((s > _NOTHING * s[:1]).sum())
    return q @ (u[:, :count] @ vt[:count])


def _signs(columns: Tensor) -> Tensor:
    """What makes the largest element of each column positive."""
    if not columns.shape[1]:
        return torch.ones(0, dtype=columns.dtype)
    largest = torch.gather(columns, 0, columns.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(columns.dtype)
