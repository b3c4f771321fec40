"""Names: what the tools write before a layer's path, and which layer that is.

Names are never parsed: every layer of an architecture is spelled forward, in diffusers' naming and in the one of the
model's own code, dotted and flattened, and keys are looked up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from imgadapt.arch import Architecture, canonical
from imgadapt.targets import DENOISERS, TEXT_ENCODERS

Naming = Literal["diffusers", "native"]
_EVERY = (*DENOISERS, *TEXT_ENCODERS)
_DENOISER = ("unet", "transformer", "transformer_2")


@dataclass(frozen=True)
class Prefix:
    """What keys begin with: for which components (the first that has the layer), and what separates their paths."""

    text: str
    components: tuple[str, ...]
    separator: str = "."


PREFIXES: tuple[Prefix, ...] = (
    Prefix("lora_unet__", _DENOISER, "_"),  # Wan-Fun
    Prefix("lora_unet_", _DENOISER, "_"),
    Prefix("oft_unet_", _DENOISER, "_"),
    Prefix("lora_transformer_", _DENOISER, "_"),  # OneTrainer's own
    Prefix("lora_te_", ("text_encoder",), "_"),
    Prefix("lora_te1_", ("text_encoder",), "_"),
    Prefix("lora_te2_", ("text_encoder_2",), "_"),
    Prefix(
        "lora_te3_", ("text_encoder_3", "text_encoder_2", "text_encoder"), "_"
    ),  # Flux: te3 of sd-scripts, te2 of OneTrainer
    Prefix("lora_prior_unet_", ("prior",), "_"),
    Prefix("lora_prior_te_", ("text_encoder",), "_"),
    Prefix("lycoris_", _EVERY, "_"),
    Prefix("model.diffusion_model.", _DENOISER),
    Prefix("diffusion_model.", _DENOISER),
    Prefix("transformer.", ("transformer", "unet")),  # ai-toolkit says so of UNets, too
    Prefix("transformer_2.", ("transformer_2",)),
    Prefix("unet.", ("unet",)),
    Prefix("prior.", ("prior",)),
    Prefix("text_encoder.", ("text_encoder",)),
    Prefix("text_encoder_2.", ("text_encoder_2",)),
    Prefix("text_encoder_3.", ("text_encoder_3",)),
    Prefix("text_encoders.clip_l.transformer.", ("text_encoder",)),
    Prefix("text_encoders.clip_g.transformer.", ("text_encoder_2",)),
    Prefix("text_encoders.t5xxl.transformer.", ("text_encoder_3", "text_encoder_2", "text_encoder")),
    *(Prefix(f"{component}.base_model.model.", (component,)) for component in _EVERY),
    Prefix("base_model.model.", _EVERY),
    Prefix("model.", ("model",)),  # a single module of no kind we know, in our own format
    Prefix("", _EVERY),
)


_LONGEST_FIRST = sorted(PREFIXES, key=lambda prefix: -len(prefix.text))


@lru_cache(maxsize=4096)  # a file asks for each of its layers some ten times
def prefixes_of(stem: str) -> tuple[Prefix, ...]:
    """Those that a key's layer begins with, the longest first."""
    return tuple(prefix for prefix in _LONGEST_FIRST if stem.startswith(prefix.text))


@dataclass(frozen=True)
class Place:
    """A layer that a key names: under which prefix, in which naming, and its full name in that."""

    prefix: Prefix
    naming: Naming
    name: str


@cache
def _index(architecture: Architecture, separator: str) -> dict[Naming, dict[tuple[str, str], str]]:
    """(component, spelled path) -> full name, in both namings; CLIP's `text_model.` is optional in what is read."""
    index: dict[Naming, dict[tuple[str, str], str]] = {"diffusers": {}, "native": {}}
    names: Sequence[tuple[Naming, Sequence[str] | Mapping[str, object]]] = (
        ("diffusers", architecture.layers),
        ("native", architecture.native),
    )
    for naming, layers in names:
        for name in layers:
            component, _, path = name.partition(".")
            for variant in {path, path.replace("text_model.", "", 1)}:
                index[naming][component, variant.replace(".", separator)] = name
    return index


def find(stem: str, architecture: Architecture, first: Naming, component: str | None = None) -> Place | None:
    """The layer that `stem` is of this architecture, in the naming `first` where both have such a layer, and of
    `component` where the prefix leaves it open.
    """
    namings: tuple[Naming, Naming] = ("native", "diffusers") if first == "native" else ("diffusers", "native")
    for prefix in prefixes_of(stem):
        path = stem[len(prefix.text) :]
        index = _index(architecture, prefix.separator)
        for naming in namings:
            for own in (c for c in (component, *prefix.components) if c in prefix.components):
                if (name := index[naming].get((own, path))) is not None:
                    return Place(prefix, naming, name)
    return None


def find_without_table(stem: str) -> Place | None:
    """A dotted layer of a model that no architecture lists."""
    prefix = next((p for p in prefixes_of(stem) if p.text and p.separator == "."), None)
    if prefix is None or not stem[len(prefix.text) :]:
        return None
    component = next(iter(prefix.components)) if len(prefix.components) <= 3 else "model"  # peft says nothing of it
    return Place(prefix, "diffusers", canonical(f"{component}.{stem[len(prefix.text) :]}"))
