"""Held-out loss: fixed pictures x timesteps x noise, and how sure a difference is."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from imgadapt.training import noise
from imgadapt.training.families import StableDiffusion


@torch.no_grad()
def held_out_losses(
    family: StableDiffusion, latents: Tensor, states: Tensor, *, timesteps: int = 8, seed: int = 0, batch: int = 32
) -> Tensor:
    """Losses (pictures, timesteps) of the model as it is now, unweighted.

    latents: (pictures, channels, h, w); states: (pictures, tokens, width). The timesteps are the middles of equal
    bins; the noise depends on seed, picture and timestep only, so that two calls compare like with like.
    """
    rows: list[Tensor] = []
    for k in range(timesteps):
        t = torch.full((len(latents),), int((k + 0.5) / timesteps * family.timesteps))
        fixed = torch.stack(
            [
                torch.randn(latents.shape[1:], generator=noise.generator(seed, k, i, "held out"))
                for i in range(len(latents))
            ]
        )
        pieces = [slice(i, i + batch) for i in range(0, len(latents), batch)]
        rows.append(torch.cat([family.losses(latents[s], states[s], fixed[s], t[s]).float().cpu() for s in pieces]))
    return torch.stack(rows, 1)


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
