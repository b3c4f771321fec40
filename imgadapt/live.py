"""Adapters that are on a model: their strengths, merging, and taking them back as files."""

from collections import Counter
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from imgadapt import targets as where
from imgadapt import tokens
from imgadapt.arch import canonical
from imgadapt.errors import ConfigError, StateError, TargetError, first_few
from imgadapt.file import AdapterFile
from imgadapt.formats import Part
from imgadapt.layer import AdapterLayer
from imgadapt.slot import Slot, Strength
from imgadapt.stored import Stored, in_parallel, stored

Weight = Strength | Mapping[str, Strength]
"""An adapter's strength: one number; a tensor (batch,), one number for each sample of a batch (guidance, which doubles
the batch, repeats it); or globs over full layer names to either (first match wins; none: 0)."""


Places = str | PathLike[str] | Mapping[str, str | PathLike[str]]
"""A checkpoint, or one for each component."""


def set_weights(model: Any, weights: Mapping[str, Weight]) -> None:
    """Change the strengths of the named adapters; the others keep theirs. Merged layers are merged anew. Words that an
    adapter brought have no strength.

    Raises:
        StateError: a name is not on the model, or a merge is not finite (all strengths are then as before).
        ConfigError: a strength is not a finite number.
    """
    if not isinstance(weights, Mapping):
        raise ConfigError(f"weights is {weights!r}; it maps names of adapters to strengths: {{'default': 0.5}}")
    rows = [(layer, slot) for _, layer in where.wrappers(where.components(model)) for slot in layer]
    _require(weights, (*(slot.name for _, slot in rows), *tokens.names(model)))
    wanted: dict[Slot, Strength] = {}
    for name, weight in weights.items():
        if isinstance(weight, Mapping):
            named = [(layer_name, slot) for layer_name, _, slot in slots(model, name)]
            by_layer = strengths(weight, [layer_name for layer_name, _ in named])
            wanted |= {slot: by_layer[layer_name] for layer_name, slot in named}
        else:
            wanted |= dict.fromkeys((slot for _, slot in rows if slot.name == name), _checked(weight))
    before = {slot: slot.weight for slot in wanted}
    merged = [layer for layer, slot in rows if slot in wanted and layer.merged]
    try:
        for slot, strength in wanted.items():
            slot.set(strength)
        for layer in merged:
            layer.refresh()
    except BaseException:
        for slot, strength in before.items():
            slot.set(strength)
        for layer in merged:
            layer.refresh()
        raise


def merge(model: Any, *, originals: Places | None = None) -> None:
    """Fold all attached adapters into the weights at their strengths; `unmerge` restores the weights bitwise.

    originals: where the base's own weights wait. None: in memory, next to the merged ones. A checkpoint that they came
        from (a pipeline's folder, a model's folder or a .safetensors file with the model's own keys; or a mapping of
        component names to these): the weights are changed in place, and no copy is kept. They are compared with the
        file first, to the bit.

    Raises:
        StateError: NaN or infinity would result, adapters are disabled, the strength differs from sample to sample,
            or the checkpoint has other weights; no layer is changed.
        TargetError: nothing is attached.
    """
    parts = where.components(model)
    layers = [(name, layer) for name, layer in where.adapted(parts)]
    if not layers:
        raise TargetError("nothing is attached to this model")
    if not all(layer.enabled for _, layer in layers):
        raise StateError("adapters are disabled here; merge outside of `disabled`")
    if originals is not None and any(layer.merged and layer.kept is None for _, layer in layers):
        raise StateError("already merged, with the originals in memory: unmerge first")
    bare = [(name, layer) for name, layer in layers if not layer.merged]
    kept = {} if originals is None else _waiting(originals, bare)
    if kept:
        _untied(parts, bare)
    touched: list[AdapterLayer] = []
    try:
        for name, layer in bare:
            layer.merge(kept.get(name))
            touched.append(layer)
    except BaseException:
        _unmerge(touched)
        raise


