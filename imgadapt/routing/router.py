"""Router: what every kind of router is, and what of a forward it sees."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """What is routed: how many adapters and layers, and the width of the texts."""

    adapters: int
    layers: int
    context: int


@dataclass(frozen=True)
class Seen:
    """What a router sees of a forward. share: time over its total, (batch,), 1 in pure noise; context: the mean of the
    text's states, (batch, width).
    """

    share: Tensor
    context: Tensor


@dataclass(frozen=True)
class Router(ABC):
    """One kind of router with its settings; stateless, as a method is. Strengths multiply each adapter's own scale."""

    name: ClassVar[str]
    by_layer: ClassVar[bool] = False
    """Whether it looks at each layer's input instead of the denoiser's (`per_layer`)."""

    @abstractmethod
    def shapes(self, sizes: Sizes) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor that is trained; none where nothing is."""

    @abstractmethod
    def init(self, sizes: Sizes) -> dict[str, Tensor]:
        """Fresh fp32 tensors, at which all adapters act alike: 1 / adapters each."""

    def strengths(self, t: Tensors, sizes: Sizes, seen: Seen, *, training: bool) -> Tensor:
        """(batch, layers or 1, adapters), differentiably."""
        raise NotImplementedError

    def of_input(self, prototypes: Tensor, there: Tensor, x: Tensor) -> Tensor:
        """(batch, adapters) of a layer's input, averaged over its places, (batch, in); prototypes: (adapters, in);
        there: which adapters the layer has.
        """
        raise NotImplementedError
