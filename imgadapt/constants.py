"""Constants: what a method needs beside its tensors, made once for a weight, a device and a dtype."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from imgadapt.methods.base import Method
from imgadapt.shared import cast
from imgadapt.sites import Site


class Source(Protocol):
    """Where a slot gets the base's weight."""

    def values(self) -> Tensor:
        """The weight as methods see it."""
        ...

    def stamp(self) -> tuple[int, ...]:
        """Another one when it has changed."""
        ...


@dataclass(frozen=True, eq=False)
class Constants:
    """tensors: what the method made. key: for what. sums: of the weight they were made of, None if of none; they tell
    that it is the same in another place, where hooks that offload bring it to, or a merge reads it.
    narrow: copies of `tensors` in the activation's dtype.
    """

    key: tuple[Any, ...]
    sums: tuple[Tensor, Tensor] | None
    tensors: dict[str, Tensor]
    narrow: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def of(self, weight: Tensor) -> Mapping[str, Tensor]:
        """Those of this weight; {} where they are another's."""
        return self.tensors if self.sums is None or _same(self.sums, _sums(weight)) else {}

    def narrowed(self, tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Of one of `tensors` its copy in the dtype, which layers share; None if it is none of them."""
        name = next((name for name, own in self.tensors.items() if own is tensor), None)
        if name is None:
            return None
        if name not in self.narrow or self.narrow[name].dtype != dtype:
            with torch.no_grad(), torch.inference_mode(False):
                self.narrow[name] = cast(tensor, tensor.device, dtype)
        return self.narrow[name]


def constants(
    kept: Constants | None, method: Method, site: Site, base: Source, device: torch.device, dtype: torch.dtype
) -> Constants:
    """Those that were kept, where they are for these, else new ones; layers share those that are equal."""
    key = (base.stamp() if method.needs_weight else (), device, dtype, method)
    if kept is not None and kept.key == key:
        return kept
    with torch.no_grad(), torch.inference_mode(False):
        weight = base.values().detach() if method.needs_weight else None
        sums = None if weight is None else _sums(weight)
        if kept is not None and kept.key[1:] == key[1:] and _same(kept.sums, sums):
            return replace(kept, key=key)
        made = method.constants(site, weight)
        return Constants(key, sums, {name: cast(made[name], device, dtype) for name in made})


def _sums(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of its rows and of its columns."""
    flat = weight.detach().flatten(1)
    return flat.sum(0, dtype=torch.float64), flat.sum(1, dtype=torch.float64)


def _same(a: tuple[Tensor, Tensor] | None, b: tuple[Tensor, Tensor] | None) -> bool:
    if a is None or b is None:
        return a is b
    return all(one.device == other.device and torch.equal(one, other) for one, other in zip(a, b, strict=True))
