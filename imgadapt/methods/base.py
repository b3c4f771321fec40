"""Method: what every adapter method is."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor

from imgadapt.errors import ConfigError, FormatError
from imgadapt.shared import cast
from imgadapt.sites import Kind, Site

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Peft:
    """How peft has a method (tuners/<type>/): its `peft_type`, what its keys end in, and both ways between.

    ends: what stands behind a layer's name, without the adapter's name: `hra_u`, `road_theta`.
    beside: names of what all layers have in common, which stand beside them: `vera_A` for `base_model.vera_A`.
    read: (tensors by these names, the config of that layer, its weight's shape or None) -> (method, its tensors).
    write: (method, tensors, shape) -> (tensors by these names, fields of the config beyond `peft_type` and
        `target_modules`). Both raise FormatError where one has no word for the other's.
    widest: (a method, the largest outputs and inputs of its layers) -> shapes of what stands beside them, where it is
        more than the layers need themselves. None: each layer has its first rows, columns, ...
    """

    type: str
    ends: tuple[str, ...]
    read: "Callable[[Tensors, Mapping[str, Any], tuple[int, ...] | None], tuple[Method, dict[str, Tensor]]]"
    write: "Callable[[Any, Tensors, tuple[int, ...]], tuple[dict[str, Tensor], dict[str, Any]]]"
    beside: tuple[str, ...] = ()
    widest: "Callable[[Any, tuple[int, ...]], Mapping[str, tuple[int, ...]]] | None" = None


class Way(NamedTuple):
    """How a method acts on a site without building its delta; all False: the wrapper builds it (`delta`).

    pair: the operands `up` (out, r) and `down` (r, in / groups, *kernel) are a low-rank change; the wrapper adds those
        of all adapters in one product.
    turn, act: the method changes the layer's input, or its output, itself.
    bias: nothing but the bias changes, by the operand `bias` (out,).
    input, output: `act` reads the layer's input, or the base's output.
    weight: `operands` reads the base's weight.
    linear: operands in which, taken together, the change is linear: the wrapper multiplies them by strength * scale.
    """

    pair: bool = False
    turn: bool = False
    act: bool = False
    input: bool = False
    output: bool = False
    weight: bool = False
    bias: bool = False
    linear: tuple[str, ...] = ()

    @property
    def dense(self) -> bool:
        return not (self.pair or self.turn or self.act or self.bias)


@dataclass(frozen=True)
class Method(ABC):
    """One adapter method with its hyper-parameters. Stateless: tensors in, a delta out.

    The wrapper multiplies by `scale`, once; `delta`, `turn` and `act` never do. Shapes are those of `Site`:
    `site.shape` is (out, in) or (out, in / groups, *kernel). `t` are the adapter's tensors, `o` its operands.
    """

    name: ClassVar[str]
    tensors: ClassVar[tuple[str, ...]]
    """Names of the method's tensors; a file has them for each layer, save the optional ones."""
    optional: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "conv", "embedding", "fused")
    """The kinds of layer it is for."""
    needs_weight: ClassVar[bool] = False
    """Whether `delta` reads the base's weight (else it may be given None)."""
    starts_from_weight: ClassVar[bool] = False
    """Whether `init` reads the base's weight, and nothing after it."""
    additive: ClassVar[bool] = True
    """Whether the delta is linear along the axes of `ranked`, so that what rank dropout leaves is scaled up."""
    frozen: ClassVar[tuple[str, ...]] = ()
    """Tensors that a file has, and no training changes."""
    common: ClassVar[tuple[str, ...]] = ()
    """Tensors that all layers of one adapter have in common: one parameter for all whose shape is the same."""
    merges: ClassVar[bool] = True
    """Whether the change is one of the weight. False: `delta` raises, and the live layer is all there is."""
    apart: ClassVar[str] = "is no change of the weight"
    """Why it does not merge, for messages."""
    timed: ClassVar[bool] = False
    """Whether what it does depends on the denoiser's time: `acting` says which ranks of its pair act."""
    fresh_only: ClassVar[tuple[str, ...]] = ()
    """Fields that only `init` reads."""
    rate_over_lora: ClassVar[float] = 1.0
    """Its best learning rate, by default settings, in LoRA's (benchmarks/methods.py, on the embedded base)."""
    peft: ClassVar[Peft | None] = None
    """How peft has it; None: not at all, or in a way of its own (`formats/meaning.py`)."""

    @property
    def scale(self) -> float:
        """What the wrapper multiplies the delta by: alpha / rank, or 1 where there is neither."""
        return 1.0

    @property
    def file_rank(self) -> int | None:
        """Rank as files and tables state it; None where the method has none."""
        return None

    @property
    def file_alpha(self) -> float | None:
        """The alpha that, over `file_rank`, is the scale; None where the method has none."""
        return None if self.file_rank is None else self.scale * self.file_rank

    @property
    def ranked(self) -> Mapping[str, int]:
        """Tensor -> axis along which rank dropout drops: leaving out an index leaves out one rank, or one block."""
        return {}

    @property
    def cut(self) -> Mapping[str, int]:
        """Tensor -> axis of its ranks, where any of them alone are an adapter of the same scale; {}: they are not."""
        return {}

    def only(self, t: Tensors, ranks: Tensor) -> tuple[Self, dict[str, Tensor]]:
        """The adapter that these of its ranks, whole numbers (n,), are; see `cut`."""
        axes = self.cut
        made = {name: v.index_select(axes[name], ranks) if name in axes else v for name, v in t.items()}
        return self.resized(len(ranks)), made

    @classmethod
    def recognises(cls, names: set[str]) -> bool:
        """Whether tensors of these names are one adapter of this method, whole."""
        return set(cls.tensors) <= names <= {*cls.tensors, *cls.optional}

    def check(self, site: Site) -> str | None:
        """Why the method cannot act on this site; None if it can."""
        return self._of_kind(site)

    def _of_kind(self, site: Site) -> str | None:
        return None if site.kind in self.kinds else f"it is {site.kind}; {self.name} is for {', '.join(self.kinds)}"

    def passes(self, site: Site) -> bool:
        """Whether the layer has nothing of what the method changes: presets and globs that end in `*` pass by it."""
        return False

    def at(self, site: Site) -> Self:
        """The method as it is on this site: where a documented rule adapts a hyper-parameter to the layer's size."""
        return self

    @abstractmethod
    def shapes(self, site: Site) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor for this site."""

    @abstractmethod
    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        """Fresh fp32 tensors whose delta is zero, drawn from torch's global generator."""

    def settled(
        self, t: Tensors, weight: Callable[[], Tensor], bias: Callable[[], Tensor | None]
    ) -> tuple["Method", Tensors]:
        """The same on a layer with this pristine weight and bias, where a file leaves something to them: values that
        replace them, a bias that is multiplied with the rest of the output. Else the very same, without a call.

        Raises:
            ShapeError: the tensors do not fit the weight.
        """
        return self, t

    def constants(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        """What it needs beside its tensors and is neither trained nor saved, as a seed or the weight makes it (random
        projections, singular vectors, indices): fp32 or int64, on the weight's device where the weight is read, else
        on the CPU. The wrapper keeps them, and has them in `t` of `delta` and `operands`; `whole` is for all others.
        """
        return {}

    def whole(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        """t with the constants, made now where they are not there; what `delta` and `operands` begin with."""
        if self.constant_names and not self.constant_names <= t.keys():
            like = next(iter(t.values()))
            made = self.constants(site, None if weight is None else weight.detach())
            return {**t, **{name: cast(tensor, like.device, like.dtype) for name, tensor in made.items()}}
        return t

    @property
    def constant_names(self) -> frozenset[str]:
        """Names of `constants`; where there are any, `delta` and `operands` get them in `t` only from the wrapper."""
        return frozenset()

    @abstractmethod
    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        """Unscaled change of the weight, `site.shape`.

        Raises:
            StateError: there is none (`merges` is False).
        """

    def accumulate(self, total: Tensor, t: Tensors, site: Site, weight: Tensor | None, gain: float) -> None:
        """total += gain * delta, in place."""
        total.add_(self.delta(t, site, weight), alpha=gain)

    def bias_delta(self, t: Tensors) -> Tensor | None:
        """Unscaled change of the bias, (out,)."""
        return None

    def way(self, site: Site) -> Way:
        """How it acts on this site; the answer may not depend on values."""
        return Way()

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        """What `pair`, `turn` and `act` work with: small tensors made of `t`, in its dtype, differentiably."""
        return t

    def turn(self, o: Tensors, site: Site, x: Tensor, onto: Tensor | None) -> Tensor:
        """The change of the input x whose image under the base is the change wanted; added to `onto` where given."""
        raise NotImplementedError

    def act(self, o: Tensors, site: Site, x: Tensor, y: Tensor | None, onto: Tensor | None) -> Tensor:
        """The change of the output; added to `onto` where given. y: the base's output without bias, if `Way.output`."""
        raise NotImplementedError

    def acting(self, share: Tensor) -> Tensor:
        """Which ranks of the pair act, 1 or 0, (n, ranks), at times (n,): from 0, no noise, to 1, noise alone."""
        raise NotImplementedError

    def resized(self, rank: int) -> Self:
        """The same adapter with zeros up to this rank, at the same scale."""
        return self if self.file_rank in (None, rank) else self._with(rank=rank, alpha=self.scale * rank)

    def unscaled(self) -> Self:
        """The method without what only scales it, or how it began: its shapes and kind."""
        began = {field.name: field.default for field in fields(self) if field.name in self.fresh_only}
        return self._with(alpha=None, **began)

    def _with(self, **changes: Any) -> Self:
        own = {field.name for field in fields(self)}
        changes = {"rank_stabilised": False, **changes}
        return replace(self, **{name: value for name, value in changes.items() if name in own})

    def fits(self, t: Tensors, site: Site) -> str | None:
        """What is wrong with these tensors for this site, as 'down is (16, 640), ...'; None if they fit."""
        if wrong := self._of_kind(site):
            return wrong
        shapes = self.shapes(site)
        for name, wanted in shapes.items():
            if name not in t:
                return f"{name} is missing, this layer takes {wanted}"
            if tuple(t[name].shape) != wanted:
                return f"{name} is {tuple(t[name].shape)}, this layer takes {wanted}"
        strange = [name for name in t if name not in shapes]
        return f"{', '.join(strange)} is there, which {self} does not have" if strange else None

    @classmethod
    @abstractmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        """The hyper-parameters that a file's tensors imply; alpha None: the file has none.

        Raises:
            ShapeError: the tensors do not belong together.
            ConfigError: they imply what cannot be (rank 0).
        """

    def pair(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        """(up, down), (out, r) and (r, in * kernel), with up @ down == delta flattened, exactly, where they exist."""
        return None


def positive(name: str, value: int) -> None:
    """Raises ConfigError unless value is a whole number of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, 1 or more")


def above_zero(name: str, value: float | None, absent: str) -> None:
    """Raises ConfigError unless value is None (which means `absent`) or a finite number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value <= sys.float_info.max):
        raise ConfigError(f"{name} is {value!r}; it must be a finite number above 0, or None for {absent}")


def linear_only(method: Method, shape: tuple[int, ...]) -> None:
    """Raises FormatError where the weight is not that of a linear layer, which is all that peft has the method for."""
    if len(shape) != 2:
        raise FormatError(
            f'peft has {method.name} for linear layers only (in UNets, targets transformer "!proj_*" are these)'
        )
