"""Differences: two checkpoints of one model, compared layer by layer, whatever files they are in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

import torch
from torch import Tensor

from imgadapt.arch import Architecture, Slice
from imgadapt.combining.checkpoints.base import BaseFile
from imgadapt.combining.fused import groups, over
from imgadapt.errors import ConfigError, ShapeError, StateError, TargetError, first_few
from imgadapt.formats import Format
from imgadapt.sites import Site
from imgadapt.stored import DTYPES
from imgadapt.targets import PRESETS, Targets, idle, matches

_HALF_STEP = (0.75 / (2 * math.log(2)) / 12) ** 0.5
"""Root mean square error of rounding to nearest, in units of |w| eps: step² / 12, and a step is eps times the power of
two below |w|, whose mean square over |w|² is 3 / (8 ln 2) where logarithms are spread evenly (0.9 of it if normal)."""
_BLOCK = 2**20


@dataclass(frozen=True)
class Difference:
    """What a layer of one checkpoint has more than the other's: values (out, fan_in), fp32, and the bias (out,); None:
    it is the same. noise: about the norm of what rounding to the coarser of both dtypes alone would make.
    rounding: the one is the other in a coarser dtype, so there is no difference (values are None).
    """

    values: Tensor | None
    bias: Tensor | None
    norm: float = 0.0
    noise: float = 0.0
    rounding: bool = False


@dataclass(frozen=True)
class Together:
    """One or several layers that are compared as one. slices: which of its rows are which layer."""

    name: str
    site: Site
    slices: tuple[Slice, ...]

    @property
    def layers(self) -> list[str]:
        return [s.layer for s in self.slices]


@dataclass(frozen=True)
class Checkpoints:
    """A fine-tuned checkpoint and the one it came from.

    Raises:
        ConfigError: they have no component in common, or (where strict) one lacks layers of the other.
        ShapeError: a layer is of another size.
    """

    tuned: BaseFile
    base: BaseFile
    strict: bool = True
    notes: list[str] = field(default_factory=list[str])
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        ours, theirs = set(self.tuned.layers), set(self.base.layers)
        here, there = _components(ours), _components(theirs)
        if not here & there:
            raise ConfigError(
                f"{self._both()}: the one has {_listed(here)}, the other {_listed(there)}: nothing to compare"
            )
        for own, path, other in ((here, self.tuned.path, there), (there, self.base.path, here)):
            if own - other:
                self.notes.append(f"only {path} has {_listed(own - other)}, which is not compared")
        shared = here & there
        for own, others, path in ((ours, theirs, self.base.path), (theirs, ours, self.tuned.path)):
            if lost := sorted(n for n in own - others if n.partition(".")[0] in shared):
                said = f"{path} has no {first_few(lost)}"
                if self.strict:
                    raise ConfigError(f"{self._both()}: {said}; is the one a fine-tune of the other?")
                self.notes.append(f"{said}: not compared")
        both = sorted(ours & theirs)
        for name in both:
            a, b = self.tuned.layers[name].site.shape, self.base.layers[name].site.shape
            if _flat(a) != _flat(b):
                raise ShapeError(f"{self._both()}: {name} is {a} and {b}; is the one a fine-tune of the other?")
        object.__setattr__(self, "names", [self.tuned.layers[name].name for name in both])

    def _both(self) -> str:
        a, b = (
            (one.path, f" ({one.architecture.name})" if one.architecture else "") for one in (self.tuned, self.base)
        )
        return f"{a[0]}{a[1]} and {b[0]}{b[1]}"

    @property
    def architecture(self) -> Architecture | None:
        """The table that has all layers of both; None: none does."""
        tables = (self.tuned.architecture, self.base.architecture)
        return next((a for a in tables if a and all(a.shape_of(name) for name in self.names)), None)

    def asked(self, targets: Targets | None) -> list[str]:
        """The layers that are targeted; None: all.

        Raises:
            TargetError: a target matches none.
        """
        if targets is None:
            return self.names
        if lost := idle(targets, self.names):
            raise TargetError(f"no layer matches {first_few(lost)}{self._near(lost)}")
        return [name for name in self.names if matches(name, targets)]

    def _near(self, lost: Sequence[str]) -> str:
        """What may have been meant: a preset, a glob around what is a middle of names; and what there is."""
        near = [m for target in lost for m in get_close_matches(target, PRESETS, n=1)]
        near += [f"*{t}*" for t in lost if any(t in name for name in self.names)]
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        some = [next(name for name in self.names if name.startswith(f"{c}.")) for c in self._components()]
        return f"{hint}; a target is a preset ({', '.join(PRESETS)}) or a glob over names, as {', '.join(some)}"

    def _components(self) -> list[str]:
        return list(dict.fromkeys(name.partition(".")[0] for name in self.names if "." in name))

    def together(self, names: Sequence[str], form: Format | None) -> list[Together]:
        """What the format has as one layer is one, the rest each for itself, in order."""
        fused = groups(self.architecture, form, set(names), lambda _: True)
        fused = {name: [s.layer for s in own] for name, own in fused.items() if self._alike([s.layer for s in own])}
        inside = {layer for layers in fused.values() for layer in layers}
        made = [self._together(name, layers) for name, layers in fused.items()]
        made += [self._together(name, [name]) for name in names if name not in inside]
        return sorted(made, key=lambda one: one.name)

    def _alike(self, layers: Sequence[str]) -> bool:
        return len({self.tuned.site(layer).shape[1:] for layer in layers}) == 1

    def _together(self, name: str, layers: Sequence[str]) -> Together:
        sites = [self.tuned.site(layer) for layer in layers]
        slices: list[Slice] = []
        start = 0
        for layer, site in zip(layers, sites, strict=True):
            slices.append(Slice(layer, 0, start, site.rows))
            start += site.rows
        return Together(name, sites[0] if len(sites) == 1 else over(sites), tuple(slices))

    def difference(self, one: Together) -> Difference:
        """Raises StateError: it is not finite."""
        found = [self._single(layer) for layer in one.layers]
        if len(found) == 1:
            return found[0]
        sites = [self.tuned.site(layer) for layer in one.layers]
        values = bias = None
        if any(d.values is not None for d in found):
            values = torch.zeros(one.site.rows, one.site.fan_in)
            for s, d in zip(one.slices, found, strict=True):
                if d.values is not None:
                    values[s.first : s.first + s.rows] = d.values
        if any(d.bias is not None for d in found):
            zeros = [torch.zeros(site.rows) for site in sites]
            bias = torch.cat([z if d.bias is None else d.bias for z, d in zip(zeros, found, strict=True)])
        norm, noise = (math.hypot(*own) for own in ([d.norm for d in found], [d.noise for d in found]))
        return Difference(values, bias, norm, noise, all(d.rounding for d in found))

    def _single(self, layer: str) -> Difference:
        bias, rounded = self._bias(layer)
        ours, theirs = self.tuned.weight(layer)[0], self.base.weight(layer)[0]
        theirs = theirs.reshape(ours.shape)
        if ours.dtype == theirs.dtype and torch.equal(ours, theirs):
            return Difference(None, bias, rounding=rounded)
        if _is_rounded(ours, theirs):
            return Difference(None, bias, rounding=bias is None)
        values, norms = _subtracted(ours, theirs)
        if not math.isfinite(norms[1]):
            broken = self.tuned.path if not math.isfinite(norms[0]) else self.base.path
            raise StateError(f"{broken}: {layer} has NaN or infinity")
        step = max(torch.finfo(ours.dtype).eps, torch.finfo(theirs.dtype).eps)
        share = int(values.count_nonzero()) / values.numel()
        flat = values.flatten(1) if values.ndim > 1 else values[:, None]
        return Difference(flat, bias, norms[1], _HALF_STEP * step * norms[0] * share**0.5)

    def _bias(self, layer: str) -> tuple[Tensor | None, bool]:
        """Its difference, and whether it is one of rounding alone."""
        ours, theirs = self.tuned.bias(layer), self.base.bias(layer)
        if ours is None and theirs is None:
            return None, False
        if ours is None or theirs is None:
            lacking = self.tuned.path if ours is None else self.base.path
            raise ConfigError(f"{self._both()}: {lacking} has no bias of {layer}; is the one a fine-tune of the other?")
        if torch.equal(ours.float(), theirs.float()):
            return None, False
        if _is_rounded(ours, theirs):
            return None, True
        values = ours.float() - theirs.float()
        if not bool(torch.isfinite(values).all()):
            raise StateError(f"{self._both()}: the bias of {layer} has NaN or infinity")
        return values, False

    def others(self) -> list[str]:
        """Keys of tensors that are of no layer, and are not the same in both."""
        used = {place.key for layer in self.tuned.layers.values() for place in (*layer.weight, *layer.bias)}
        used |= {layer.scale for layer in self.tuned.layers.values() if layer.scale}
        found: list[str] = []
        for key in sorted(self.tuned.tensors.keys() & self.base.tensors.keys() - used):
            a, b = self.tuned.tensors[key], self.base.tensors[key]
            if a.dtype in DTYPES and b.dtype in DTYPES:
                ours = a.read()
                same = b.matches(ours) or (a.shape == b.shape and _is_rounded(ours, b.read()))
                if not same:
                    found.append(key)
        return found


def _subtracted(ours: Tensor, theirs: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """ours - theirs, fp32, and the norms of ours and of that; by blocks, for other dtypes would be copied whole."""
    values = torch.empty(ours.shape)
    step = max(1, _BLOCK * len(ours) // max(1, ours.numel()))
    squares: list[tuple[float, float]] = []
    for k in range(0, len(ours), step):
        a, out = ours[k : k + step].float(), values[k : k + step]
        torch.sub(a, theirs[k : k + step].float(), out=out)
        squares.append((float(a.norm()) ** 2, float(out.norm()) ** 2))
    first, second = (math.fsum(own) ** 0.5 for own in zip(*squares, strict=True))
    return values, (first, second)


def _is_rounded(ours: Tensor, theirs: Tensor) -> bool:
    """Whether the one is the other in a coarser dtype."""
    if ours.dtype == theirs.dtype:
        return False
    fine, coarse = sorted((ours, theirs), key=lambda t: torch.finfo(t.dtype).eps)
    return torch.equal(fine.to(coarse.dtype), coarse)


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A linear layer may be a convolution with a kernel of 1 elsewhere."""
    return shape[:2] if math.prod(shape[2:]) == 1 else shape


def _components(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
