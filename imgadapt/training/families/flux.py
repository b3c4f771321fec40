"""Flux.1, dev and schnell: CLIP's pooled text and T5's states, a transformer on latents packed 2 x 2, flow matching."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from imgadapt.training.families.family import Conditions, Family
from imgadapt.training.objective import Sampling, Schedule

# what dev is told in training, so that its own distilled guidance is not trained away (sd-scripts' documentation)
_GUIDANCE = 1.0


class Flux(Family):
    """`FluxPipeline`. dev was distilled to be told its guidance; schnell, which was not, to draw in four steps."""

    pipelines = ("FluxPipeline",)
    patch = 2
    packing = 4
    grid = 32
    guidance = 3.5

    @property
    def native(self) -> int:
        return int(self.pipeline.default_sample_size) * int(self.pipeline.vae_scale_factor)

    @property
    def tokens(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] # of the config here
        """Tokens of T5, padding included, that the model was trained on: 512 for dev, 256 for schnell."""
        return 512 if self._settings["guidance_embeds"] else 256

    def _schedule(self) -> Schedule:
        return Schedule("flow", None, int(self.pipeline.scheduler.config.num_train_timesteps))

    def sampling(self, height: int, width: int) -> Sampling:
        """Logit-normal, shifted as the sampler is: for dev by e^mu, mu linear in the packed places, from 0.5 at 256 to
        1.15 at 4096 (3.158 at 1024 x 1024 pixels); for schnell not at all.
        """
        own = self.pipeline.scheduler.config
        if not own.use_dynamic_shifting:
            return Sampling("logit_normal", shift=float(own.shift))
        slope = (own.max_shift - own.base_shift) / (own.max_image_seq_len - own.base_image_seq_len)
        mu = own.base_shift + slope * (height // 2 * (width // 2) - own.base_image_seq_len)
        return Sampling("logit_normal", shift=math.exp(mu))

    def text(self, captions: Sequence[str]) -> Conditions:
        """ "states" (batch, tokens, 4096) of T5 and "pooled" (batch, 768) of CLIP."""
        states, pooled, _ = self.pipeline.encode_prompt(
            list(captions), device=self.device, max_sequence_length=self.tokens
        )
        return {"states": states, "pooled": pooled}

    @property
    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        widths = self._settings["joint_attention_dim"], self._settings["pooled_projection_dim"]
        return {"states": (self.tokens, widths[0]), "pooled": (widths[1],)}

    def predict(self, noisy: Tensor, conditions: Conditions, times: Tensor) -> Tensor:
        (batch, _, height, width), (states, pooled) = noisy.shape, (conditions[key] for key in ("states", "pooled"))
        told = torch.full((batch,), _GUIDANCE, device=self.device) if self._settings["guidance_embeds"] else None
        made = self.denoiser(
            hidden_states=pack(noisy).to(self.device, self.dtype),
            encoder_hidden_states=states.to(self.device, self.dtype),
            pooled_projections=pooled.to(self.device, self.dtype),
            timestep=times.to(self.device) / self.schedule.total,
            guidance=told,
            img_ids=places(height // 2, width // 2).to(self.device),
            txt_ids=torch.zeros(states.shape[1], 3, device=self.device),
        ).sample
        return unpack(made, height, width).float()

    def options(self) -> dict[str, Any]:
        return {"max_sequence_length": self.tokens}

    def unpacked(self, latents: Tensor, height: int, width: int) -> Tensor:
        return unpack(latents, height, width)


def pack(latents: Tensor) -> Tensor:
    """(batch, h/2 * w/2, channels * 4) of (batch, channels, h, w): each 2 x 2 places are one, row by row."""
    blocks = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # batch, channels, rows, 2, columns, 2
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """What `pack` packed. height, width: of the latents, in places."""
    blocks = packed.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def places(height: int, width: int) -> Tensor:
    """(height * width, 3): 0, row and column of each packed place, for the rotary embedding."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()
