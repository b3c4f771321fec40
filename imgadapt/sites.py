"""Site: the geometry of one layer, and its operation with another weight."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
Kind = Literal["linear", "conv", "embedding", "norm", "fused"]


@dataclass(frozen=True)
class Site:
    """What a method may know of the layer it acts on: shapes and convolution arguments, no values.

    shape: of the weight as methods see it: (out, in) of a linear layer, (out, in / groups, *kernel) of a convolution,
        (width, entries) of an embedding (which stores it transposed: a lookup is a product with one-hot inputs),
        (3 * width, width) of a fused q/k/v projection, (width,) of a norm.
    parameter, bias: names of the module's parameters; bias None: it has none.
    """

    shape: tuple[int, ...]
    kind: Kind = "linear"
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    parameter: str = "weight"
    bias: str | None = None

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """The site that `module` is, or None: linear layers, 1-, 2- and 3-d convolutions, embeddings, norms with a
        weight, and nn.MultiheadAttention (its fused in-projection) are sites.
        """
        bias = None if module._parameters.get("bias") is None else "bias"
        if isinstance(module, nn.Linear):
            return cls((module.out_features, module.in_features), bias=bias)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if type(module).forward not in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
                return None  # pads or crops in a forward of its own (diffusers' causal convolutions)
            return cls(
                tuple(module.weight.shape),
                "conv",
                tuple(module.stride),
                module.padding if isinstance(module.padding, str) else tuple(module.padding),
                tuple(module.dilation),
                module.groups,
                module.padding_mode,
                bias=bias,
            )
        if isinstance(module, nn.Embedding):
            plain = type(module).forward is nn.Embedding.forward and module.max_norm is None
            return cls((module.embedding_dim, module.num_embeddings), "embedding") if plain else None
        if isinstance(module, nn.MultiheadAttention):
            if module._parameters.get("in_proj_weight") is None:
                return None  # three projections of unequal width
            bias = None if module._parameters.get("in_proj_bias") is None else "in_proj_bias"
            return cls(tuple(module.in_proj_weight.shape), "fused", parameter="in_proj_weight", bias=bias)
        weight = module._parameters.get("weight")
        if type(module).__name__.endswith("Norm") and weight is not None and weight.ndim == 1:
            return cls(tuple(weight.shape), "norm", bias=bias)
        return None

    @classmethod
    def of_shape(cls, shape: tuple[int, ...], kinds: Sequence[Kind] = ("linear",)) -> Self:
        """The site of a weight of which the shape alone is known; kinds: that it may be of, where several are so."""
        flat: list[Kind] = [kind for kind in kinds if kind in ("linear", "embedding", "fused")] or ["linear"]
        kind: Kind = flat[0] if len(shape) == 2 else "conv"
        return cls(shape, kind if len(shape) > 1 else "norm", bias="bias")

    @property
    def kernel(self) -> tuple[int, ...]:
        """Extent of the convolution kernel; () for other layers."""
        return self.shape[2:]

    @property
    def rows(self) -> int:
        """Output features or channels."""
        return self.shape[0]

    @property
    def fan_in(self) -> int:
        """Inputs of one output: (in / groups) * kernel."""
        return math.prod(self.shape[1:])

    @property
    def ones(self) -> tuple[int, ...]:
        """A kernel of extent 1."""
        return tuple(1 for _ in self.kernel)

    @property
    def pointwise(self) -> bool:
        """Whether each output position reads one input position, all channels: what acts on channels acts on x."""
        return self.kind == "linear" or (self.kind == "conv" and self.groups == 1 and math.prod(self.kernel) == 1)

    def seen(self, weight: Tensor) -> Tensor:
        """The module's parameter as methods see it, and a delta as the parameter needs it: its own inverse."""
        return weight.t() if self.kind == "embedding" else weight

    def along(self, vector: Tensor) -> Tensor:
        """(channels,) shaped so that it multiplies the layer's input or output channel by channel."""
        return vector.reshape(-1, *self.ones) if self.kind == "conv" else vector

    def op(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's operation on x with `weight` (any number of output rows), without bias."""
        if self.kind == "embedding":
            return F.embedding(x, weight.t())
        if self.kind == "linear":
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

    def mix(self, x: Tensor, weight: Tensor, onto: Tensor | None) -> Tensor:
        """Mix what `spread` gave, group by group and position by position, with weight (out, r); added to `onto`, whose
        strides it keeps: what follows may take another kernel for others, and then a no-op would not be one to the bit.
        """
        if self.kind != "conv":
            if onto is None or not onto.is_contiguous():
                change = F.linear(x, weight)
                return change if onto is None else onto + change
            added = torch.addmm(onto.reshape(-1, onto.shape[-1]), x.reshape(-1, x.shape[-1]), weight.t())
            return added.view(onto.shape)
        if self.groups == 1 and onto is not None and onto.is_contiguous():
            added = torch.baddbmm(onto.flatten(2), weight.expand(len(x), *weight.shape), x.flatten(2))
            return added.view(onto.shape)
        change = _CONVOLVE[len(self.kernel)](x, weight.reshape(*weight.shape, *self.ones), groups=self.groups)
        return change if onto is None else onto + change

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
