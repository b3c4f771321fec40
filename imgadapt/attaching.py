"""Putting adapters on a model and taking them off: attach, detach, swap."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from imgadapt import moment, tokens
from imgadapt import targets as where
from imgadapt.arch import canonical
from imgadapt.collector import uncollected
from imgadapt.dequantize import weight_of
from imgadapt.errors import ConfigError, FormatError, ShapeError, StateError, TargetError, first_few
from imgadapt.file import AdapterFile
from imgadapt.formats import Part
from imgadapt.layer import AdapterLayer
from imgadapt.live import Weight, adapters, require, slots, strengths
from imgadapt.methods import Method
from imgadapt.prompting import Prompting
from imgadapt.prompting import stack as prompts
from imgadapt.sites import Kind
from imgadapt.slot import Dropout, Slot, Strength
from imgadapt.stored import Stored
from imgadapt.targets import Layer, Targets
from imgadapt.whole import settled


def attach(
    model: Any,
    adapter: Method | Mapping[str, Method] | Prompting | AdapterFile,
    *,
    name: str = "default",
    targets: Targets | None = None,
    weight: Weight = 1.0,
    dropout: Dropout | float = 0.0,
    trainable: bool | None = None,
) -> None:
    """Put an adapter on the layers of a model: a fresh one of a Method, or the one of a file.

    model: a diffusers pipeline, a mapping of component names to modules, or one module.
    adapter: a Method; a mapping of targets to Methods, for a rank, alpha or method of their own (the first target that
        a layer matches gives its method); a learned prompt (PromptTuning, ...); or a loaded file.
    targets: presets, globs and `!` exclusions (see `targets.matches`); "*" is every layer the method can act on.
        Presets and globs that end in `*` pass by norms (save for `Norm`) and embeddings: those are named by their ends.
        None means the preset "transformer" for a Method, all that its targets match for a mapping, and everything in it
        for a file.
    weight: strength at which it acts, see `Weight`; 0 is off, negative is allowed.
    dropout: what training leaves out, see `Dropout`; a number is the share of the input.
    trainable: whether its tensors require gradients; None: those of a fresh one do, those of a file do not.

    Words that a file brings (embeddings) go into the pipeline's tokenizers and text encoders, at full strength. Learned
    prompts go to the denoiser's cross-attentions, which targets and weight then name.
    A fresh adapter changes nothing until it is trained (save for prompts without a gate); its tensors are fp32 and come
    from torch's global generator.
    Freeze the base yourself (`unet.requires_grad_(False)`) before training: attach leaves it as it is.

    Raises:
        TargetError: no layer matches, the method cannot act on one that is named, or the file names layers that the
            model does not have.
        ShapeError: a tensor of the file does not fit its layer.
        FormatError: a tensor of the file is not finite.
        StateError: the name is taken, or the method needs the base's weights and they are not there.
        ConfigError: a weight or a dropout that cannot be.
    """
    _check_kind(adapter)
    parts = where.components(model)
    taken = {*tokens.names(model), *prompts.names(parts)}
    if any(layer.slot(name) is not None for _, layer in where.adapted(parts)) or name in taken:
        raise StateError(f"the name '{name}' is taken: detach(model, '{name}') first, or choose another name=")
    words = adapter.embeddings if isinstance(adapter, AdapterFile) else {}
    prompt = (
        adapter.prompts if isinstance(adapter, AdapterFile) else adapter if isinstance(adapter, Prompting) else None
    )
    if isinstance(adapter, AdapterFile):
        chosen = _from_file(parts, adapter, targets) if adapter.parts or not (words or prompt) else []
    else:
        chosen = [] if isinstance(adapter, Prompting) else _fresh(parts, adapter, targets)
    readers = prompts.readers(parts, prompt, None if chosen else targets) if prompt else []
    left_out = dropout if isinstance(dropout, Dropout) else Dropout(input=dropout)
    if prompt and not chosen and left_out:
        raise ConfigError("a learned prompt has no dropout")
    _check_dropout(left_out, chosen)
    by_layer = strengths(weight, [*(layer.name for layer, _ in chosen), *readers]) if chosen or readers else {}
    learns = not isinstance(adapter, AdapterFile) if trainable is None else trainable
    try:
        with uncollected():
            _put_on(parts, chosen, name, by_layer, left_out, learns)
            if prompt:
                prompts.add(parts, prompt, name, {reader: by_layer[reader] for reader in readers}, learns=learns)
            if words:
                tokens.add(model, words, name)
    except BaseException:  # whatever it was (no memory, NaN in a merged layer): nothing stays half attached
        prompts.remove(parts, [name])
        _take_off(parts, [name])
        raise


def _check_kind(adapter: Any) -> None:
    methods = list(adapter.values()) if isinstance(adapter, Mapping) else [adapter]
    if isinstance(adapter, Prompting):
        return
    if wrong := [one for one in methods if not isinstance(one, Method | AdapterFile)]:
        hint = ": imgadapt.load(path) reads a file" if isinstance(wrong[0], str | PathLike) else ""
        raise ConfigError(f"{wrong[0]!r} is no adapter; wanted a method such as LoRA(rank=8), or a loaded file{hint}")
    if not methods:
        raise ConfigError("an empty mapping is no adapter; wanted targets and methods: {'attention': LoRA(rank=8)}")


def _put_on(
    parts: Mapping[str, nn.Module],
    chosen: Sequence["Row"],
    name: str,
    by_layer: Mapping[str, Strength],
    dropout: Dropout,
    learns: bool,
) -> None:
    common: dict[int, nn.Parameter] = {}
    for layer, part in chosen:
        wrapper = layer.module if isinstance(layer.module, AdapterLayer) else AdapterLayer(layer.module, layer.site)
        tensors = dict(part.tensors)
        for key in part.method.common:
            if key in tensors:
                learning = learns and key not in part.method.frozen
                tensors[key] = common.setdefault(id(part.tensors[key]), nn.Parameter(tensors[key], learning))
        slot = Slot(name, part.method, layer.site, tensors, by_layer[layer.name], dropout, learns)
        if part.method.timed:
            component = layer.name.partition(".")[0]
            slot.__dict__["moment"] = moment.given(parts[component], component)
        wrapper.add(slot)
        if wrapper is not layer.module:
            layer.replace(wrapper)


def detach(model: Any, *names: str) -> None:
    """Take adapters off (all of them when none is named); layers left bare become their base again, bitwise.

    Raises:
        StateError: a name is not on the model, or its words cannot be taken out (see `tokens`); nothing is detached.
    """
    require(model, names)
    gone = names or adapters(model)
    tokens.check_removal(model, gone)
    parts = where.components(model)
    _take_off(parts, gone)
    prompts.remove(parts, gone)
    tokens.remove(model, gone)


def swap(model: Any, file: AdapterFile, *, name: str = "default") -> None:
    """Put a file's tensors in the place of those of the adapter `name`, at its strengths, without recompiling.

    It must be of the same method, its rank no larger (the rest is filled with zeros), on no other layers; layers that
    it does not have are off until the next swap. Merged layers are merged anew.

    Raises:
        StateError: no such adapter, the file does not fit into it (which says why), or the new merge is not finite;
            the old adapter is as it was.
        FormatError: a tensor of the file is not finite.
    """
    if not isinstance(file, AdapterFile):
        raise ConfigError(f"{file!r} is no loaded file; wanted imgadapt.load(path)")
    if file.embeddings:
        raise StateError(
            f"the file brings words ({first_few(list(file.embeddings))}): detach '{name}' and attach the file"
        )
    if file.prompts or name in prompts.names(where.components(model)):
        raise StateError(f"a learned prompt is not swapped: detach '{name}' and attach the file")
    own = {canonical(layer_name): (layer, slot) for layer_name, layer, slot in slots(model, name)}
    if strange := [key for key in file.parts if key not in own]:
        raise StateError(
            f"{len(strange)} of the file's {len(file.parts)} layers are not in '{name}' ({first_few(strange)}): "
            "detach it and attach the file"
        )
    parts = {key: _into(key, part, own[key][1]) for key, part in file.parts.items()}
    _check_common(name, parts, {key: slot for key, (_, slot) in own.items()})
    before = {key: (slot.method, slot.tensors(), slot.absent) for key, (_, slot) in own.items()}
    before = {key: (m, {k: v.detach().clone() for k, v in t.items()}, absent) for key, (m, t, absent) in before.items()}
    try:
        for key, (layer, slot) in own.items():
            slot.fill(parts[key].method, parts[key].tensors) if key in parts else slot.vacate()
            layer.refresh()
    except BaseException:
        for key, (layer, slot) in own.items():
            method, tensors, absent = before[key]
            slot.fill(method, tensors)
            if absent:
                slot.vacate()
            layer.refresh()
        raise


def _into(key: str, part: Part, slot: Slot) -> Part:
    """A part with the shapes of the slot's tensors."""
    _finite(key, part)
    old, new = slot.method, part.method
    if type(old) is not type(new):
        raise StateError(f"{key}: the file has {new.name}, the adapter is {old.name}: detach it and attach the file")
    grown = {k: _padded(t, slot.tensors().get(k), new.file_rank, old.file_rank) for k, t in part.tensors.items()}
    made = new if old.file_rank is None else new.resized(old.file_rank)
    found = {k: t for k, t in grown.items() if t is not None}
    if set(found) != set(slot.keys) or made.unscaled() != old.unscaled():
        raise StateError(f"{key}: the file's {new} does not fit into {old}: detach it and attach the file")
    return Part(made, found)


