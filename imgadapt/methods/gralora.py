"""GraLoRA: a LoRA for each of k x k blocks of the weight (arXiv 2505.20355)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from imgadapt.errors import ConfigError, FormatError, ShapeError
from imgadapt.methods.base import Method, Peft, Tensors, Way, linear_only, positive
from imgadapt.methods.lora import check_alpha, too_large
from imgadapt.sites import Site


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple["GraLoRA", dict[str, Tensor]]:
    alpha = config.get("alpha", 64)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise FormatError(f"alpha is {alpha!r}, wanted a number")
    if any(t[name].ndim != 3 for name in ("gralora_A", "gralora_B")):
        raise ShapeError(f"gralora_A is {tuple(t['gralora_A'].shape)} and gralora_B {tuple(t['gralora_B'].shape)}")
    own = {
        name: t[key].transpose(1, 2).contiguous() for name, key in (("gra_down", "gralora_A"), ("gra_up", "gralora_B"))
    }
    general = {"hybrid_down": "gralora_A_general.weight", "hybrid_up": "gralora_B_general.weight"}
    own |= {name: t[key] for name, key in general.items() if key in t}
    return GraLoRA.infer(own, alpha), own


def _write(method: "GraLoRA", t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    linear_only(method, shape)
    made = {"gralora_A": t["gra_down"].transpose(1, 2), "gralora_B": t["gra_up"].transpose(1, 2)}
    if method.hybrid_rank:
        made |= {"gralora_A_general.weight": t["hybrid_down"], "gralora_B_general.weight": t["hybrid_up"]}
    fields = {"r": method.rank, "hybrid_r": method.hybrid_rank, "gralora_k": method.k, "alpha": method.file_alpha}
    return made, fields


@dataclass(frozen=True)
class GraLoRA(Method):
    """Block (j, n) of the delta is up[j][:, n] @ down[n][j]: each of k blocks of inputs has `rank` numbers, of which
    rank / k go to each of k blocks of outputs; gra_down (k, rank, in / groups / k, *kernel), gra_up (k, out / k, rank).
    The size and the cost of LoRA, and up to k times its rank.

    alpha: the delta is multiplied by alpha / (rank + hybrid_rank); None means the sum.
    k: the largest number up to it is taken that divides the rank and the layer's channels; 1 is LoRA.
    hybrid_rank: of a LoRA beside, hybrid_down (hybrid_rank, in / groups, *kernel), hybrid_up (out, hybrid_rank, *1).

    peft (tuners/gralora, A and B with their last axes the other way round) has it for linear layers.

    Raises:
        ConfigError: rank or k below 1, k does not divide rank, hybrid_rank below 0, or an alpha not above 0.
    """

    rank: int = 16
    alpha: float | None = None
    k: int = 2
    hybrid_rank: int = 0

    name = "gralora"
    rate_over_lora = 1.4
    tensors = ("gra_down", "gra_up")
    optional = ("hybrid_down", "hybrid_up")
    peft = Peft(
        "GRALORA",
        ("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight"),
        _read,
        _write,
    )

    def __post_init__(self) -> None:
        positive("rank", self.rank)
        positive("k", self.k)
        if self.hybrid_rank != 0 or isinstance(self.hybrid_rank, bool):
            positive("hybrid_rank (or 0, for none)", self.hybrid_rank)
        check_alpha(self.alpha)
        if self.rank % self.k:
            raise ConfigError(f"rank is {self.rank}; it must be a multiple of k, {self.k}")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.file_rank

    @property
    def file_rank(self) -> int:
        return self.rank + self.hybrid_rank

    @property
    def ranked(self) -> dict[str, int]:
        return {"gra_down": 1, "hybrid_down": 0}

    def resized(self, rank: int) -> Self:
        return self  # where a rank goes depends on how many there are

    def check(self, site: Site) -> str | None:
        if site.kind == "embedding":
            return "its inputs are token ids, which make no blocks"
        return super().check(site) or too_large(max(self.rank, self.hybrid_rank), site)

    def at(self, site: Site) -> Self:
        shared = math.gcd(self.rank, site.rows, site.shape[1])
        return replace(self, k=next(k for k in range(min(self.k, shared), 0, -1) if shared % k == 0))

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        k, r, h, inputs = self.k, self.rank, self.hybrid_rank, site.shape[1]
        shapes = {"gra_down": (k, r, inputs // k, *site.kernel), "gra_up": (k, site.rows // k, r)}
        hybrid = {"hybrid_down": (h, inputs, *site.kernel), "hybrid_up": (site.rows, h, *site.ones)}
        return {**shapes, **(hybrid if h else {})}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        made = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        for block in made["gra_down"]:
            nn.init.kaiming_uniform_(block, a=math.sqrt(5))
        if self.hybrid_rank:
            nn.init.kaiming_uniform_(made["hybrid_down"], a=math.sqrt(5))
        return made

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        up, down = self.pair(t, site)
        return (up @ down).reshape(site.shape)

    def pair(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Of rank k * rank + hybrid_rank."""
        k, part = self.k, self.rank // self.k
        eye = torch.eye(k, dtype=t["gra_down"].dtype, device=t["gra_down"].device)
        down = torch.einsum("nri...,nm->nrmi...", t["gra_down"], eye).flatten(0, 1)
        up = torch.einsum("jons,jm->jonms", t["gra_up"].unflatten(2, (k, part)), eye)
        up, down = up.flatten(0, 1).flatten(1), down.flatten(1)
        if not self.hybrid_rank:
            return up, down
        return torch.cat([up, t["hybrid_up"].flatten(1)], 1), torch.cat([down, t["hybrid_down"].flatten(1)])

    def way(self, site: Site) -> Way:
        if site.groups > 1:
            return Way(pair=True, linear=("up",))
        return Way(pair=self.hybrid_rank > 0, act=True, input=True, linear=("gra_up", "up"))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        if site.groups > 1:
            up, down = self.pair(t, site)
            return {"up": up, "down": down.view(-1, *site.shape[1:])}
        hybrid = {"up": t["hybrid_up"].flatten(1), "down": t["hybrid_down"]} if self.hybrid_rank else {}
        return {"gra_down": t["gra_down"], "gra_up": t["gra_up"], **hybrid}

    def act(self, o: Tensors, site: Site, x: Tensor, y: Tensor | None, onto: Tensor | None) -> Tensor:
        down, up, k = o["gra_down"], o["gra_up"], self.k
        if site.kind == "linear":
            h = torch.einsum("...ni,nri->...nr", x.unflatten(-1, (k, -1)), down)
            h = h.unflatten(-1, (k, -1)).transpose(-3, -2).flatten(-2)  # (..., output block, all its numbers)
            change = torch.einsum("...jr,jor->...jo", h, up).flatten(-2)
            return change if onto is None else onto + change
        blocks = replace(site, groups=k)
        h = blocks.op(x, down.flatten(0, 1)).unflatten(1, (k, k, -1)).transpose(1, 2).flatten(1, 3)
        return blocks.mix(h, up.flatten(0, 1), onto)

    def fits(self, t: Tensors, site: Site) -> str | None:
        if wrong := super().fits(t, site):
            return wrong
        return f"{self.k} blocks do not divide its {site.shape}" if math.gcd(*site.shape[:2]) % self.k else None

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        down, up = t["gra_down"].shape, t["gra_up"].shape
        if len(down) < 3 or len(up) != 3 or down[:1] != up[:1] or down[1] != up[2]:
            raise ShapeError(f"gra_down is {tuple(down)} and gra_up {tuple(up)}: their blocks or ranks differ")
        if ("hybrid_down" in t) != ("hybrid_up" in t):
            raise ShapeError("of hybrid_down and hybrid_up one is missing")
        return cls(down[1], alpha, down[0], len(t["hybrid_down"]) if "hybrid_down" in t else 0)
