"""Starts that are made of what layers read: EVA and CorDA."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from imgadapt.errors import ConfigError
from imgadapt.formats import Part
from imgadapt.methods import LoRA
from imgadapt.training.starts.place import Place, largest, require, top
from imgadapt.training.starts.shown import MOST, Show, moments

_DAMP = 0.01  # of a moment's mean diagonal, added to it so that it can be inverted (peft's tuners/lora/corda.py)


def eva(places: Sequence[Place], show: Show, *, rho: float = 2.0, most: int = MOST) -> dict[str, Part]:
    """down = the directions in which most of what a layer reads lies, V of X = U S Vᵀ; up = 0 (arXiv 2410.07170).

    rho: ranks go where they explain most, up to rho times a layer's own, the sum staying what it was; a layer that gets
        none is left out. 1: all keep theirs. The scale of each stays, too.
    most: see `moments`. X is taken as it is; peft's takes its mean off first.

    Raises:
        ConfigError: rho below 1, or a layer reads no numbers.
    """
    require(places, "eva")
    if not rho >= 1:
        raise ConfigError(f"rho is {rho!r}; it must be 1 or more")
    found: list[tuple[Place, Tensor]] = []
    shares: list[Tensor] = []
    for place, moment in moments(places, show, most=most):
        count = min(round(rho * place.lora.rank), place.site.fan_in, place.site.rows)
        values, vectors = largest(moment, count)
        whole = moment.diagonal().double().sum().clamp(min=torch.finfo(torch.float64).tiny)
        shares.append((values / whole).cpu())
        found.append((place, vectors.t().float().cpu()))
    return {
        place.name: place.plain(torch.zeros(place.site.rows, rank), down[:rank], _of_rank(place.lora, rank))
        for (place, down), rank in zip(found, _ranks(places, shares), strict=True)
        if rank
    }


def _ranks(places: Sequence[Place], shares: Sequence[Tensor]) -> list[int]:
    """How many of each layer's directions are among those that explain the largest shares of what their layers read."""
    rows = [(-float(share), k, n) for k, own in enumerate(shares) for n, share in enumerate(own)]
    chosen = sorted(rows)[: sum(place.lora.rank for place in places)]
    return [sum(k == place for _, place, _ in chosen) for k in range(len(shares))]


def _of_rank(lora: LoRA, rank: int) -> LoRA:
    """The same scale at another rank; nothing is said that need not be."""
    if rank == lora.rank:
        return lora
    alpha = lora.scale * (math.sqrt(rank) if lora.rank_stabilised else rank)
    return replace(lora, rank=rank, alpha=None if alpha == rank and not lora.rank_stabilised else alpha)


def corda(
    places: Sequence[Place], show: Show, *, mode: Literal["ipm", "kpm"] = "ipm", most: int = MOST
) -> dict[str, Part]:
    """up_0 = U √S, down_0 = √S Vᵀ C⁻¹ of W C = U S Vᵀ, with C the mean of x xᵀ over what a layer reads: parts of W, in
    the order of what they do to these inputs (arXiv 2406.05223).

    mode: "ipm": the first ones are trained, shown what is to be learnt; "kpm": the last ones, shown what is to be kept.
    Every input counts alike; peft divides each batch's by the largest number in it first, which weighs batches anew.

    Raises:
        ConfigError: no such mode, or a layer reads no numbers.
    """
    require(places, "corda")
    if mode not in ("ipm", "kpm"):
        raise ConfigError(f"mode is {mode!r}; it must be 'ipm' or 'kpm'")
    return {place.name: _oriented(place, moment, mode) for place, moment in moments(places, show, most=most)}


def _oriented(place: Place, moment: Tensor, mode: str) -> Part:
    c, rank = moment.double(), place.lora.rank
    c = c + torch.eye(len(c), dtype=c.dtype, device=c.device) * (_DAMP * c.diagonal().mean()).clamp(min=1e-30)
    turned = place.weight().double() @ c
    if mode == "ipm":
        u, s, v = top(turned, rank)
    else:
        u, s, v = torch.linalg.svd(turned, full_matrices=False)
        u, s, v = u[:, -rank:], torch.where(s > 1e-12 * s[0], s, 0)[-rank:], v[-rank:]
    back = torch.cholesky_solve(v.t(), torch.linalg.cholesky(c)).t()
    return place.anchored(*place.split(u, s, back))
