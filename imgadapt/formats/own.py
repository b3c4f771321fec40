"""imgadapt's own format: dotted names, our tensor names, and every hyper-parameter in the metadata; for any method.

`imgadapt` is JSON: {"methods": [{"method": "lora", "rank": 4, ...}, ...], "layers": {layer: place in that list}}.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any, cast

from imgadapt.errors import FormatError
from imgadapt.formats.part import Parts
from imgadapt.formats.table import Format, Settings
from imgadapt.methods import METHODS, Method
from imgadapt.targets import DENOISERS, TEXT_ENCODERS

_KEY = "imgadapt"


def _described(method: Method) -> dict[str, Any]:
    values = {field.name: getattr(method, field.name) for field in fields(method)}
    return {
        "method": method.name,
        **{name: _described(value) if isinstance(value, Method) else value for name, value in values.items()},
    }


@lru_cache(maxsize=8)  # one file asks for every layer
def _contents(text: str) -> tuple[list[Settings], dict[str, int]]:
    try:
        said = cast("dict[str, Any]", json.loads(text))
        methods = [_values(row) for row in said["methods"]]
        layers = {str(name): int(place) for name, place in said["layers"].items()}
        if any(not 0 <= place < len(methods) for place in layers.values()):
            raise ValueError("a layer's method is not in the list")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise FormatError(f"the metadata '{_KEY}' is not what imgadapt writes: {error!r}") from error
    return methods, layers


def _values(row: Mapping[str, Any]) -> Settings:
    """Fields of a method; ValueError where it is none."""
    kind = next((m for m in METHODS if m.name == row["method"]), None)
    if kind is None or {field.name for field in fields(kind)} != set(row) - {"method"}:
        raise ValueError(f"no method {row}")
    if wrong := [f.name for f in fields(kind) if f.type is bool and not isinstance(row[f.name], bool)]:
        raise ValueError(f"{wrong[0]} is {row[wrong[0]]!r}, wanted true or false")
    return {name: _made(value) for name, value in row.items() if name != "method"}


def _made(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    row = cast("dict[str, Any]", value)
    values = _values(row)
    return next(m for m in METHODS if m.name == row["method"])(**values)


def _settings(metadata: Mapping[str, str], name: str) -> Settings:
    methods, layers = _contents(metadata.get(_KEY, ""))
    if name not in layers:
        raise FormatError(f"the metadata '{_KEY}' does not say how {name} was trained")
    return methods[layers[name]]


def _metadata(parts: Parts, old: Mapping[str, str]) -> dict[str, str]:
    methods = list(dict.fromkeys(part.method for part in parts.values()))
    layers = {name: methods.index(part.method) for name, part in parts.items()}
    return {_KEY: json.dumps({"methods": [_described(m) for m in methods], "layers": layers}, sort_keys=True)}


_NAMES = {tensor: tensor for method in METHODS for tensor in (*method.tensors, *method.optional)}

OWN = Format(
    name="imgadapt",
    prefixes={component: f"{component}." for component in (*DENOISERS, *TEXT_ENCODERS, "model")},
    separator=".",
    spelling={method.name: _NAMES for method in METHODS},
    also={},
    alpha=None,
    settings=_settings,
    metadata=_metadata,
    own_metadata=(_KEY,),
)
