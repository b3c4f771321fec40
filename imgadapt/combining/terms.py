"""Terms: a change of one weight, as factors wherever there are some, never as a dense matrix unless it is one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Term(Protocol):
    """A change of a weight flattened to (out, fan_in), its scale in it; fp32."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def rank(self) -> int:
        """The most that its rank can be."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start ... stop - 1, (stop - start, fan_in)."""
        ...

    def times(self, x: Tensor) -> Tensor:
        """change @ x; x (fan_in, k)."""
        ...

    def under(self, x: Tensor) -> Tensor:
        """xᵀ @ change; x (out, k)."""
        ...

    def as_pair(self) -> "Pair":
        """The same as a product, exactly."""
        ...

    def scaled(self, factor: float) -> "Term": ...


@dataclass(frozen=True)
class Pair:
    """up @ down; up (out, r), down (r, fan_in)."""

    up: Tensor
    down: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        return min(self.up.shape[1], *self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.up[start:stop] @ self.down

    def times(self, x: Tensor) -> Tensor:
        return self.up @ (self.down @ x)

    def under(self, x: Tensor) -> Tensor:
        return (x.t() @ self.up) @ self.down

    def as_pair(self) -> "Pair":
        return self

    def scaled(self, factor: float) -> "Pair":
        return Pair(self.up * factor, self.down)


@dataclass(frozen=True)
class Kron:
    """kron(first, second): first (a, b), second (c, e * kernel)."""

    first: Tensor
    second: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.first.shape[0] * self.second.shape[0], self.first.shape[1] * self.second.shape[1]

    @property
    def rank(self) -> int:
        return min(self.first.shape) * min(self.second.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        c = self.second.shape[0]
        index = torch.arange(start, stop)
        left, right = self.first[index // c], self.second[index % c]
        return (left[:, :, None] * right[:, None, :]).flatten(1)

    def times(self, x: Tensor) -> Tensor:
        z = x.reshape(self.first.shape[1], self.second.shape[1], -1)
        z = torch.matmul(self.second, z)  # (b, c, k)
        return (self.first @ z.flatten(1)).reshape(self.shape[0], -1)

    def under(self, x: Tensor) -> Tensor:
        return Kron(self.first.t(), self.second.t()).times(x).t()

    def as_pair(self) -> Pair:
        """kron(w1, w2) = kron(w1, 1) kron(1, w2), or kron(1, w2) kron(w1, 1): whichever is thinner."""
        (a, b), (c, e) = self.first.shape, self.second.shape
        if b * c <= a * e:
            return Pair(_kron(self.first, torch.eye(c)), _kron(torch.eye(b), self.second))
        return Pair(_kron(torch.eye(a), self.second), _kron(self.first, torch.eye(e)))

    def scaled(self, factor: float) -> "Kron":
        return Kron(self.first * factor, self.second)


def _kron(first: Tensor, second: Tensor) -> Tensor:
    made = first[:, None, :, None] * second[None, :, None]  # torch.kron fails on some strides
    return made.reshape(len(first) * len(second), -1)


@dataclass(frozen=True)
class Dense:
    """A whole difference, (out, fan_in); read where it lies, in its own dtype, times `factor`."""

    values: Tensor
    factor: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def rank(self) -> int:
        return min(self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop].float() * self.factor

    def times(self, x: Tensor) -> Tensor:
        return self.values.float() @ x * self.factor

    def under(self, x: Tensor) -> Tensor:
        return x.t() @ self.values.float() * self.factor

    def as_pair(self) -> Pair:
        whole, (rows, columns) = self.rows(0, self.shape[0]), self.shape
        return Pair(whole, torch.eye(columns)) if columns <= rows else Pair(torch.eye(rows), whole)

    def scaled(self, factor: float) -> "Dense":
        return Dense(self.values, self.factor * factor)


def inner(a: Term, b: Term) -> float:
    """⟨a, b⟩, the sum of products of their elements, in fp64; without a dense matrix unless one of them is one."""
    if isinstance(a, Kron) and isinstance(b, Kron) and a.first.shape == b.first.shape:
        return float((a.first.double() * b.first.double()).sum() * (a.second.double() * b.second.double()).sum())
    if isinstance(b, Pair):
        left, right = b.up, b.down
        if a is b:
            left, right = left.double(), right.double()
            return float(((left.t() @ left) * (right @ right.t())).sum())
        if isinstance(a, Pair):
            return float(((a.up.double().t() @ left.double()) * (a.down.double() @ right.double().t())).sum())
        return float((a.times(right.t()).double() * left.double()).sum())
    if isinstance(a, Pair):
        return inner(b, a)
    step = max(1, 2**20 // a.shape[1])
    rows = range(0, a.shape[0], step)
    return math.fsum(
        float((a.rows(k, min(k + step, a.shape[0])) * b.rows(k, min(k + step, a.shape[0]))).sum(dtype=torch.float64))
        for k in rows
    )


def gram(terms: Sequence[Term]) -> Tensor:
    """(k, k) of inner products, fp64."""
    made = torch.zeros(len(terms), len(terms), dtype=torch.float64)
    for i, a in enumerate(terms):
        for j, b in enumerate(terms[: i + 1]):
            made[i, j] = made[j, i] = inner(a, b)
    return made
