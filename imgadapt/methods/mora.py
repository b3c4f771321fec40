"""MoRA: a square matrix between inputs that are gathered and outputs that are repeated (arXiv 2405.12130)."""

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from imgadapt.errors import ConfigError, ShapeError
from imgadapt.methods.base import Method, Tensors, Way, positive
from imgadapt.sites import Site


@dataclass(frozen=True)
class MoRA(Method):
    """`mora` (s, s, *kernel) acts on blocks of s input channels; a last, short block is filled up from the first ones.

    rank: s is the rounded root of rank * (in + out), so that it has the numbers of a LoRA of this rank (with a kernel:
        of rank * (in + out / kernel)); at most in / groups and out, even for type 6.
    mora_type: 1, the blocks are added up and the s outputs repeated up to `out`: of rank s. 6, block j is turned by
        RoPE's angles j / 10000^(2i / s) and has s outputs of its own, all of which are repeated up to `out`, or cut:
        inputs beyond `out` have no effect.

    As kongds/MoRA has it (peft-mora/src/peft/tuners/lora/layer.py, commit de5df31), for linear layers, whose scale is 1
    whatever the alpha says. peft has none. Grouped convolutions and fused projections build the delta.

    Raises:
        ConfigError: rank below 1, or another type.
    """

    rank: int = 8
    mora_type: Literal[1, 6] = 6

    name = "mora"
    rate_over_lora = 0.25
    tensors = ("mora",)

    def __post_init__(self) -> None:
        positive("rank", self.rank)
        if isinstance(self.mora_type, bool) or self.mora_type not in (1, 6):
            raise ConfigError(f"mora_type is {self.mora_type!r}; it must be 1 (sharing) or 6 (rotation)")

    def check(self, site: Site) -> str | None:
        if site.kind == "embedding":
            return "its inputs are token ids, which no matrix mixes"
        if (reason := super().check(site)) or self._size(site):
            return reason
        return f"its {site.shape[1]} inputs and {site.rows} outputs have no two to turn; use mora_type=1"

    def _size(self, site: Site) -> int:
        """s."""
        most = min(site.shape[1], site.rows)
        rank = min(self.rank, most**2)  # a file may say anything; beyond it s is `most`
        size = min(most, int(math.sqrt(rank * (site.shape[1] + site.rows / math.prod(site.kernel))) + 0.5))
        return size if self.mora_type == 1 else size // 2 * 2

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        size = self._size(site)
        return {"mora": (size, size, *site.kernel)}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        return {"mora": torch.zeros(self.shapes(site)["mora"])}

    @property
    def constant_names(self) -> frozenset[str]:
        return frozenset({"cos", "sin"}) if self.mora_type == 6 else frozenset()

    def constants(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        """cos and sin, (blocks, s): those of the first half twice."""
        if self.mora_type == 1:
            return {}
        size = self._size(site)
        angles = torch.outer(torch.arange(self._blocks(site)), 10000.0 ** -(torch.arange(0, size, 2) / size))
        return {"cos": angles.cos().repeat(1, 2), "sin": angles.sin().repeat(1, 2)}

    def _blocks(self, site: Site) -> int:
        """How many have an effect."""
        size = self._size(site)
        return math.ceil((site.shape[1] if self.mora_type == 1 else min(site.shape[1], site.rows)) / size)

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        rows = self._rows(self._cores(t, site, weight), site)
        return rows[torch.arange(site.rows, device=rows.device) % len(rows)]

    def _rows(self, core: Tensor, site: Site) -> Tensor:
        """The delta before it is repeated: (s or blocks * s, in / groups, *kernel)."""
        size, inputs = core.shape[1], site.shape[1]
        place = torch.arange(self._blocks(site) * size, device=core.device)
        blank = core.new_zeros(size, inputs, *site.kernel)
        if len(core) == 1:
            return blank.index_add(1, place % inputs, core[0][:, place % size])
        return torch.cat([blank.index_add(1, p % inputs, own) for p, own in zip(place.split(size), core, strict=True)])

    def pair(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        if self.mora_type == 6:
            return None
        down = self._rows(self._cores(t, site, None), site).flatten(1)
        place = torch.arange(site.rows, device=down.device) % len(down)
        return torch.eye(len(down), dtype=down.dtype, device=down.device)[place], down

    def _cores(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        """The matrix for all blocks, (1, s, s, *kernel), or for each, (blocks, s, s, *kernel), turned back."""
        core = t["mora"]
        if self.mora_type == 1:
            return core[None]
        t = self.whole(t, site, weight)
        half = core.shape[1] // 2
        swapped = torch.cat([core[:, half:], -core[:, :half]], 1)
        along = (len(t["cos"]), 1, -1, *site.ones)
        return core * t["cos"].view(along) + swapped * t["sin"].view(along)

    def way(self, site: Site) -> Way:
        apart = site.kind == "linear" or (site.kind == "conv" and site.groups == 1)
        return Way(act=True, input=True, linear=("core",)) if apart else Way()

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        return {"core": self._cores(t, site, weight)}

    def act(self, o: Tensors, site: Site, x: Tensor, y: Tensor | None, onto: Tensor | None) -> Tensor:
        core = o["core"]
        axis = -1 if site.kind == "linear" else 1
        blocks = _blocks(x, axis, core.shape[1], self._blocks(site))  # (..., blocks, s) or (batch, blocks, s, ...)
        if self.mora_type == 1:
            made = site.op(blocks.sum(1 if axis == 1 else -2), core[0])
        elif site.kind == "linear":
            made = torch.einsum("...js,jts->...jt", blocks, core).flatten(-2)
        else:
            made = replace(site, groups=len(core)).op(blocks.flatten(1, 2), core.flatten(0, 1))
        times = math.ceil(site.rows / made.shape[axis])
        change = torch.cat([made] * times, axis).narrow(axis, 0, site.rows)
        return change if onto is None else onto + change

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        shape = tuple(t["mora"].shape)
        if len(shape) < 2 or shape[0] != shape[1]:
            raise ShapeError(f"mora is {shape}, wanted (s, s, *kernel)")
        return cls()


def _blocks(x: Tensor, axis: int, size: int, count: int) -> Tensor:
    """The first `count` blocks of channels, the last filled up from the first channels."""
    channels = x.shape[axis]
    if count * size > channels:
        x = torch.cat([x, x.narrow(axis, 0, count * size - channels)], axis)
    return x.narrow(axis, 0, count * size).unflatten(axis, (count, size))