def _waiting(originals: Places, layers: Sequence[tuple[str, AdapterLayer]]) -> dict[str, Stored]:
    """Layer -> its weight in the checkpoint, which is this very weight."""
    components = list(dict.fromkeys(name.partition(".")[0] for name, _ in layers))
    if isinstance(originals, Mapping):
        places = {component: Path(originals[component]) for component in components if component in originals}
    else:
        root = Path(originals)
        places = {c: root / c if (root / c).is_dir() else root for c in components}
    if missing := [component for component in components if component not in places]:
        raise StateError(f"originals= says nothing of {first_few(missing)}: give each component its file or folder")
    files = {component: stored(place) for component, place in places.items()}
    kept = {name: _where(files, name, layer) for name, layer in layers}

    def other(row: tuple[str, AdapterLayer]) -> bool:
        return not kept[row[0]].matches(row[1]._parameters[row[1].site.parameter])  # pyright: ignore[reportArgumentType] # a layer's parameter is there

    if wrong := [name for (name, _), is_other in zip(layers, in_parallel(other, layers), strict=True) if is_other]:
        raise StateError(f"{kept[wrong[0]].file} has other weights for {len(wrong)} layers: {first_few(wrong)}")
    return kept


def _untied(parts: Mapping[str, nn.Module], layers: Sequence[tuple[str, AdapterLayer]]) -> None:
    """Raises StateError where a weight that would change in place is another layer's, too."""
    modules = {id(module): module for part in parts.values() for module in part.modules()}
    uses = Counter(id(p) for module in modules.values() for p in module._parameters.values() if p is not None)
    if tied := [name for name, layer in layers if uses[id(layer._parameters[layer.site.parameter])] > 1]:
        raise StateError(f"{first_few(tied)} share their weight with other layers: merge without originals=")


def _where(files: Mapping[str, Mapping[str, Stored]], name: str, layer: AdapterLayer) -> Stored:
    component, _, path = name.partition(".")
    key = f"{path.removesuffix('.in_proj') if layer.site.kind == 'fused' else path}.{layer.site.parameter}"
    found = files[component].get(key) or files[component].get(f"text_model.{key}")
    if found is None:
        raise StateError(f"the checkpoint of {component} has no {key}; it has {first_few(list(files[component]))}")
    return found


def unmerge(model: Any) -> None:
    """Undo `merge`: every weight is the very tensor it was, or has its values from the checkpoint that keeps them.

    Raises:
        TargetError: nothing is attached.
        StateError: that checkpoint is gone or has changed; nothing is unmerged.
    """
    _unmerge(_some(model))


def _unmerge(layers: Sequence[AdapterLayer]) -> None:
    waiting = [layer for layer in layers if layer.kept is not None]
    for layer in waiting:
        assert layer.kept is not None
        layer.kept.check()
    in_parallel(AdapterLayer.unmerge, waiting)
    for layer in layers:
        layer.unmerge()


@contextmanager
def disabled(model: Any) -> Generator[None]:
    """Within the block the model acts as the base, merged or not; afterwards as before. Adapters that are attached
    within it act.
    """
    states = [(layer, layer.merged, layer.kept, layer.enabled) for _, layer in where.adapted(where.components(model))]
    _unmerge([layer for layer, *_ in states])
    for layer, *_ in states:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, _, _, enabled in states:
            layer.enabled = enabled
        for layer, merged, kept, _ in states:
            if merged and layer.slots:
                layer.merge(kept)


def adapters(model: Any) -> list[str]:
    """Names of the attached adapters, in the order they came."""
    return list(dict.fromkeys((*(slot.name for _, _, slot in slots(model)), *tokens.names(model))))


def parameters(model: Any, name: str = "default") -> list[nn.Parameter]:
    """The tensors of one adapter that training changes, for an optimiser; one that layers share is there once.

    Raises:
        StateError: it is not on the model.
    """
    rows = [slot._parameters[key] for _, _, slot in slots(model, name) for key in slot.learning]
    return list({id(parameter): parameter for parameter in rows if parameter is not None}.values())


