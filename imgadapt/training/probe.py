"""Probe: one fixed prediction of the live model, kept beside a trained file to prove later that the file acts so."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from imgadapt.file import read_tensors, write_tensors
from imgadapt.training import noise
from imgadapt.training.families import StableDiffusion


@torch.no_grad()
def take(family: StableDiffusion, latents: Tensor, states: Tensor, *, seed: int = 0) -> dict[str, Tensor]:
    """Inputs and the model's prediction for (pictures, channels, h, w) latents at timesteps over the whole range."""
    count = len(latents)
    t = ((torch.arange(count) + 0.5) / count * family.timesteps).long()
    noisy = family.noised(latents, noise.gaussian(seed, 0, latents.shape), t).cpu()
    return {"noisy": noisy, "states": states, "timesteps": t, "prediction": family.predict(noisy, states, t).cpu()}


@torch.no_grad()
def error(family: StableDiffusion, probe: Mapping[str, Tensor]) -> float:
    """Largest absolute difference between the prediction now and the one that was taken."""
    now = family.predict(probe["noisy"], probe["states"], probe["timesteps"])
    return (now.cpu() - probe["prediction"]).abs().max().item()


def save(probe: Mapping[str, Tensor], path: Path) -> None:
    """Write a probe as safetensors."""
    write_tensors(path, probe, {})


def load(path: Path) -> dict[str, Tensor]:
    """Read a probe.

    Raises:
        FormatError: there is none, or it is torn.
    """
    return read_tensors(path)[0]
