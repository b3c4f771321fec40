"""Part: what one layer has of an adapter."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from imgadapt.methods.base import Method


@dataclass(frozen=True)
class Part:
    """A method with its hyper-parameters, and its tensors, for one layer."""

    method: Method
    tensors: Mapping[str, Tensor]


Parts = Mapping[str, Part]
"""Canonical layer name (`unet.mid_block.attentions.0.proj_in`) -> Part."""
