"""Adapters that are on a model: their strengths, merging, and taking them back as files."""

from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

from torch import Tensor, nn

from imgadapt import targets as where
from imgadapt import tokens
from imgadapt.arch import canonical
from imgadapt.errors import ConfigError, StateError, TargetError, first_few
from imgadapt.file import AdapterFile
from imgadapt.formats import Part
from imgadapt.layer import AdapterLayer
from imgadapt.prompting import stack as prompts
from imgadapt.slot import Slot, Strength
from imgadapt.stored import in_parallel
from imgadapt.waiting import Places, untied, waiting

Weight = Strength | Mapping[str, Strength]
"""An adapter's strength: one number; a tensor (batch,), one number for each sample of a batch (guidance, which doubles
the batch, repeats it); or globs over full layer names to either (first match wins; none: 0)."""


def set_weights(model: Any, weights: Mapping[str, Weight]) -> None:
    """Change the strengths of the named adapters; the others keep theirs. Merged layers are merged anew. Words that an
    adapter brought have no strength; that of a learned prompt is its share of attention (see `prompting`).

    Raises:
        StateError: a name is not on the model, or a merge is not finite (all strengths are then as before).
        ConfigError: a strength is not a finite number, or one at which a learned prompt cannot act.
    """
    if not isinstance(weights, Mapping):
        raise ConfigError(f"weights is {weights!r}; it maps names of adapters to strengths: {{'default': 0.5}}")
    parts = where.components(model)
    rows = [(layer, slot) for _, layer in where.wrappers(parts) for slot in layer]
    _require(weights, (*(slot.name for _, slot in rows), *tokens.names(model), *prompts.names(parts)))
    wanted: dict[Slot, Strength] = {}
    read: dict[prompts.Attached, dict[str, Strength]] = {}
    for name, weight in weights.items():
        prompt = prompts.attached(parts, name)
        if isinstance(weight, Mapping):
            named = [(layer_name, slot) for layer_name, _, slot in _slots(parts) if slot.name == name]
            readers = list(prompt.strengths) if prompt else []
            by_layer = strengths(weight, [*(layer_name for layer_name, _ in named), *readers])
            wanted |= {slot: by_layer[layer_name] for layer_name, slot in named}
        else:
            wanted |= dict.fromkeys((slot for _, slot in rows if slot.name == name), checked := _checked(weight))
            by_layer = dict.fromkeys(prompt.strengths if prompt else (), checked)
        if prompt:
            read[prompt] = {reader: by_layer[reader] for reader in prompt.strengths}
            prompt.check(read[prompt])
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
    for prompt, strength in read.items():
        prompt.strengths = strength


def merge(model: Any, *, originals: Places | None = None) -> None:
    """Fold all attached adapters into the weights at their strengths; `unmerge` restores the weights bitwise. Words and
    learned prompts change no weight, and stay as they are.

    originals: where the base's own weights wait. None: in memory, next to the merged ones. A checkpoint that they came
        from (a pipeline's folder, a model's folder or a .safetensors file with the model's own keys; or a mapping of
        component names to these): the weights are changed in place, and no copy is kept. They are compared with the
        file first, to the bit.

    Raises:
        StateError: NaN or infinity would result, adapters are disabled, the strength differs from sample to sample,
            or the checkpoint has other weights; no layer is changed.
        TargetError: nothing is attached, or only what changes no weight.
    """
    parts = where.components(model)
    layers = [(name, layer) for name, layer in where.adapted(parts)]
    if not layers:
        raise _nothing(model)
    if not all(layer.enabled for _, layer in layers):
        raise StateError("adapters are disabled here; merge outside of `disabled`")
    if originals is not None and any(layer.merged and layer.kept is None for _, layer in layers):
        raise StateError("already merged, with the originals in memory: unmerge first")
    bare = [(name, layer) for name, layer in layers if not layer.merged]
    kept = {} if originals is None else waiting(originals, bare)
    if kept:
        untied(parts, bare)
    touched: list[AdapterLayer] = []
    try:
        for name, layer in bare:
            layer.merge(kept.get(name))
            touched.append(layer)
    except BaseException:
        _unmerge(touched)
        raise


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
    parts = where.components(model)
    states = [(layer, layer.merged, layer.kept, layer.enabled) for _, layer in where.adapted(parts)]
    stack = prompts.of(parts)
    _unmerge([layer for layer, *_ in states])
    for layer, *_ in states:
        layer.enabled = False
    enabled_before = stack is not None and stack.enabled
    if stack:
        stack.enabled = False
    try:
        yield
    finally:
        if stack:
            stack.enabled = enabled_before
        for layer, _, _, enabled in states:
            layer.enabled = enabled
        for layer, merged, kept, _ in states:
            if merged and layer.slots:
                layer.merge(kept)


def adapters(model: Any) -> list[str]:
    """Names of the attached adapters, in the order they came."""
    parts = where.components(model)
    rows = (slot.name for _, _, slot in _slots(parts))
    return list(dict.fromkeys((*rows, *tokens.names(model), *prompts.names(parts))))


def parameters(model: Any, name: str = "default") -> list[nn.Parameter]:
    """The tensors of one adapter that training changes, for an optimiser; one that layers share is there once.

    Raises:
        StateError: it is not on the model.
    """
    learned = [parameter for _, _, parameter in prompts.learning(where.components(model), name)]
    found = [] if learned and not _has_slots(model, name) else slots(model, name)
    rows = [*(slot._parameters[key] for _, _, slot in found for key in slot.learning), *learned]
    return list({id(parameter): parameter for parameter in rows if parameter is not None}.values())


def collect(model: Any, name: str = "default") -> AdapterFile:
    """The adapter `name` as a file in memory; its tensors are copies, on the CPU, in their own dtype. Words that it
    brought are in it, and its learned prompt.

    Under FSDP2 the shards are gathered: every process must call it.

    Raises:
        StateError: it is not on the model.
    """
    brought = tokens.embeddings(model, name)
    prompt = prompts.collected(where.components(model), name)
    rows = [] if (brought or prompt) and not _has_slots(model, name) else slots(model, name)
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
    return AdapterFile(parts, embeddings=brought, prompts=prompt)


def _whole(tensor: Any) -> Tensor:
    gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # FSDP2's DTensor
    return gathered.detach().cpu().clone()


def slots(model: Any, *names: str) -> list[tuple[str, AdapterLayer, Slot]]:
    """(layer's name, layer, slot) of the named adapters, of all when none is named.

    Raises:
        StateError: a name is not on the model.
    """
    rows = _slots(where.components(model))
    _require(names, (slot.name for _, _, slot in rows))
    return [row for row in rows if row[2].name in names] if names else rows


def _slots(parts: Mapping[str, nn.Module]) -> list[tuple[str, AdapterLayer, Slot]]:
    return [(name, layer, slot) for name, layer in where.adapted(parts) for slot in layer]


def _has_slots(model: Any, name: str) -> bool:
    return any(slot.name == name for _, _, slot in _slots(where.components(model)))


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
        raise _nothing(model)
    return found


def _nothing(model: Any) -> TargetError:
    """What `merge` says of a model whose layers are bare."""
    others = {"a learned prompt": prompts.names(where.components(model)), "words": tokens.names(model)}
    said = [f"'{name}' is {what}" for what, names in others.items() for name in names]
    if not said:
        return TargetError("nothing is attached to this model")
    return TargetError(f"{first_few(said)}: that changes no weight and does not merge into any; it acts as it is")