def _check_common(name: str, parts: Mapping[str, Part], own: Mapping[str, Slot]) -> None:
    """Raises StateError where layers that share a tensor would get different ones."""
    first: dict[int, Tensor] = {}
    for key, part in parts.items():
        for end in (end for end in part.method.common if end in part.tensors):
            tensor = part.tensors[end]
            if not torch.equal(first.setdefault(id(own[key]._parameters[end]), tensor), tensor):
                raise StateError(
                    f"{key}: '{name}' has one {end} for several layers, the file others: detach it and attach the file"
                )


def _padded(tensor: Tensor, into: Tensor | None, rank: int | None, larger: int | None) -> Tensor | None:
    """tensor with zeros where `into` has more ranks; None if it differs in more than that."""
    if into is None or into.ndim != tensor.ndim:
        return None
    pairs = list(zip(tensor.shape, into.shape, strict=True))
    if any(a != b and (a != rank or b != larger or a > b) for a, b in pairs):
        return None
    made = tensor.new_zeros(into.shape)
    made[tuple(slice(n) for n in tensor.shape)] = tensor
    return made


def _take_off(parts: Mapping[str, nn.Module], names: Sequence[str]) -> None:
    """Adapters off, all or none: a layer whose others cannot be merged anew leaves every layer as it was."""
    rows = [(layer, wrapper) for layer in where.layers(parts) if isinstance(wrapper := layer.module, AdapterLayer)]
    done: list[tuple[AdapterLayer, nn.ModuleList, bool, Stored | None]] = []
    try:
        for _, wrapper in rows:
            before = wrapper.slots, wrapper.merged, wrapper.kept
            wrapper.remove(names)
            done.append((wrapper, *before))
    except BaseException:
        for wrapper, slots_before, merged, kept in done:
            wrapper.slots = slots_before
            if merged:
                wrapper.refresh()
                wrapper.merge(kept)
        raise
    timed = {id(slot.moment) for _, wrapper in rows for slot in wrapper}
    for layer, wrapper in rows:
        if not wrapper.slots:
            layer.replace(wrapper.release())
    for root in parts.values():
        if (there := moment.moment(root)) is not None and id(there) not in timed:
            there.remove()


