"""Random projections from a seed, which many layers share."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from imgadapt.errors import ConfigError, ShapeError

STREAMS = 2**16
"""Of a seed: torch's CPU generator reads 32 bits of it."""


MOST = 2**27
"""Numbers of the projections of one layer."""


def check_seed(seed: int | None) -> None:
    """Raises ConfigError unless seed is None or a whole number that leaves room for its streams."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32 // STREAMS):  # pyright: ignore[reportUnnecessaryIsInstance] # a file may say anything
        raise ConfigError(f"seed is {seed!r}; it must be a whole number from 0 to {2**32 // STREAMS - 1}, or None")


@lru_cache(maxsize=32)
def rows(seed: int, stream: int, count: int, width: int, bound: float = 1.0) -> Tensor:
    """(count, width), uniform in [-bound, bound): each row is the same however many follow it, so a smaller layer's are
    the first of a larger one's. Not to be changed: it is one tensor for all.
    """
    return drawn(seed, stream, count, width, bound)


@lru_cache(maxsize=32)
def columns(seed: int, stream: int, height: int, shape: tuple[int, ...], bound: float = 1.0) -> Tensor:
    """(height, *shape), the transpose of `rows`."""
    return drawn(seed, stream, math.prod(shape), height, bound).t().reshape(height, *shape)


def drawn(seed: int, stream: int, count: int, width: int, bound: float) -> Tensor:
    """`rows` that nothing keeps."""
    if wrong := too_large(count * width):
        raise ShapeError(wrong)
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator().manual_seed(seed * STREAMS + stream)
        values = torch.rand(count * width, generator=generator, dtype=torch.float32, device="cpu")
        return values.mul_(2).sub_(1).mul_(bound).view(count, width)


def too_large(size: int) -> str | None:
    """Of numbers that are drawn for one layer."""
    return None if size <= MOST else f"its projections would be of {size:,} numbers, more than any layer's"
