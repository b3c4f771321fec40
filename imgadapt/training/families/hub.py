"""Bases out of the Hugging Face hub's cache, by name. Nothing is downloaded: the error says the command that does."""

import re
from collections.abc import Mapping
from pathlib import Path

from imgadapt.errors import ConfigError, MissingExtra

NAMES: Mapping[str, str] = {
    "sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd35_large": "stabilityai/stable-diffusion-3.5-large",
    "sd35_medium": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
}
"""What short names of bases stand for."""

_CONFIGS = ("*.json", "*.txt", "*.model")
_WEIGHTS = ("*/*.safetensors",)  # those beside model_index.json are the same in one file
_NOT = ("*.fp16.*", "*.non_ema.*", "*flax*", "*onnx*", "*openvino*")


def folder(base: str, *, weights: bool = True) -> Path:
    """The cached folder of one of NAMES, or of any `owner/name`. weights: whether the command in the error brings them.

    Raises:
        ConfigError: it is not a name, or not in the cache.
        MissingExtra: huggingface_hub, which comes with diffusers, is not installed.
    """
    name = NAMES.get(base, base)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise ConfigError(
            f"base {base} is not there; wanted 'demo', a diffusers folder, a checkpoint file, or one of the hub's that "
            f"is on this machine: {', '.join(NAMES)} or owner/name"
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        raise MissingExtra("huggingface_hub", "diffusers") from error
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError as error:
        what = f"base {base}" if weights else f"the configs of {name}, which a single file needs,"
        raise ConfigError(f"{what} is not on this machine; bring it with: {command(name, weights=weights)}") from error


def command(name: str, *, weights: bool = True) -> str:
    """What to type to bring `owner/name` into the cache, without what training does not need."""
    wanted = _CONFIGS + (_WEIGHTS if weights else ())
    left_out = [f'--exclude "{pattern}"' for pattern in _NOT] if weights else []
    return " ".join(["hf download", name, *(f'--include "{pattern}"' for pattern in wanted), *left_out])
