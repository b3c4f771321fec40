"""Adapters for diffusion image models: train, load, convert, merge and compare them."""
# ruff: noqa: F405  the names of the methods are those of imgadapt.methods

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imgadapt import methods
    from imgadapt.attaching import attach, detach, swap
    from imgadapt.combining.files import combine
    from imgadapt.combining.recipe import Entry, MergeRecipe
    from imgadapt.errors import ImgadaptError
    from imgadapt.file import AdapterFile, load, plan, save
    from imgadapt.live import adapters, collect, disabled, merge, parameters, set_weights, unmerge
    from imgadapt.methods import *  # noqa: F403
    from imgadapt.overview import status
    from imgadapt.prompting import GatedPrompts, PrefixTuning, PromptTuning, PTuning
    from imgadapt.slot import Dropout

__version__ = "0.1.0"

_PLACES = {  # where the public names live; imported at first use, so that `imgadapt --help` needs no torch
    "attaching": ("attach", "detach", "swap"),
    "combining.files": ("combine",),
    "combining.recipe": ("Entry", "MergeRecipe"),
    "errors": ("ImgadaptError",),
    "file": ("AdapterFile", "load", "plan", "save"),
    "live": ("adapters", "collect", "disabled", "merge", "parameters", "set_weights", "unmerge"),
    "slot": ("Dropout",),
    "overview": ("status",),
    "prompting": ("GatedPrompts", "PTuning", "PrefixTuning", "PromptTuning"),
}
_HOMES = {name: home for home, names in _PLACES.items() for name in names}

__all__ = [
    "BOFT",
    "IA3",
    "METHODS",
    "OFT",
    "AdapterFile",
    "DoRA",
    "Dropout",
    "Entry",
    "Full",
    "GLoRA",
    "GatedPrompts",
    "ImgadaptError",
    "LoHa",
    "LoKr",
    "LoRA",
    "MergeRecipe",
    "Method",
    "Norm",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "adapters",
    "attach",
    "collect",
    "combine",
    "detach",
    "disabled",
    "load",
    "merge",
    "methods",
    "parameters",
    "plan",
    "save",
    "set_weights",
    "status",
    "swap",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"imgadapt.{_HOMES[name]}"), name)
    if name in ("demo", "methods"):
        return import_module(f"imgadapt.{name}")
    if name[:1].isupper() and name in (methods := import_module("imgadapt.methods")).__all__:
        return getattr(methods, name)
    raise AttributeError(f"module 'imgadapt' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *import_module("imgadapt.methods").__all__})
