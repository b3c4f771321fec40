"""Which layers: components of a model, globs over their paths, presets."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

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
        return {_kind(model): model}
    if isinstance(model, Mapping):
        found: dict[str, nn.Module] = {str(k): m for k, m in model.items() if isinstance(m, nn.Module)}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        if len(found) < len(model):  # pyright: ignore[reportUnknownArgumentType]
            raise TargetError("a model given as a mapping maps component names to modules only: {'unet': unet}")
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
    an exclusion, which wins.
    """
    wanted = False
    for target in [targets] if isinstance(targets, str) else targets:
        globs = PRESETS.get(target.removeprefix("!"), (target.removeprefix("!"),))
        if any(fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}") for glob in globs):
            if target.startswith("!"):
                return False
            wanted = True
    return wanted


def layers(parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, Site]]:
    """(full name, module, site) of every layer that has a site; an adapted layer is yielded as its wrapper."""
    for component, root in parts.items():
        for path, module in root.named_modules():
            site = module.site if isinstance(module, AdapterLayer) else Site.of(module)
            if site is not None and path:
                yield f"{component}.{path}", module, site


def find(parts: Mapping[str, nn.Module], targets: Targets) -> list[tuple[str, nn.Module, Site]]:
    """The layers that `targets` names.

    Raises:
        TargetError: none is named.
    """
    every = list(layers(parts))
    found = [row for row in every if matches(row[0], targets)]
    if not found:
        near = first_few([name for name, _, _ in every])
        raise TargetError(
            f"no layer matches targets={targets!r}; there are {len(every)}: {near}. Presets: {', '.join(PRESETS)}"
        )
    return found


def replace(parts: Mapping[str, nn.Module], name: str, module: nn.Module) -> None:
    """Put `module` where the layer of this full name is."""
    component, _, path = name.partition(".")
    parent, _, child = path.rpartition(".")
    parts[component].get_submodule(parent)._modules[child] = module
