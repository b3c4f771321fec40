"""Rule: a row of the table of merging rules.

Rules are of four families, by what they need to see of a layer: `scalar` rules give each input a number, from the inner
products of the changes; `factor` rules work on low-rank factors, and the result is of low rank again; `element` rules
look at each element of the changes, so the result is whole; `rotation` rules merge OFT and BOFT as rotations.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from imgadapt.combining.terms import Pair, Term
from imgadapt.errors import ConfigError

Scalar = Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]
"""(weights (n,), inner products (n, n), options) -> what each change is multiplied by (n,); fp64. Of all inputs: the
inner products of one that does not have the layer are zero."""
Factors = Callable[[Any, Mapping[str, Any]], Pair]
"""(layer, options) -> the merged change."""
Rotations = Callable[[Sequence[Tensor], Tensor, Mapping[str, Any]], Tensor]
"""(block-diagonal rotations of all inputs (count, b, b), weights (n,), options) -> the merged rotation; fp64. That of
an input that does not have the layer is the identity."""


class Elements(Protocol):
    def __call__(
        self,
        layer: Any,
        recipe: Any,
        options: Mapping[str, Any],
        *,
        cuts: Any = None,
        workers: int = 1,
        out: Tensor | None = None,
    ) -> tuple[tuple[Term, ...], Tensor | None]:
        """(layer, recipe, options) -> terms whose sum is the merged change, and the bias's. out: where it is written, a
        matrix (out, fan_in); workers: threads that it may take; cuts: of `prepare`.
        """
        ...

    def prepare(self, layers: Callable[[], Iterable[Any]], options: Mapping[str, Any], workers: int) -> Any:
        """What has to be known of all layers before the first is merged; None: nothing."""
        ...


@dataclass(frozen=True)
class Option:
    """A setting of a rule: its default, and the least and the most it may be; texts: one of `choices`."""

    default: float | str | bool
    about: str
    least: float = 0.0
    most: float = 1.0
    choices: tuple[str, ...] = ()
    open: bool = False  # whether least and most themselves are out of range


@dataclass(frozen=True)
class Rule:
    """A row: one of scalar, factors, elements, rotations.

    source: paper or code. least, most: how many inputs it merges. ordered: whether it tells the first from the second.
    in_core: whether it can work in core space. apart: whether it merges each layer that a format fuses for itself.
    beside: what merges norms and biases, where a rule has factors; None: they are added up, times `scale`.
    linear: whether the merged change is linear in the weights; relative: whether only their shares in the sum count.
    wrong: what is wrong with options that are in range, each for itself.
    """

    name: str
    about: str
    source: str
    scalar: Scalar | None = None
    factors: Factors | None = None
    elements: Elements | None = None
    rotations: Rotations | None = None
    options: Mapping[str, Option] = field(default_factory=dict[str, Option])
    least: int = 1
    most: int = 1000
    ordered: bool = False
    in_core: bool = False
    apart: bool = False
    beside: Elements | None = None
    linear: bool = False
    relative: bool = False
    wrong: Callable[[Mapping[str, Any]], str | None] | None = None

    def checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options, defaults filled in.

        Raises:
            ConfigError: one that it does not have, or out of range.
        """
        made: dict[str, Any] = {name: option.default for name, option in self.options.items()}
        for name, value in options.items():
            option = self.options.get(name)
            if option is None:
                own = ", ".join(self.options) or "none"
                raise ConfigError(f"{self.name} has no option '{name}'; it has: {own}")
            if option.choices:
                if value not in option.choices:
                    raise ConfigError(f"{name} is {value!r}; {self.name} takes {', '.join(option.choices)}")
            elif isinstance(option.default, bool):
                if not isinstance(value, bool):
                    raise ConfigError(f"{name} is {value!r}; it is true or false")
            elif (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not option.least <= value <= option.most
                or (option.open and value in (option.least, option.most))
            ):
                raise ConfigError(f"{name} is {value!r}; it must be a number from {option.least:g} to {option.most:g}")
            made[name] = value
        if self.wrong is not None and (reason := self.wrong(made)):
            raise ConfigError(f"{self.name}: {reason}")
        return made
