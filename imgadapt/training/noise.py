"""Everything random of a training, as functions of (seed, step, place, purpose): nothing to save, nothing to replay."""

import hashlib

import torch
from torch import Tensor
from torch.nn import functional as F


def generator(seed: int, *place: int | str) -> torch.Generator:
    """A CPU generator for one purpose at one place of a run."""
    return torch.Generator().manual_seed(number(seed, *place))


def number(seed: int, *place: int | str) -> int:
    """A whole number in [0, 2^63) for one purpose at one place of a run."""
    text = "/".join(str(part) for part in (seed, *place))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def uniform(seed: int, step: int, batch: int, purpose: str) -> Tensor:
    """(batch,) numbers in [0, 1)."""
    return torch.rand(batch, generator=generator(seed, step, purpose))


def chance(seed: int, step: int, purpose: str) -> float:
    """A number in [0, 1)."""
    return uniform(seed, step, 1, purpose).item()


def stratified(seed: int, step: int, batch: int, purpose: str = "timestep") -> Tensor:
    """(batch,) numbers in [0, 1), one in each of `batch` equal bins, in a random order."""
    bins = torch.randperm(batch, generator=generator(seed, step, purpose, "bins"))
    return (bins + uniform(seed, step, batch, purpose)) / batch


def gaussian(seed: int, step: int, shape: torch.Size, first: int = 0, *, purpose: str = "noise") -> Tensor:
    """Standard normal noise of `shape` (batch, ...), each sample from its own generator.

    first: the place of the first sample in the step's batch, so that a batch may be made in pieces.
    """
    places = range(first, first + shape[0])
    return torch.stack([torch.randn(shape[1:], generator=generator(seed, step, k, purpose)) for k in places])


def shaped(
    seed: int, step: int, shape: torch.Size, first: int = 0, *, offset: float = 0.0, pyramid: float = 0.0
) -> Tensor:
    """Noise (batch, channels, h, w) of a step.

    offset: this much of a normal number for each sample and channel is added (crosslabs.org, "Diffusion with Offset
        Noise"). pyramid: discount d of noise that is added at ever lower resolutions, d^i of it, six times, each size 2
        to 4 times smaller, and the sum scaled to variance 1 (multi-resolution noise, Jonathan Whitaker).
    """
    eps = gaussian(seed, step, shape, first)
    if pyramid:
        eps = torch.stack([_pyramid(x, seed, step, first + k, pyramid) for k, x in enumerate(eps)])
    if offset:
        eps = eps + offset * gaussian(seed, step, torch.Size((*shape[:2], 1, 1)), first, purpose="offset")
    return eps


def _pyramid(eps: Tensor, seed: int, step: int, place: int, discount: float, levels: int = 6) -> Tensor:
    made, (height, width) = eps.clone(), eps.shape[1:]
    source = generator(seed, step, place, "pyramid")
    h, w = height, width
    for level in range(1, levels + 1):
        ratio = 2 + 2 * torch.rand((), generator=source).item()
        h, w = max(1, int(h / ratio)), max(1, int(w / ratio))
        coarse = torch.randn(1, eps.shape[0], h, w, generator=source)
        made += discount**level * F.interpolate(coarse, (height, width), mode="bilinear")[0]
        if h == w == 1:
            break
    return made / made.std()
