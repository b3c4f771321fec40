"""MiSS, once Bone: the same block of the delta for every block of the inputs (arXiv 2409.15371)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from imgadapt.errors import ConfigError, FormatError, ShapeError
from imgadapt.methods.base import Method, Peft, Tensors, Way, linear_only, positive
from imgadapt.sites import Site

Variant = Literal["miss", "mini", "bat"]


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple["MiSS", dict[str, Tensor]]:
    said = config.get("init_weights", True)
    if said not in (True, False, "mini", "bat"):
        raise FormatError(f"init_weights is {said!r}, which no MiSS has")
    own = {f"miss_{said}" if isinstance(said, str) else "miss_block": t["miss_block"]}
    return MiSS.infer(own, None), own


def _write(method: "MiSS", t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    linear_only(method, shape)
    (block,) = t.values()
    kind = True if method.variant == "miss" else method.variant
    return {"miss_block": block}, {"r": method.rank, "mini_r": method.mini_rank, "init_weights": kind}


@dataclass(frozen=True)
class MiSS(Method):
    """delta[o, i] = block[i mod rank, o]: the input channels, `rank` at a time, are added up and go through one block.

    variant "miss": `miss_block` (rank, out, *kernel). "mini": `miss_mini` (rank, mini_rank, *kernel), repeated along
        the outputs; the largest divisor of `out` up to mini_rank is taken. "bat": each rank x rank block V of the flat
        weight changes by V @ B + B, with `miss_bat` (out / rank, rank, rank), one B for each row of blocks; the largest
        rank that divides both sides is taken. That one reads the weight, and the change goes into the product with it.

    As peft has it (tuners/miss), for linear layers; there is no scale.

    Raises:
        ConfigError: rank or mini_rank below 1, or another variant.
    """

    rank: int = 32
    variant: Variant = "miss"
    mini_rank: int = 1

    name = "miss"
    rate_over_lora = 0.12
    tensors = ()
    optional = ("miss_block", "miss_mini", "miss_bat")
    peft = Peft("MISS", ("miss_block",), _read, _write)

    def __post_init__(self) -> None:
        positive("rank", self.rank)
        positive("mini_rank", self.mini_rank)
        if self.variant not in ("miss", "mini", "bat"):
            raise ConfigError(f"variant is {self.variant!r}; it must be 'miss', 'mini' or 'bat'")
        object.__setattr__(self, "needs_weight", self.variant == "bat")

    @classmethod
    def recognises(cls, names: set[str]) -> bool:
        return names in ({"miss_block"}, {"miss_mini"}, {"miss_bat"})

    @property
    def file_rank(self) -> int:
        return self.rank

    @property
    def ranked(self) -> dict[str, int]:
        return {} if self.variant == "bat" else {self._tensor: 0}

    @property
    def _tensor(self) -> str:
        return "miss_block" if self.variant == "miss" else f"miss_{self.variant}"

    def resized(self, rank: int) -> Self:
        return self  # which inputs are added up depends on it

    def check(self, site: Site) -> str | None:
        if site.kind == "embedding":
            return "its inputs are token ids, which make no blocks"
        if reason := super().check(site):
            return reason
        if self.variant == "bat":
            none = math.gcd(site.rows, site.fan_in) == 1
            return f"no block divides its {site.rows} x {site.fan_in} weight" if none else None
        return f"rank {self.rank} is above its {site.shape[1]} input channels" if self.rank > site.shape[1] else None

    def at(self, site: Site) -> Self:
        if self.variant == "bat":
            return replace(self, rank=_divisor(math.gcd(site.rows, site.fan_in), self.rank))
        return replace(self, mini_rank=_divisor(site.rows, self.mini_rank)) if self.variant == "mini" else self

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        if self.variant == "bat":
            return {"miss_bat": (site.rows // self.rank, self.rank, self.rank)}
        return {self._tensor: (self.rank, site.rows if self.variant == "miss" else self.mini_rank, *site.kernel)}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        if self.variant == "bat":
            assert weight is not None
            blocks = weight.reshape(site.rows // self.rank, self.rank, -1, self.rank)
            made = torch.einsum("qapc,qcb->qapb", blocks, t["miss_bat"]) + t["miss_bat"][:, :, None]
            return made.reshape(site.shape)
        core = self._core(t, site)
        return core[:, torch.arange(site.shape[1], device=core.device) % self.rank]

    def _core(self, t: Tensors, site: Site) -> Tensor:
        """(out, rank, *kernel)."""
        core = t[self._tensor].transpose(0, 1)
        return torch.cat([core] * (site.rows // len(core)))

    def pair(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        """Of rank * kernel."""
        if self.variant == "bat":
            return None
        up = self._core(t, site).flatten(1)
        eye = torch.eye(up.shape[1], dtype=up.dtype, device=up.device).unflatten(1, (self.rank, -1))
        return up, eye[:, torch.arange(site.shape[1], device=up.device) % self.rank].flatten(1)

    def way(self, site: Site) -> Way:
        return Way() if self.variant == "bat" else Way(act=True, input=True, linear=("core",))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        small = self.variant == "mini" and site.groups == 1
        return {"core": t["miss_mini"].transpose(0, 1) if small else self._core(t, site)}

    def act(self, o: Tensors, site: Site, x: Tensor, y: Tensor | None, onto: Tensor | None) -> Tensor:
        core, r = o["core"], self.rank
        if site.kind == "linear":
            h = F.pad(x, (0, -x.shape[-1] % r)).unflatten(-1, (-1, r)).sum(-2)
            if len(core) == site.rows:
                return site.mix(h, core, onto)
            made = F.linear(h, core)
            change = torch.cat([made] * (site.rows // len(core)), -1)
            return change if onto is None else onto + change
        x = x.unflatten(1, (site.groups, -1))
        x = F.pad(x, (*(0 for _ in range(2 * len(site.kernel))), 0, -x.shape[2] % r))
        made = site.op(x.unflatten(2, (-1, r)).sum(2).flatten(1, 2), core)
        change = torch.cat([made] * (site.rows // len(core)), 1)
        return change if onto is None else onto + change

    def fits(self, t: Tensors, site: Site) -> str | None:
        if wrong := super().fits(t, site):
            return wrong
        if self.variant == "bat":
            divided = math.gcd(site.rows, site.fan_in) % self.rank == 0
            return None if divided else f"blocks of {self.rank} do not divide its {site.rows} x {site.fan_in} weight"
        if self.variant == "mini" and site.rows % self.mini_rank:
            return f"mini_rank {self.mini_rank} does not divide its {site.rows} outputs"
        return self.check(site)

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        ((name, tensor),) = t.items()
        shape = tuple(tensor.shape)
        if name == "miss_bat":
            if len(shape) != 3 or shape[1] != shape[2]:
                raise ShapeError(f"miss_bat is {shape}, wanted (out / rank, rank, rank)")
            return cls(shape[1], "bat")
        if len(shape) < 2:
            raise ShapeError(f"{name} is {shape}, wanted (rank, outputs, *kernel)")
        return cls(shape[0], "mini", shape[1]) if name == "miss_mini" else cls(shape[0])


def _divisor(size: int, most: int) -> int:
    return next(b for b in range(min(most, size), 0, -1) if size % b == 0)
