"""Part: what one layer has of an adapter, and the tensors of the file that it came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from imgadapt.arch import Slice
from imgadapt.methods.base import Method


@dataclass(frozen=True, eq=False)
class Source:
    """What a file had for one of its layers: the tensors untouched, under their keys there.

    format: which one it was in. made: what became of them: layers of ours (a fused q/k/v is three) -> method, tensors.
    of: how many tensors the file has for layers. beside: those it has once for this layer and others.
    """

    format: str
    tensors: Mapping[str, Tensor]
    made: Mapping[str, tuple[Method, Mapping[str, Tensor]]]
    of: int = 0
    beside: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    stamps: Mapping[int, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stamps", {id(t): t._version for t in self._all()})

    def _all(self) -> list[Tensor]:
        return [
            *self.tensors.values(),
            *self.beside.values(),
            *(t for _, own in self.made.values() for t in own.values()),
        ]

    def is_of(self, parts: Mapping[str, "Part"]) -> bool:
        """Whether these are all the layers it was made into, and nothing has changed them since."""
        same = parts.keys() == self.made.keys() and all(
            part.method == method
            and part.tensors.keys() == own.keys()
            and all(part.tensors[key] is tensor for key, tensor in own.items())
            for part, (method, own) in ((parts[name], made) for name, made in self.made.items())
        )
        return same and all(self.stamps[id(t)] == t._version for t in self._all())


@dataclass(frozen=True)
class Part:
    """A method with its hyper-parameters, and its tensors, for one layer.

    source: where it came from, as long as nothing has changed it; it is written back from there, byte for byte.
    slices: of a fused layer that only the whole weight can split (a rotation across q and k): which rows of it are
        which layer. Its name is then the fused layer's own, and `attach` splits it.
    shape: of the layer's weight, where it is known (it was on a model); tensors may be flat where that is not.
    """

    method: Method
    tensors: Mapping[str, Tensor] = field(repr=False)
    source: Source | None = field(default=None, compare=False, repr=False)
    slices: tuple[Slice, ...] = ()
    shape: tuple[int, ...] | None = field(default=None, compare=False)


Parts = Mapping[str, Part]
"""Canonical layer name (`unet.mid_block.attentions.0.proj_in`) -> Part."""
