"""Bases in a single file, as ComfyUI has them: which kind it is, by its keys, and its diffusers pipeline."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from imgadapt.errors import ConfigError, MissingExtra
from imgadapt.header import header_of
from imgadapt.training.families import hub

_KINDS: Mapping[str, tuple[str, str]] = {
    "v1": ("StableDiffusionPipeline", "sd1"),
    "v2": ("StableDiffusionPipeline", "sd2"),
    "xl_base": ("StableDiffusionXLPipeline", "sdxl"),
    "sd3": ("StableDiffusion3Pipeline", "sd3"),
    "sd35_medium": ("StableDiffusion3Pipeline", "sd35_medium"),
    "sd35_large": ("StableDiffusion3Pipeline", "sd35_large"),
    "flux-dev": ("FluxPipeline", "flux"),
    "flux-schnell": ("FluxPipeline", "flux-schnell"),
}
"""diffusers' name of a kind -> its pipeline, and the base that lends what the file lacks: configs at least."""

_TRANSFORMERS = {"StableDiffusion3Pipeline": "SD3Transformer2DModel", "FluxPipeline": "FluxTransformer2DModel"}
_UNET = "model.diffusion_model.input_blocks.0.0.weight"
_AUTOENCODERS = ("first_stage_model.", "vae.")
_TEXT = ("cond_stage_model.", "conditioner.", "text_encoders.")


def open_pipeline(path: Path, dtype: torch.dtype) -> Any:
    """The pipeline of a checkpoint file; its autoencoder is in fp32. What the file lacks is its base's (see `hub`).

    Raises:
        ConfigError: it is not a base of a kind that is trained here, or the hub's cache lacks what it needs.
        OSError, RuntimeError, ValueError, ...: diffusers cannot read it.
    """
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise MissingExtra("diffusers", "diffusers") from error
    keys = shapes(path)
    kind = kind_of(path, keys)
    pipeline_class, base = _KINDS[kind]
    has_text = any(key.startswith(_TEXT) for key in keys)
    has_autoencoder = any(key.startswith(_AUTOENCODERS) for key in keys)
    folder = hub.folder(base, weights=not (has_text and has_autoencoder))
    options: dict[str, Any] = {"config": os.fspath(folder), "local_files_only": True}
    parts: dict[str, Any] = {}
    if has_autoencoder:
        parts["vae"] = diffusers.AutoencoderKL.from_single_file(
            os.fspath(path), subfolder="vae", dtype=torch.float32, **options
        )
    made: Any = getattr(diffusers, pipeline_class)
    if has_text and has_autoencoder:
        pipeline = made.from_single_file(os.fspath(path), dtype=dtype, **parts, **options)
    elif pipeline_class in _TRANSFORMERS:
        transformer: Any = getattr(diffusers, _TRANSFORMERS[pipeline_class])
        parts["transformer"] = transformer.from_single_file(
            os.fspath(path), subfolder="transformer", dtype=dtype, **options
        )
        pipeline = made.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype={"default": dtype, "vae": torch.float32}, **parts
        )
    else:
        lacks = "text encoders" if has_autoencoder else "autoencoder"
        raise ConfigError(f"{path} has no {lacks}; take the whole checkpoint, or a diffusers folder")
    return _with_prediction(pipeline, kind, keys, path)


def shapes(path: Path) -> Mapping[str, Any]:
    """The file's keys, each with an object that has a `shape`; nothing but the header is read.

    Raises:
        ConfigError: it is not safetensors, by its name. FormatError: nor by its content, or not whole.
    """
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ConfigError(
            f"{path}: a pickle, which can hold code, and is not read; write it as .safetensors first (docs/training.md "
            "says how)"
        )
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} is not a checkpoint; wanted .safetensors")
    return header_of(path).rows


def kind_of(path: Path, keys: Mapping[str, Any]) -> str:
    """diffusers' name of the file's kind, one of those that are trained here.

    Raises:
        ConfigError: it is of another, or no base at all.
    """
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    kind = infer_diffusers_model_type(keys)
    if kind == "v1" and _UNET not in keys:  # what diffusers calls all that it does not know
        few = ", ".join(list(keys)[:3])
        raise ConfigError(
            f"{path} is not a base: it has none of the keys of one, but {len(keys)} such as {few}; an adapter?"
        )
    if kind not in _KINDS:
        raise ConfigError(f"{path} is of the kind '{kind}'; imgadapt trains single files of {', '.join(_KINDS)}")
    return kind


def _with_prediction(pipeline: Any, kind: str, keys: Mapping[str, Any], path: Path) -> Any:
    """SDXL files that predict velocity say so by a key of that name, as ComfyUI reads it; those of SD2 do not say."""
    if kind == "v2":
        warnings.warn(
            f"{path} is taken for a base that predicts velocity, as SD 2.1 does; SD 2.x 'base' files (512 pixels), "
            "which predict noise, have the same keys: for one of those give its diffusers folder",
            stacklevel=3,
        )
    if "v_pred" in keys:
        changes: dict[str, Any] = {"prediction_type": "v_prediction"}
        if "ztsnr" in keys:
            changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changes)
    return pipeline
