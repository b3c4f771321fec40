"""Adapters for diffusion image models: train, load, convert, merge and compare them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imgadapt import methods
    from imgadapt.errors import ImgadaptError
    from imgadapt.file import AdapterFile, load, save
    from imgadapt.live import adapters, attach, collect, detach, disabled, merge, parameters, set_weights, unmerge
    from imgadapt.methods import METHODS, LoRA, Method

__version__ = "0.1.0"

_HOMES = {  # where each public name lives; imported at first use, so that `imgadapt --help` needs no torch
    "AdapterFile": "file",
    "ImgadaptError": "errors",
    "LoRA": "methods",
    "METHODS": "methods",
    "Method": "methods",
    "adapters": "live",
    "attach": "live",
    "collect": "live",
    "detach": "live",
    "disabled": "live",
    "load": "file",
    "merge": "live",
    "parameters": "live",
    "save": "file",
    "set_weights": "live",
    "unmerge": "live",
}

__all__ = [
    "METHODS",
    "AdapterFile",
    "ImgadaptError",
    "LoRA",
    "Method",
    "adapters",
    "attach",
    "collect",
    "detach",
    "disabled",
    "load",
    "merge",
    "methods",
    "parameters",
    "save",
    "set_weights",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"imgadapt.{_HOMES[name]}"), name)
    if name in ("demo", "methods"):
        return import_module(f"imgadapt.{name}")
    raise AttributeError(f"module 'imgadapt' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
