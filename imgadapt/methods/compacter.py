"""Compacter: a bottleneck of Kronecker products whose small factors all layers share (arXiv 2106.04647)."""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from imgadapt.errors import ConfigError, ShapeError, StateError
from imgadapt.methods.base import Tensors, Way, positive
from imgadapt.methods.bottleneck import Nonlinearity, Placement, check_network, passed, too_wide, way_of
from imgadapt.methods.lora import Scaled
from imgadapt.sites import Site


@dataclass(frozen=True)
class Compacter(Scaled):
    """`Bottleneck` whose down and up are sums over i of kron(A_i, u_i @ v_i), with A `compacter_a` (n, n, n) of all
    layers, `down_u` (n, rank / n, q), `down_v` (n, q, width / n), `up_u` (n, out / n, q), `up_v` (n, q, rank / n) each
    after `compacter_`, and the biases of Bottleneck. width: of what goes through, in / groups * kernel if parallel.

    n: the largest number up to it is taken that divides the rank, the width and the outputs; layers of one n share A.
        The paper's is 4 (rabeehk/compacter: phm_dim).
    q: the rank of the second factors, `kron_rank`; the paper's is 1 (phm_rank).
    alpha: the change is multiplied by alpha / rank; None means rank.

    down and up are multiplied out in each forward, (rank, width) and (out, rank): they are small; the cost over tokens
    is Bottleneck's. Like that one it neither merges nor becomes LoRA.

    Raises:
        ConfigError: rank, n or kron_rank below 1, n does not divide the rank, an alpha not above 0, an unknown
            placement or nonlinearity.
    """

    rank: int = 16
    alpha: float | None = None
    n: int = 4
    kron_rank: int = 1
    placement: Placement = "parallel"
    nonlinearity: Nonlinearity = "gelu"

    name = "compacter"
    rate_over_lora = 7.1
    tensors = tuple(f"compacter_{end}" for end in ("a", "down_u", "down_v", "down_b", "up_u", "up_v", "up_b"))
    kinds = ("linear", "conv")
    common = ("compacter_a",)
    merges = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("n", self.n)
        positive("kron_rank", self.kron_rank)
        check_network(self.placement, self.nonlinearity)
        if self.rank % self.n:
            raise ConfigError(f"rank is {self.rank}; it must be a multiple of n, {self.n}")

    def resized(self, rank: int) -> Self:
        return self  # where a rank stands in the products depends on how many there are

    def check(self, site: Site) -> str | None:
        if reason := super().check(site) or too_wide(self.rank, self.placement, site):
            return reason
        most = max(self.rank // self.n, 1) * self.n  # a file may say anything
        return f"kron_rank {self.kron_rank} is above the rank, {most}" if self.kron_rank > most else None

    def _width(self, site: Site) -> int:
        return site.fan_in if self.placement == "parallel" else site.rows

    def at(self, site: Site) -> Self:
        shared = math.gcd(self.rank, site.rows, self._width(site))
        return replace(self, n=next(n for n in range(min(self.n, shared), 0, -1) if shared % n == 0))

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        n, q, r = self.n, self.kron_rank, self.rank // self.n
        ends = {
            "a": (n, n, n),
            "down_u": (n, r, q),
            "down_v": (n, q, self._width(site) // n),
            "down_b": (self.rank,),
            "up_u": (n, site.rows // n, q),
            "up_v": (n, q, r),
            "up_b": (site.rows,),
        }
        return {f"compacter_{end}": shape for end, shape in ends.items()}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        """up_u and the biases are zero; the products of down have the variance that LoRA's down has."""
        made = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        spread = {"a": self.n**-0.5, "down_u": self.kron_rank**-0.5, "up_v": self.kron_rank**-0.5}
        for end, std in {**spread, "down_v": (3 * self._width(site)) ** -0.5}.items():
            nn.init.normal_(made[f"compacter_{end}"], std=std)
        return made

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        raise StateError(f"{self.name} {self.apart}: keep it live")

    def way(self, site: Site) -> Way:
        return way_of(self.placement)

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        def product(end: str) -> Tensor:
            second = t[f"compacter_{end}_u"] @ t[f"compacter_{end}_v"]
            made = torch.einsum("iab,icd->acbd", t["compacter_a"], second)
            return made.flatten(0, 1).flatten(1)

        down, biases = product("down"), {f"{end}_b": t[f"compacter_{end}_b"] for end in ("down", "up")}
        if self.placement == "parallel":
            down = down.view(self.rank, *site.shape[1:])
        return {"down": down, "up": product("up"), **biases}

    def act(self, o: Tensors, site: Site, x: Tensor, y: Tensor | None, onto: Tensor | None) -> Tensor:
        return passed(o, site, x if self.placement == "parallel" else y, self.placement, self.nonlinearity, onto)

    def fits(self, t: Tensors, site: Site) -> str | None:
        if wrong := super().fits(t, site):
            return wrong
        undivided = math.gcd(site.rows, self._width(site)) % self.n
        return f"n, {self.n}, does not divide its {site.rows} and {self._width(site)} channels" if undivided else None

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        a, u, v, bias = (tuple(t[f"compacter_{end}"].shape) for end in ("a", "down_u", "down_v", "down_b"))
        whole = len(a) == 3 and len(u) == 3 and len(v) == 3 and len(bias) == 1
        if not whole or {*a} != {u[0]} or u[2] != v[1] or bias[0] != u[0] * u[1]:
            raise ShapeError(f"compacter_a is {a}, down_u {u}, down_v {v}, down_b {bias}: their sizes differ")
        return cls(bias[0], alpha, u[0], u[2])
