"""Probe: one fixed prediction of the live model, kept beside a trained file to prove later that the file acts so."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from imgadapt.tensors import read_tensors, write_tensors
from imgadapt.training import noise
from imgadapt.training.families import Family
from imgadapt.training.material import Material
from imgadapt.training.objective import Schedule


@torch.no_grad()
def take(family: Family, schedule: Schedule, material: Material, *, seed: int = 0) -> dict[str, Tensor]:
    """Inputs and the model's prediction for up to four pictures of one size, at times over the whole range.

    Text conditions are not in it: they are encoded anew, so that changed text encoders and words are proved, too.
    """
    _, batch = next(material.all(4))
    count = len(batch.latents)
    times = (torch.arange(count) + 0.5) / count * schedule.total
    times = times if schedule.alphas is None else times.long()
    eps = noise.gaussian(seed, 0, batch.latents.shape).to(family.device)
    noisy = schedule.noised(batch.latents, eps, times.to(family.device)).cpu()
    text = "\0".join(batch.captions).encode()
    probe = {"noisy": noisy, "times": times, "sizes": batch.conditions["sizes"].cpu(),
             "captions": torch.tensor(list(text), dtype=torch.uint8)}  # fmt: skip
    return {**probe, "prediction": _predict(family, probe)}


@torch.no_grad()
def error(family: Family, probe: Mapping[str, Tensor]) -> float:
    """Largest absolute difference between the prediction now and the one that was taken."""
    return (_predict(family, probe) - probe["prediction"]).abs().max().item()


def _predict(family: Family, probe: Mapping[str, Tensor]) -> Tensor:
    captions = bytes(probe["captions"].tolist()).decode().split("\0")
    with family.here():
        conditions = {**family.text(captions), "sizes": probe["sizes"].to(family.device)}
    return family.predict(probe["noisy"].to(family.device), conditions, probe["times"].to(family.device)).cpu()


def save(probe: Mapping[str, Tensor], path: Path) -> None:
    """Write a probe as safetensors."""
    write_tensors(path, probe, {})


def load(path: Path) -> dict[str, Tensor]:
    """Read a probe.

    Raises:
        FormatError: there is none, or it is torn.
    """
    return read_tensors(path)[0]
