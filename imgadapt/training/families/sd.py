"""Stable Diffusion 1.x and the embedded base: one CLIP text encoder, a UNet that predicts noise or velocity."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imgadapt.errors import ConfigError


class StableDiffusion:
    """A frozen `StableDiffusionPipeline`, as the trainer needs it.

    pipeline: the pipeline itself, for sampling; its modules are on `device` in `dtype`.
    """

    pipeline_class = "StableDiffusionPipeline"

    def __init__(self, pipeline: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.pipeline = pipeline.to(device)
        self.device, self.dtype = device, dtype
        self.unet: nn.Module = pipeline.unet
        self.text_encoder: nn.Module = pipeline.text_encoder
        self.vae: Any = pipeline.vae
        self.scheduler: Any = pipeline.scheduler
        for module in (self.unet, self.text_encoder, self.vae):
            if next(module.parameters()).dtype != dtype:
                module.to(dtype)
            module.requires_grad_(False).eval()

    def side(self, wanted: int | None) -> int:
        """Pixels of a side to train at: the wanted ones, or those that the base was trained at.

        Raises:
            ConfigError: it is not a multiple of what the autoencoder shrinks by.
        """
        factor = int(self.pipeline.vae_scale_factor)
        side = int(self.pipeline.unet.config.sample_size * factor) if wanted is None else wanted
        if side % factor:
            raise ConfigError(f"resolution is {side}; it must be a multiple of {factor} for this base")
        return side

    @property
    def timesteps(self) -> int:
        """Timesteps of the noise schedule."""
        return int(self.scheduler.config.num_train_timesteps)

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        """Latent (channels, h, w), fp32 on the CPU, of (3, H, W) in [-1, 1]; the mean, where it is a distribution."""
        encoded = self.vae.encode(image[None].to(self.device, self.dtype))
        latent = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return ((latent[0].float() - shift) * self.vae.config.scaling_factor).cpu()

    @torch.no_grad()
    def encode_text(self, caption: str) -> Tensor:
        """Text states (tokens, width), fp32 on the CPU."""
        states, _ = self.pipeline.encode_prompt(caption, self.device, 1, False)
        return states[0].float().cpu()

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of the scheduler's forward process, on the device."""
        return self.scheduler.add_noise(latents.to(self.device), noise.to(self.device), timesteps.to(self.device))

    def predict(self, noisy: Tensor, states: Tensor, timesteps: Tensor) -> Tensor:
        """The model's prediction (batch, channels, h, w), fp32: noise or velocity, as its scheduler's config says."""
        noisy, states = noisy.to(self.device, self.dtype), states.to(self.device, self.dtype)
        return self.unet(noisy, timesteps.to(self.device), states).sample.float()

    def losses(
        self, latents: Tensor, states: Tensor, noise: Tensor, timesteps: Tensor, gamma: float | None = None
    ) -> Tensor:
        """(batch,) mean squared errors of the prediction, weighted by min-SNR where gamma is given.

        latents, noise: (batch, channels, h, w); states: (batch, tokens, width); timesteps: (batch,) whole.
        The target is noise, or velocity (arXiv 2202.00512); the weights are min(SNR, gamma) / SNR and
        min(SNR, gamma) / (SNR + 1) (arXiv 2303.09556).
        """
        latents, noise, timesteps = (x.to(self.device) for x in (latents, noise, timesteps))
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        guess = self.predict(self.noised(latents, noise, timesteps), states, timesteps)
        errors = F.mse_loss(guess, target, reduction="none").mean((1, 2, 3))
        if gamma is None:
            return errors
        a = self.scheduler.alphas_cumprod.to(self.device)[timesteps]
        snr = a / (1 - a)
        capped = snr.clamp(max=gamma)
        return errors * (capped / (snr + 1) if velocity else torch.where(snr > 0, capped / snr, torch.ones_like(snr)))

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], *, steps: int = 20, guidance: float = 4.0
    ) -> list[Any]:
        """One PIL picture a prompt, each from its own seed, so that it is the same in any batch."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.pipeline.set_progress_bar_config(disable=True)
        return self.pipeline(
            list(prompts), num_inference_steps=steps, guidance_scale=guidance, generator=generators
        ).images
