"""The table engine: a Format row and an Architecture's names give both directions, reading and writing.

Names are never parsed: every layer of an architecture is spelled forward, the index is inverted, and keys are looked
up in it. Which format and architecture a file has is 'the ones that know every key'. Dotted names need no table, so
files in a dotted format are read for architectures that have none, too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from imgadapt.arch import Architecture, architectures, canonical
from imgadapt.errors import ConfigError, FormatError, ShapeError, first_few
from imgadapt.formats.part import Part, Parts
from imgadapt.methods import METHODS

Settings = Mapping[str, Any]
"""Hyper-parameters that the metadata states beyond what tensors imply: fields of the Method."""


@dataclass(frozen=True, eq=False)  # a row is itself; hashed by identity
class Format:
    """How one tool spells an adapter.

    prefixes: component -> what its keys begin with; prefixes_of: the same for architectures where that differs.
    separator: what stands for the dots of a layer's path.
    spelling: method name -> our tensor name -> the key's end.
    also: other ends that are read, never written -> our tensor name.
    alpha: the key's end of the alpha tensor; None: alpha is in the metadata only.
    settings: (metadata, canonical layer name) -> what the metadata says of a layer's hyper-parameters.
    metadata: (layers, metadata they came with) -> what the tool writes there itself, verbatim as it came where that is
        still true; own_metadata: the names of those entries.
    """

    name: str
    prefixes: Mapping[str, str]
    separator: str
    spelling: Mapping[str, Mapping[str, str]]
    also: Mapping[str, str]
    alpha: str | None
    settings: Callable[[Mapping[str, str], str], Settings]
    metadata: Callable[[Parts, Mapping[str, str]], dict[str, str]]
    own_metadata: tuple[str, ...]
    prefixes_of: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])

    def spell(self, name: str, architecture: str | None) -> str | None:
        """The canonical layer `name` as this tool writes it; None if it has no word for the component."""
        component, _, path = name.partition(".")
        prefix = self.prefixes_of.get(architecture or "", self.prefixes).get(component)
        return None if prefix is None else prefix + path.replace(".", self.separator)

    def says(self, part: Part) -> bool:
        """Whether it has a word for the part's method and each of its tensors."""
        return set(part.tensors) <= set(self.spelling.get(part.method.name, {}))

    @property
    def ends(self) -> dict[str, str]:
        """Key end -> our tensor name, over all methods, and alpha."""
        ends = {end: tensor for names in self.spelling.values() for tensor, end in names.items()}
        return {**ends, **self.also} if self.alpha is None else {**ends, **self.also, self.alpha: "alpha"}


@dataclass(frozen=True)
class Reading:
    """What a file says: its layers, the tables that knew it, and keys that none knew (only when not strict)."""

    parts: Parts
    format: str
    architecture: str | None
    unknown: tuple[str, ...]


@cache
def _index(form: Format, architecture: Architecture) -> dict[str, str]:
    """Spelled layer -> canonical name; CLIP's `text_model.` is optional in what is read."""
    index: dict[str, str] = {}
    for name in architecture.layers:
        for variant in (name, name.replace(".text_model.", ".", 1)):
            if (spelled := form.spell(variant, architecture.name)) is not None:
                index[spelled] = name
    return index


def _named(form: Format, layer: str) -> str | None:
    """Canonical name of a dotted layer that no architecture lists."""
    known = form.separator == "." and layer.startswith(tuple(form.prefixes.values()))
    return canonical(layer) if known else None


def read(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    formats: Sequence[Format],
    architectures: Sequence[Architecture],
    *,
    strict: bool = True,
) -> Reading:
    """Recognise an adapter's tensors.

    Raises:
        FormatError: no pair of tables knows every key (the best one's unknown keys are counted and named; with
            strict=False they are returned), or a layer lacks a tensor.
    """
    best: tuple[Format, str | None, dict[str, dict[str, Tensor]], list[str]] | None = None
    for form in formats:
        split = _split(form, tensors)
        for architecture in (*architectures, None):
            index = _index(form, architecture) if architecture else {}
            layers: dict[str, dict[str, Tensor]] = {}
            unknown: list[str] = []
            for key, (layer, tensor) in split.items():
                name = index.get(layer) if architecture else _named(form, layer)
                if name is None or not tensor or tensor in layers.get(name, {}):  # the last: it says it twice
                    unknown.append(key)
                else:
                    layers.setdefault(name, {})[tensor] = tensors[key]
            if best is None or len(unknown) < len(best[3]):
                best = form, architecture.name if architecture else None, layers, unknown
    if best is None or not best[2]:
        raise FormatError(
            f"not an adapter that imgadapt reads: none of its {len(tensors)} keys is known "
            f"({first_few(list(tensors))}). "
            f"Formats: {', '.join(f.name for f in formats)}; methods: {', '.join(m.name for m in METHODS)}"
        )
    form, architecture_name, layers, unknown = best
    if unknown and strict:
        raise FormatError(
            f"{len(unknown)} of {len(tensors)} keys are unknown to the nearest table, {form.name}"
            f"{f' for {architecture_name}' if architecture_name else ''}: {first_few(unknown)}. "
            "strict=False loads the rest and lists these"
        )
    parts = {name: _part(form, name, found, metadata) for name, found in layers.items()}
    return Reading(parts, form.name, architecture_name, tuple(unknown))


