"""MergeRecipe: what is merged, how, and with which weights."""

import math
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from os import PathLike
from typing import Any, Literal

from imgadapt.combining.rules import RULES
from imgadapt.combining.rules.rule import Rule
from imgadapt.errors import ConfigError
from imgadapt.formats import FORMATS
from imgadapt.patterns import Pattern

Setting = float | str | bool
DTYPES = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Entry:
    """An adapter that goes into a merge.

    weight: what its change is multiplied by; may be negative. components: factors by component (`unet`,
        `text_encoder`, ...; `te` is all text encoders, `denoiser` whatever is none). blocks: factors by block: a
        preset's name, kohya's list of numbers ("1,0,0,1,...": LBW), or block (`IN04`, or a glob over layers) -> factor.
        masks: regular expressions over canonical layer names -> factor. All that match multiply.
    sha256: of the file; checked where it is given.

    Raises:
        ConfigError: a number that is not finite, a mask that is no regular expression.
    """

    path: str | PathLike[str]
    weight: float = 1.0
    components: Mapping[str, float] = field(default_factory=dict[str, float])
    blocks: str | Mapping[str, float] = ""
    masks: Mapping[str, float] = field(default_factory=dict[str, float])
    sha256: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.fspath(self.path))
        no_nul(str(self.path))
        blocks = {} if isinstance(self.blocks, str) else self.blocks
        rows = {"weight": self.weight, **self.components, **blocks, **self.masks}
        for name, value in rows.items():
            if not finite(value):
                raise ConfigError(f"{self.path}: {name} is {value!r}; it must be a finite number")
        object.__setattr__(self, "weight", float(self.weight))
        for name in ("components", "masks", *(() if isinstance(self.blocks, str) else ("blocks",))):
            object.__setattr__(self, name, {key: float(value) for key, value in getattr(self, name).items()})
        for mask in self.masks:
            try:
                Pattern(mask)
            except ConfigError as error:
                raise ConfigError(f"{self.path}: the mask '{mask[:80]}' is no regular expression: {error}") from error


@dataclass(frozen=True)
class MergeRecipe:
    """How adapters become one.

    rule: a name of `RULES`; options: its own settings. space: where the rule works: "delta", on the weights' changes,
        or "core", on the small matrices that the changes are in the basis that all of them share (arXiv 2509.17786).
    rank, error, energy, size: of the result; at most one. A rank for each layer; the relative Frobenius error of the
        whole; the part of its squared norm that is kept; megabytes of the file. The last three give each layer the rank
        that is worth most. None of them: exact, where the rule keeps a low rank; the largest rank of the inputs for
        "svd"; and where a rule looks at elements, the sum of their ranks.
    whole: write what such a rule gives as it is, as whole differences: as large as the model.
    seed: of what is random. base: a diffusers folder or a checkpoint, for methods that read the base's weights.
    dtype, format: of the file written; None: the inputs', where they agree, else fp32 and what `save` takes.

    Raises:
        ConfigError: no such rule or option, numbers out of their range, too few or too many inputs, two of rank, error,
            energy and size.
    """

    inputs: tuple[Entry, ...]
    rule: str = "weighted"
    options: Mapping[str, Setting] = field(default_factory=dict[str, Setting])
    space: Literal["delta", "core"] = "delta"
    rank: int | None = None
    error: float | None = None
    energy: float | None = None
    size: float | None = None
    whole: bool = False
    seed: int = 0
    base: str | None = None
    base_sha256: str = ""
    dtype: str | None = None
    format: str | None = None

    def __post_init__(self) -> None:
        row = self.row
        no_nul(self.base or "")
        if not row.least <= len(self.inputs) <= row.most:
            wanted = f"{row.least} or more" if row.most > 99 else f"{row.least} to {row.most}"
            wanted = str(row.least) if row.least == row.most else wanted
            raise ConfigError(f"{self.rule} merges {wanted} adapters, and there are {len(self.inputs)}")
        row.checked(self.options)
        if self.space not in ("delta", "core") or (self.space == "core" and not row.in_core):
            raise ConfigError(f"space is {self.space!r}; {self.rule} works in 'delta'" + " or 'core'" * row.in_core)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("format", self.format, [form.name for form in FORMATS])
        given = [name for name in ("rank", "error", "energy", "size") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)}: one of them says how much is kept")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ConfigError(f"rank is {self.rank!r}; it must be a whole number, 1 or more")
        for name, most in (("error", 1.0), ("energy", 1.0), ("size", math.inf)):
            value: Any = getattr(self, name)
            if value is not None and not (finite(value) and 0 < value <= most):
                raise ConfigError(
                    f"{name} is {value!r}; it must be a number above 0" + f", {most} at most" * (most < 9)
                )
            if value is not None:
                object.__setattr__(self, name, float(value))
        if row.rotations is not None and given:
            raise ConfigError(f"{self.rule} gives rotations, which have no rank; leave out {given[0]}")
        if self.whole and (given or row.elements is None or self.space == "core"):
            named = ", ".join(rule.name for rule in RULES if rule.elements is not None)
            wrong = f"{given[0]} makes factors" if given else "space 'core' makes factors"
            wrong = f"{self.rule} does not" if row.elements is None else wrong
            raise ConfigError(
                f"whole (--whole) writes whole differences, as rules that look at elements make them ({named}), and "
                f"{wrong}; leave one of the two out"
            )
        if self.rule == "concat" and given:
            raise ConfigError(f"concat is exact and keeps all ranks; for a {given[0]} take rule 'svd'")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed!r}; it must be a whole number from 0 on")

    @property
    def row(self) -> Rule:
        found = next((rule for rule in RULES if rule.name == self.rule), None)
        if found is None:
            near = get_close_matches(self.rule, [rule.name for rule in RULES], n=1)
            hint = f", did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"no rule '{self.rule}'{hint}; there are: {', '.join(rule.name for rule in RULES)}")
        return found

    def option(self, name: str) -> Any:
        return self.options.get(name, self.row.options[name].default)


def finite(value: Any) -> bool:
    """Whether it is a number, and one that a float can be (TOML has whole ones of any length)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _one_of(what: str, value: str | None, known: Collection[str]) -> None:
    if value is not None and value not in known:
        raise ConfigError(f"{what} is {value!r}; there are: {', '.join(known)}")


def no_nul(path: str) -> None:
    """Raises ConfigError: a path that is none."""
    if "\0" in path:
        raise ConfigError(f"{path.replace(chr(0), '?')} is no path: it has a character 0")
