"""Adapters on a live model: attach, detach, set_weights, disabled, merge, unmerge, collect, parameters."""

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from imgadapt import targets as where
from imgadapt.arch import canonical
from imgadapt.errors import ConfigError, ShapeError, StateError, TargetError, first_few
from imgadapt.file import AdapterFile
from imgadapt.formats import Part
from imgadapt.layer import AdapterLayer, Slot
from imgadapt.methods import Method
from imgadapt.sites import Site
from imgadapt.targets import Targets

Weight = float | Mapping[str, float]
"""An adapter's strength: one number, or globs over full layer names to numbers (first match wins; none: 0)."""


def attach(
    model: Any,
    adapter: Method | AdapterFile,
    *,
    name: str = "default",
    targets: Targets | None = None,
    weight: Weight = 1.0,
) -> None:
    """Put an adapter on the layers of a model: a fresh one of a Method, or the one of a file.

    model: a diffusers pipeline, a mapping of component names to modules, or one module.
    targets: presets, globs and `!` exclusions (see `targets.matches`); "*" is every layer the method can act on.
        None means the preset "transformer" for a Method, and everything in it for a file.
    weight: strength at which it acts; 0 is off, negative is allowed.

    A fresh adapter changes nothing until it is trained; its tensors are fp32 and come from torch's global generator.
    Freeze the base yourself (`unet.requires_grad_(False)`) before training: attach leaves it as it is.

    Raises:
        TargetError: no layer matches, the method cannot act on one that is named, or the file names layers that the
            model does not have.
        ShapeError: a tensor of the file does not fit its layer.
        StateError: the name is taken.
    """
    parts = where.components(model)
    if any(layer.slot(name) is not None for _, layer in _adapted(parts)):
        raise StateError(f"the name '{name}' is taken: detach(model, '{name}') first, or choose another name=")
    if isinstance(adapter, Method):
        chosen = _fresh(parts, adapter, "transformer" if targets is None else targets)
    else:
        chosen = _from_file(parts, adapter, targets)
    strengths = _strengths(weight, [layer_name for layer_name, *_ in chosen])
    try:
        for layer_name, module, site, part in chosen:
            layer = module if isinstance(module, AdapterLayer) else AdapterLayer(module, site)
            layer.add(Slot(name, part.method, part.tensors, strengths[layer_name]))
            if layer is not module:
                where.replace(parts, layer_name, layer)
    except BaseException:  # whatever it was (no memory, NaN in a merged layer): nothing stays half attached
        _take_off(parts, [name])
        raise


def detach(model: Any, *names: str) -> None:
    """Take adapters off (all of them when none is named); layers left bare become their base again, bitwise.

    Raises:
        StateError: a name is not on the model.
    """
    parts = where.components(model)
    present = adapters(model)
    if missing := [name for name in names if name not in present]:
        raise StateError(f"no adapter {first_few(missing)} on this model; it has: {', '.join(present) or 'none'}")
    _take_off(parts, names or present)


def set_weights(model: Any, weights: Mapping[str, Weight]) -> None:
    """Change the strengths of the named adapters; the others keep theirs. Merged layers are merged anew.

    Raises:
        StateError: a name is not on the model, or a merge is not finite (all strengths are then as before).
        ConfigError: a strength is not a finite number.
    """
    parts = where.components(model)
    present = adapters(model)
    if missing := [name for name in weights if name not in present]:
        raise StateError(f"no adapter {first_few(missing)} on this model; it has: {', '.join(present) or 'none'}")
    rows = [(n, layer, slot) for n, layer in _adapted(parts) for slot in layer if slot.name in weights]
    wanted = {
        name: _strengths(weight, [n for n, _, slot in rows if slot.name == name]) for name, weight in weights.items()
    }
    before = [slot.weight for _, _, slot in rows]
    try:
        for layer_name, layer, slot in rows:
            slot.weight = wanted[slot.name][layer_name]
            layer.refresh()
    except BaseException:
        for (_, _, slot), strength in zip(rows, before, strict=True):
            slot.weight = strength
        for _, layer, _ in rows:
            layer.refresh()
        raise


def merge(model: Any) -> None:
    """Fold all attached adapters into the weights at their strengths; `unmerge` restores the weights bitwise.

    Raises:
        StateError: NaN or infinity would result, or adapters are disabled; no layer is changed.
        TargetError: nothing is attached.
    """
    layers = _some(model)
    if not all(layer.enabled for layer in layers):
        raise StateError("adapters are disabled here; merge outside of `disabled`")
    touched: list[AdapterLayer] = []
    try:
        for layer in layers:
            if not layer.merged:
                layer.merge()
                touched.append(layer)
    except BaseException:
        for layer in touched:
            layer.unmerge()
        raise


def unmerge(model: Any) -> None:
    """Undo `merge`: every weight is the very tensor it was.

    Raises:
        TargetError: nothing is attached.
    """
    for layer in _some(model):
        layer.unmerge()


