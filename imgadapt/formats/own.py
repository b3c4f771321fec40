"""imgadapt's own format: dotted names, our tensor names, and every hyper-parameter in the metadata; for any method.

`imgadapt` is JSON: {"methods": [{"method": "lora", "rank": 4, ...}, ...], "layers": {layer: place in that list}}.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

from torch import Tensor

from imgadapt.errors import FormatError, ImgadaptError
from imgadapt.formats.format import Format
from imgadapt.formats.layer_config import LONGEST_JSON
from imgadapt.formats.meaning import checked
from imgadapt.formats.part import Part, Parts, Source
from imgadapt.formats.spelling import own
from imgadapt.methods import METHODS, Method
from imgadapt.targets import DENOISERS, TEXT_ENCODERS

KEY = "imgadapt"
"""Metadata entry."""


def _described(method: Method) -> dict[str, Any]:
    values = {field.name: getattr(method, field.name) for field in fields(method)}
    return {
        "method": method.name,
        **{name: _described(value) if isinstance(value, Method) else value for name, value in values.items()},
    }


def _contents(text: str) -> tuple[list[tuple[type[Method], dict[str, Any]]], dict[str, int]]:
    try:
        if len(text) > LONGEST_JSON:
            raise ValueError("it is larger than any")
        said = cast("dict[str, Any]", json.loads(text))
        rows = [(_values(row), _kind(row)) for row in said["methods"]]
        methods = [(kind, values) for values, kind in rows]
        layers = {str(name): int(place) for name, place in said["layers"].items()}
        if any(not 0 <= place < len(methods) for place in layers.values()):
            raise ValueError("a layer's method is not in the list")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise FormatError(f"the metadata '{KEY}' is not what imgadapt writes: {error!r}") from error
    return methods, layers


def _kind(row: Mapping[str, Any]) -> type[Method]:
    return next(m for m in METHODS if m.name == row["method"])


def _values(row: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a method; ValueError where it is none."""
    kind = next((m for m in METHODS if m.name == row["method"]), None)
    if kind is None or not set(row) - {"method"} <= {field.name for field in fields(kind)}:
        raise ValueError(f"no method {row}")
    if wrong := [f.name for f in fields(kind) if f.type is bool and not isinstance(row.get(f.name, False), bool)]:
        raise ValueError(f"{wrong[0]} is {row[wrong[0]]!r}, wanted true or false")
    return {name: _made(value) for name, value in row.items() if name != "method"}


def _made(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    row = cast("dict[str, Any]", value)
    values = _values(row)
    return _kind(row)(**values)


def is_own(metadata: Mapping[str, str]) -> bool:
    return KEY in metadata


def read_own(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[dict[str, Part], dict[str, str]]:
    """(layers, keys that no layer has -> why); of the format that names everything as we do.

    Raises:
        FormatError: the metadata is not what imgadapt writes.
    """
    methods, layers = _contents(metadata.get(KEY, ""))
    found: dict[str, dict[str, Tensor]] = {}
    unknown: dict[str, str] = {}
    for key, tensor in tensors.items():
        name, _, end = key.rpartition(".")
        if end not in _NAMES:
            unknown[key] = "no tensor of any method"
        elif name not in layers:
            unknown[key] = f"the metadata '{KEY}' does not say how {name} was trained"
        else:
            found.setdefault(name, {})[end] = tensor
    for name in layers.keys() - found.keys():
        unknown[name] = f"the metadata '{KEY}' has this layer, and the file does not"
    parts: dict[str, Part] = {}
    for name, t in found.items():
        kind, values = methods[layers[name]]
        try:
            method = kind(**values)
            if not kind.recognises(set(t)):
                raise ValueError(f"{', '.join(sorted(t))} are not {kind.name}, whole: it lost a tensor")
            checked((method, t))
            inferred = method.infer(t, method.file_alpha)
            if method.file_rank != inferred.file_rank:
                raise ValueError(f"its tensors are of rank {inferred.file_rank}, and the metadata says {method}")
            keys = {f"{name}.{end}": tensor for end, tensor in t.items()}
            parts[name] = Part(method, t, Source("imgadapt", keys, {name: (method, t)}))
        except (ValueError, TypeError, ImgadaptError) as error:
            unknown |= {f"{name}.{end}": f"{name}: {error}" for end in t}
    return parts, unknown


def nothing(parts: Parts, old: Mapping[str, str]) -> dict[str, str]:
    """No metadata of its own."""
    return {}


def _metadata(parts: Parts, old: Mapping[str, str]) -> dict[str, str]:
    methods = list(dict.fromkeys(part.method for part in parts.values()))
    layers = {name: methods.index(part.method) for name, part in parts.items()}
    return {KEY: json.dumps({"methods": [_described(m) for m in methods], "layers": layers}, sort_keys=True)}


_NAMES = {tensor: tensor for method in METHODS for tensor in (*method.tensors, *method.optional)}

OWN = Format(
    "imgadapt",
    "imgadapt, for any method",
    {component: f"{component}." for component in (*DENOISERS, *TEXT_ENCODERS, "model")},
    own,
    tuple(_NAMES),
    _metadata,
    own_metadata=(KEY,),
)
