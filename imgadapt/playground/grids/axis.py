"""Axis: what a grid's pictures differ in, as it is asked for; and what its readers share."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from imgadapt.errors import ConfigError
from imgadapt.playground.grids.ranges import listed, plain
from imgadapt.playground.requests import GenerateRequest, Id, Request, Text, Use

AXES = ("adapter", "weight", "seed", "prompt", "blocks", "rule", "checkpoint", "steps", "guidance", "sampler")
ADAPTERS = ("adapter", "checkpoint", "weight", "blocks", "rule")
"""Axes that a picture without adapters has no place on; in the order in which they change a request."""
SHOWN = 60
"""Characters of a label, but for those of prompts."""


class Axis(Request):
    """values: as text, one a comma or a line: `0, 0.5, 1`, ranges `0:1:0.25` (start:stop:step, both ends), `1..5`,
    `1, 2, .., 10`; `random 4` seeds; adapters by name or id, `a+b` for a stack, `a:0.8` at a weight, `none`; prompts
    one a line, or `old -> new` for what is replaced in the common one; blocks as presets or lists, one a line or `;`;
    rules with options: `ties density=0.3`; checkpoints by name, or `all`.

    adapter: which one of the stack a weight, block or adapter axis is about, or whose run's checkpoints; None: all of
    it.
    """

    kind: Literal[AXES]  # pyright: ignore[reportInvalidTypeForm] # a table
    values: Text
    adapter: Id | None = None


Change = Callable[[GenerateRequest], GenerateRequest]


@dataclass(frozen=True)
class Rule:
    """A rule of `combining`, and its options; it merges the stack."""

    name: str
    options: Mapping[str, float | str | bool] = field(default_factory=dict[str, float | str | bool])


@dataclass(frozen=True)
class Value:
    """One place of an axis. change: what it makes of a request; rule: what its stack is then merged by. each: what it
    makes of a use, where that is all that it changes; instead: an adapter of the stack, and the ids that it puts there.
    """

    label: str
    change: Change
    rule: Rule | None = None
    each: Callable[[Use], Use] | None = None
    instead: tuple[str, frozenset[str]] | None = None


def changed(request: GenerateRequest, **update: Any) -> GenerateRequest:
    """The request with other settings, checked again."""
    return GenerateRequest.of({**request.model_dump(), **update})


def numbers(
    axis: Axis, most: int, name: str, least: float, largest: float, *, whole: bool = False
) -> list[tuple[str, Any]]:
    """(label, number) of each; those out of range raise."""
    made: list[tuple[str, Any]] = []
    for value in listed(axis.values, most):
        if not least <= value <= largest or (whole and value != int(value)):
            kind = "a whole number" if whole else "a number"
            raise ConfigError(f"{name} {plain(value)}: it is {kind} from {least:g} to {largest:g}")
        made.append((plain(value), int(value) if whole else float(value) + 0.0))
    return made


def words(text: str) -> list[str]:
    """Those between commas, semicolons and line ends."""
    return [word.strip() for word in re.split(r"[,;\n]", text) if word.strip()]


def short(text: str) -> str:
    """A text that others are shown."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
