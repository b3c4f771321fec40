"""PSOFT: a rotation among the weight's largest singular directions (openreview FSHrinMArK, as peft has it)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from imgadapt.errors import ConfigError, FormatError, ShapeError
from imgadapt.methods import rotation
from imgadapt.methods.base import Method, Peft, Tensors, Way, above_zero, linear_only, positive
from imgadapt.methods.lora import too_large
from imgadapt.sites import Site


@dataclass(frozen=True)
class PSOFT(Method):
    """delta = B (R - I) A; A (rank, in / groups, *kernel) and B (out, rank), B A the part of W in its `rank` largest
    singular directions, stay as they are: `psoft_a`, `psoft_b` (huggingface/peft tuners/psoft).

    R = diag(psoft_out) C diag(psoft_in), with C the Cayley transform of `psoft_r` (rank * (rank - 1) / 2,), an upper
    triangle, and the two vectors (rank,), 1 when fresh.

    orthogonal: False: C is `psoft_r` (rank, rank) itself. mag_a, mag_b: whether there are psoft_in, psoft_out.
    symmetric: A and B have half of the singular values each (`pissa_init`), so R is no rotation of what A gives; else
        B has them, and A's rows are orthonormal.
    neumann: terms of peft's polynomial instead of the exact C; 0: exact. constraint: the most that ‖Q‖ is, with it.

    W is read for A and B alone, which a file has: an SVD chooses signs, on which C depends. peft's files are without
    them, and mean those that the SVD here chooses. alpha cancels in peft, and is not here.

    Raises:
        ConfigError: rank below 1, or 2 where orthogonal; neumann not of 0 to 64, or a constraint not above 0.
    """

    rank: int = 32
    orthogonal: bool = True
    mag_a: bool = True
    mag_b: bool = True
    symmetric: bool = False
    neumann: int = 0
    constraint: float | None = None

    name = "psoft"
    rate_over_lora = 0.44
    tensors = ("psoft_r",)
    optional = ("psoft_in", "psoft_out", "psoft_a", "psoft_b")
    frozen = ("psoft_a", "psoft_b")
    starts_from_weight = True
    additive = False

    def __post_init__(self) -> None:
        positive("rank", self.rank)
        if self.orthogonal and self.rank < 2:
            raise ConfigError("rank is 1; one direction turns nowhere")
        if self.neumann != 0:
            positive("neumann (or 0, for the exact rotation)", self.neumann)
            if self.neumann > 64:
                raise ConfigError(f"neumann is {self.neumann}; it is a number of terms, 64 at most (peft has 5)")
        above_zero("constraint", self.constraint, "none")

    def check(self, site: Site) -> str | None:
        return super().check(site) or too_large(self.rank, site)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        r = self.rank
        vectors = {"psoft_in": self.mag_a, "psoft_out": self.mag_b}
        return {
            "psoft_r": (r * (r - 1) // 2,) if self.orthogonal else (r, r),
            **{name: (r,) for name, there in vectors.items() if there},
            "psoft_a": (r, *site.shape[1:]),
            "psoft_b": (site.rows, r),
        }

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        assert weight is not None
        r = torch.zeros(self.rank * (self.rank - 1) // 2) if self.orthogonal else torch.eye(self.rank)
        made = {name: torch.ones(shape) for name, shape in self.shapes(site).items()}
        return {**made, "psoft_r": r, **{name: tensor.cpu() for name, tensor in self._directions(weight).items()}}

    def settled(
        self, t: Tensors, weight: Callable[[], Tensor], bias: Callable[[], Tensor | None]
    ) -> tuple[Method, Tensors]:
        if "psoft_a" in t or "psoft_b" in t:
            return self, t
        own = weight()
        if own.ndim < 2:
            return self, t  # `fits` says what is wrong
        if self.rank > min(own.flatten(1).shape):
            raise ShapeError(f"its rank is {self.rank}, and this layer's weight {tuple(own.shape)}")
        device = t["psoft_r"].device
        return self, {**t, **{name: tensor.to(device) for name, tensor in self._directions(own).items()}}

    def _directions(self, weight: Tensor) -> dict[str, Tensor]:
        u, s, v = torch.linalg.svd(weight.detach().flatten(1).float(), full_matrices=False)
        u, s, v = u[:, : self.rank], s[: self.rank], v[: self.rank]
        if self.symmetric:
            s = s.sqrt()
            v = s[:, None] * v
        return {"psoft_a": v.reshape(-1, *weight.shape[1:]).contiguous(), "psoft_b": (u * s).contiguous()}

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        return (self._up(t) @ t["psoft_a"].flatten(1)).reshape(site.shape)

    def way(self, site: Site) -> Way:
        return Way(pair=True, linear=("up",))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        return {"up": self._up(t), "down": t["psoft_a"]}

    def pair(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        return (self._up(t), t["psoft_a"].flatten(1)) if {"psoft_a", "psoft_b"} <= t.keys() else None

    def _up(self, t: Tensors) -> Tensor:
        """B (R - I)."""
        r = t["psoft_r"]
        if self.orthogonal:
            q = rotation.unpacked(r[None])
            if self.constraint is not None and self.neumann:
                q = rotation.limited_each(q, self.constraint)
            r = (rotation.neumann(q, self.neumann) if self.neumann else rotation.cayley(-q))[0]
        if "psoft_out" in t:
            r = t["psoft_out"][:, None] * r
        if "psoft_in" in t:
            r = r * t["psoft_in"]
        return t["psoft_b"] @ (r - torch.eye(len(r), dtype=r.dtype, device=r.device))

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        shape = tuple(t["psoft_r"].shape)
        rank = shape[0] if len(shape) == 2 else rotation.block_size(shape[0]) if len(shape) == 1 else 0
        if shape not in ((rank, rank), (rank * (rank - 1) // 2,)) or rank < 1:
            raise ShapeError(f"psoft_r is {shape}, wanted (rank, rank) or its upper triangle")
        return cls(rank, len(shape) == 1, "psoft_in" in t, "psoft_out" in t)


_NAMES = {"psoft_R.weight": "psoft_r", "psoft_R.vector_a": "psoft_in", "psoft_R.vector_b": "psoft_out"}


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple[Method, dict[str, Tensor]]:
    made = {_NAMES[name]: tensor for name, tensor in t.items()}
    if "psoft_r" not in made:
        raise FormatError("psoft_R.weight is missing")
    if config.get("psoft_svd", "full") != "full":
        raise FormatError("its directions are of an approximate SVD, from random numbers; wanted psoft_svd='full'")
    start = config.get("ab_svd_init", "psoft_init")
    if start not in ("psoft_init", "pissa_init"):
        raise FormatError(f"ab_svd_init is {start!r}, wanted 'psoft_init' or 'pissa_init'")
    neumann, limit = 0, None
    if config.get("use_cayley_neumann", False):
        neumann, limit = config.get("num_cayley_neumann_terms", 5), config.get("cayley_neumann_eps")
    own = PSOFT.infer(made, None)
    symmetric = start == "pissa_init"
    return PSOFT(own.rank, own.orthogonal, own.mag_a, own.mag_b, symmetric, neumann, limit), made


def _write(method: PSOFT, t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    linear_only(method, shape)
    fields: dict[str, Any] = {
        "r": method.rank,
        "psoft_alpha": method.rank,
        "psoft_orth": method.orthogonal,
        "psoft_mag_a": method.mag_a,
        "psoft_mag_b": method.mag_b,
        "ab_svd_init": "pissa_init" if method.symmetric else "psoft_init",
    }
    if method.neumann:
        fields |= {"use_cayley_neumann": True, "num_cayley_neumann_terms": method.neumann}
        fields |= {} if method.constraint is None else {"cayley_neumann_eps": method.constraint}
    return {name: t[own] for name, own in _NAMES.items() if own in t}, fields


PSOFT.peft = Peft("PSOFT", tuple(_NAMES), _read, _write)
