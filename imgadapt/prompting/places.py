"""Where learned prompts act in a denoiser: cross-attentions, or, of SD3 and Flux, the denoiser's own input."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from imgadapt.errors import TargetError
from imgadapt.prompting.kind import Place

_CROSS = ("UNet2DConditionModel", "PixArtTransformer2DModel")
_JOINT = ("SD3Transformer2DModel", "FluxTransformer2DModel")


@dataclass(frozen=True)
class Reads:
    """A denoiser and what in it reads text.

    whole: its place. attentions: name -> (module, place); none where text and picture attend together.
    """

    component: str
    denoiser: nn.Module
    whole: Place
    attentions: Mapping[str, tuple[Any, Place]] = field(default_factory=dict[str, tuple[Any, Place]])


def find(parts: Mapping[str, nn.Module]) -> Reads:
    """The denoiser among components.

    Raises:
        TargetError: there is none whose way to read text is known, or attention of a kind that hooks cannot follow.
    """
    known = {name: module for name, module in parts.items() if _kind(module) in (*_CROSS, *_JOINT)}
    if len(known) != 1:
        raise TargetError(
            f"learned prompts are for one denoiser of {', '.join((*_CROSS, *_JOINT))}; this model has "
            f"{', '.join(f'{name} ({_kind(module)})' for name, module in parts.items())}"
        )
    ((component, denoiser),) = known.items()
    if _kind(denoiser) in _JOINT:
        config: Any = denoiser.config
        return Reads(component, denoiser, Place(component, int(config.joint_attention_dim)))
    found: dict[str, tuple[Any, Place]] = {}
    for path, module in denoiser.named_modules():
        if getattr(module, "is_cross_attention", False) is True and hasattr(module, "to_k"):
            name, attention = f"{component}.{path}", module
            _check(name, attention)
            inside: Any = attention
            width, inner = (int(inside.to_k.in_features), int(inside.to_k.out_features))
            found[name] = inside, Place(name, width, inner, int(inside.heads))
    widths = {place.context for _, place in found.values()}
    if len(widths) != 1:
        raise TargetError(f"{component}'s cross-attentions read texts of {len(widths)} widths; wanted one")
    return Reads(component, denoiser, Place(component, widths.pop()), found)


def _kind(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("FSDP")


def _check(name: str, attention: Any) -> None:
    if getattr(attention, "added_kv_proj_dim", None) is not None or getattr(attention, "only_cross_attention", False):
        raise TargetError(f"{name} has projections beside to_k and to_v, which learned prompts do not know")
    norm = getattr(attention, "norm_cross", None)
    if norm is not None and type(norm).__name__ != "LayerNorm":
        raise TargetError(f"{name} normalises its texts over all tokens: learned ones would change the others")
