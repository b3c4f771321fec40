"""HRA: a product of Householder reflections of the input (arXiv 2405.17484)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from imgadapt.errors import ConfigError, FormatError, ShapeError
from imgadapt.methods.base import Method, Peft, Tensors, Way, positive
from imgadapt.sites import Site


@dataclass(frozen=True)
class HRA(Method):
    """W' = W H_1 ... H_rank over the flattened inputs, H_i = I - 2 u_i u_iᵀ / ‖u_i‖², with `hra_u` (inputs, rank).

    rank: even, for a fresh one: reflections are equal in pairs, which undo each other (huggingface/peft tuners/hra).
    orthogonal: the u_i are made orthogonal first (peft's `apply_GS`), W' = W (I - 2 Q Qᵀ). For files: it is never the
        identity, so there is no fresh one; peft's has the residual of two equal vectors, noise, for every second.

    Where a layer mixes channels alone the input is reflected (two thin products; W is not read), elsewhere the change
    is the low-rank pair (W left, rightᵀ). peft builds the (inputs, inputs) product of the reflections in each forward,
    of convolutions with square kernels, no groups, and neither dilation nor a padding mode.

    Raises:
        ConfigError: rank below 1, or, of a fresh one, odd or orthogonal.
    """

    rank: int = 8
    orthogonal: bool = False

    name = "hra"
    rate_over_lora = 3.5
    tensors = ("hra_u",)
    needs_weight = True
    additive = False

    def __post_init__(self) -> None:
        positive("rank", self.rank)

    def check(self, site: Site) -> str | None:
        if site.kind == "embedding":
            return "its inputs are token ids, which nothing reflects"
        if self.rank > site.fan_in:
            return f"rank {self.rank} is above its {site.fan_in} inputs"
        return super().check(site)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"hra_u": (site.fan_in, self.rank)}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        if self.rank % 2 or self.orthogonal:
            what = "orthogonal reflections are never" if self.orthogonal else f"{self.rank} reflections are not"
            raise ConfigError(f"{what} the identity: a fresh HRA is of an even rank, not orthogonal")
        return {"hra_u": torch.randn(site.fan_in, self.rank // 2).repeat_interleave(2, 1)}

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        assert weight is not None
        left, right = self._change(t)
        return ((weight.flatten(1) @ left) @ right).reshape(site.shape)

    def way(self, site: Site) -> Way:
        if site.pointwise:
            return Way(turn=True, linear=("left",))
        return Way(pair=True, weight=True, linear=("up",))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        left, right = self._change(t)
        if site.pointwise:
            return {"left": left, "right": right}
        assert weight is not None
        up = weight.flatten(1) @ left.to(weight.dtype)
        return {"up": up.to(left.dtype), "down": right.reshape(-1, *site.shape[1:])}

    def turn(self, o: Tensors, site: Site, x: Tensor, onto: Tensor | None) -> Tensor:
        if site.kind == "linear":
            return site.mix(x @ o["right"].t(), o["left"], onto)
        thin = (o["right"] @ x.flatten(2)).unflatten(2, x.shape[2:])
        return site.mix(thin, o["left"], onto)

    def _change(self, t: Tensors) -> tuple[Tensor, Tensor]:
        """left (inputs, rank) and right (rank, inputs), left @ right = H_1 ... H_rank - I.

        Of a pair of unit vectors, b = a + d, it is -2 (g a + d) aᵀ + 2 ((1 - g) a - d) dᵀ with g = ‖d‖²: exactly zero
        where d is. Pairs follow one another as I + L Rᵀ: together L (I - G)⁻¹ Rᵀ, with G what of Rᵀ L is above its
        blocks of two.
        """
        if self.orthogonal:
            q = torch.linalg.qr(t["hra_u"]).Q
            return -2 * q, q.t()
        u = t["hra_u"].t().contiguous()  # rows, of which equal ones have equal norms
        u = u / torch.linalg.vector_norm(u, dim=1, keepdim=True)
        even = len(u) // 2 * 2
        a, d = u[:even:2], u[1::2] - u[:even:2]
        g = d.square().sum(1, keepdim=True)
        left = torch.stack((-2 * (g * a + d), 2 * ((1 - g) * a - d)), 1).flatten(0, 1)
        right = torch.stack((a, d), 1).flatten(0, 1)
        left, right = torch.cat((left, -2 * u[even:])), torch.cat((right, u[even:]))
        block = torch.arange(len(u), device=u.device) // 2
        g = torch.where(block[:, None] < block, (right @ left.t()).to(u.dtype), 0)
        eye = torch.eye(len(u), dtype=u.dtype, device=u.device)
        whole = torch.linalg.solve_triangular(eye - g, left.t(), upper=True, left=False, unitriangular=True)
        return whole, right

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        if t["hra_u"].ndim != 2:
            raise ShapeError(f"hra_u is {tuple(t['hra_u'].shape)}, wanted (inputs, rank)")
        return cls(rank=t["hra_u"].shape[1])


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple[Method, dict[str, Tensor]]:
    orthogonal = config.get("apply_GS", False)
    if not isinstance(orthogonal, bool):
        raise FormatError(f"apply_GS is {orthogonal!r}; it is true or false")
    made = HRA.infer(t, None)
    return HRA(made.rank, orthogonal), {"hra_u": t["hra_u"]}


def _write(method: HRA, t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if len(shape) not in (2, 4) or len(set(shape[2:])) > 1:
        raise FormatError(f"peft's HRA is for linear layers and square kernels, and this weight is {shape}")
    return {"hra_u": t["hra_u"]}, {"r": method.rank, "apply_GS": method.orthogonal}


HRA.peft = Peft("HRA", ("hra_u",), _read, _write)
