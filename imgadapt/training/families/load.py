"""Load a base by name or path, and find its family."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imgadapt import demo
from imgadapt.errors import ConfigError, MissingExtra, shortened
from imgadapt.shortage import out_of_memory
from imgadapt.training.families import hub, single_file
from imgadapt.training.families import quantise as quantising
from imgadapt.training.families.family import Family
from imgadapt.training.families.flux import Flux
from imgadapt.training.families.folder import INDEX, check, check_whole, pipeline_class, variant
from imgadapt.training.families.quantise import Storage
from imgadapt.training.families.sd import StableDiffusion
from imgadapt.training.families.sd3 import StableDiffusion3
from imgadapt.training.families.sdxl import StableDiffusionXL

FAMILIES: Mapping[str, type[Family]] = {
    name: family for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux) for name in family.pipelines
}
"""By the name of diffusers' class."""

_OTHERS = {
    "Inpaint": "for inpainting",
    "Fill": "for inpainting",
    "Pix2Pix": "for editing",
    "Kontext": "for editing",
    "Control": "led by a control picture",
    "Img2Img": "a refiner, or made to redraw pictures",
    "Upscale": "for enlarging",
    "Depth": "led by depth",
}
"""What a pipeline is whose class has such a word in its name."""


def load(
    base: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantise: Storage | None = None,
    originals: dict[str, Tensor] | None = None,
) -> Family:
    """The base, frozen, on a device; it is read in `dtype` at once and never lies in memory as fp32.

    base: "demo"; one of `hub.NAMES` or `owner/name`, out of the hub's cache; a folder in diffusers format; a
        single-file checkpoint. quantise: "nf4" or "int8": how the denoiser's layers are kept (see quantise.py);
        originals takes their weights as they were, by full names.

    Raises:
        ConfigError: there is no such base, it cannot be read, or its kind is not one that imgadapt trains.
        MissingExtra: diffusers, or for `quantise` bitsandbytes, is not installed.
    """
    pipeline = open_pipeline(base, dtype)
    family = family_of(base, type(pipeline).__name__)
    if quantise is not None:
        denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
        held: dict[str, Tensor] | None = None if originals is None else {}
        quantising.quantise(denoiser, quantise, device=torch.device(device), dtype=dtype, originals=held)
        component = "transformer" if getattr(pipeline, "unet", None) is None else "unet"
        if originals is not None:
            originals.update({f"{component}.{name}": weight for name, weight in (held or {}).items()})
    return family(pipeline, torch.device(device), dtype)


def open_pipeline(base: str, dtype: torch.dtype = torch.float32) -> Any:
    """The diffusers pipeline of a base, in `dtype` but for its autoencoder, which is in fp32 (see `Family`).

    Raises:
        ConfigError: there is no such base, it cannot be read, or its kind is not one that imgadapt trains.
        MemoryError, RuntimeError: memory is out.
    """
    if base == "demo":
        return demo.pipeline()
    path = Path(os.path.expanduser(base))  # Path's own raises where nobody has such a name
    try:
        if path.is_file():
            pipeline, folder = single_file.open_pipeline(path, dtype), None
        else:
            folder = path if path.is_dir() else hub.folder(base)
            pipeline = _open_folder(base, folder, dtype)
        check_whole(pipeline, folder)
        return pipeline
    except (ConfigError, MissingExtra):
        raise
    except Exception as error:  # diffusers and transformers raise whatever a config leads them to
        if out_of_memory(error):
            raise
        hint = "" if path.exists() else f" (if it is not whole: {hub.command(hub.NAMES.get(base, base))})"
        said = shortened(str(error) or type(error).__name__, 400)
        raise ConfigError(f"{base} cannot be read as a base: {said}{hint}") from error


def family_of(base: str, pipeline_class: str) -> type[Family]:
    """The family of a diffusers class.

    Raises:
        ConfigError: there is none; it says what the base is, where its class does.
    """
    if pipeline_class in FAMILIES:
        return FAMILIES[pipeline_class]
    what = next((f", {text}" for word, text in _OTHERS.items() if word in pipeline_class), "")
    raise ConfigError(f"{base} is a {pipeline_class}{what}; imgadapt trains {', '.join(FAMILIES)}")


def _open_folder(base: str, folder: Path, dtype: torch.dtype) -> Any:
    if not (folder / INDEX).is_file():
        raise ConfigError(f"base {base} has no {INDEX}; wanted 'demo', a diffusers folder, or a checkpoint file")
    family_of(base, pipeline_class(folder))  # before gigabytes are read
    check(folder)
    try:
        from diffusers import DiffusionPipeline
    except ModuleNotFoundError as error:
        raise MissingExtra("diffusers", "diffusers") from error
    return DiffusionPipeline.from_pretrained(
        folder,
        local_files_only=True,
        use_safetensors=True,
        dtype={"default": dtype, "vae": torch.float32},
        variant=variant(folder) or None,
    )
