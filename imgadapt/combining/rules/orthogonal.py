"""Rotations as a group: powers, products, means, and the way back to what Cayley's map makes them of.

Blocks are (count, b, b), orthogonal, fp64. Several rotations come as a list, of one shape.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from imgadapt.errors import StateError
from imgadapt.methods.rotation import cayley

_SMALLEST = 1e-6  # what nearly cancels, or turns by nearly 180 degrees, is not told apart from what does
_STEPS, _STILL = 100, 1e-13


def uncayley(blocks: Tensor) -> Tensor:
    """Q with `cayley(Q)` = R: (I - R)(I + R)⁻¹, for the map is its own inverse.

    Raises:
        StateError: a block turns something by 180 degrees (R has an eigenvalue of -1), which no Q does.
    """
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    inverse, info = torch.linalg.inv_ex(eye + blocks)
    # the smallest singular value of I + R, from below, by the norm of the inverse
    if bool(info.any()) or not float(torch.linalg.vector_norm(inverse, dim=(1, 2)).max()) < 1 / _SMALLEST:
        raise StateError("the merged rotation turns something by 180 degrees, which OFT's tensors cannot say")
    q = 2 * inverse - eye
    return (q - q.transpose(1, 2)) / 2


def power(blocks: Tensor, exponent: float) -> Tensor:
    """R to a power, exp(exponent * log R): that much of the way along the geodesic from I to R; negative: back.

    Raises:
        StateError: see `uncayley`.
    """
    if exponent in (1, -1):
        return blocks if exponent == 1 else blocks.transpose(1, 2)
    angles, vectors = _angles(blocks)
    turned = vectors * torch.exp(1j * exponent * angles)[:, None]
    return (turned @ vectors.mH).real


def logarithm(blocks: Tensor) -> Tensor:
    """The skew-symmetric S of least norm with exp(S) = R; raises as `uncayley`."""
    angles, vectors = _angles(blocks)
    made = ((vectors * (1j * angles)[:, None]) @ vectors.mH).real
    return (made - made.transpose(1, 2)) / 2


def _angles(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """By how much each eigenvector of R turns, radians (count, b), and the eigenvectors."""
    values, vectors = torch.linalg.eigh(1j * uncayley(blocks).to(torch.complex128))  # Q v = -i λ v
    return 2 * values.atan(), vectors


def polar(blocks: Tensor) -> Tensor:
    """The nearest rotation to each block, its polar factor.

    Raises:
        StateError: there is none that is nearest, or the nearest one is a reflection.
    """
    left, values, right = torch.linalg.svd(blocks)
    made = left @ right
    if not (float(values.min()) > _SMALLEST and float(torch.linalg.det(made).min()) > 0):
        raise StateError("the rotations point opposite ways in a plane, so that no rotation is in the middle of them")
    return made


def shares(weights: Tensor) -> Tensor:
    """|w| / sum |w|."""
    return weights.abs() / weights.abs().sum().clamp(min=1e-300)


def product(rotations: Sequence[Tensor], weights: Tensor, options: Mapping[str, Any]) -> Tensor:
    """R₁^w₁ R₂^w₂ ..."""
    made = torch.eye(rotations[0].shape[-1], dtype=torch.float64).expand_as(rotations[0])
    for blocks, weight in zip(rotations, weights.tolist(), strict=True):
        made = made @ power(blocks, weight) if weight else made
    return made


def chordal_mean(rotations: Sequence[Tensor], weights: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The polar factor of Σ p R, p = |w| / Σ |w|: whose squared distances to all, as matrices, are least. Of two at
    equal weights it is the middle of the geodesic between them. Negative weights: of the inverse.
    """
    return power(polar(_sum(_towards(rotations, weights), shares(weights))), options["strength"])


def geodesic_mean(rotations: Sequence[Tensor], weights: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Whose squared angles to all are least (Karcher's mean), p and negative weights as in `chordal_mean`.

    Raises:
        StateError: they are too far apart for there to be one such.
    """
    there, p = _towards(rotations, weights), shares(weights)
    made = polar(_sum(there, p))
    for _ in range(_STEPS):
        step = _sum([logarithm(made.transpose(1, 2) @ blocks) for blocks in there], p)
        made = made @ torch.matrix_exp(step)
        if float(step.abs().max()) < _STILL:
            return power(polar(made), options["strength"])
    raise StateError(f"their mean was not found in {_STEPS} steps; the rotations are too far apart, take rule 'polar'")


def lie_mean(rotations: Sequence[Tensor], weights: Tensor, options: Mapping[str, Any]) -> Tensor:
    """OrthoMerge (arXiv 2602.05943): Q̄ = (Σ p ‖Q‖ / ‖Σ p Q‖) Σ p Q, norms over all blocks; with equal weights the
    paper's (1 / T)(Σ ‖Q‖ / ‖Σ Q‖) Σ Q. p and negative weights as in `chordal_mean`.

    Raises:
        StateError: they cancel, so that nothing is left that could be as long as they are.
    """
    own, p = [uncayley(blocks) for blocks in _towards(rotations, weights)], shares(weights)
    total, wanted = (
        _sum(own, p),
        float(sum(float(x) * torch.linalg.vector_norm(q) for x, q in zip(p, own, strict=True))),
    )
    length = float(torch.linalg.vector_norm(total))
    if wanted and length < _SMALLEST * wanted:
        raise StateError("the rotations cancel each other, and 'ortho' keeps their length; take rule 'polar'")
    return power(cayley(total * (wanted / length if length else 1.0)), options["strength"])


def _towards(rotations: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    return [r if w >= 0 else r.transpose(1, 2) for r, w in zip(rotations, weights.tolist(), strict=True)]


def _sum(blocks: Sequence[Tensor], factors: Tensor) -> Tensor:
    return torch.stack([float(f) * b for f, b in zip(factors, blocks, strict=True)]).sum(0)
