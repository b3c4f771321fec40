"""OFT: the weight turned by a block-diagonal rotation (arXiv 2306.07280)."""

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from imgadapt.errors import ConfigError, ShapeError
from imgadapt.methods import rotation
from imgadapt.methods.base import Method, Tensors, Way, above_zero, positive
from imgadapt.sites import Site


@dataclass(frozen=True)
class OFT(Method):
    """W' = C W with C = blockdiag((I - Q)(I + Q)⁻¹) over the outputs, or W' = W Cᵀ over the flattened inputs.

    side "output": `blocks` (count, b, b), Q = blocks - blocksᵀ, as LyCORIS' diag-oft and kohya have it.
    side "input": `packed` (count, b * (b - 1) / 2), Q's upper triangle, as peft has it.
    block_size: b. A layer whose size it does not divide takes the largest divisor below it, and is refused if that
        is 1; in grouped convolutions the size is that of a group.
    rescaled: a factor for each output, `rescale` (out, *1), after the rotation.
    constraint: how far it may turn: ‖Q‖ over all blocks at most constraint * out on the output side (kohya, LyCORIS:
        their alpha), each block's ‖Q‖ at most constraint / sqrt(count) on the input side (peft's `eps`).
    shared: one block for all (input side; peft's `block_share`).
    neumann: peft's polynomial of that many terms instead of the exact inverse (see `rotation.neumann`); 0: exact.

    Strength interpolates: W + strength * (W' - W). It acts on activations where blocks stay within channels (linear
    layers, 1x1 convolutions, every output side); elsewhere the weight is turned.

    Raises:
        ConfigError: block_size below 1 (2, for a fresh one), a side that is neither, a constraint not above 0, shared
            on the output side.
    """

    block_size: int = 32
    side: Literal["output", "input"] = "output"
    rescaled: bool = False
    constraint: float | None = None
    shared: bool = False
    neumann: int = 0

    name = "oft"
    rate_over_lora = 0.31
    tensors = ()
    optional = ("blocks", "packed", "rescale")
    needs_weight = True
    additive = False

    def __post_init__(self) -> None:
        positive("block_size", self.block_size)
        rotation.check_side(self.side)
        above_zero("constraint", self.constraint, "none")
        if self.shared and self.side == "output":
            raise ConfigError("a shared block is for side='input'")
        if self.neumann != 0:
            positive("neumann (or 0, for the exact rotation)", self.neumann)
            if self.neumann > 64:  # a file may say anything, and each term is a product
                raise ConfigError(f"neumann is {self.neumann}; it is a number of terms, 64 at most (peft has 5)")

    @classmethod
    def recognises(cls, names: set[str]) -> bool:
        return names - {"rescale"} in ({"blocks"}, {"packed"})

    @property
    def ranked(self) -> dict[str, int]:
        return {"packed" if self.side == "input" else "blocks": 0}

    def check(self, site: Site) -> str | None:
        if reason := super().check(site):
            return reason
        if self.side == "input" and site.kind == "embedding":
            return "its inputs are token ids, which no rotation mixes; use side='output'"
        size = rotation.rotated_size(site, self.side)
        if self.block_size == 1:  # LyCORIS' files have such, on layers of few outputs, for the sake of `rescale`
            return None
        return None if _divisor(size, self.block_size) > 1 else f"no block of 2 to {self.block_size} divides {size}"

    def at(self, site: Site) -> Self:
        return replace(self, block_size=_divisor(rotation.rotated_size(site, self.side), self.block_size))

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        b = self.block_size
        rescale = {"rescale": (site.rows, *(1 for _ in site.shape[1:]))} if self.rescaled else {}
        if self.side == "output":
            return {"blocks": (site.rows // b, b, b), **rescale}
        return {"packed": (1 if self.shared else site.fan_in // b, b * (b - 1) // 2), **rescale}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        if self.block_size == 1:
            raise ConfigError("block_size is 1; blocks of one turn nothing")
        return {k: (torch.ones if k == "rescale" else torch.zeros)(shape) for k, shape in self.shapes(site).items()}

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        assert weight is not None
        c = self._rotation(t, site)
        turned = rotation.rotate_rows(weight, c) if self.side == "output" else rotation.rotate_columns(weight, c)
        return (turned * t["rescale"] if "rescale" in t else turned) - weight

    def way(self, site: Site) -> Way:
        if self.side == "output":
            inside = site.rows // site.groups % self.block_size == 0
            return Way(act=True, output=True, linear=("change",)) if inside else Way()
        plain = site.pointwise and not self.rescaled
        return Way(turn=True, linear=("change",)) if plain else Way()

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        c = self._rotation(t, site)
        if self.side == "input":
            c = c.transpose(1, 2)  # W Cᵀ x
        elif "rescale" in t:
            c = c * t["rescale"].reshape(len(c), -1, 1)
        return {"change": c - torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)}

    def turn(self, o: Tensors, site: Site, x: Tensor, onto: Tensor | None) -> Tensor:
        return rotation.rotate(x, o["change"], site, onto)

    def act(self, o: Tensors, site: Site, x: Tensor, y: Tensor | None, onto: Tensor | None) -> Tensor:
        assert y is not None
        return rotation.rotate(y, o["change"], site, onto)

    def _rotation(self, t: Tensors, site: Site) -> Tensor:
        """C, (count, b, b)."""
        q = rotation.unpacked(t["packed"]) if "packed" in t else rotation.skew(t["blocks"])
        if self.constraint is not None:
            if self.side == "output":
                q = rotation.limited(q, self.constraint * site.rows)
            else:
                q = rotation.limited_each(q, self.constraint / math.sqrt(len(q)))
        c = rotation.neumann(q, self.neumann) if self.neumann else rotation.cayley(q)
        return c.expand(site.fan_in // c.shape[-1], -1, -1) if self.shared else c

    def fits(self, t: Tensors, site: Site) -> str | None:
        size = site.rows if self.side == "output" else site.fan_in
        undivided = f"blocks of {self.block_size} do not divide its {size} {self.side}s"
        return undivided if size % self.block_size else super().fits(t, site)

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        rescaled = "rescale" in t
        if "packed" in t:
            size = rotation.block_size(t["packed"].shape[-1]) if t["packed"].ndim == 2 else 0
            if size < 2:
                raise ShapeError(f"packed is {tuple(t['packed'].shape)}, which is no (count, b * (b - 1) / 2)")
            return cls(size, "input", rescaled, shared=len(t["packed"]) == 1)
        blocks = tuple(t["blocks"].shape)
        if len(blocks) != 3 or blocks[1] != blocks[2]:
            raise ShapeError(f"blocks is {blocks}, wanted (count, b, b)")
        return cls(blocks[1], "output", rescaled, constraint=alpha)


def _divisor(size: int, most: int) -> int:
    return next(b for b in range(min(most, size), 0, -1) if size % b == 0)
