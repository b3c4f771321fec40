"""Rounding at random: to one of the two nearest values of a dtype, so that it is right on average.

Changes smaller than half a step vanish where all is rounded to the nearest value.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def stochastic(values: Tensor, dtype: torch.dtype, chance: Tensor) -> Tensor:
    """Each value to the one below it or above it in `dtype`, with the probability that makes the mean exact. values,
    result: fp32, which may be beyond the range of dtype; chance: as many numbers in [0, 1).

    Source: Gupta et al., arXiv 1502.02551.
    """
    info = torch.finfo(dtype)
    least, digits = round(math.log2(info.smallest_normal)), -round(math.log2(info.eps))
    size: Any = values.double().abs().numpy()  # numpy's ldexp is exact; torch's multiplies by a power it computes
    step = np.maximum(np.frexp(size)[1] - 1, least) - digits
    whole = np.floor(np.ldexp(size, -step) + chance.view_as(values).numpy())
    return torch.from_numpy(np.ldexp(whole, step)).copysign_(values).float()
