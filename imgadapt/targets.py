"""Which layers: components of a model, globs over their paths, presets."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from imgadapt.arch import canonical
from imgadapt.errors import TargetError, first_few
from imgadapt.layer import AdapterLayer
from imgadapt.sites import Site

DENOISERS = ("unet", "transformer", "transformer_2", "prior")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_in", "proj_out")
_CONVOLUTIONS = ("resnets.*.conv1", "resnets.*.conv2", "resnets.*.conv_shortcut", "*samplers.0.conv")
_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

PRESETS: Mapping[str, tuple[str, ...]] = {
    "attention": tuple(f"{c}.*.{p}" for c in DENOISERS for p in _ATTENTION),
    "transformer": tuple(f"{c}.*.{p}" for c in DENOISERS for p in _ATTENTION + _FEED_FORWARD),
    "convolution": tuple(f"{c}.*.{p}" for c in DENOISERS for p in _CONVOLUTIONS),
    "denoiser": tuple(f"{c}.*" for c in DENOISERS),
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
        return {_kind(getattr(model, "_orig_mod", model)): model}
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
    return found


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


def _listed(targets: Targets) -> Sequence[str]:
    return [targets] if isinstance(targets, str) else targets


def idle(targets: Targets, names: Sequence[str]) -> list[str]:
    """The targets that match none of the names: mistyped, most likely."""
    return [t for t in _listed(targets) if not any(matches(name, t.removeprefix("!")) for name in names)]


# their fused kernels read `out_proj.weight` and the like themselves: an adapter on it would never be called
_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def layers(parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, Site]]:
    """(full name, module, site) of every layer that has a site; an adapted layer is yielded as its wrapper.

    Raises:
        TargetError: one layer is reached by two names; wrapping it at one of them would leave the other bare.
    """
    seen: dict[int, str] = {}
    for component, root in parts.items():
        fused = [path for path, module in root.named_modules() if isinstance(module, _FUSED)]
        for path, module in root.named_modules(remove_duplicate=False):
            site = module.site if isinstance(module, AdapterLayer) else Site.of(module)
            if site is None or not path or any(path.startswith(f"{outer}.") or not outer for outer in fused):
                continue
            name = f"{component}.{path}".replace("_orig_mod.", "")  # torch.compile's wrapper
            other = seen.setdefault(id(module), name)
            if other != name:
                raise TargetError(f"{other} and {name} are one and the same layer; adapters cannot tell them apart")
            yield name, module, site


def find(parts: Mapping[str, nn.Module], targets: Targets) -> list[tuple[str, nn.Module, Site]]:
    """The layers that `targets` names.

    Raises:
        TargetError: a target matches no layer, or nothing is left after the exclusions.
    """
    every = list(layers(parts))
    names = [name for name, _, _ in every]
    found = [row for row in every if matches(row[0], targets)]
    wrong = idle(targets, names)
    if wrong or not found:
        near = [m for t in wrong for m in get_close_matches(t, PRESETS, n=1)]
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise TargetError(
            f"no layer matches targets={wrong or targets!r}{hint}; "
            f"there are {len(every)}: {first_few(names)}. Presets: {', '.join(PRESETS)}"
        )
    return found


def replace(parts: Mapping[str, nn.Module], name: str, module: nn.Module) -> None:
    """Put `module` where the layer of this full name is."""
    component, _, path = name.partition(".")
    inner = getattr(parts[component], "_orig_mod", parts[component])
    parent, _, child = path.rpartition(".")
    inner.get_submodule(parent)._modules[child] = module
