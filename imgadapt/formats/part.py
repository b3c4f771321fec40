"""Part: what one layer has of an adapter, and the tensors of the file that it came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from imgadapt.arch import Slice
from imgadapt.methods.base import Method


@dataclass(frozen=True, eq=False)
class Source:
    """What a file had for one of its layers: the tensors untouched, under their keys there.

    format: which one it was in. parts: how many layers of ours it is (a fused q/k/v is three).
    """

    format: str
    tensors: Mapping[str, Tensor]
    parts: int = 1


@dataclass(frozen=True)
class Part:
    """A method with its hyper-parameters, and its tensors, for one layer.

    source: where it came from, as long as nothing has changed it; it is written back from there, byte for byte.
    slices: of a fused layer that only the whole weight can split (a rotation across q and k): which rows of it are
        which layer. Its name is then the fused layer's own, and `attach` splits it.
    shape: of the layer's weight, where it is known (it was on a model); tensors may be flat where that is not.
    """

    method: Method
    tensors: Mapping[str, Tensor]
    source: Source | None = field(default=None, compare=False)
    slices: tuple[Slice, ...] = ()
    shape: tuple[int, ...] | None = field(default=None, compare=False)


Parts = Mapping[str, Part]
"""Canonical layer name (`unet.mid_block.attentions.0.proj_in`) -> Part."""
