"""Which layers: components of a model, globs over their paths, presets."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from imgadapt.arch import canonical
from imgadapt.errors import TargetError, first_few
from imgadapt.layer import AdapterLayer
from imgadapt.sites import Kind, Site

DENOISERS = ("unet", "transformer", "transformer_2", "prior")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEED_FORWARD = (
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("proj_in", "proj_out", "proj_mlp"),
)
_MODULATION = ("norm.linear", "norm1.linear", "norm1_context.linear", "norm2.linear")
_CONVOLUTIONS = ("resnets.*.conv1", "resnets.*.conv2", "resnets.*.conv_shortcut", "*samplers.0.conv")
_TEXT = (
    *("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),  # CLIP
    *(f"SelfAttention.{p}" for p in "qkvo"),  # T5
    *(f"DenseReluDense.{p}" for p in ("wi", "wi_0", "wi_1", "wo")),
)

_HEADS = ("to_q", "to_k", "to_v", "to_out.0")

PRESETS: Mapping[str, tuple[str, ...]] = {
    "attention": tuple(f"{c}.*.{p}" for c in DENOISERS for p in _ATTENTION),
    "transformer": tuple(f"{c}.*.{p}" for c in DENOISERS for p in _ATTENTION + _FEED_FORWARD),
    "modulation": tuple(f"{c}.*.{p}" for c in DENOISERS for p in _MODULATION),
    "convolution": tuple(f"{c}.*.{p}" for c in DENOISERS for p in _CONVOLUTIONS),
    "denoiser": tuple(f"{c}.*" for c in DENOISERS),
    # arXiv 2403.14572: the two of SDXL's blocks that B-LoRA trains together and uses apart
    "b-lora-content": tuple(f"unet.up_blocks.0.attentions.0.*.{p}" for p in _HEADS),
    "b-lora-style": tuple(f"unet.up_blocks.0.attentions.1.*.{p}" for p in _HEADS),
    "text": tuple(f"{c}.*.{p}" for c in TEXT_ENCODERS for p in _TEXT),
}
"""Names that stand for globs: `transformer` is what kohya and diffusers train by default in a UNet or DiT."""

Targets = str | Sequence[str]


def components(model: Any) -> dict[str, nn.Module]:
    """The parts of `model` that adapters go on, by name.

    model: a diffusers pipeline (its denoisers and text encoders), a mapping of names to modules, or one module,
    which is called by its kind: `unet`, `transformer`, `text_encoder`, else `model`.

    Raises:
        TargetError: there is none.
    """
    if isinstance(model, nn.Module):
        model = _bare(model)
        return {_kind(model): model}
    if isinstance(model, Mapping):
        found: dict[str, nn.Module] = {str(k): m for k, m in model.items() if isinstance(m, nn.Module)}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        if len(found) < len(model):  # pyright: ignore[reportUnknownArgumentType]
            raise TargetError("a model given as a mapping maps component names to modules only: {'unet': unet}")
        if dotted := [name for name in found if "." in name]:
            raise TargetError(f"a component's name has no dots: {', '.join(dotted)}")
    else:
        parts: Mapping[str, Any] = getattr(model, "components", {})
        found = {k: parts[k] for k in DENOISERS + TEXT_ENCODERS if isinstance(parts.get(k), nn.Module)}
    if not found:
        wanted = "a diffusers pipeline, a mapping such as {'unet': unet}, or a module"
        raise TargetError(f"{type(model).__name__} has no UNet, transformer or text encoder; wanted {wanted}")
    return {name: _bare(module) for name, module in found.items()}


def _bare(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and data-parallel wrappers."""
    inner: Any = getattr(model, "_orig_mod", model)
    return _bare(inner.module) if type(inner).__name__ in ("DataParallel", "DistributedDataParallel") else inner


def _kind(module: nn.Module) -> str:
    name = type(module).__name__
    if "UNet" in name:
        return "unet"
    if "Transformer" in name:
        return "transformer"
    return "text_encoder" if "Text" in name or name.endswith("EncoderModel") else "model"


def matches(name: str, targets: Targets) -> bool:
    """Whether a layer's full name (`unet.mid_block.attentions.0.proj_in`) is targeted.

    A target is a preset, a glob over the full name or over its end after a dot (`to_q` is `*.to_q`), or, after `!`,
    an exclusion, which wins. CLIP's layers are known by both their names, with `text_model.` and without.
    """
    wanted = False
    for target in _listed(targets):
        globs = PRESETS.get(target.removeprefix("!"), (target.removeprefix("!"),))
        if any(fnmatchcase(n, g) or fnmatchcase(n, f"*.{g}") for n in {name, canonical(name)} for g in globs):
            if target.startswith("!"):
                return False
            wanted = True
    return wanted


def named(name: str, targets: Targets) -> bool:
    """Whether a target names the layer by its end, and does not just take it in (a preset, a glob that ends in `*`)."""
    return matches(name, [t for t in _listed(targets) if t not in PRESETS and not t.endswith("*")])


def _listed(targets: Targets) -> Sequence[str]:
    return [targets] if isinstance(targets, str) else targets


def idle(targets: Targets, names: Sequence[str]) -> list[str]:
    """The targets that match none of the names: mistyped, most likely."""
    return [t for t in _listed(targets) if not any(matches(name, t.removeprefix("!")) for name in names)]


