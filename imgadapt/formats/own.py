"""imgadapt's own format: dotted names, our tensor names, and every hyper-parameter in the metadata; for any method.

`imgadapt` is JSON: {"methods": [{"method": "lora", "rank": 4, ...}, ...], "layers": {layer: place in that list}}, and,
where there are any, "common", {layer: {tensor: number}} of the tensors that layers share, which have the keys
`common.<tensor>.<number>`, and "shapes", {layer: [out, in, ...]} of weights of which the tensors tell less.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor

from imgadapt.errors import FormatError, ImgadaptError
from imgadapt.formats.format import Format
from imgadapt.formats.layer_config import LONGEST_JSON
from imgadapt.formats.meaning import checked
from imgadapt.formats.part import Part, Parts, Source
from imgadapt.formats.settings import check, described, made_of
from imgadapt.formats.spelling import own
from imgadapt.formats.splitting import inputs_of, rows_of
from imgadapt.methods import METHODS
from imgadapt.targets import DENOISERS, TEXT_ENCODERS

KEY = "imgadapt"
"""Metadata entry."""
_COMMON = "common."
_LARGEST = 2**31  # numbers of a weight; an embedding of 256,000 words of 8,192 has as many


class _Said(NamedTuple):
    """What the metadata says: settings, layer -> place among them, its common tensors' numbers, its weight's shape."""

    methods: list[dict[str, Any]]
    layers: dict[str, int]
    common: dict[str, dict[str, int]]
    shapes: dict[str, tuple[int, ...]]


def _contents(text: str) -> _Said:
    try:
        if len(text) > LONGEST_JSON:
            raise ValueError("it is larger than any")
        said = cast("dict[str, Any]", json.loads(text))
        methods: list[dict[str, Any]] = [{**row} for row in said["methods"]]
        for row in methods:
            check(row)
        layers = {str(name): int(place) for name, place in said["layers"].items()}
        if any(not 0 <= place < len(methods) for place in layers.values()):
            raise ValueError("a layer's method is not in the list")
        common = {str(name): {str(k): int(n) for k, n in row.items()} for name, row in said.get("common", {}).items()}
        shapes = {str(name): _shape(row) for name, row in said.get("shapes", {}).items()}
        if not {*common, *shapes} <= layers.keys():
            raise ValueError("it says more of a layer that it does not have")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise FormatError(f"the metadata '{KEY}' is not what imgadapt writes: {error!r}") from error
    return _Said(methods, layers, common, shapes)


def _shape(row: Any) -> tuple[int, ...]:
    sizes = cast("list[Any]", row)
    total = 1
    for n in sizes:
        if type(n) is not int or not 0 < n <= _LARGEST or not 1 <= len(sizes) <= 5:
            raise ValueError(f"no weight is of the shape {sizes!r}")
        total *= n
    if not isinstance(row, list) or total > _LARGEST:
        raise ValueError(f"no weight is of the shape {sizes!r}")
    return tuple(sizes)


def is_own(metadata: Mapping[str, str]) -> bool:
    return KEY in metadata


def read_own(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[dict[str, Part], dict[str, str]]:
    """(layers, keys that no layer has -> why); of the format that names everything as we do.

    Raises:
        FormatError: the metadata is not what imgadapt writes.
    """
    said = _contents(metadata.get(KEY, ""))
    found: dict[str, dict[str, Tensor]] = {}
    unknown: dict[str, str] = {}
    shared = {_key(name, number) for row in said.common.values() for name, number in row.items()}
    for key, tensor in tensors.items():
        name, _, end = key.rpartition(".")
        if key in shared:
            continue
        if end not in _NAMES:
            unknown[key] = "no tensor of any method"
        elif name not in said.layers:
            unknown[key] = f"the metadata '{KEY}' does not say how {name} was trained"
        else:
            found.setdefault(name, {})[end] = tensor
    for name, row in said.common.items():
        for end, number in row.items():
            if (key := _key(end, number)) not in tensors:
                unknown[key] = f"{name} has it in common with others, and the file does not have it"
            elif end in found.setdefault(name, {}):
                unknown[f"{name}.{end}"] = f"{name} has {end} twice, of its own and in common with others"
            else:
                found[name][end] = tensors[key]
    for name in said.layers.keys() - found.keys():
        unknown[name] = f"the metadata '{KEY}' has this layer, and the file does not"
    parts: dict[str, Part] = {}
    for name, t in found.items():
        try:
            parts[name] = _part(name, t, said)
        except (ValueError, TypeError, IndexError, KeyError, OverflowError, RuntimeError, ImgadaptError) as error:
            own_ends = t.keys() - said.common.get(name, {}).keys()
            unknown |= {f"{name}.{end}": f"{name}: {error}" for end in own_ends or t}
    return parts, unknown


def _key(name: str, number: int) -> str:
    return f"{_COMMON}{name}.{number}"


def _part(name: str, t: dict[str, Tensor], said: _Said) -> Part:
    method = made_of(said.methods[said.layers[name]])
    if not method.recognises(set(t)):
        raise ValueError(f"{', '.join(sorted(t))} are not {method.name}, whole: it lost a tensor")
    checked((method, t))
    common = said.common.get(name, {})
    if common.keys() - {*method.common}:
        raise ValueError(f"{', '.join(sorted(common))} are not what layers of {method.name} have in common")
    inferred = method.infer(t, method.file_alpha)
    if method.file_rank != inferred.file_rank:
        raise ValueError(f"its tensors are of rank {inferred.file_rank}, and the metadata says {method}")
    shape = said.shapes.get(name)
    if method.common:  # keys that are numbered anew when they are written
        return Part(method, t, shape=shape)
    keys = {f"{name}.{end}": tensor for end, tensor in t.items()}
    return Part(method, t, Source("imgadapt", keys, {name: (method, t)}), shape=shape)


def nothing(parts: Parts, old: Mapping[str, str]) -> dict[str, str]:
    """No metadata of its own."""
    return {}


def _metadata(parts: Parts, old: Mapping[str, str]) -> dict[str, str]:
    methods = list(dict.fromkeys(part.method for part in parts.values()))
    places = {method: place for place, method in enumerate(methods)}
    made: dict[str, Any] = {
        "methods": [described(method) for method in methods],
        "layers": {name: places[part.method] for name, part in parts.items()},
    }
    if common := _numbers(parts):
        made["common"] = common
    if shapes := {name: part.shape for name, part in parts.items() if part.shape is not None and _untold(part)}:
        made["shapes"] = shapes
    return {KEY: json.dumps(made, sort_keys=True)}


def _untold(part: Part) -> bool:
    """Whether its tensors do not tell the shape of the weight."""
    if part.method.kinds == ("norm",) or part.slices:
        return False
    return rows_of(part.method, part.tensors) is None or inputs_of(part.method, part.tensors) is None


def _numbers(parts: Parts) -> dict[str, dict[str, int]]:
    """Layer -> tensor that it has in common with others -> which of those of that name, in the layers' order."""
    seen: dict[str, list[Tensor]] = {}
    numbers: dict[tuple[str, int], int] = {}
    made: dict[str, dict[str, int]] = {}
    for layer, part in sorted(parts.items()):
        for name in part.method.common:
            tensor = part.tensors.get(name)
            if tensor is None:
                continue
            own = seen.setdefault(name, [])
            if (name, id(tensor)) not in numbers:
                numbers[name, id(tensor)] = len(own)
                own.append(tensor)
            made.setdefault(layer, {})[name] = numbers[name, id(tensor)]
    return made


def _beside(parts: Parts) -> dict[str, dict[str, str]]:
    return {layer: {name: _key(name, number) for name, number in row.items()} for layer, row in _numbers(parts).items()}


_NAMES = {tensor: tensor for method in METHODS for tensor in (*method.tensors, *method.optional)}

OWN = Format(
    "imgadapt",
    "imgadapt, for any method",
    {component: f"{component}." for component in (*DENOISERS, *TEXT_ENCODERS, "model")},
    own,
    tuple(_NAMES),
    _metadata,
    own_metadata=(KEY,),
    beside=_beside,
)
