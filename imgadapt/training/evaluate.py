"""Held-out loss: fixed pictures x timesteps x noise, and how sure a difference is."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from imgadapt.training import noise
from imgadapt.training.families import Family
from imgadapt.training.material import Material
from imgadapt.training.objective import Objective


@torch.no_grad()
def held_out_losses(
    family: Family, objective: Objective, material: Material, *, timesteps: int = 8, seed: int = 0
) -> Tensor:
    """Losses (views, timesteps) of the model as it is now, unweighted.

    material: a fixed one. The timesteps are the middles of equal bins; the noise depends on seed, place and timestep
    only, so that two calls compare like with like.
    """
    losses = torch.zeros(len(material.views), timesteps)
    schedule = objective.schedule
    for places, batch in material.all():
        for k in range(timesteps):
            t = torch.full((len(places),), (k + 0.5) / timesteps * schedule.total, device=family.device)
            t = t if schedule.alphas is None else t.long()
            shape = batch.latents.shape[1:]
            eps = torch.stack([torch.randn(shape, generator=noise.generator(seed, k, i, "held out")) for i in places])
            eps = eps.to(family.device)
            guess = family.predict(schedule.noised(batch.latents, eps, t), batch.conditions, t)
            losses[places, k] = objective.losses(guess, batch.latents, eps, t, batch.mask).raw.float().cpu()
    return losses


def bootstrap(lower: Tensor, higher: Tensor, *, draws: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of higher - lower with its 95 % interval, pictures drawn anew with their pairing kept.

    lower, higher: losses (pictures, timesteps) of the same pictures under two models.
    """
    gaps = (higher - lower).mean(1).double().numpy()
    picks = np.random.default_rng(seed).integers(len(gaps), size=(draws, len(gaps)))
    low, high = np.quantile(gaps[picks].mean(1), (0.025, 0.975))
    return float(gaps.mean()), float(low), float(high)


def describe(name: str, losses: Tensor, against: Sequence[tuple[str, Tensor]]) -> str:
    """One line: mean loss, and the difference to others with its interval."""
    parts = [f"{name} {losses.mean().item():.4f}"]
    for other, theirs in against:
        gap, low, high = bootstrap(losses, theirs)
        parts.append(f"{gap:+.4f} below {other} (95 %: {low:.4f} to {high:.4f})")
    return ", ".join(parts)
