"""Block-diagonal rotations, which OFT and BOFT are made of."""

import math

import torch
from torch import Tensor

from imgadapt.errors import ConfigError
from imgadapt.sites import Site


def skew(blocks: Tensor) -> Tensor:
    """B - Bᵀ of blocks (..., b, b)."""
    return blocks - blocks.transpose(-1, -2)


def unpacked(vector: Tensor) -> Tensor:
    """(count, b * (b - 1) / 2), rows of the upper triangle, as skew-symmetric blocks (count, b, b)."""
    size = block_size(vector.shape[1])
    rows, columns = torch.triu_indices(size, size, 1, device=vector.device)
    upper = vector.new_zeros(len(vector), size, size).index_put(
        (torch.arange(len(vector), device=vector.device)[:, None], rows, columns), vector
    )
    return upper - upper.transpose(1, 2)


def block_size(packed: int) -> int:
    """b, of a packed upper triangle of b * (b - 1) / 2 elements; 0 if there is none."""
    size = (1 + math.isqrt(1 + 8 * packed)) // 2
    return size if size * (size - 1) // 2 == packed else 0


def cayley(q: Tensor) -> Tensor:
    """(I - Q)(I + Q)⁻¹ of skew-symmetric blocks (..., b, b): exactly orthogonal."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    inverse = torch.linalg.inv_ex(eye + q).inverse  # its backward keeps that alone, that of solve_ex three tensors
    return 2 * inverse - (eye + 0 * q)  # infinity, which would invert to 0, gives NaN


def neumann(q: Tensor, terms: int) -> Tensor:
    """peft's polynomial for (I + Q)(I - Q)⁻¹, the transpose of `cayley`: I + 2Q + ... + 2Qⁿ⁻² + Qⁿ⁻¹ (n = terms), which
    is orthogonal only for small Q. Of 2 terms it is I + 2Q, and 3 are 4 (huggingface/peft tuners/oft/layer.py,
    `_cayley_batch`).
    """
    total = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    last = {1: 0, 2: 1, 3: 3}.get(terms, terms - 1)
    power = q
    for k in range(1, last + 1):
        total = total + (1 if k == last > 1 else 2) * power
        power = power @ q
    return total


def limited(q: Tensor, most: float) -> Tensor:
    """Q shrunk to a Frobenius norm over all its blocks of at most `most` (LyCORIS functional/diag_oft.py)."""
    norm = torch.linalg.vector_norm(q) + 1e-8
    return q * (most / norm).clamp(max=1)


def limited_each(q: Tensor, most: float) -> Tensor:
    """Each block of Q shrunk to a Frobenius norm of at most `most` (peft's `coft`)."""
    norm = torch.linalg.vector_norm(q, dim=(-2, -1), keepdim=True)
    return q * (most / norm.clamp(min=1e-30)).clamp(max=1)


def rotate(x: Tensor, blocks: Tensor, site: Site, onto: Tensor | None) -> Tensor:
    """blocks (count, b, b) applied to the channels of an activation of the site; added to `onto` where given."""
    count, size = blocks.shape[:2]
    if site.kind == "conv":
        z = torch.matmul(blocks, x.unflatten(1, (count, size)).flatten(3)).reshape(x.shape)
        return z if onto is None else onto + z
    z = torch.bmm(x.reshape(-1, count, size).transpose(0, 1), blocks.transpose(1, 2)).transpose(0, 1)
    if onto is not None and onto.is_contiguous():
        return (onto.view(z.shape) + z).view(x.shape)
    return z.reshape(x.shape) if onto is None else onto + z.reshape(x.shape)


def rotate_rows(weight: Tensor, blocks: Tensor) -> Tensor:
    """blocks (count, b, b) applied to the rows of a weight."""
    count, size = blocks.shape[:2]
    return torch.bmm(blocks, weight.reshape(count, size, -1)).view(weight.shape)


def rotate_columns(weight: Tensor, blocks: Tensor) -> Tensor:
    """W @ blockdiag(blocks)ᵀ over the flattened inputs of a weight."""
    count, size = blocks.shape[:2]
    rows = weight.reshape(len(weight), count, size).transpose(0, 1)
    return torch.bmm(rows, blocks.transpose(1, 2)).transpose(0, 1).reshape(weight.shape)


def rotated_size(site: Site, side: str) -> int:
    """How many rows, or inputs, blocks must divide: those of one group, which a rotation does not leave."""
    return site.rows // site.groups if side == "output" else site.fan_in


def check_side(side: str) -> None:
    if side not in ("input", "output"):
        raise ConfigError(
            f"side is {side!r}; it must be 'input' (as peft rotates) or 'output' (as LyCORIS and kohya do)"
        )
