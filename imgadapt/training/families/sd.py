"""Stable Diffusion 1.x and the embedded base: one CLIP text encoder, a UNet that predicts noise or velocity."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imgadapt.errors import ConfigError
from imgadapt.file import tensors_digest


def _ddpm(config: Any) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(config)


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
        # betas and prediction type are the base's; its sampler (Euler, DPM++) may add noise in another way
        self.schedule: Any = _ddpm(pipeline.scheduler.config)
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

    def identity(self) -> dict[str, str]:
        """SHA-256 of each part that decides what is learnt, with its config; good as cache keys, too."""
        configs = {
            "unet": self.pipeline.unet.config,
            "vae": self.pipeline.vae.config,
            "text_encoder": self.text_encoder.config.to_dict(),  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            "scheduler": self.schedule.config,
            "tokenizer": self.pipeline.tokenizer.get_vocab(),
        }
        modules: dict[str, nn.Module] = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        found: dict[str, str] = {}
        for name, config in configs.items():
            told = {k: v for k, v in dict(config).items() if not k.startswith("_")}
            text = json.dumps(told, sort_keys=True, default=str)
            weights = tensors_digest(modules[name].state_dict()) if name in modules else ""
            found[name] = hashlib.sha256(f"{text} {weights}".encode()).hexdigest()
        return found

    @property
    def timesteps(self) -> int:
        """Timesteps of the noise schedule."""
        return int(self.schedule.config.num_train_timesteps)

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
        """x_t of the base's forward process (arXiv 2006.11239), on the device."""
        return self.schedule.add_noise(latents.to(self.device), noise.to(self.device), timesteps.to(self.device))

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
        velocity = self.schedule.config.prediction_type == "v_prediction"
        target = self.schedule.get_velocity(latents, noise, timesteps) if velocity else noise
        guess = self.predict(self.noised(latents, noise, timesteps), states, timesteps)
        errors = F.mse_loss(guess, target, reduction="none").mean((1, 2, 3))
        if gamma is None:
            return errors
        a = self.schedule.alphas_cumprod.to(self.device)[timesteps]
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