@contextmanager
def disabled(model: Any) -> Generator[None]:
    """Within the block the model acts as the base, merged or not; afterwards as before."""
    states = [(layer, layer.merged, layer.enabled) for _, layer in _adapted(where.components(model))]
    for layer, _, _ in states:
        layer.unmerge()
        layer.enabled = False
    try:
        yield
    finally:
        for layer, _, enabled in states:
            layer.enabled = enabled
        for layer, merged, _ in states:
            if merged and layer.slots:
                layer.merge()


def adapters(model: Any) -> list[str]:
    """Names of the attached adapters, in the order they came."""
    names = (slot.name for _, layer in _adapted(where.components(model)) for slot in layer)
    return list(dict.fromkeys(names))


def parameters(model: Any, name: str = "default") -> list[nn.Parameter]:
    """The tensors of one adapter, for an optimiser.

    Raises:
        StateError: it is not on the model.
    """
    slots = _slots(model, name)
    return [parameter for _, slot in slots for parameter in slot.parameters()]


def collect(model: Any, name: str = "default") -> AdapterFile:
    """The adapter `name` as a file in memory; its tensors are copies, on the CPU, in their own dtype.

    Raises:
        StateError: it is not on the model.
    """
    parts = {
        canonical(layer_name): Part(slot.method, {k: v.detach().cpu().clone() for k, v in slot.tensors().items()})
        for layer_name, slot in _slots(model, name)
    }
    return AdapterFile(parts)


def _adapted(parts: Mapping[str, nn.Module]) -> list[tuple[str, AdapterLayer]]:
    return [(name, module) for name, module, _ in where.layers(parts) if isinstance(module, AdapterLayer)]


def _some(model: Any) -> list[AdapterLayer]:
    found = [layer for _, layer in _adapted(where.components(model))]
    if not found:
        raise TargetError("nothing is attached to this model")
    return found


def _slots(model: Any, name: str) -> list[tuple[str, Slot]]:
    rows = [(n, layer.slot(name)) for n, layer in _adapted(where.components(model))]
    found = [(n, slot) for n, slot in rows if slot is not None]
    if not found:
        raise StateError(f"no adapter '{name}' on this model; it has: {', '.join(adapters(model)) or 'none'}")
    return found


def _take_off(parts: Mapping[str, nn.Module], names: Sequence[str]) -> None:
    for layer_name, layer in _adapted(parts):
        layer.remove(names)
        if not layer.slots:
            where.replace(parts, layer_name, layer.base)


def _strengths(weight: Weight, names: Sequence[str]) -> dict[str, float]:
    """Layer name -> strength."""
    by_glob: Mapping[str, float] = weight if isinstance(weight, Mapping) else {"*": weight}
    for value in by_glob.values():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"weight is {value!r}; it must be a finite number or a mapping of globs to such numbers")
    if wrong := where.idle(list(by_glob), names):
        raise ConfigError(f"weight names {first_few(wrong)}, which no layer of the adapter matches: {first_few(names)}")
    return {n: float(next((v for glob, v in by_glob.items() if where.matches(n, glob)), 0.0)) for n in names}


Row = tuple[str, nn.Module, Site, Part]


def _fresh(parts: Mapping[str, nn.Module], method: Method, targets: Targets) -> list[Row]:
    rows: list[Row] = []
    for name, module, site in where.find(parts, targets):
        if reason := method.check(site):
            if targets == "*":
                continue
            raise TargetError(f"{name}: {method.name} cannot act on it: {reason}")
        rows.append((name, module, site, Part(method, method.init(site))))
    if not rows:
        raise TargetError(f"{method.name} can act on no layer of this model")
    return rows


def _from_file(parts: Mapping[str, nn.Module], file: AdapterFile, targets: Targets | None) -> list[Row]:
    live = {canonical(name): (name, module, site) for name, module, site in where.layers(parts)}
    wanted = {k: part for k, part in file.parts.items() if targets is None or where.matches(k, targets)}
    if not wanted or (targets is not None and where.idle(targets, list(file.parts))):
        raise TargetError(
            f"the file has no layer that matches targets={targets!r}; it has {first_few(list(file.parts))}"
        )
    if unknown := [name for name in wanted if name not in live]:
        raise TargetError(
            f"{len(unknown)} of the file's {len(wanted)} layers are not in this model ({first_few(unknown)}); "
            f"the model has {', '.join(parts)}. Is it for another base? targets= can choose a part of a file."
        )
    rows: list[Row] = []
    for key, part in wanted.items():
        name, module, site = live[key]
        if wrong := part.method.fits(part.tensors, site):
            raise ShapeError(f"{name}: {wrong}; is the file for another base?")
        tensors = {k: v.clone() for k, v in part.tensors.items()}
        rows.append((name, module, site, Part(part.method, tensors)))
    return rows
