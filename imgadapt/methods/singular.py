"""The largest singular directions of a weight, for methods that keep them in their files."""

import torch
from torch import Tensor

_OVER = 16
"""How many more than asked an approximation looks for."""
_PASSES = 8


@torch.no_grad()
def largest(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """u (out, rank), s (rank,) and v (rank, in * kernel) in fp32: exact where the rank is no small part of the
    weight's, else by subspace iteration from a fixed start (arXiv 0909.4061), where the last of them are approximate.
    """
    w = weight.detach().flatten(1).float()
    size = rank + _OVER
    if 4 * size > min(w.shape):
        u, s, v = torch.linalg.svd(w, full_matrices=False)
    else:
        start = torch.randn(w.shape[1], size, generator=torch.Generator().manual_seed(0), device="cpu")
        q = torch.linalg.qr(w @ start.to(w.device)).Q
        for _ in range(_PASSES):
            q = torch.linalg.qr(w @ torch.linalg.qr(w.t() @ q).Q).Q
        u, s, v = torch.linalg.svd(q.t() @ w, full_matrices=False)
        u = q @ u
    return u[:, :rank].contiguous(), s[:rank].contiguous(), v[:rank].contiguous()
