"""BOFT: the weight turned by a product of butterfly-structured rotations (arXiv 2311.06243)."""

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from imgadapt.errors import ConfigError, ShapeError
from imgadapt.methods import rotation
from imgadapt.methods.base import Method, Tensors, Way, above_zero, positive
from imgadapt.sites import Site

_WIDEST = 64  # a product of stages that mixes no more channels than this is one block-diagonal matrix


@dataclass(frozen=True)
class BOFT(Method):
    """W' = M W over the outputs, or W' = W Mᵀ over the flattened inputs; M = Mₘ ... M₂ M₁, each block-diagonal after a
    permutation, so that m stages of blocks of b mix 2ᵐ⁻¹ b channels.

    stages: (m, count, b, b) blocks. Stage i mixes r = b / 2 neighbours with the r that stand 2ⁱ r further on.
    side "output": blocks are rotations (I + Q)(I - Q)⁻¹ of Q = B - Bᵀ, in LyCORIS' order within a block.
    side "input": (I - Q)(I + Q)⁻¹ of Q = (B - Bᵀ) / 2, in peft's order.
    block_size: b, even. factors: m. A layer that 2ᵐ⁻¹ b does not divide takes the largest even b below that does, and
        is refused if there is none; in grouped convolutions the size is that of a group.
    rescaled: a factor for each output, `rescale` (out, *1), after the rotation. peft always has it (`boft_s`).
    constraint: ‖Q‖ over all blocks at most constraint * out.

    Strength interpolates the whole, W + strength * (W' - W). No permutation matrix is ever stored: stages that
    together mix up to 64 channels are multiplied out (they are small); wider ones are reshapes.

    Raises:
        ConfigError: block_size below 2 or odd, factors below 1, a side that is neither, a constraint not above 0.
    """

    block_size: int = 8
    factors: int = 2
    side: Literal["output", "input"] = "output"
    rescaled: bool = False
    constraint: float | None = None

    name = "boft"
    rate_over_lora = 0.31
    tensors = ("stages",)
    optional = ("rescale",)
    needs_weight = True
    additive = False

    def __post_init__(self) -> None:
        positive("block_size", self.block_size)
        positive("factors", self.factors)
        rotation.check_side(self.side)
        if self.block_size % 2:
            raise ConfigError(f"block_size is {self.block_size}; a butterfly's blocks are of even size")
        above_zero("constraint", self.constraint, "none")

    @property
    def ranked(self) -> dict[str, int]:
        return {"stages": 1}

    def check(self, site: Site) -> str | None:
        if reason := super().check(site):
            return reason
        if self.side == "input" and site.kind == "embedding":
            return "its inputs are token ids, which no rotation mixes; use side='output'"
        size = rotation.rotated_size(site, self.side)
        if self._block(size):
            return None
        return f"no even block of up to {self.block_size} makes {self.factors} butterfly stages over {size}"

    def _block(self, size: int) -> int:
        if self.factors > size.bit_length():
            return 0  # before 2 ** factors is a number that takes minutes
        most = min(self.block_size, size // 2 * 2)
        return next((b for b in range(most, 1, -2) if size % (b * 2 ** (self.factors - 1)) == 0), 0)

    def at(self, site: Site) -> Self:
        return replace(self, block_size=self._block(rotation.rotated_size(site, self.side)))

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        size, b = site.rows if self.side == "output" else site.fan_in, self.block_size
        rescale = {"rescale": (site.rows, *(1 for _ in site.shape[1:]))} if self.rescaled else {}
        return {"stages": (self.factors, size // b, b, b), **rescale}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        return {k: (torch.ones if k == "rescale" else torch.zeros)(shape) for k, shape in self.shapes(site).items()}

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        assert weight is not None
        rotations = self._rotations(t, site)
        if self.side == "output":
            turned = self._product(rotations, weight.flatten(1)).view(weight.shape)
        else:
            turned = self._product(rotations, weight.flatten(1).t()).t().reshape(weight.shape)
        return (turned * t["rescale"] if "rescale" in t else turned) - weight

    def way(self, site: Site) -> Way:
        linear = ("change",) if len(self._chunks()) == 1 else ("last", "one")
        if self.side == "output":
            inside = site.rows // site.groups % (self.block_size * 2 ** (self.factors - 1)) == 0
            return Way(act=True, output=True, linear=linear) if inside else Way()
        plain = site.pointwise and not self.rescaled
        return Way(turn=True, linear=linear) if plain else Way()

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        """Either `change`, the whole product less 1; or its factors: `first`, ..., `last`, and a `one` to subtract."""
        rotations = self._rotations(t, site)
        factors = [self._multiplied_out(rotations, start, stages) for start, stages in self._chunks()]
        if self.side == "input":  # x as a row is turned by M: last stage first, each transposed
            factors = [factor.transpose(1, 2) for factor in reversed(factors)]
        elif "rescale" in t:
            start, stages = self._chunks()[-1]
            rows = self._gathered(t["rescale"].reshape(-1, 1), start, stages)
            factors[-1] = factors[-1] * rows
        if len(factors) == 1:
            return {
                "change": factors[0] - torch.eye(factors[0].shape[-1], dtype=rotations.dtype, device=rotations.device)
            }
        names = [*(f"stage_{k}" for k in range(len(factors) - 1)), "last"]
        return {**dict(zip(names, factors, strict=True)), "one": torch.ones((), device=rotations.device)}

    def turn(self, o: Tensors, site: Site, x: Tensor, onto: Tensor | None) -> Tensor:
        if "change" in o:
            return rotation.rotate(x, o["change"], site, onto)
        chunks = self._chunks() if self.side == "output" else self._chunks()[::-1]
        z = x.flatten(2).transpose(1, 2) if site.kind == "conv" else x
        for (start, stages), (_, factor) in zip(chunks, (row for row in o.items() if row[0] != "one"), strict=True):
            z = self._act_chunk(z, factor, start, stages)
        z = z.transpose(1, 2).reshape(x.shape) if site.kind == "conv" else z
        change = z - o["one"] * x
        return change if onto is None else onto + change

    def act(self, o: Tensors, site: Site, x: Tensor, y: Tensor | None, onto: Tensor | None) -> Tensor:
        assert y is not None
        return self.turn(o, site, y, onto)

    def _chunks(self) -> list[tuple[int, int]]:
        """(first stage, stages) that are multiplied out together."""
        most = max(1, int(math.log2(max(2, 2 * _WIDEST // self.block_size))))
        return [(k, min(most, self.factors - k)) for k in range(0, self.factors, most)]

    def _rotations(self, t: Tensors, site: Site) -> Tensor:
        """(m, count, b, b)."""
        q = rotation.skew(t["stages"])
        if self.constraint is not None:
            q = rotation.limited(q, self.constraint * site.rows)
        return rotation.cayley(q / 2) if self.side == "input" else rotation.cayley(-q)

    def _product(self, rotations: Tensor, rows: Tensor) -> Tensor:
        """M @ rows (size, k)."""
        for stage in range(self.factors):
            rows = self._stage(rotations[stage], rows, stage)
        return rows

    def _stage(self, blocks: Tensor, rows: Tensor, stage: int) -> Tensor:
        """One butterfly: the blocks gather r rows and the r that stand 2**stage * r further on."""
        r, width = self.block_size // 2, rows.shape[-1]
        z = rows.reshape(-1, 2, 2**stage, r, width)  # (high, pair, mid, low, width)
        order = (0, 2, 3, 1, 4) if self.side == "output" else (0, 2, 1, 3, 4)  # LyCORIS: low, pair; peft: pair, low
        back = (0, 3, 1, 2, 4) if self.side == "output" else (0, 2, 1, 3, 4)
        z = z.permute(order)
        turned = torch.bmm(blocks, z.reshape(-1, self.block_size, width)).view(z.shape)
        return turned.permute(back).reshape(rows.shape)

    def _multiplied_out(self, rotations: Tensor, start: int, stages: int) -> Tensor:
        """Stages start ... start + stages - 1 as one block-diagonal matrix, (count, span, span)."""
        r = self.block_size // 2
        one = torch.eye(r, dtype=rotations.dtype, device=rotations.device)
        two = torch.eye(2, dtype=rotations.dtype, device=rotations.device)[:, None, :, None]
        rows = one.repeat(2 * rotations.shape[1], 1)
        for stage in range(start, start + stages):  # it mixes pairs of blocks: each into columns of its own first
            rows = (rows.reshape(-1, 2, 2**stage * r, 1, rows.shape[1]) * two).reshape(len(rows), -1)
            rows = self._stage(rotations[stage], rows, stage)
        return self._gathered(rows, start, stages)

    def _gathered(self, rows: Tensor, start: int, stages: int) -> Tensor:
        """(size, k) -> (count, span, k): the rows that a chunk of stages mixes, together."""
        z = rows.reshape(-1, 2**stages, 2**start, self.block_size // 2, rows.shape[-1])
        return z.transpose(1, 2).reshape(-1, 2 ** (stages - 1) * self.block_size, rows.shape[-1])

    def _act_chunk(self, x: Tensor, factor: Tensor, start: int, stages: int) -> Tensor:
        """factor (count, span, span) applied to the last axis of x (..., size)."""
        z = x.reshape(
            -1, x.shape[-1] // (2 ** (start + stages) * self.block_size // 2), 2**stages, 2**start, self.block_size // 2
        )
        gathered = z.permute(1, 3, 0, 2, 4)  # (high, mid, n, bits, low)
        turned = torch.bmm(gathered.reshape(len(factor), len(z), -1), factor.transpose(1, 2)).view(gathered.shape)
        return turned.permute(2, 0, 3, 1, 4).reshape(x.shape)

    def fits(self, t: Tensors, site: Site) -> str | None:
        size = site.rows if self.side == "output" else site.fan_in
        undivided = f"{self.factors} stages of blocks of {self.block_size} do not divide its {size} {self.side}s"
        return super().fits(t, site) or (undivided if size % (self.block_size * 2 ** (self.factors - 1)) else None)

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        blocks = tuple(t["stages"].shape)
        if len(blocks) != 4 or blocks[2] != blocks[3]:
            raise ShapeError(f"stages is {blocks}, wanted (m, count, b, b)")
        return cls(blocks[2], blocks[0], "output", "rescale" in t, alpha)
