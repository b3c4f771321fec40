"""A sparse matrix of trained values between two fixed transforms: what FourierFT, WaveFT and SHiRA are made of."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from imgadapt.errors import ConfigError, ShapeError
from imgadapt.methods.base import Method, Tensors, Way, above_zero, positive
from imgadapt.sites import Site


@dataclass(frozen=True)
class Basis:
    """Coefficients of vectors of `size` numbers in a fixed basis; this one is that of the vectors themselves."""

    size: int

    @property
    def count(self) -> int:
        """How many coefficients there are."""
        return self.size

    def analyse(self, x: Tensor) -> Tensor:
        """The coefficients A x of x (tokens, size), as (count, tokens)."""
        return x.t().contiguous()

    def synthesise(self, u: Tensor) -> Tensor:
        """Aᵀ u of u (count, tokens), whose rows were multiplied by `once`, as (tokens, size)."""
        return u.t()

    def once(self, values: Tensor, rows: Tensor) -> Tensor:
        """Values times what those of their rows are to be multiplied by before `synthesise`."""
        return values


def check_scaling(scaling: float) -> None:
    """Raises ConfigError unless it is a finite number above 0."""
    if scaling is None:  # pyright: ignore[reportUnnecessaryComparison] # a file may say anything
        raise ConfigError("scaling is None; it must be a finite number above 0")
    above_zero("scaling", scaling, "none")


def check_seed(seed: int) -> None:
    """Raises ConfigError unless it is a whole number that torch.Generator takes."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ConfigError(f"seed is {seed!r}; it must be a whole number of 64 bits")


@lru_cache(maxsize=64)
def drawn(seed: int, size: int, count: int) -> Tensor:
    """`count` of `size` places without repetition, as peft draws them."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed), device="cpu")[:count].clone()


def indices(rows: Tensor, columns: Tensor, into: Basis, out: Basis) -> tuple[Tensor, dict[str, Tensor]]:
    """(what sorts the entries of a sparse matrix, at rows[k], columns[k], by row; both ways through them, sorted).

    columns: the entries'; row_starts: where each row begins; of_row: each entry's row.
    flip: sorts them by column; rows: theirs then; column_starts: where each column begins.
    """
    order = torch.argsort(rows, stable=True)
    rows, columns = rows[order], columns[order]
    flip = torch.argsort(columns, stable=True)
    return order, {
        "columns": columns,
        "row_starts": torch.searchsorted(rows, torch.arange(out.count, device="cpu")),
        "of_row": rows,
        "flip": flip,
        "rows": rows[flip],
        "column_starts": torch.searchsorted(columns[flip], torch.arange(into.count, device="cpu")),
    }


_NAMES = ("columns", "row_starts", "of_row", "flip", "rows", "column_starts")


def operands(values: Tensor, t: Tensors) -> Tensors:
    """What `act` works with; values (n,), sorted."""
    return {"values": values, **{name: t[name] for name in _NAMES}}


def way(site: Site, entries: int) -> Way:
    """Through the entries where that is cheaper than the gradient of a delta, one product of the weight's size: a
    sparse multiply-add, of which each entry takes three for a token, lasts as long as some thirty of a product's.
    """
    moved = any(n != 1 for n in site.stride) or (not isinstance(site.padding, str) and any(site.padding))
    cheap = site.pointwise and not moved and 96 * entries <= math.prod(site.shape)
    return Way(act=True, input=True, linear=("values",)) if cheap else Way()


def act(o: Tensors, site: Site, x: Tensor, onto: Tensor | None, into: Basis, out: Basis) -> Tensor:
    """Aᵀ S B x, with S of these operands, B of `into` and A of `out`; added to `onto` where given."""
    channels = -1 if site.kind == "linear" else 1
    x = x.movedim(channels, -1)
    flat = x.reshape(-1, into.size)
    given = (flat, o["values"], *(o[name] for name in _NAMES), into, out)
    # dynamo makes an instance of a Function, and torch warns of it; a compiler decides itself what is kept
    change: Any = _through(*given) if torch.compiler.is_compiling() else _Product.apply(*given)
    change = change.view(*x.shape[:-1], out.size).movedim(-1, channels)
    return change.to(o["values"].dtype) if onto is None else onto + change.to(onto.dtype)


def _through(x: Tensor, values: Tensor, *rest: Any) -> Tensor:
    columns, row_starts, of_row, *_, into, out = rest
    return out.synthesise(_times(into.analyse(x), out.once(values, of_row), columns, row_starts)).to(x.dtype)


class _Product(Function):
    """Keeps nothing but x, in its own dtype: its coefficients are made anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(x, values, *rest[:-2])
        ctx.bases = rest[-2:]
        return _through(x, values, *rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, values, columns, row_starts, of_row, flip, rows, column_starts = ctx.saved_tensors
        into, out = ctx.bases
        g, dx, dv = out.analyse(grads[0]), None, None
        if ctx.needs_input_grad[0]:
            values = into.once(values, columns)[flip]
            dx = into.synthesise(_times(g, values, rows, column_starts)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dots: Any = torch.ops.aten._embedding_bag_per_sample_weights_backward
            dv = dots(g, into.analyse(x), columns, row_starts, of_row, 0)
        return dx, dv, *(None for _ in range(len(_NAMES) + 2))


def _times(u: Tensor, values: Tensor, columns: Tensor, row_starts: Tensor) -> Tensor:
    """S u of u (columns, tokens): for each row of S a bag of u's rows, each times its value."""
    return F.embedding_bag(columns, u, row_starts, mode="sum", per_sample_weights=values.to(u.dtype))


class ByScaling(Method):
    """Methods whose delta is multiplied by a number of their own, and not by one over a rank."""

    scaling: float

    @property
    def scale(self) -> float:
        return self.scaling

    @property
    def file_alpha(self) -> float:
        return self.scaling

    def unscaled(self) -> Self:
        return replace(self, scaling=1.0)


class Spectrum(ByScaling):
    """n_frequency trained entries of a transform of the delta, at places from a seed: one vector, `tensors[0]` (n,)."""

    n_frequency: int
    scaling: float
    seed: int

    def __post_init__(self) -> None:
        positive("n_frequency", self.n_frequency)
        check_scaling(self.scaling)
        check_seed(self.seed)

    def at(self, site: Site) -> Self:
        return replace(self, n_frequency=min(self.n_frequency, math.prod(site.shape)))

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {self.tensors[0]: (self.n_frequency,)}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        return {self.tensors[0]: torch.zeros(self.n_frequency)}

    @property
    def constant_names(self) -> frozenset[str]:
        return frozenset({"places"})

    def fits(self, t: Tensors, site: Site) -> str | None:
        size = math.prod(site.shape)
        most = f"{self.tensors[0]} is of {self.n_frequency} entries, and this layer has {size}"
        return super().fits(t, site) or (most if self.n_frequency > size else None)

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        entries: Any = t[cls.tensors[0]]
        if entries.ndim != 1:
            raise ShapeError(f"{cls.tensors[0]} is {tuple(entries.shape)}, wanted (n,)")
        known = {} if alpha is None else {"scaling": alpha}
        return cls(n_frequency=len(entries), **known)  # pyright: ignore[reportCallIssue] # fields of the dataclasses
