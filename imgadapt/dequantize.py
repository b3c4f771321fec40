"""The weight of a module as floating-point numbers, however it is stored, and storing a changed one the same way."""

from typing import Any

import torch
from torch import Tensor, nn

from imgadapt.errors import StateError


def weight_of(module: nn.Module, parameter: str = "weight") -> Tensor:
    """The values of a weight: the parameter itself where it is plain, else its dequantised values, detached.

    Raises:
        StateError: it has no values here (on 'meta', and no offload hook knows them), or a quantisation unknown to us.
    """
    weight: Any = module._parameters[parameter]
    if weight.is_meta:
        held = getattr(getattr(module, "_hf_hook", None), "weights_map", None)  # accelerate's sequential offload
        if held is None:
            raise StateError("the weights are on 'meta': load them first")
        weight = held[parameter]
    if weight.dtype in _NARROW:
        return weight.detach().to(torch.float32)
    return weight


_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)
