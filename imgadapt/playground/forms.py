"""Forms: a page's fields as requests, and requests as a page's fields; fields are plain values under plain names."""

from collections.abc import Mapping, Sequence
from typing import Any

from imgadapt.playground.requests import RANDOM, GenerateRequest, Use

ROWS = 8
"""Adapters that a page's stack has room for."""
COMMON = (
    "prompt",
    "negative",
    "seed",
    "count",
    "steps",
    "guidance",
    "sampler",
    "width",
    "height",
    "init",
    "mask",
    "denoise",
    "layout",
)
"""Fields of all pictures; an empty one (None, "") leaves the choice to the request's default."""
ROW = ("adapter", "weight", "text", "blocks", "start", "stop")
"""Fields of one adapter of the stack; `adapter` is "" where the row is free."""
FIELDS = (*COMMON, *(f"{name}_{row}" for row in range(ROWS) for name in ROW))
"""All of them, in the order in which a page passes them on."""


def uses(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stack in a form, as JSON; rows of weight 0 are in it."""
    rows = [{name: fields[f"{name}_{row}"] for name in ROW} for row in range(ROWS)]
    return [_filled(row) for row in rows if row["adapter"]]


def request(fields: Mapping[str, Any], base: str | None = None) -> GenerateRequest:
    """What a form asks for.

    Raises:
        ConfigError: what is wrong with it, in one line.
    """
    common = _filled({name: fields[name] for name in COMMON})
    if common.get("count", 1) != 1:
        common.pop("layout", None)
    if "init" not in common:
        common.pop("mask", None)
        common.pop("denoise", None)
    return GenerateRequest.of({**common, "adapters": uses(fields), **({"base": base} if base else {})})


def fields(request: GenerateRequest) -> dict[str, Any]:
    """A form that asks for this."""
    said = request.model_dump(mode="json")
    return {**{name: said[name] for name in COMMON}, **rows(request.adapters)}


def rows(stack: Sequence[Use]) -> dict[str, Any]:
    """The stack's part of a form; all of its rows, those that are free too. What has no room is left out."""
    empty = {"adapter": "", "weight": 1.0, "text": None, "blocks": "", "start": 0, "stop": None}
    filled = [use.model_dump(mode="json") for use in stack[:ROWS]]
    filled += [empty] * (ROWS - len(filled))
    return {f"{name}_{row}": values[name] for row, values in enumerate(filled) for name in ROW}


def _filled(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None and value != ""}


__all__ = ["COMMON", "FIELDS", "RANDOM", "ROW", "ROWS", "fields", "request", "rows", "uses"]
