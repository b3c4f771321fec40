"""Training a router: its tensors learn from the loss of the base with all adapters on it, which stay as they are."""

from collections.abc import Callable

import torch

from imgadapt.errors import ConfigError, TrainingError
from imgadapt.routing import Routed
from imgadapt.training import noise
from imgadapt.training.families import Family
from imgadapt.training.material import Material
from imgadapt.training.objective import Objective


def learn(
    family: Family,
    objective: Objective,
    material: Material,
    routed: Routed,
    *,
    steps: int,
    rate: float = 3e-3,
    progress: Callable[[int, float], None] = lambda *_: None,
) -> list[float]:
    """Train what a router has, by AdamW at a rate that falls to zero; returns the loss of each step.

    material: pictures of all the kinds that it shall tell apart, prepared, with the captions that they are asked by;
        its config says batch size and seed. progress: told (step, loss).
    For example, with `family`, and pictures of two styles in one folder:

        attach(family.pipeline, load("ink.safetensors"), name="ink")
        attach(family.pipeline, load("duotone.safetensors"), name="duotone")
        routed = route(family.pipeline, XLoRA(), "ink", "duotone")
        config = TrainConfig.of({"folder": "both", "output": "out", "batch_size": 8})
        material = Material(config, family, scan(config.folder, None, None))
        material.prepare()
        learn(family, objective.of(config, family.schedule, family.sampling(8, 8)), material, routed, steps=100)
        save_router(routed.file(), "router.safetensors")

    Raises:
        ConfigError: the router has nothing to train. TrainingError: the loss is not finite.
    """
    if not routed.parameters():
        raise ConfigError(f"{routed.router.name} has nothing to train")
    if steps < 1 or not 0 < rate < 1e6:
        raise ConfigError(f"steps is {steps}, and rate {rate}; wanted 1 step or more, and a rate above 0")
    size, seed = material.config.batch_size, material.config.seed
    optimizer = torch.optim.AdamW(routed.parameters(), lr=rate, weight_decay=0.0)
    losses: list[float] = []
    routed.training = True
    try:
        for step in range(steps):
            torch.manual_seed(noise.number(seed, step, "router"))
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            batch = material.batch(step, range(size))
            asked = objective.ask(batch.latents, seed, step, range(size), size)
            guess = family.predict(asked.noisy, batch.conditions, asked.times)
            loss = objective.losses(guess, batch.latents, asked.noise, asked.times, batch.mask).weighted.mean()
            if not loss.isfinite():
                raise TrainingError(f"the loss of step {step} is not finite; lower the rate, {rate}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            progress(step, losses[-1])
    finally:
        routed.training = False
    return losses
