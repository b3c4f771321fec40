"""Forms: a page's fields as requests, and requests as a page's fields; fields are plain values under plain names."""

from collections.abc import Mapping, Sequence
from typing import Any

from imgadapt.playground.requests import GenerateRequest, Use

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
OPTIONAL = ("guidance", "width", "height", "text", "stop")
"""Numbers that may be left open; a page has text for them, "" for open."""
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
    return {**_texts({name: said[name] for name in COMMON}), **rows(request.adapters)}


def rows(stack: Sequence[Use]) -> dict[str, Any]:
    """The stack's part of a form; all of its rows, those that are free too. What has no room is left out."""
    empty = {"adapter": "", "weight": 1.0, "text": None, "blocks": "", "start": 0, "stop": None}
    filled = [_texts(use.model_dump(mode="json")) for use in stack[:ROWS]]
    filled += [_texts(empty)] * (ROWS - len(filled))
    return {f"{name}_{row}": values[name] for row, values in enumerate(filled) for name in ROW}


def _texts(row: Mapping[str, Any]) -> dict[str, Any]:
    """With optional numbers as text."""
    return {name: _text(value) if name in OPTIONAL else value for name, value in row.items()}


def _text(value: float | None) -> str:
    return "" if value is None else str(value)


def _filled(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is not left open, texts of numbers read. (What is no number stays: the request says so.)"""
    read = {name: number(value) if name in OPTIONAL else value for name, value in row.items()}
    return {name: value for name, value in read.items() if value is not None and value != ""}


def number(value: Any) -> Any:
    """A number that a page has as text; "" stays "", and so does what is no number."""
    if not isinstance(value, str):
        return value
    short = value.strip()[:40]
    try:
        return int(short)
    except ValueError:
        pass
    try:
        return float(short)
    except ValueError:
        return short
