"""Methods that say themselves how peft has them (`Method.peft`): read from its files, and written."""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from imgadapt.errors import FormatError, ImgadaptError, first_few
from imgadapt.formats.ends import ENDS, THEIRS
from imgadapt.formats.fusing import Unfusable
from imgadapt.formats.part import Part
from imgadapt.methods import METHODS, Method
from imgadapt.methods.base import Peft
from imgadapt.sites import Site

Made = tuple[Method, dict[str, Tensor]]
_WRONG = (ImgadaptError, ValueError, TypeError, OverflowError, IndexError, KeyError, RuntimeError, AttributeError)
"""What settings and tensors of a file, which say anything, may raise."""

_PATTERNED: Mapping[str, Mapping[str, str]] = {
    "C3A": {"block_size": "block_size_pattern"},
    "DELORA": {"r": "rank_pattern", "delora_lambda": "lambda_pattern"},
    "FOURIERFT": {"n_frequency": "n_frequency_pattern"},
    "HIRA": {"r": "rank_pattern"},
    "OSF": {"effective_rank": "rank_pattern"},
    "WAVEFT": {"n_frequency": "n_frequency_pattern"},
}
"""peft_type -> fields of its config that it has patterns for, and those (peft 0.21, tuners/*/config.py)."""
_PLAIN = ("C3A", "FOURIERFT")
"""Whose patterns are looked up by the whole name, and tried as the end of one (tuners/*/model.py)."""
_SEARCHED = ("OSF",)
"""Whose patterns may match anywhere in a name."""
_PIECES = ("block_size", "group_size", "vector_length")
"""Fields of ours, and of the config, of which a layer takes the largest that divides it."""


def kind_of(names: Collection[str], config: Mapping[str, Any]) -> type[Method] | None:
    """The method whose ends these tensors are, by our names; None if it is none of those that say so themselves.

    Raises:
        FormatError: peft has several such, or the config says another.
    """
    if THEIRS.isdisjoint(names):
        return None
    found = [(m, m.peft) for m in METHODS if m.peft is not None and set(names) <= _by_tensor(m.peft).keys()]
    said = config.get("peft_type")
    own = [method for method, peft in found if said in (None, peft.type)]
    if not found or len(own) == 1:
        return own[0] if own else None
    types = " or ".join(peft.type for _, peft in found)
    if not own:
        raise FormatError(f"{first_few(sorted(names))} are of peft's {types}, and its config says {said!r}")
    raise FormatError(f"{first_few(sorted(names))} are of peft's {types}: adapter_config.json, which says, is missing")


def _by_tensor(peft: Peft) -> dict[str, str]:
    """Our name of an end -> the end. Layers may have what stands beside them, too (RandLoRA's do)."""
    return {ENDS[end].tensor: end for end in (*peft.ends, *peft.beside)}


def meant(
    kind: type[Method],
    t: Mapping[str, Tensor],
    beside: Mapping[str, Tensor],
    config: Mapping[str, Any],
    shape: tuple[int, ...] | None,
) -> Made:
    """The method and its tensors, of what a layer has in peft's file and what stands beside the layers.

    Raises:
        FormatError: they are no whole adapter, or the config, which the method needs, is not there.
    """
    peft = kind.peft
    assert peft is not None
    own = {name: tensor for name, tensor in beside.items() if _stands_beside(peft, name)}
    own |= {_by_tensor(peft)[name]: tensor for name, tensor in t.items()}
    if empty := [name for name, tensor in own.items() if not tensor.numel()]:
        raise FormatError(f"{', '.join(empty)} is empty")
    try:
        return _read(peft, own, config, shape)
    except _WRONG as error:
        said = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        rest = "" if config else "; its adapter_config.json, which may say more, is missing: keep them together"
        raise FormatError(f"as peft's {peft.type}: {said}{rest}") from error


