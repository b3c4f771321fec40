"""Fused layers made one again: adapters of q, k and v as one adapter of the layer that they are in the model's code."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imgadapt.arch import Slice
from imgadapt.errors import FormatError
from imgadapt.formats.part import Part
from imgadapt.formats.splitting import Made, by_layer, inner_of, take
from imgadapt.methods.base import Method
from imgadapt.methods.lora import LoRA


class Unfusable(FormatError):
    """The layers' adapters are not one adapter of the fused layer. dense: their difference can be, written out."""

    def __init__(self, reason: str, *, dense: bool) -> None:
        super().__init__(reason)
        self.dense = dense


def fuse(parts: Mapping[str, Part], slices: Sequence[Slice]) -> Made:
    """One adapter of the fused layer, out of those of its layers (which need not all be there).

    Raises:
        Unfusable: there is none.
    """
    layers = by_layer(slices)
    whole = {layer: s[0] for layer, s in layers.items() if len(s) == 1}
    there = [layer for layer in layers if layer in parts]
    kinds = {parts[layer].method.name for layer in there}
    if len(kinds) > 1:
        raise Unfusable(f"{', '.join(sorted(kinds))} are not one method", dense=True)
    if len(layers) == 1 and there:  # the same layer with its rows in another order
        own = layers[there[0]]
        back = [(s.start, s.rows) for s in sorted(own, key=lambda s: s.first)]
        made = take(parts[there[0]].method, parts[there[0]].tensors, back, sum(s.rows for s in own))
        if made is None:
            raise Unfusable(f"{parts[there[0]].method.name} mixes rows that have another order there", dense=True)
        return made
    if len(whole) < len(layers):
        raise Unfusable("the layers' rows are interleaved there", dense=True)
    order = sorted(whole.values(), key=lambda s: s.first)
    return _FUSE.get(kinds.pop(), _never)([(s, parts.get(s.layer)) for s in order])


_Pieces = Sequence[tuple[Slice, Part | None]]


def written_out(method: Method) -> bool:
    """Whether its change can be worked out without the base's weights."""
    return method.merges and not method.needs_weight


def _never(pieces: _Pieces) -> Made:
    part = next(part for _, part in pieces if part is not None)
    raise Unfusable(f"{part.method.name} of parts is none of the whole", dense=written_out(part.method))


def _present(pieces: _Pieces) -> list[Part]:
    return [part for _, part in pieces if part is not None]


def _same(parts: Sequence[Part], *names: str) -> bool:
    """Whether these tensors are the same in all."""
    first = parts[0].tensors
    return all(
        part.tensors.keys() == first.keys()
        and all(name not in first or torch.equal(part.tensors[name], first[name]) for name in names)
        for part in parts[1:]
    )


def _stacked(pieces: _Pieces, name: str) -> Tensor:
    """A tensor of all pieces, row after row, zeros for those that are not there."""
    like = _present(pieces)[0].tensors[name]
    return torch.cat(
        [like.new_zeros(s.rows, *like.shape[1:]) if part is None else part.tensors[name] for s, part in pieces]
    )


def _widest(tensors: Sequence[Tensor], gains: Sequence[float]) -> torch.dtype:
    """A dtype that holds all of them exactly, multiplied by their gains."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype if all(gain == 1 for gain in gains) else torch.promote_types(dtype, torch.float32)


def _diagonal(pieces: _Pieces, name: str, gains: Sequence[float]) -> Tensor:
    """The pieces' tensors (rows, rank, ...) down the diagonal."""
    parts = _present(pieces)
    ranks = [part.tensors[name].shape[1] for part in parts]
    like, dtype = parts[0].tensors[name], _widest([*(part.tensors[name] for part in parts)], gains)
    made = like.new_zeros(sum(s.rows for s, _ in pieces), sum(ranks), *like.shape[2:], dtype=dtype)
    row = column = 0
    gain = iter(gains)
    for s, part in pieces:
        if part is not None:
            up = part.tensors[name]
            factor = next(gain)
            made[row : row + s.rows, column : column + up.shape[1]] = up if factor == 1 else up.to(dtype) * factor
            column += up.shape[1]
        row += s.rows
    return made


def _fuse_lora(pieces: _Pieces) -> Made:
    parts = _present(pieces)
    method: Any = parts[0].method
    bias = {"bias": _stacked(pieces, "bias")} if any("bias" in part.tensors for part in parts) else {}
    if bias and not all("bias" in part.tensors for part in parts):
        raise Unfusable("some of the layers' adapters have a bias and some have none", dense=True)
    if len({part.method for part in parts}) == 1 and _same(parts, "down", "mid"):
        return method, {**parts[0].tensors, "up": _stacked(pieces, "up"), **bias}
    if any("mid" in part.tensors for part in parts):
        raise Unfusable("Tucker cores of several layers are not one", dense=True)
    rank = sum(part.tensors["down"].shape[0] for part in parts)
    scale = method.scale
    gains = [part.method.scale / scale for part in parts]
    if bias and any(gain != 1 for gain in gains):
        raise Unfusable("the layers' biases are of different alpha / rank", dense=True)
    down = torch.cat([part.tensors["down"] for part in parts])  # of the widest dtype
    made = LoRA(rank=rank, alpha=scale * rank, bias=bool(bias))
    return made, {"down": down, "up": _diagonal(pieces, "up", gains), **bias}