Row = tuple[Layer, Part]


def _fresh(
    parts: Mapping[str, nn.Module], adapter: Method | Mapping[str, Method], targets: Targets | None
) -> list[Row]:
    methods: Mapping[str, Method] = {"*": adapter} if isinstance(adapter, Method) else adapter
    default = targets is None
    if targets is None:
        targets = "transformer" if isinstance(adapter, Method) else list(methods)
    kinds: list[Kind] = [kind for method in methods.values() for kind in method.kinds]
    try:
        found = where.find(parts, targets, kinds)
    except TargetError as error:
        if not default:
            raise
        raise TargetError(f"without targets= it is {targets!r}: {error}") from error
    if wrong := where.idle(list(methods), [layer.name for layer in found]):
        raise TargetError(f"the methods for {first_few(wrong)} match none of the {len(found)} targeted layers")
    rows: list[Row] = []
    first: dict[tuple[Any, ...], Tensor] = {}  # the first layer's, of each kind and size
    for layer in found:
        method = next((m for target, m in methods.items() if where.matches(layer.name, target)), None)
        if method is None:
            raise TargetError(
                f"{layer.name} is targeted, and no target of {first_few(list(methods))} gives it a method"
            )
        if reason := method.check(layer.site):
            if targets == "*" or (method.passes(layer.site) and not where.named(layer.name, targets)):
                continue
            raise TargetError(f"{layer.name}: {method.name} cannot act on it: {reason}")
        made = method.at(layer.site)
        tensors = made.init(layer.site, _weight(layer, made))
        for key in (key for key in made.common if key in tensors):
            tensors[key] = first.setdefault((made.name, key, *tensors[key].shape), tensors[key])
        rows.append((layer, Part(made, tensors)))
    if not rows:
        what = f"{', '.join(m.name for m in methods.values())} can act on no layer"
        if targets == "*":
            raise TargetError(f"{what} of this model")
        acts = next(iter(methods.values())).check
        hint = where.offered(list(where.layers(parts)), lambda site: acts(site) is None)
        raise TargetError(f"{what} that targets={targets!r} names ({found[0].name}: {acts(found[0].site)}): {hint}")
    return rows