def _split(form: Format, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Key -> (spelled layer, our tensor name); tensor name '' where no end of the format matches."""
    ends = form.ends
    rows: dict[str, tuple[str, str]] = {}
    for key in tensors:
        end = next((end for end in ends if key.endswith(f".{end}")), "")
        rows[key] = (key.removesuffix(f".{end}"), ends.get(end, ""))
    return rows


def _part(form: Format, name: str, found: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Part:
    own = {key: tensor for key, tensor in found.items() if key != "alpha"}
    method = next((m for m in METHODS if m.recognises(set(own))), None)
    if method is None:
        raise FormatError(
            f"{name} has {', '.join(sorted(own)) or 'only alpha'}, which is no whole adapter: it lost a tensor"
        )
    alpha = _alpha(name, found["alpha"]) if "alpha" in found else None
    try:
        return Part(replace(method.infer(own, alpha), **form.settings(metadata, name)), own)
    except (ConfigError, ShapeError, TypeError, ValueError, OverflowError, IndexError) as error:
        shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in own.items())
        raise FormatError(f"{name} ({shapes}): {error}") from error


def _alpha(name: str, tensor: Tensor) -> float | None:
    value = tensor.to(torch.float64).item() if tensor.numel() == 1 else math.nan
    if not 0 <= value < math.inf:
        raise FormatError(f"{name}: alpha is {tensor.tolist()}, wanted one finite number, 0 or more")
    return value or None  # 0 means rank, as sd-scripts reads it


def write(form: Format, parts: Parts, metadata: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata in the tool's spelling; foreign metadata is kept.

    Raises:
        FormatError: the format has no word for a layer's component or method, or flattens names of which no
            architecture has a table, so that neither we nor the tool would find them again.
    """
    if not parts:
        raise FormatError("the adapter has no layers; there is nothing to write")
    tensors: dict[str, Tensor] = {}
    parts = dict(sorted(parts.items()))  # so that the same adapter gives the same metadata, too
    architecture = next((a.name for a in architectures() if set(a.layers).issuperset(parts)), None)
    for name, part in parts.items():
        spelled, ends = form.spell(name, architecture), form.spelling.get(part.method.name)
        if spelled is None or ends is None:
            lacks = f"component {name.partition('.')[0]}" if spelled is None else f"method {part.method.name}"
            raise FormatError(f"{form.name} has no word for the {lacks} (of {name}); format='imgadapt' has one for all")
        if nameless := [tensor for tensor in part.tensors if tensor not in ends]:
            raise FormatError(f"{form.name} has no word for {first_few(nameless)} of {part.method} (of {name})")
        for tensor, value in part.tensors.items():
            if f"{spelled}.{ends[tensor]}" in tensors:
                raise FormatError(f"{name} and another layer are both {spelled} in {form.name}; one would be lost")
            tensors[f"{spelled}.{ends[tensor]}"] = value
        if form.alpha is not None and part.method.file_alpha is not None:
            tensors[f"{spelled}.{form.alpha}"] = torch.tensor(part.method.file_alpha)
    if form.separator != "." and architecture is None:
        known = {layer for a in architectures() for layer in a.layers}
        strange = [name for name in parts if name not in known]
        raise FormatError(
            f"how {form.name} names this model's layers is not known yet ({first_few(strange or list(parts))}); "
            f"known: {', '.join(a.name for a in architectures())}. Dotted formats need no table"
        )
    return tensors, {**metadata, **form.metadata(parts, metadata)}
