"""What stands beside the layers of a file once for all of them, put together from what each layer has of it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from imgadapt.errors import FormatError


class Beside:
    """Tensors by key, each the least one of which all that came are the first rows, columns, ...: peft has random
    projections once, of the largest layer's size.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.wrong = ""

    def add(self, own: Mapping[str, Tensor]) -> None:
        """What a layer has; `wrong` says, at the end, whether some had others."""
        for key, tensor in own.items():
            first = self.tensors.setdefault(key, tensor)
            if first is tensor or self.wrong:
                continue
            whole = _joined(first, tensor)
            if whole is None:
                self.wrong = f"a file has one {key} for all layers, and these have several"
            else:
                self.tensors[key] = whole

    def check(self) -> None:
        """Raises FormatError: there are several where a file has one."""
        if self.wrong:
            raise FormatError(self.wrong)


def _joined(first: Tensor, second: Tensor) -> Tensor | None:
    """The least tensor in whose first corner both are; None: there is none."""
    if first.dtype != second.dtype or first.ndim != second.ndim:
        return None
    inner = tuple(slice(min(a, b)) for a, b in zip(first.shape, second.shape, strict=True))
    if not torch.equal(first[inner], second[inner]):
        return None
    large, small = (first, second) if first.numel() >= second.numel() else (second, first)
    shape = [max(a, b) for a, b in zip(first.shape, second.shape, strict=True)]
    if tuple(shape) == tuple(large.shape):
        return large
    made = sized(large, shape)
    made[tuple(map(slice, small.shape))] = small
    return made


def sized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Its first corner of that shape, zeros where it has none."""
    ends = [n for have, wanted in zip(tensor.shape, shape, strict=True) for n in (wanted - have, 0)]
    return F.pad(tensor, ends[::-1]) if any(ends) else tensor
