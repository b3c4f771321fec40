"""Random numbers by place: each element of each tensor has its own, whatever is computed around it."""

import hashlib

import numpy as np
import torch
from torch import Tensor

_BLOCK = 8  # Philox 4x64 makes four words of 64 bits at once, each of them two numbers


def mask_key(seed: int, digest: str, name: str) -> int:
    """What the numbers of one tensor of one adapter are keyed by. digest: of the adapter; name: of the tensor."""
    text = f"{seed}\0{digest}\0{name}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def uniform(key: int, start: int, count: int) -> Tensor:
    """Numbers of elements start ... start + count - 1, (count,), in [0, 1), fp32: multiples of 2⁻²⁴.

    Counter-based (Philox 4x64-10, Salmon et al. 2011): a tile's numbers do not depend on the tiles before it.
    """
    block, skip = divmod(start, _BLOCK)
    generator = np.random.Generator(np.random.Philox(key=key, counter=block))
    return torch.from_numpy(generator.random(skip + count, dtype=np.float32)[skip:])
