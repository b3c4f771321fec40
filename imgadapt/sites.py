"""Site: the geometry of one layer, and its operation with another weight."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Site:
    """What a method may know of the layer it acts on: shapes and convolution arguments, no values.

    shape: of the weight: (out, in) of a linear layer, (out, in / groups, *kernel) of a convolution.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """The site that `module` is, or None: linear layers and 1-, 2- and 3-d convolutions are sites."""
        if isinstance(module, nn.Linear):
            return cls((module.out_features, module.in_features))
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if type(module).forward not in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
                return None  # pads or crops in a forward of its own (diffusers' causal convolutions)
            return cls(
                tuple(module.weight.shape),
                tuple(module.stride),
                module.padding if isinstance(module.padding, str) else tuple(module.padding),
                tuple(module.dilation),
                module.groups,
                module.padding_mode,
            )
        return None

    @property
    def kernel(self) -> tuple[int, ...]:
        """Extent of the convolution kernel; () for a linear layer."""
        return self.shape[2:]

    @property
    def rows(self) -> int:
        """Output features or channels."""
        return self.shape[0]

    def op(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's operation on x with `weight` (any number of output rows), without bias."""
        if not self.kernel:
            return F.linear(x, weight)
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._edges(), mode=self.padding_mode)
            padding = 0
        convolve = _CONVOLVE[len(self.kernel)]
        return convolve(x, weight, None, self.stride, padding, self.dilation, self.groups)

    def spread(self, x: Tensor, weight: Tensor) -> Tensor:
        """`op` with the same few rows (r, in / groups, *kernel) for every group: (batch, groups * r, ...)."""
        return self.op(x, weight.repeat(self.groups, *(1 for _ in weight.shape[1:])) if self.groups > 1 else weight)

    def mix(self, x: Tensor, weight: Tensor) -> Tensor:
        """Mix what `spread` gave, group by group and position by position, with weight (out, r)."""
        if not self.kernel:
            return F.linear(x, weight)
        weight = weight.reshape(*weight.shape[:2], *(1 for _ in self.kernel))
        return _CONVOLVE[len(self.kernel)](x, weight, groups=self.groups)

    def _edges(self) -> list[int]:
        """Padding as F.pad wants it: both ends of the last dimension first (torch's rule for 'same')."""
        if isinstance(self.padding, str):
            total = [
                d * (k - 1) if self.padding == "same" else 0 for d, k in zip(self.dilation, self.kernel, strict=True)
            ]
            ends = [(n // 2, n - n // 2) for n in total]
        else:
            ends = [(n, n) for n in self.padding]
        return list(chain.from_iterable(reversed(ends)))
