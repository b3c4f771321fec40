"""What is made of one tensor for many layers, made once."""

from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_MADE: Any = WeakIdKeyDictionary()


def once(tensor: Tensor, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives of a tensor: one object for all that ask with this key, as long as one of them keeps it."""
    made: WeakValueDictionary[Hashable, Tensor] = _MADE.setdefault(tensor, WeakValueDictionary())
    found = made.get(key)
    if found is None:
        found = made[key] = make()
    return found


def cast(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """tensor.to(device, dtype), once; whole numbers, which are indices, stay such."""
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    if tensor.device == device and tensor.dtype == dtype:
        return tensor
    return once(tensor, (device, dtype), lambda: tensor.to(device, dtype))


def corner(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The first elements of a tensor along each of its axes, a copy, once."""
    if tuple(tensor.shape) == shape:
        return tensor
    return once(tensor, shape, lambda: tensor[tuple(slice(n) for n in shape)].contiguous())