def collect(model: Any, name: str = "default") -> AdapterFile:
    """The adapter `name` as a file in memory; its tensors are copies, on the CPU, in their own dtype. Words that it
    brought are in it.

    Under FSDP2 the shards are gathered: every process must call it.

    Raises:
        StateError: it is not on the model.
    """
    brought = tokens.embeddings(model, name)
    rows = [] if brought and all(slot.name != name for _, _, slot in slots(model)) else slots(model, name)
    common: dict[int, Tensor] = {}

    def copied(slot: Slot, key: str) -> Tensor:
        if key not in slot.method.common:
            return _whole(getattr(slot, key))
        if id(slot._parameters[key]) not in common:
            common[id(slot._parameters[key])] = _whole(getattr(slot, key))
        return common[id(slot._parameters[key])]

    parts = {
        canonical(layer_name): Part(slot.method, {key: copied(slot, key) for key in slot.keys}, shape=layer.site.shape)
        for layer_name, layer, slot in rows
        if not slot.absent
    }
    return AdapterFile(parts, embeddings=brought)


def _whole(tensor: Any) -> Tensor:
    gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # FSDP2's DTensor
    return gathered.detach().cpu().clone()


def slots(model: Any, *names: str) -> list[tuple[str, AdapterLayer, Slot]]:
    """(layer's name, layer, slot) of the named adapters, of all when none is named.

    Raises:
        StateError: a name is not on the model.
    """
    rows = [(n, layer, slot) for n, layer in where.adapted(where.components(model)) for slot in layer]
    _require(names, (slot.name for _, _, slot in rows))
    return [row for row in rows if row[2].name in names] if names else rows


def require(model: Any, names: Collection[str]) -> None:
    """Raises StateError unless the model has all these adapters."""
    _require(names, adapters(model))


def _require(names: Collection[str], on: Iterable[str]) -> None:
    present = dict.fromkeys(on)
    if missing := [name for name in names if name not in present]:
        raise StateError(f"no adapter {first_few(missing)} on this model; it has: {', '.join(present) or 'none'}")


def strengths(weight: Weight, names: Sequence[str]) -> dict[str, Strength]:
    """Layer name -> strength.

    Raises:
        ConfigError: a strength is not finite, or a glob matches no layer.
    """
    by_glob: Mapping[str, Strength] = weight if isinstance(weight, Mapping) else {"*": weight}
    checked = {glob: _checked(value) for glob, value in by_glob.items()}
    if not checked:
        raise ConfigError("weight is an empty mapping; 0 turns an adapter off")
    if list(checked) == ["*"]:
        return dict.fromkeys(names, checked["*"])
    if wrong := where.idle(list(checked), names):
        raise ConfigError(f"weight names {first_few(wrong)}, which no layer of the adapter matches: {first_few(names)}")
    return {n: next((v for glob, v in checked.items() if where.matches(n, glob)), 0.0) for n in names}


def _checked(value: Any) -> Strength:
    if isinstance(value, Tensor) and value.ndim:
        if value.ndim == 1 and len(value) and not value.is_complex() and value.isfinite().all():
            return value.detach().clone()
        raise ConfigError(
            f"weight is a tensor {tuple(value.shape)}; one for each sample is (batch,), of finite numbers"
        )
    number: Any = value if isinstance(value, Real) and not isinstance(value, bool) else None  # (numpy's, too)
    if number is not None and abs(number) < 1e300:  # NaN is not
        return float(number)
    raise ConfigError(
        f"weight is {value!r}; it must be a finite number, a tensor (batch,) or a mapping of globs to these"
    )


def _some(model: Any) -> list[AdapterLayer]:
    found = [layer for _, layer in where.adapted(where.components(model))]
    if not found:
        raise TargetError("nothing is attached to this model")
    return found