@dataclass(frozen=True)
class Layer:
    """A layer of a model that has a site; an adapted one is its wrapper.

    name: component and path. places: (parent module, child name) of every place it stands at, usually one.
    """

    name: str
    module: nn.Module
    site: Site
    places: tuple[tuple[nn.Module, str], ...]

    def replace(self, module: nn.Module) -> None:
        """Put `module` at its places."""
        for parent, child in self.places:
            parent._modules[child] = module


def layers(parts: Mapping[str, nn.Module]) -> Iterator[Layer]:
    """Every layer that has a site. One that stands at two places is yielded once, by its first name.

    What is inside nn.TransformerEncoderLayer is left out, and so is the out-projection of nn.MultiheadAttention: their
    fused kernels read those weights themselves and would never call an adapter.
    """
    for component, root in parts.items():
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        named: dict[int, str] = {}
        _walk(root, f"{component}.", places, named)
        found = {
            id(child): child
            for rows in places.values()
            for parent, name in rows[:1]
            for child in [parent._modules[name]]
        }
        for key, path in named.items():
            module = found[key]
            assert module is not None
            site = module.site if isinstance(module, AdapterLayer) else Site.of(module)
            if site is not None:
                name = f"{path}.in_proj" if site.kind == "fused" else path
                yield Layer(name, module, site, tuple(places[key]))


def _walk(module: nn.Module, path: str, places: dict[int, list[tuple[nn.Module, str]]], named: dict[int, str]) -> None:
    for name, child in module._modules.items():
        if child is None:
            continue
        known = id(child) in places
        places.setdefault(id(child), []).append((module, name))
        if known or isinstance(child, nn.TransformerEncoderLayer):
            continue
        inside = path if name == "_orig_mod" else f"{path}{name}."  # torch.compile's wrapper
        named[id(child)] = inside[:-1]
        if not isinstance(child, AdapterLayer | nn.MultiheadAttention):
            _walk(child, inside, places, named)


def adapted(parts: Mapping[str, nn.Module]) -> list[tuple[str, AdapterLayer]]:
    """(name, wrapper) of every adapted layer."""
    return [(_spelled(path, layer), layer) for path, layer in wrappers(parts)]


def wrappers(parts: Mapping[str, nn.Module]) -> list[tuple[tuple[Any, ...], AdapterLayer]]:
    """(path, wrapper) of every adapted layer, quickly: no name is spelled, no site looked at."""
    rows: list[tuple[tuple[Any, ...], AdapterLayer]] = []
    for component, root in parts.items():
        seen: set[int] = set()
        stack: list[tuple[nn.Module, tuple[Any, ...]]] = [(root, (component,))]
        while stack:
            module, path = stack.pop()
            if isinstance(module, AdapterLayer):
                if id(module) not in seen:
                    seen.add(id(module))
                    rows.append((path, module))
            else:
                inner = reversed(module._modules.items())
                stack += [(child, (path, name)) for name, child in inner if child is not None and child._modules]
    return rows


def _spelled(path: tuple[Any, ...], layer: AdapterLayer) -> str:
    """component.path of nested (((component,), name), name)."""
    names = ["in_proj"] if layer.site.kind == "fused" else []
    while len(path) > 1:
        path, name = path
        if name != "_orig_mod":
            names.append(name)
    return ".".join([*path, *reversed(names)])


def offered(every: Sequence[Layer], acts: Callable[[Site], bool]) -> str:
    """What to give as targets for layers that a method acts on, for messages."""
    names = [layer.name for layer in every if acts(layer.site)]
    if not names:
        return "this model has none"
    usual = next((target for target in ("transformer", "norm*") if any(matches(name, target) for name in names)), None)
    return f'--targets "{usual or names[0].rpartition(".")[2]}" (targets= in Python) names such'


def find(
    parts: Mapping[str, nn.Module], targets: Targets, kinds: Collection[Kind] = ("linear", "conv", "fused")
) -> list[Layer]:
    """The layers that `targets` names; presets and globs that end in `*` take in those of these kinds only, and never
    embeddings.

    Raises:
        TargetError: a target matches no layer, or nothing is left after the exclusions.
    """
    every = list(layers(parts))
    names, taken = [layer.name for layer in every], {*kinds} - {"embedding"}
    found = [
        layer
        for layer in every
        if matches(layer.name, targets) and (layer.site.kind in taken or named(layer.name, targets))
    ]
    wrong = idle(targets, names)
    if wrong or not found:
        if not wrong and (passed := [layer for layer in every if matches(layer.name, targets)]):
            raise TargetError(
                f"targets={targets!r} takes in other kinds of layer only ({passed[0].name} is {passed[0].site.kind}); "
                f"wanted {' or '.join(dict.fromkeys(kinds))}: {offered(every, lambda site: site.kind in kinds)}"
            )
        near = [m for t in wrong if t not in PRESETS for m in get_close_matches(t, PRESETS, n=1)]
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise TargetError(
            f"no layer matches targets={wrong or targets!r}{hint}; "
            f"there are {len(every)}: {first_few(names)}. Presets: {', '.join(PRESETS)}"
        )
    return found
