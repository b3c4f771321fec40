"""Stable Diffusion 1.x and 2.x, and the embedded base: one CLIP text encoder, a UNet for noise or velocity."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from imgadapt.training.families.family import Conditions, Family


class StableDiffusion(Family):
    """`StableDiffusionPipeline`."""

    pipelines = ("StableDiffusionPipeline",)

    def text(self, captions: Sequence[str]) -> Conditions:
        states, _ = self.pipeline.encode_prompt(list(captions), self.device, 1, False)
        return {"states": states}

    @property
    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        clip: Any = self.encoders["text_encoder"]
        return {"states": (clip.config.max_position_embeddings, clip.config.hidden_size)}

    def predict(self, noisy: Tensor, conditions: Conditions, times: Tensor) -> Tensor:
        states = conditions["states"].to(self.device, self.dtype)
        return self.denoiser(noisy.to(self.device, self.dtype), times.to(self.device), states).sample.float()
