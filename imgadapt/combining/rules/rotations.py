"""Rules that merge OFT and BOFT as rotations, without the base: the result is OFT or BOFT again.

An input's strength w is the power R^w, that much of the way along the geodesic; `attach` goes straight instead, to
W + w (W' - W), which between 0 and 1 is no rotation; they agree at 0 and 1. An input that does not have the layer does
not turn it. Limits (COFT, kohya's alpha) are worked into the tensors. Factors of outputs (`rescale`) multiply, to the
powers that the rotations have. Rotations of inputs and of outputs have nothing in common until the weight between them
is known.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from imgadapt.combining.rules import orthogonal
from imgadapt.combining.rules.rule import Option, Rule
from imgadapt.errors import ConfigError, ShapeError, StateError
from imgadapt.formats import Part
from imgadapt.methods import BOFT, OFT
from imgadapt.sites import Site

_ORTHOGONAL = 1e-9


@dataclass(frozen=True)
class Turned:
    """A merged layer.

    gram: (k, k) inner products of the inputs' rotations less 1, of outputs with their factors in them; norm: of the
    merged one's. residual: over `norm`, how far it is from the same rule on whole matrices as the files have them: of
    BOFT, what merging factor by factor costs; of `compose`, that factors of outputs do not commute with rotations; of
    peft's polynomials, how far they are from rotations.
    """

    part: Part
    gram: Tensor
    norm: float
    residual: float


@dataclass(frozen=True)
class _Turn:
    """A part opened. stages: (m, count, b, b) rotations, fp64; of OFT m is 1; count is 1 where all blocks are `shared`.
    rescale: (out,); moved: distance of the rotations to what the part says.
    """

    method: OFT | BOFT
    stages: Tensor
    size: int | None
    rescale: Tensor | None
    moved: float

    @property
    def shared(self) -> bool:
        return isinstance(self.method, OFT) and self.method.shared

    def whole(self) -> Tensor:
        """All stages multiplied out, (count, span, span): stages that begin with the first mix neighbours."""
        if isinstance(self.method, OFT):
            return self.stages[0]
        return self.method._multiplied_out(self.stages, 0, self.method.factors)


def is_rotation(part: Part) -> bool:
    return isinstance(part.method, OFT | BOFT)


def powers(row: Rule, weights: Tensor, options: Mapping[str, Any]) -> Tensor:
    """What each input is raised to by itself: its weight, or its share of a mean; what adds up is multiplied by it."""
    return weights if row.ordered else weights.sign() * orthogonal.shares(weights) * options["strength"]


def turned(
    name: str, parts: Sequence[Part | None], weights: Tensor, row: Rule, options: Mapping[str, Any], size: int | None
) -> Turned:
    """A layer merged by a rule of rotations. parts: of all inputs; None where one does not have it, or at weight 0.
    size: how many inputs, or outputs, the layer has on the side that is turned, where a table says so.

    Raises:
        ConfigError: they are not all rotations of one side, or of no common shape.
        ShapeError: they are for other layers.
        StateError: a rotation, or the merged one, is not finite, or cannot be (see `orthogonal`).
    """
    try:
        return _turned(parts, weights, row, options, size)
    except (ConfigError, ShapeError, StateError) as error:
        raise type(error)(f"{name}: {error}") from error


def _turned(
    parts: Sequence[Part | None], weights: Tensor, row: Rule, options: Mapping[str, Any], size: int | None
) -> Turned:
    there = [part for part in parts if part is not None]
    _check(there, options["butterfly"])
    turns = [_opened(part, size) for part in there]
    if options["butterfly"] == "blocks":
        turns = [_as_blocks(turn) for turn in turns]
    aligned = _aligned(turns)
    exponents = powers(row, weights, options)
    who = [k for k, part in enumerate(parts) if part is not None]
    alone = len(who) == 1 and float(exponents[who[0]]) == 1

    def merged(rotations: Sequence[Tensor]) -> Tensor:
        """Those that are not there do not turn."""
        eye = torch.eye(rotations[0].shape[-1], dtype=torch.float64).expand_as(rotations[0])
        by_input = dict(zip(who, rotations, strict=True))
        assert row.rotations is not None
        return row.rotations([by_input.get(k, eye) for k in range(len(parts))], weights, options)

    stages = [merged([turn.stages[s] for turn in aligned]) for s in range(len(aligned[0].stages))]
    method = replace(aligned[0].method, rescaled=any(turn.rescale is not None for turn in aligned))
    made = _Turn(method, torch.stack(stages), aligned[0].size, _rescale(aligned, exponents[who]), 0.0)
    own = [_changes(turn) for turn in aligned]
    products = torch.stack([torch.stack([(a * b).sum() for b in own]) for a in own])
    found = _changes(made)
    norm = float(torch.linalg.vector_norm(found))
    wanted = _wanted(aligned, exponents[who], row, merged)
    far = float(torch.linalg.vector_norm(found - wanted)) if wanted is not None else 0.0
    far += math.fsum(abs(float(p)) * turn.moved for p, turn in zip(exponents[who], aligned, strict=True))
    if not math.isfinite(norm):
        raise StateError("the merged rotation is not finite")
    if alone and options["butterfly"] == "factors":
        return Turned(there[0], products, norm, 0.0)
    return Turned(_closed(made, there), products, norm, far / norm if norm else 0.0)


def _check(parts: Sequence[Part], butterfly: str) -> None:
    if others := sorted({part.method.name for part in parts if not is_rotation(part)}):
        raise ConfigError(
            f"an input has {', '.join(others)} here, another a rotation; they add up on the base's weights only: "
            "give the base and take a rule of changes, as 'weighted' or 'svd'"
        )
    methods: list[Any] = [part.method for part in parts]
    if len({method.side for method in methods}) > 1:
        raise ConfigError(
            "one rotates outputs (LyCORIS, kohya), another inputs (peft), and what that makes together only the base's "
            "weights tell: give the base and take a rule of changes, as 'weighted' or 'svd'"
        )
    if len({part.slices for part in parts}) > 1:
        raise ConfigError("the files split this fused layer in different ways")
    shapes = {(type(m), m.block_size, m.factors) if isinstance(m, BOFT) else (type(m),) for m in methods}
    if butterfly == "factors" and len(shapes) > 1:
        raise ConfigError(
            "BOFT is merged factor by factor, with BOFT of as many factors and as large blocks only; option "
            "butterfly='blocks' makes the whole rotations OFT, of larger blocks"
        )


def _opened(part: Part, size: int | None) -> _Turn:
    method: Any = part.method
    t = {key: tensor.double() for key, tensor in part.tensors.items()}
    key = next(k for k in ("blocks", "packed", "stages") if k in t)
    count = t[key].shape[1] if key == "stages" else t[key].shape[0]
    shared = isinstance(method, OFT) and method.shared
    own = None if shared and size is None else size if shared else count * method.block_size
    if size is not None and (own != size or size % method.block_size):
        raise ShapeError(
            f"{key} is {tuple(t[key].shape)} and the layer has {size} {method.side}s; is it for another base?"
        )
    turned_size = method.block_size if shared else count * method.block_size
    site = Site((turned_size, turned_size))
    wanted = method.shapes(site)[key]
    if tuple(t[key].shape) != wanted:
        raise ShapeError(f"{key} is {tuple(t[key].shape)}, {method} takes {wanted}")
    stages = method._rotations(t, site) if isinstance(method, BOFT) else method._rotation(t, site)[None]
    if not bool(torch.isfinite(stages).all()):
        raise StateError(f"{key} has NaN or infinity")
    eye, moved = torch.eye(stages.shape[-1], dtype=stages.dtype), 0.0
    if float((stages @ stages.transpose(-1, -2) - eye).abs().max()) > _ORTHOGONAL:
        nearest = orthogonal.polar(stages.flatten(0, 1)).view(stages.shape)
        stages, moved = nearest, float(torch.linalg.vector_norm(nearest - stages))
    plain = (
        replace(method, constraint=None) if isinstance(method, BOFT) else replace(method, constraint=None, neumann=0)
    )
    return _Turn(plain, stages, own, t["rescale"].flatten() if "rescale" in t else None, moved)


def _as_blocks(turn: _Turn) -> _Turn:
    """BOFT as OFT, exactly."""
    if isinstance(turn.method, OFT):
        return turn
    blocks = turn.whole()
    return replace(turn, method=OFT(blocks.shape[-1], turn.method.side), stages=blocks[None])


def _aligned(turns: Sequence[_Turn]) -> list[_Turn]:
    """The same, all of them in blocks of one size: the least common multiple, which divides what each of them divides.

    Raises:
        ShapeError: they are for layers of different sizes.
    """
    sizes = {turn.size for turn in turns if turn.size is not None}
    if len(sizes) > 1:
        raise ShapeError(
            f"the inputs turn {' and '.join(map(str, sorted(sizes)))} channels; are they for the same base?"
        )
    rows = {len(turn.rescale) for turn in turns if turn.rescale is not None}
    if len(rows) > 1:
        raise ShapeError(f"the inputs rescale {' and '.join(map(str, sorted(rows)))} outputs")
    blocks = {turn.method.block_size for turn in turns}
    if len(blocks) == 1 and len({turn.shared for turn in turns}) == 1:
        return list(turns)
    size, block = next(iter(sizes), None), math.lcm(*blocks)
    if size is None:
        raise ShapeError("blocks that all inputs share do not tell the layer's size; give the base")
    return [_in_blocks(turn, size, block) for turn in turns]


def _in_blocks(turn: _Turn, size: int, block: int) -> _Turn:
    b, k = turn.method.block_size, block // turn.method.block_size
    own = turn.stages[0].expand(size // b, b, b)
    made = own.new_zeros(size // block, k, b, k, b)
    index = torch.arange(k)
    made[:, index, :, index] = own.reshape(-1, k, b, b).transpose(0, 1)
    method = replace(turn.method, block_size=block, shared=False)  # pyright: ignore[reportCallIssue] # it is OFT
    return replace(turn, method=method, stages=made.reshape(1, size // block, block, block), size=size)


def _rescale(turns: Sequence[_Turn], powers: Tensor) -> Tensor | None:
    made: Tensor | None = None
    for turn, p in zip(turns, powers.tolist(), strict=True):
        if turn.rescale is None:
            continue
        if p != int(p) and not bool((turn.rescale > 0).all()):
            raise StateError("`rescale` has factors that are not above 0, of which there are no powers but whole ones")
        if p < 0 and not bool((turn.rescale != 0).all()):
            raise StateError("`rescale` has a factor of 0, which nothing undoes")
        own = turn.rescale if p == 1 else turn.rescale**p
        made = own if made is None else made * own
    return made


def _rescaled(blocks: Tensor, turn: _Turn) -> Tensor:
    """Rows of blocks times the factors of outputs, where those are what is turned."""
    if turn.rescale is None or turn.method.side == "input":
        return blocks
    if turn.rescale.numel() != blocks.shape[0] * blocks.shape[1]:
        raise ShapeError(
            f"`rescale` is of {turn.rescale.numel()} outputs, and {blocks.shape[0] * blocks.shape[1]} are turned"
        )
    return blocks * turn.rescale.view(len(blocks), -1, 1)


def _changes(turn: _Turn) -> Tensor:
    """What it makes of a weight of ones on the diagonal, less that: (count, span, span)."""
    blocks = turn.whole()
    return _rescaled(blocks, turn) - torch.eye(blocks.shape[-1], dtype=blocks.dtype)


def _wanted(turns: Sequence[_Turn], powers: Tensor, row: Rule, merged: Any) -> Tensor | None:
    """`_changes` of the same rule on whole matrices; None where that is what was done."""
    scaled = any(turn.rescale is not None for turn in turns) and turns[0].method.side == "output"
    if isinstance(turns[0].method, OFT) and not (row.ordered and scaled):
        return None
    wholes = [turn.whole() for turn in turns]
    eye = torch.eye(wholes[0].shape[-1], dtype=torch.float64)
    if not (row.ordered and scaled):
        total = replace(turns[0], rescale=_rescale(turns, powers))
        return _rescaled(merged(wholes), total) - eye
    made = eye.expand_as(wholes[0])
    for turn, blocks, p in zip(turns, wholes, powers.tolist(), strict=True):
        own = replace(turn, rescale=_rescale([turn], torch.tensor([p])))
        made = made @ _rescaled(orthogonal.power(blocks, p), own)
    return made - eye


def _closed(turn: _Turn, parts: Sequence[Part]) -> Part:
    """As a part has it, fp32."""
    q = orthogonal.uncayley(turn.stages.flatten(0, 1)).view(turn.stages.shape)
    b = turn.method.block_size
    if isinstance(turn.method, BOFT):
        t = {"stages": q if turn.method.side == "input" else -q / 2}
    elif turn.method.side == "input":
        rows, columns = torch.triu_indices(b, b, 1)
        t = {"packed": q[0][:, rows, columns]}
    else:
        t = {"blocks": q[0] / 2}
    if turn.rescale is not None:
        ones = next(part.tensors["rescale"].shape for part in parts if "rescale" in part.tensors)
        t["rescale"] = turn.rescale.reshape(ones)
    shape = next((part.shape for part in parts if part.shape is not None), None)
    return Part(turn.method, {k: v.float().contiguous() for k, v in t.items()}, slices=parts[0].slices, shape=shape)


_BUTTERFLY = Option(
    "factors",
    "factors: BOFT factor by factor, nearly; blocks: the whole rotation, exactly, as OFT of larger blocks",
    choices=("factors", "blocks"),
)
_STRENGTH = Option(1.0, "the power that the mean is raised to", -4.0, 4.0)

_MEAN = {"butterfly": _BUTTERFLY, "strength": _STRENGTH}

RULES = (
    Rule("compose", "OFT and BOFT one after another, R1^w1 R2^w2 ...: the last turns the weight first",
         "the definition", rotations=orthogonal.product, options={"butterfly": _BUTTERFLY}, ordered=True),
    Rule("polar", "the mean of OFT and BOFT: the rotation nearest to the mean matrix; weights count as shares",
         "the chordal mean; of two, the middle of the geodesic", rotations=orthogonal.chordal_mean, options=_MEAN,
         relative=True),
    Rule("geodesic", "the mean of OFT and BOFT by angles (Karcher's); weights count as shares",
         "Karcher 1977", rotations=orthogonal.geodesic_mean, options=_MEAN, relative=True),
    Rule("ortho", "the mean of OFT and BOFT that turns as far as they do (OrthoMerge); weights count as shares",
         "arXiv 2602.05943", rotations=orthogonal.lie_mean, options=_MEAN, relative=True),
)  # fmt: skip
