"""What goes into a merge and what comes out of it, layer by layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from imgadapt.combining.entering import Change
from imgadapt.combining.terms import Term
from imgadapt.errors import ConfigError
from imgadapt.file import AdapterFile
from imgadapt.formats import Part
from imgadapt.sites import Site


@dataclass(frozen=True)
class Input:
    """An adapter that is merged. digest: SHA-256 of its file (or of its tensors): what random masks are keyed by.

    weight: what each of its layers is multiplied by (see `weights.factor_of`). tie: what tells it from another input of
    the same digest.

    Raises:
        ConfigError: it has a learned prompt.
    """

    name: str
    file: AdapterFile
    digest: str
    weight: Callable[[str], float]
    tie: str = ""

    def __post_init__(self) -> None:
        if self.file.prompts is not None:
            raise ConfigError(
                f"{self.name} has a learned prompt ({self.file.prompts.kind.name}), which changes no weight and cannot "
                "be merged: attach it beside what is"
            )


def order_of(inputs: Sequence[Input], ordered: bool) -> list[int]:
    """Indices of inputs as they are merged: as they come, where a rule tells the first from the second, else an order
    that theirs does not change.
    """
    if ordered:
        return list(range(len(inputs)))
    return sorted(range(len(inputs)), key=lambda k: (inputs[k].digest, inputs[k].tie, k))


@dataclass(frozen=True)
class Layer:
    """One layer of a merge: what the inputs that have it change, in the order of the engine's inputs.

    who: their indices. weights: (k,), fp64; none is 0. every: (n,), those of all inputs.
    """

    name: str
    site: Site
    who: tuple[int, ...]
    changes: tuple[Change, ...]
    weights: Tensor
    keys: tuple[str, ...]
    every: Tensor

    @property
    def terms(self) -> list[Term]:
        return [change.term for change in self.changes]


@dataclass(frozen=True)
class Merged:
    """What became of a layer: terms whose sum is the merged change, and the bias's.

    gram: (k, k) inner products of the inputs' changes, unweighted; who: which inputs those are. residual: relative norm
    of what was cut off, over `norm`, the merged change's before. part: of a rotation, which is no sum: what it is; gram
    and norm are then of the rotations less 1, and terms are of the base's weights, where they are known.
    """

    name: str
    site: Site
    terms: tuple[Term, ...]
    bias: Tensor | None
    who: tuple[int, ...]
    gram: Tensor
    norm: float
    residual: float = 0.0
    part: Part | None = None