def _fuse_loha(pieces: _Pieces) -> Made:
    parts = _present(pieces)
    method: Any = parts[0].method
    if any("core_1" in part.tensors for part in parts):
        raise Unfusable("Tucker cores of several layers are not one", dense=True)
    if len({part.method for part in parts}) == 1 and _same(parts, "down_1", "down_2"):
        return method, {**parts[0].tensors, "up_1": _stacked(pieces, "up_1"), "up_2": _stacked(pieces, "up_2")}
    gains = [part.method.scale / method.scale for part in parts]
    ones = [1.0 for _ in parts]
    t = {f"down_{k}": torch.cat([part.tensors[f"down_{k}"] for part in parts]) for k in (1, 2)}
    t |= {"up_1": _diagonal(pieces, "up_1", gains), "up_2": _diagonal(pieces, "up_2", ones)}
    rank = len(t["down_1"])
    return replace(method, rank=rank, alpha=method.scale * rank, rank_stabilised=False), t


def _fuse_lokr(pieces: _Pieces) -> Made:
    parts = _present(pieces)
    if len(parts) < len(pieces) or not _same(parts, "w2", "w2_a", "w2_b", "t2", "w1_b") or _scales(parts) > 1:
        raise Unfusable("the layers' Kronecker products are of different second factors", dense=True)
    name = "w1" if "w1" in parts[0].tensors else "w1_a"
    method: Any = parts[0].method
    return method, {**parts[0].tensors, name: _stacked(pieces, name)}


def _scales(parts: Sequence[Part]) -> int:
    return len({part.method.scale for part in parts})


def _fuse_oft(pieces: _Pieces) -> Made:
    parts = _present(pieces)
    method: Any = parts[0].method
    if method.side == "input":
        if (
            len(parts) < len(pieces)
            or len({part.method for part in parts}) > 1
            or not _same(parts, "packed", "rescale")
        ):
            raise Unfusable("rotations of the inputs of several layers are not one", dense=False)
        return method, dict(parts[0].tensors)
    size = method.block_size
    alike = len({part.method for part in parts}) == 1 and method.constraint is None
    if not alike or any(s.rows % size for s, _ in pieces) or (method.rescaled and len(parts) < len(pieces)):
        raise Unfusable("the layers' rotations are of different blocks, or limited", dense=False)
    like = parts[0].tensors["blocks"]
    blocks = torch.cat(
        [like.new_zeros(s.rows // size, size, size) if part is None else part.tensors["blocks"] for s, part in pieces]
    )
    rescale = {"rescale": _stacked(pieces, "rescale")} if method.rescaled else {}
    return method, {"blocks": blocks, **rescale}


def _fuse_dora(pieces: _Pieces) -> Made:
    parts = _present(pieces)
    method: Any = parts[0].method
    if method.axis == "input":
        raise Unfusable("a norm over the rows of one layer is none over all", dense=False)
    if len({(part.method.axis, part.method.inner.name) for part in parts}) > 1:  # pyright: ignore[reportAttributeAccessIssue] # they are DoRA
        raise Unfusable("the layers' DoRAs are of different axes, or over different methods", dense=False)
    if len(parts) < len(pieces):
        raise Unfusable("DoRA of some of the layers needs the norms of the others", dense=False)
    inner = [
        (
            s,
            None
            if part is None
            else Part(inner_of(part.method), {k: v for k, v in part.tensors.items() if k != "magnitude"}),
        )
        for s, part in pieces
    ]
    made, tensors = _FUSE.get(method.inner.name, _never)(inner)
    return replace(method, inner=made), {**tensors, "magnitude": _stacked(pieces, "magnitude")}


def _fuse_glora(pieces: _Pieces) -> Made:
    parts = _present(pieces)
    if len(parts) < len(pieces) or len({part.method for part in parts}) > 1 or not _same(parts, "a1", "a2", "b2"):
        raise Unfusable("the layers' changes of the input are different", dense=False)
    return parts[0].method, {**parts[0].tensors, "b1": _stacked(pieces, "b1")}


def _fuse_ia3(pieces: _Pieces) -> Made:
    parts = _present(pieces)
    method: Any = parts[0].method
    if method.axis == "output" and not method.absolute and len({part.method for part in parts}) == 1:
        return method, {"vector": _stacked(pieces, "vector")}
    if len(parts) == len(pieces) and len({part.method for part in parts}) == 1:
        if method.axis == "output":
            return method, {"vector": _stacked(pieces, "vector")}
        if _same(parts, "vector"):
            return method, dict(parts[0].tensors)
    raise Unfusable("the layers' factors are not one layer's", dense=False)


def _fuse_full(pieces: _Pieces) -> Made:
    parts = _present(pieces)
    method: Any = parts[0].method
    if (
        len({part.tensors.keys() == parts[0].tensors.keys() for part in parts}) > 1
        or len({p.method for p in parts}) > 1
    ):
        raise Unfusable("some of the layers' adapters have a bias and some have none", dense=False)
    if method.absolute and len(parts) < len(pieces):
        raise Unfusable("weights that are set need those of all of its layers", dense=False)
    return method, {name: _stacked(pieces, name) for name in parts[0].tensors}


_FUSE: dict[str, Callable[[_Pieces], Made]] = {
    "lora": _fuse_lora, "loha": _fuse_loha, "lokr": _fuse_lokr, "oft": _fuse_oft, "dora": _fuse_dora,
    "glora": _fuse_glora, "ia3": _fuse_ia3, "full": _fuse_full, "norm": _fuse_full,
}  # fmt: skip
