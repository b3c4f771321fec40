"""Layers that adapters rotate, in the engine: a merged rotation is a part, not terms, and needs no base."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from imgadapt.arch import Architecture
from imgadapt.combining.entering import Base, change_of
from imgadapt.combining.layers import Merged
from imgadapt.combining.rules.rotations import is_rotation, turned
from imgadapt.combining.rules.rule import Rule
from imgadapt.errors import ConfigError, ShapeError
from imgadapt.formats import Part
from imgadapt.formats.splitting import inputs_of, rows_of
from imgadapt.sites import Site
from imgadapt.whole import settled


def ready(parts: Mapping[str, Part], base: Base | None, row: Rule) -> Mapping[str, Part]:
    """An input's parts, none of them whole or absolute, save what is merged as a rotation."""
    if base is None:
        return parts
    kept = {name: part for name, part in parts.items() if row.rotations is not None and is_rotation(part)}
    rest = {name: part for name, part in parts.items() if name not in kept}
    return {**settled(rest, base.names, base.weight, base.bias), **kept}


def check(row: Rule, parts: Sequence[Mapping[str, Part]], used: Collection[str]) -> None:
    """Raises ConfigError: a rule of rotations, and no input is one; or a fused layer is turned in one file, and one of
    those that it fuses is in another.
    """
    if row.rotations is None:
        return
    there = [(name, part) for own in parts for name, part in own.items() if name in used]
    if there and not any(is_rotation(part) for _, part in there):
        kinds = ", ".join(sorted({part.method.name for _, part in there}))
        raise ConfigError(f"{row.name} merges rotations (OFT, BOFT), and the inputs are {kinds}; take rule 'weighted'")
    names = {name for name, _ in there}
    for name, part in there:
        if both := [s.layer for s in part.slices if s.layer in names]:
            raise ConfigError(
                f"an input turns {name} as one, and another has {both[0]}, which is part of it; only the base's "
                "weights tell what that makes: give the base and take a rule of changes, as 'weighted' or 'svd'"
            )


def merged_rotation(
    name: str,
    parts: Sequence[Part | None],
    weights: Tensor,
    row: Rule,
    options: Mapping[str, Any],
    tables: tuple[Architecture | None, Base | None],
) -> Merged:
    """A layer that an input turns. parts, weights: of all inputs, None and 0 where one does not have it. With the base,
    its terms are what the rotation changes there; without it there are none.
    """
    architecture, base = tables
    who = tuple(k for k, part in enumerate(parts) if part is not None)
    there = [part for part in parts if part is not None]
    in_base = base is not None and name in base.names
    sure = base.site(name).shape if base is not None and in_base else next((p.shape for p in there if p.shape), None)
    site = _site(sure or _shape(name, there, architecture))
    method: Any = there[0].method
    known = sure is not None or all(getattr(part.method, "shared", False) for part in there)
    size = None if site is None or not known else site.rows if method.side == "output" else site.fan_in
    made = turned(name, parts, weights, row, options, size)
    rescale = made.part.tensors.get("rescale")
    if site is not None and rescale is not None and len(rescale) != site.rows:
        raise ShapeError(
            f"{name}: `rescale` is of {len(rescale)} outputs, the layer has {site.rows}; is it another base's?"
        )
    terms = (change_of(name, made.part, site, base).term,) if site is not None and in_base else ()
    return Merged(name, site or Site(()), terms, None, who, made.gram, made.norm, made.residual, made.part)


def _site(shape: tuple[int, ...] | None) -> Site | None:
    return None if shape is None else Site(shape, "conv" if len(shape) > 2 else "linear", bias="bias")


def _shape(name: str, parts: Sequence[Part], architecture: Architecture | None) -> tuple[int, ...] | None:
    """What the architecture says of a layer, if the tensors do not say otherwise: models of other widths (the embedded
    base) have layers of the same names.
    """
    shape = None if architecture is None else architecture.shape_of(name)
    if (site := _site(shape)) is None:
        return None
    for part in parts:
        rows, inputs = rows_of(part.method, part.tensors), inputs_of(part.method, part.tensors)
        if rows not in (None, site.rows) or inputs not in (None, site.fan_in):
            return None
    return shape