def _weight(layer: Layer, method: Method) -> Tensor | None:
    """The pristine weight, for methods that start from it."""
    if not (method.needs_weight or method.starts_from_weight):
        return None
    try:
        return _pristine(layer)
    except StateError as error:
        raise StateError(f"{layer.name}: {method.name} starts from the weight, but {error}") from error


def _pristine(layer: Layer) -> Tensor:
    if isinstance(layer.module, AdapterLayer):
        return layer.module.pristine()
    return layer.site.seen(weight_of(layer.module, layer.site.parameter))


def _pristine_bias(layer: Layer) -> Tensor | None:
    """Of a layer as it is without adapters; None if it has none."""
    if layer.site.bias is None:
        return None
    if isinstance(layer.module, AdapterLayer) and layer.module.merged:
        original: Any = layer.module.originals.get(layer.site.bias)
        return original if isinstance(original, Tensor) else weight_of(layer.module, layer.site.bias)
    return weight_of(layer.module, layer.site.bias)


def _from_file(parts: Mapping[str, nn.Module], file: AdapterFile, targets: Targets | None) -> list[Row]:
    live = {canonical(layer.name): layer for layer in where.layers(parts)}

    def chosen(name: str) -> bool:
        return targets is None or where.matches(name, targets)

    wanted = {
        name: part for name, part in file.parts.items() if chosen(name) or any(chosen(s.layer) for s in part.slices)
    }
    if not file.parts:
        raise TargetError("the file has no layers")
    names = [name for key, part in file.parts.items() for name in (key, *(s.layer for s in part.slices))]
    if not wanted or (targets is not None and where.idle(targets, names)):
        raise TargetError(
            f"the file has no layer that matches targets={targets!r}; it has {first_few(list(file.parts))}"
        )
    asked = [layer for name, part in wanted.items() for layer in ({s.layer for s in part.slices} or {name})]
    if unknown := [name for name in asked if name not in live]:
        whose = f"the file is for {file.architecture}, " if file.architecture else ""
        raise TargetError(
            f"{len(unknown)} of the file's {len(asked)} layers are not in this model ({first_few(unknown)}): "
            f"{whose}the model has {', '.join(parts)}. Is it for another base? targets= can choose a part of a file."
        )
    wanted = settled(
        wanted, live, lambda name: (_pristine(live[name]), live[name].site), lambda name: _pristine_bias(live[name])
    )
    rows: list[Row] = []
    copies: dict[int, Tensor] = {}
    for key, part in wanted.items():
        if not chosen(key):  # of a fused layer, another of which is
            continue
        layer = live[key]
        if wrong := part.method.fits(part.tensors, layer.site):
            raise ShapeError(f"{layer.name}: {wrong}; is the file for another base?")
        if reason := part.method.check(layer.site):
            raise TargetError(f"{layer.name}: {part.method.name} cannot act on it: {reason}")
        _finite(layer.name, part)
        own = {
            k: copies.setdefault(id(v), v.clone()) if k in part.method.common else v.clone()
            for k, v in part.tensors.items()
        }
        rows.append((layer, Part(part.method, own)))
    return rows


def _finite(name: str, part: Part) -> None:
    for key, tensor in part.tensors.items():
        if not tensor.is_floating_point() or tensor.is_meta or tensor.layout != torch.strided:
            raise FormatError(f"{name}: {key} is {tensor.dtype} on {tensor.device}; wanted floating-point numbers")
        # one pass, for NaN and infinity go through a sum; what is only too large for it is looked at closely
        if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor.float()).all():
            raise FormatError(f"{name}: {key} has NaN or infinity; the training that made it diverged")


def _check_dropout(dropout: Dropout, rows: Sequence[Row]) -> None:
    for layer, part in rows:
        if dropout.rank and not part.method.ranked:
            raise ConfigError(f"{layer.name}: {part.method.name} has no ranks that rank dropout could leave out")
        if dropout.input and layer.site.kind in ("fused", "norm", "embedding"):
            raise ConfigError(
                f"{layer.name} is {layer.site.kind}: input dropout has no effect there; exclude the layer"
            )
        if dropout.input and part.method.way(layer.site).bias:
            raise ConfigError(f"{layer.name}: {part.method.name} reads no input that input dropout could leave out")