def _read(peft: Peft, t: Mapping[str, Tensor], config: Mapping[str, Any], shape: tuple[int, ...] | None) -> Made:
    """With the shape that a table has of the layer, unless this model is of another size."""
    if shape is None:
        return peft.read(t, config, None)
    try:
        made = peft.read(t, config, shape)
        if made[0].fits(made[1], Site.of_shape(shape, made[0].kinds)) is None:
            return made
    except _WRONG:
        return peft.read(t, config, None)
    try:
        return peft.read(t, config, None)
    except _WRONG:
        return made


def _stands_beside(peft: Peft, name: str) -> bool:
    return name.partition(".")[0] in peft.beside


def beside(parts: Mapping[str, Part]) -> dict[str, dict[str, str]]:
    """Layer -> name of what peft has beside its layers -> its key."""
    return {
        layer: {name: f"base_model.{name}" for name in part.method.peft.beside}
        for layer, part in parts.items()
        if part.method.peft is not None and part.method.peft.beside
    }


def sizes(parts: Mapping[str, Part]) -> dict[str, tuple[int, ...]]:
    """Key of what stands beside the layers -> its shape, where the method says what peft makes it of."""
    shapes = [part.shape for part in parts.values() if part.shape is not None]
    first = next(iter(parts.values())).method if parts else None
    if first is None or first.peft is None or first.peft.widest is None or not shapes:
        return {}
    largest = tuple(max(numbers) for numbers in zip(*(shape[:2] for shape in shapes), strict=True))
    return {f"base_model.{name}": shape for name, shape in first.peft.widest(first, largest).items()}


def spelled(part: Part) -> dict[str, Tensor]:
    """What peft has of a part, by its names.

    Raises:
        Unfusable: peft has no word for it.
    """
    return _written(part)[0]


def _written(part: Part) -> tuple[dict[str, Tensor], dict[str, Any]]:
    peft = part.method.peft
    assert peft is not None
    if part.shape is None:
        raise Unfusable(
            f"peft's {peft.type} needs the layer's size, which no table has: attach the file to the model, collect it",
            dense=False,
        )
    try:
        return peft.write(part.method, part.tensors, part.shape)
    except FormatError as error:
        raise Unfusable(str(error), dense=False) from error


def config_for(parts: Mapping[str, Part]) -> dict[str, Any]:
    """What the config says of layers beyond which they are, by their paths.

    Raises:
        FormatError: they differ in what peft has one setting for.
    """
    peft = next(iter(parts.values())).method.peft
    assert peft is not None
    rows = {path: _written(part)[1] for path, part in parts.items()}
    patterns = _PATTERNED.get(peft.type, {})
    made: dict[str, Any] = {}
    for field in dict.fromkeys(field for row in rows.values() for field in row):
        values = {path: row.get(field) for path, row in rows.items()}
        most: Any = Counter(map(repr, values.values())).most_common(1)[0][0]
        made[field] = next(value for value in values.values() if repr(value) == most)
        others = {path: value for path, value in values.items() if repr(value) != most}
        if not others:
            continue
        if field not in patterns or (peft.type in _PLAIN and _ambiguous(parts)):
            said = first_few(list(dict.fromkeys(map(repr, values.values()))))
            raise FormatError(
                f"peft's {peft.type} has one {field} for all layers of a file, and this has {said}"
                + fitting_all([part.method for part in parts.values()], field)
            )
        plain, end = peft.type in _PLAIN, "$" if peft.type in _SEARCHED else ""
        made[patterns[field]] = {path if plain else f"^{re.escape(path)}{end}": v for path, v in others.items()}
    return made


def fitting_all(methods: Sequence[Any], field: str) -> str:
    """Of methods that differ in the size of their layers' pieces: what to train with so that they do not, for errors;
    "": there is nothing.
    """
    most = math.gcd(*(getattr(method, field) for method in methods)) if field in _PIECES else 1
    return f"; train with {field}={most}, which fits all of them" * (most > 1)


def _ambiguous(paths: Collection[str]) -> bool:
    """Whether one is the end of another."""
    ends = {path[k + 1 :] for path in paths for k, letter in enumerate(path) if letter == "."}
    return not ends.isdisjoint(paths)
