"""Everything random of a training, as functions of (seed, step, place, purpose): nothing to save, nothing to replay."""

import hashlib

import torch
from torch import Tensor


def generator(seed: int, *place: int | str) -> torch.Generator:
    """A CPU generator for one purpose at one place of a run."""
    text = "/".join(str(part) for part in (seed, *place))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def order(seed: int, count: int, step: int, batch: int) -> list[int]:
    """Which of `count` examples are in the batch of this step: every one once an epoch, in a new order each epoch."""
    places = range(step * batch, (step + 1) * batch)
    epochs = {place // count for place in places}
    shuffled = {e: torch.randperm(count, generator=generator(seed, e, "order")).tolist() for e in epochs}
    return [shuffled[place // count][place % count] for place in places]


def uniform(seed: int, step: int, batch: int, purpose: str) -> Tensor:
    """(batch,) numbers in [0, 1)."""
    return torch.rand(batch, generator=generator(seed, step, purpose))


def timesteps(seed: int, step: int, batch: int, total: int) -> Tensor:
    """(batch,) whole timesteps in [0, total), one in each of `batch` equal bins (less variance)."""
    jitter = uniform(seed, step, batch, "timestep")
    return ((torch.arange(batch) + jitter) / batch * total).long().clamp(0, total - 1)


def gaussian(seed: int, step: int, shape: torch.Size) -> Tensor:
    """Standard normal noise of `shape` (batch, ...), each sample from its own generator."""
    return torch.stack(
        [torch.randn(shape[1:], generator=generator(seed, step, place, "noise")) for place in range(shape[0])]
    )
