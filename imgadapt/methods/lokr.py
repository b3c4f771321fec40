"""LoKr: a Kronecker product (KronA, arXiv 2212.10650; LyCORIS, arXiv 2309.14859)."""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imgadapt.errors import ConfigError, ShapeError
from imgadapt.methods.base import Method, Tensors, Way, positive
from imgadapt.methods.lora import check_alpha, scale_of
from imgadapt.sites import Site


def split(size: int, factor: int) -> tuple[int, int]:
    """size as (smaller, larger) factors: `factor` where it divides, else the largest divisor below it; -1: the most
    balanced pair (LyCORIS' `factorization`).
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = next(n for n in range(most, 0, -1) if size % n == 0)
    return small, size // small


@dataclass(frozen=True)
class LoKr(Method):
    """delta = kron(w1, w2), with w1 (a, b) and w2 (c, e, *kernel): out = a * c and in / groups = b * e.

    rank: w2 = w2_a (c, rank) @ w2_b (rank, e * kernel); None: w2 full. On a layer where half of w2's larger side is no
        more than the rank, both are full.
    factor: sizes a and b of w1 (see `split`). alpha: as in LoRA, but where both are full there is no rank and the
        scale is 1 (LyCORIS' rule).
    both: w1 = w1_a (a, rank) @ w1_b (rank, b), too, where rank is below half of its larger side.
    tucker: on kernels above 1, w2_a is (rank, c), w2_b (rank, e), with a core t2 (rank, rank, *kernel) between.
    rank_stabilised: alpha / sqrt(rank) instead.

    Raises:
        ConfigError: rank below 1, factor 0 or below -1, alpha not a finite positive number.
    """

    rank: int | None = 8
    alpha: float | None = None
    factor: int = -1
    both: bool = False
    tucker: bool = False
    rank_stabilised: bool = False

    name = "lokr"
    rate_over_lora = 1.8
    tensors = ()
    optional = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        if self.rank is not None:
            positive("rank", self.rank)
        elif self.alpha is not None:
            raise ConfigError(f"alpha is {self.alpha}, but rank None makes both factors full, and alpha has no effect")
        if self.factor != -1:
            positive("factor (or -1)", self.factor)

    @property
    def scale(self) -> float:
        return 1.0 if self.rank is None else scale_of(self.alpha, self.rank, stabilised=self.rank_stabilised)

    @property
    def file_rank(self) -> int | None:
        return self.rank

    @property
    def ranked(self) -> dict[str, int]:
        return {"w2": 0} if self.rank is None else {"w2_b": 0}

    @classmethod
    def recognises(cls, names: set[str]) -> bool:
        first, second = names & {"w1", "w1_a", "w1_b"}, names - {"w1", "w1_a", "w1_b"}
        return first in ({"w1"}, {"w1_a", "w1_b"}) and second in ({"w2"}, {"w2_a", "w2_b"}, {"w2_a", "w2_b", "t2"})

    def at(self, site: Site) -> Self:
        (_, c), (_, e) = split(site.rows, self.factor), split(site.shape[1], self.factor)
        if self.rank is not None and self.rank >= max(c, e) / 2:
            return replace(self, rank=None, alpha=None, both=False, tucker=False)
        return replace(self, tucker=self.tucker and math.prod(site.kernel) > 1)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        (a, c), (b, e) = split(site.rows, self.factor), split(site.shape[1], self.factor)
        r = self.rank
        if r is None:
            return {"w1": (a, b), "w2": (c, e, *site.kernel)}
        first = {"w1_a": (a, r), "w1_b": (r, b)} if self.both and r < max(a, b) / 2 else {"w1": (a, b)}
        if self.tucker:
            return {**first, "t2": (r, r, *site.kernel), "w2_a": (r, c), "w2_b": (r, e)}
        return {**first, "w2_a": (c, r), "w2_b": (r, e * math.prod(site.kernel))}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        made = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        for name in made.keys() - {"w2", "w2_a"}:
            nn.init.kaiming_uniform_(made[name], a=math.sqrt(5))
        return made

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        w1, (c, e) = _first(t), self._second_sizes(t, site)
        w2 = self._second(t, site, c, e)
        made = w1[:, None, :, None, None] * w2.reshape(1, c, 1, e, -1)
        return made.reshape(site.shape)

    def way(self, site: Site) -> Way:
        if site.kind not in ("linear", "conv") or site.groups > 1:
            return Way()  # a lookup and groups have no (b, e) view of their input
        (a, _), (_, e) = split(site.rows, self.factor), split(site.shape[1], self.factor)
        # forward and both gradients in two steps against the one dense gradient of a built delta
        thin = 3 * (a * site.shape[1] + e * site.rows) <= site.rows * site.shape[1]
        return Way(act=True, input=True, linear=("w1",)) if thin or self.rank is not None else Way()

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        made = {name: t[name] for name in ("w2", "w2_a", "w2_b") if name in t}
        if "t2" in t:
            made["w2_a"] = t["w2_a"].t()
            made["w2_b"] = torch.einsum("rs...,se->re...", t["t2"], t["w2_b"])
        return {"w1": _first(t), **made}

    def act(self, o: Tensors, site: Site, x: Tensor, y: Tensor | None, onto: Tensor | None) -> Tensor:
        b = o["w1"].shape[1]
        return self._convolve(o, site, x, b, onto) if site.kind == "conv" else self._multiply(o, x, b, onto)

    def _multiply(self, o: Tensors, x: Tensor, b: int, onto: Tensor | None) -> Tensor:
        """x as (n, b, e): w1 mixes b into a, w2 maps e to c; whichever is thinner goes first."""
        z = x.reshape(-1, b, x.shape[-1] // b)
        if "w2" not in o:
            z = F.linear(z, o["w2_b"])
        z = torch.bmm(o["w1"].expand(len(z), *o["w1"].shape), z)
        last = o["w2"] if "w2" in o else o["w2_a"]
        rows = z.reshape(-1, z.shape[-1])
        if onto is None or not onto.is_contiguous():
            change = F.linear(rows, last).view(*x.shape[:-1], len(o["w1"]) * len(last))
            return change if onto is None else onto + change
        return torch.addmm(onto.reshape(-1, len(last)), rows, last.t()).view(onto.shape)

    def _convolve(self, o: Tensors, site: Site, x: Tensor, b: int, onto: Tensor | None) -> Tensor:
        """The same with b folded into the batch."""
        a, e = len(o["w1"]), x.shape[1] // b
        if "w2" in o:
            z = _mix(o["w1"], x, b).unflatten(1, (a, e)).flatten(0, 1)
            z = site.op(z, o["w2"])
        else:
            thin = o["w2_b"].reshape(len(o["w2_b"]), e, *site.kernel)
            z = site.op(x.unflatten(1, (b, e)).flatten(0, 1), thin)
            z = _mix(o["w1"], z.unflatten(0, (-1, b)).flatten(1, 2), b)
            z = site.mix(z.unflatten(1, (a, -1)).flatten(0, 1), o["w2_a"], None)
        change = z.unflatten(0, (-1, a)).flatten(1, 2)
        return change if onto is None else onto + change

    def _second(self, t: Tensors, site: Site, c: int, e: int) -> Tensor:
        if "w2" in t:
            return t["w2"]
        if "t2" in t:
            return torch.einsum("rs...,rc,se->ce...", t["t2"], t["w2_a"], t["w2_b"])
        return (t["w2_a"] @ t["w2_b"].flatten(1)).reshape(c, e, *site.kernel)

    def _second_sizes(self, t: Tensors, site: Site) -> tuple[int, int]:
        a, b = _first_sizes(t)
        return site.rows // a, site.shape[1] // b

    def fits(self, t: Tensors, site: Site) -> str | None:
        """Any factorisation that multiplies to the layer fits: files have others than `split` gives."""
        if wrong := self._of_kind(site):
            return wrong
        if not self.recognises(set(t)) or any(tensor.ndim < 2 for tensor in t.values()):
            return f"{', '.join(f'{k} {tuple(v.shape)}' for k, v in t.items())} are no two factors"
        ranks = {t[name].shape[0] for name in ("w1_b", "w2_b") if name in t}
        ranks |= {t[name].shape[1] for name in ("w1_a", "w2_a") if name in t and not (name == "w2_a" and "t2" in t)}
        if "t2" in t:
            ranks |= {t["w2_a"].shape[0], *t["t2"].shape[:2]}
        if ranks != {self.rank} - {None}:
            return f"its factors are of rank {', '.join(map(str, ranks)) or 'None'}, and {self} of {self.rank}"
        (a, b), kernel = _first_sizes(t), math.prod(site.kernel)
        shapes = {name: tuple(tensor.shape) for name, tensor in t.items()}
        if "w2" in t:
            c, e, extent = *shapes["w2"][:2], math.prod(shapes["w2"][2:])
        elif "t2" in t:
            c, e, extent = shapes["w2_a"][1], shapes["w2_b"][1], math.prod(shapes["t2"][2:])
        else:
            c, e, extent = shapes["w2_a"][0], math.prod(shapes["w2_b"][1:]) // kernel, kernel
        if (a * c, b * e, extent) != (site.rows, site.shape[1], kernel):
            said = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            return f"{said} make {(a * c, b * e)} with a kernel of {extent}, this layer takes {site.shape}"
        return None

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        if any(tensor.ndim < 2 for tensor in t.values()):
            raise ShapeError("a factor has fewer than 2 dimensions")
        low = next((t[name] for name in ("w2_b", "w1_b") if name in t), None)
        factor = min(_first_sizes(t))
        if low is None:
            return cls(rank=None, factor=factor)
        return cls(rank=low.shape[0], alpha=alpha, factor=factor, both="w1_b" in t, tucker="t2" in t)

    def pair(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        if "w2" in t:
            return None  # of full rank
        w1, (_, e) = _first(t), self._second_sizes(t, site)
        o = self.operands(t, site, None)
        eye = torch.eye(len(w1), dtype=w1.dtype, device=w1.device)
        up = (eye[:, None, :, None] * o["w2_a"][None, :, None]).flatten(2).flatten(0, 1)  # kron, which fails at rank 1
        thin = o["w2_b"].reshape(-1, e, math.prod(site.kernel))
        down = w1[:, None, :, None, None] * thin[None, :, None]
        return up, down.reshape(up.shape[1], -1)


def _first(t: Tensors) -> Tensor:
    return t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]


def _first_sizes(t: Tensors) -> tuple[int, int]:
    return (t["w1"].shape[0], t["w1"].shape[1]) if "w1" in t else (t["w1_a"].shape[0], t["w1_b"].shape[1])


def _mix(w1: Tensor, x: Tensor, b: int) -> Tensor:
    """(batch, b * k, ...) -> (batch, a * k, ...)."""
    k = x.shape[1] // b
    z = torch.bmm(w1.expand(len(x), *w1.shape), x.unflatten(1, (b, k)).flatten(2))
    return z.reshape(len(x), len(w1) * k, *x.shape[2:])
