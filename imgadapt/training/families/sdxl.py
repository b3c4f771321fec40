"""Stable Diffusion XL: two CLIP text encoders, pooled text and sizes as further conditions, a UNet."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from imgadapt.errors import ConfigError
from imgadapt.training.families.family import Conditions, Family


class StableDiffusionXL(Family):
    """`StableDiffusionXLPipeline`."""

    pipelines = ("StableDiffusionXLPipeline",)
    guidance = 5.0

    def __init__(self, pipeline: Any, device: torch.device, dtype: torch.dtype) -> None:
        if pipeline.text_encoder is None:
            raise ConfigError(
                "this base has text_encoder_2 only: it is SDXL's refiner, which works on the last, almost noiseless "
                "times of another base's pictures; train the base (sdxl) and leave the refiner out"
            )
        super().__init__(pipeline, device, dtype)

    def text(self, captions: Sequence[str]) -> Conditions:
        """ "states" (batch, 77, 2048), both encoders' side by side, and "pooled" (batch, 1280), of the second."""
        states, _, pooled, _ = self.pipeline.encode_prompt(
            list(captions), device=self.device, do_classifier_free_guidance=False
        )
        return {"states": states, "pooled": pooled}

    @property
    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        first, second = (cast("Any", self.encoders[name]).config for name in ("text_encoder", "text_encoder_2"))
        width = first.hidden_size + second.hidden_size
        return {"states": (second.max_position_embeddings, width), "pooled": (second.projection_dim,)}

    def predict(self, noisy: Tensor, conditions: Conditions, times: Tensor) -> Tensor:
        added = {
            "text_embeds": conditions["pooled"].to(self.device, self.dtype),
            "time_ids": conditions["sizes"].to(self.device, torch.float32),  # bf16 has no 1023; the UNet embeds in fp32
        }
        states = conditions["states"].to(self.device, self.dtype)
        return self.denoiser(
            noisy.to(self.device, self.dtype), times.to(self.device), states, added_cond_kwargs=added
        ).sample.float()
