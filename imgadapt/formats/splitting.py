"""Fused layers: one layer of a model's own code that is several in diffusers (q, k, v), split.

Rows of the fused weight are rows of the layers', so what a method makes of each row alone is split by taking rows of
its tensors. What mixes rows (a rotation across an edge, a norm over all) is split by `attach`, which has the weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imgadapt.arch import Slice
from imgadapt.methods import Method, rotation

Rows = Sequence[tuple[int, int]]
"""(first, count) of runs of rows."""
Made = tuple[Method, dict[str, Tensor]]


def rows_of(method: Method, t: Mapping[str, Tensor]) -> int | None:
    """Outputs of the layer that the tensors are for; None where they do not tell."""
    by_name: dict[str, Callable[[], int | None]] = {
        "lora": lambda: t["up"].shape[0],
        "loha": lambda: t["up_1"].shape[1 if "core_1" in t else 0],
        "lokr": lambda: _first(t).shape[0] * _second_rows(t),
        "oft": lambda: t["blocks"].shape[0] * t["blocks"].shape[1] if "blocks" in t else None,
        "boft": lambda: (
            t["stages"].shape[1] * t["stages"].shape[2] if getattr(method, "side", "") == "output" else None
        ),
        "dora": lambda: rows_of(inner_of(method), t),
        "glora": lambda: t["b1"].shape[0],
        "ia3": lambda: len(t["vector"]) if getattr(method, "axis", "") == "output" else None,
        "full": lambda: t["diff"].shape[0],
        "norm": lambda: t["w_norm"].shape[0],
    }
    return by_name.get(method.name, lambda: None)()


def inputs_of(method: Method, t: Mapping[str, Tensor]) -> int | None:
    """Inputs of one output of the layer (its kernel among them) that the tensors are for; None if they do not tell."""
    name, inner = method.name, getattr(method, "inner", method)
    if "down" in t:
        return t["down"][0].numel() * (t["mid"][0, 0].numel() if "mid" in t else 1)
    if "down_1" in t:
        return t["down_1"].shape[1] * (t["core_1"][0, 0].numel() if "core_1" in t else 1)
    if inner.name == "lokr":
        first = (t["w1"] if "w1" in t else t["w1_b"]).shape[1]
        if "w2" in t:
            return first * t["w2"][0].numel()
        return first * t["w2_b"].shape[1] * (t["t2"][0, 0].numel() if "t2" in t else 1)
    if "packed" in t and len(t["packed"]) > 1:
        return len(t["packed"]) * rotation.block_size(t["packed"].shape[1])
    if name == "boft" and getattr(method, "side", "") == "input":
        return t["stages"].shape[1] * t["stages"].shape[2]
    for whole in ("diff", "b2"):
        if whole in t:
            return t[whole][0].numel() if t[whole].ndim > 1 else None
    return None


def scaled(slices: Sequence[Slice], total: int, rows: int) -> tuple[Slice, ...] | None:
    """The slices of a model whose fused layer has `rows` rows, where the table's has `total`."""
    if any(n * rows % total for s in slices for n in (s.start, s.first, s.rows)):
        return None
    return tuple(
        replace(s, start=s.start * rows // total, first=s.first * rows // total, rows=s.rows * rows // total)
        for s in slices
    )


def by_layer(slices: Sequence[Slice]) -> dict[str, list[Slice]]:
    """Layer -> its slices, in the order of its own rows."""
    found: dict[str, list[Slice]] = {}
    for s in sorted(slices, key=lambda s: s.start):
        found.setdefault(s.layer, []).append(s)
    return found


def split(method: Method, t: Mapping[str, Tensor], slices: Sequence[Slice]) -> dict[str, Made] | None:
    """Layer -> its adapter; None where only the whole weight can split it."""
    made: dict[str, Made] = {}
    for layer, own in by_layer(slices).items():
        taken = take(method, t, [(s.first, s.rows) for s in own], max(s.first + s.rows for s in slices))
        if taken is None:
            return None
        made[layer] = taken
    return made


def take(method: Method, t: Mapping[str, Tensor], rows: Rows, total: int) -> Made | None:
    """The adapter of some rows of its layer, in this order."""
    if list(rows) == [(0, total)]:
        return method, dict(t)
    known = _TAKE.get(method.name)
    return None if known is None else known(method, dict(t), rows)


def taken(method: Method, t: Mapping[str, Tensor], rows: Rows) -> Made:
    """`take` of a method all of whose tensors are rows: whole differences."""
    return method, {name: _runs(tensor, rows) for name, tensor in t.items()}


def _runs(tensor: Tensor, rows: Rows, axis: int = 0) -> Tensor:
    return torch.cat([tensor.narrow(axis, first, count) for first, count in rows], axis)


def _some(t: dict[str, Tensor], rows: Rows, *names: str, axis: int = 0) -> dict[str, Tensor]:
    return {name: _runs(tensor, rows, axis) if name in names else tensor for name, tensor in t.items()}


def _blocks(rows: Rows, size: int) -> Rows | None:
    """The same rows counted in blocks of `size`; None where one is cut."""
    if any(n % size for run in rows for n in run):
        return None
    return [(first // size, count // size) for first, count in rows]


def _take_lora(method: Any, t: dict[str, Tensor], rows: Rows) -> Made:
    """Without the ranks that do nothing in these rows: adapters of q, k and v may have been made one that way."""
    made = _some(t, rows, "up", "bias")
    up = made["up"].flatten(1)
    if bool((up[0] != 0).all()) or "mid" in t:  # of one row: an adapter trained as a whole is not read for this
        return method, made
    used = (up != 0).any(0)
    if bool(used.all()) or not bool(used.any()):
        return method, made
    rank = int(used.sum())
    made |= {"up": made["up"][:, used], "down": t["down"][used]}
    return replace(method, rank=rank, alpha=method.scale * rank, rank_stabilised=False), made


def _take_loha(method: Method, t: dict[str, Tensor], rows: Rows) -> Made:
    return method, _some(t, rows, "up_1", "up_2", axis=1 if "core_1" in t else 0)


def _take_lokr(method: Method, t: dict[str, Tensor], rows: Rows) -> Made | None:
    blocks = _blocks(rows, _second_rows(t))
    return None if blocks is None else (method, _some(t, blocks, "w1", "w1_a"))


def _take_oft(method: Any, t: dict[str, Tensor], rows: Rows) -> Made | None:
    if "blocks" not in t:
        return (method, t) if "rescale" not in t else (method, _some(t, rows, "rescale"))  # turned inputs are all rows'
    blocks = _blocks(rows, t["blocks"].shape[1])
    if blocks is None:
        return None
    if method.constraint is not None:  # it is over all blocks, so it is spent before they part
        q = rotation.skew(t["blocks"].float())
        limited = rotation.limited(q, method.constraint * t["blocks"].shape[0] * t["blocks"].shape[1])
        t["blocks"] = limited / 2
        method = replace(method, constraint=None)
    return method, {
        **_some(t, blocks, "blocks"),
        **_some({k: v for k, v in t.items() if k == "rescale"}, rows, "rescale"),
    }


def _take_dora(method: Any, t: dict[str, Tensor], rows: Rows) -> Made | None:
    if method.axis == "input" or method.inner.name not in _TAKE:
        return None
    inner = _TAKE[method.inner.name](method.inner, {k: v for k, v in t.items() if k != "magnitude"}, rows)
    return (
        None
        if inner is None
        else (replace(method, inner=inner[0]), {**inner[1], "magnitude": _runs(t["magnitude"], rows)})
    )


def _take_ia3(method: Any, t: dict[str, Tensor], rows: Rows) -> Made:
    return method, (t if method.axis == "input" else _some(t, rows, "vector", "diff_b"))


_TAKE: dict[str, Callable[[Any, dict[str, Tensor], Rows], Made | None]] = {
    "lora": _take_lora,
    "loha": _take_loha,
    "lokr": _take_lokr,
    "oft": _take_oft,
    "boft": lambda method, t, rows: (method, t) if method.side == "input" and "rescale" not in t else None,
    "dora": _take_dora,
    "glora": lambda method, t, rows: (method, _some(t, rows, "b1")),
    "ia3": _take_ia3,
    "full": lambda method, t, rows: (method, _some(t, rows, "diff", "diff_b")),
    "norm": lambda method, t, rows: (method, _some(t, rows, "w_norm", "b_norm")),
}


def inner_of(method: Any) -> Method:
    return method.inner


def _first(t: Mapping[str, Tensor]) -> Tensor:
    return t["w1"] if "w1" in t else t["w1_a"]


def _second_rows(t: Mapping[str, Tensor]) -> int:
    """Rows of LoKr's second factor."""
    if "w2" in t:
        return t["w2"].shape[0]
    return t["w2_a"].shape[1] if "t2" in t else t["w2_a"].shape[0]
