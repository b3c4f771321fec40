"""Load a base by name or path, and find its family."""

import os
from pathlib import Path
from typing import Any

import torch

from imgadapt import demo
from imgadapt.errors import ConfigError, MissingExtra
from imgadapt.training.families.sd import StableDiffusion

FAMILIES = {family.pipeline_class: family for family in (StableDiffusion,)}


def load(base: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> StableDiffusion:
    """The base, frozen, on a device.

    base: "demo", a folder in diffusers format, or a single-file checkpoint (`.safetensors`).

    Raises:
        ConfigError: there is no such base, it cannot be read, or its family is not one that imgadapt trains.
    """
    pipeline = open_pipeline(base)
    kind = type(pipeline).__name__
    if kind not in FAMILIES:
        raise ConfigError(f"{base} is a {kind}; imgadapt trains {', '.join(FAMILIES)} so far")
    return FAMILIES[kind](pipeline, torch.device(device), dtype)


def open_pipeline(base: str) -> Any:
    """The diffusers pipeline of a base; nothing is ever downloaded.

    Raises:
        ConfigError: there is no such base, or it cannot be read.
    """
    if base == "demo":
        return demo.pipeline()
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise MissingExtra("diffusers", "diffusers") from error
    path = Path(base).expanduser()
    try:
        if (path / "model_index.json").is_file():
            return diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=True)
        if path.is_file():
            return diffusers.StableDiffusionPipeline.from_single_file(os.fspath(path), local_files_only=True)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        hint = (
            ""
            if path.is_dir()
            else " (diffusers needs its configs in the hub's cache for a single file; a folder has them)"
        )
        raise ConfigError(f"{base} cannot be read as a base{hint}: {error}") from error
    what = "has no model_index.json" if path.is_dir() else "is not there"
    raise ConfigError(f"base {base} {what}; wanted 'demo', a diffusers folder, or a checkpoint file")
