"""Stable Diffusion 3 and 3.5: two CLIP text encoders and a T5, a transformer, flow matching."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from imgadapt.training.families.family import Conditions, Family
from imgadapt.training.objective import Sampling, Schedule


class StableDiffusion3(Family):
    """`StableDiffusion3Pipeline`; text_encoder_3 (T5) may be None, whose states are zeros then."""

    pipelines = ("StableDiffusion3Pipeline",)
    patch = 2
    grid = 32
    guidance = 4.5

    def _schedule(self) -> Schedule:
        return Schedule("flow", None, int(self.pipeline.scheduler.config.num_train_timesteps))

    def sampling(self, height: int, width: int) -> Sampling:
        """Logit-normal, shifted as the base's sampler is (3) at its own size, and by the root of the places' number for
        others, never below 1 (arXiv 2403.03206, 5.3.2).
        """
        own = float(self.pipeline.scheduler.config.shift)
        return Sampling(
            "logit_normal", shift=max(1.0, own * math.sqrt(height * width) / int(self._settings["sample_size"]))
        )

    def text(self, captions: Sequence[str]) -> Conditions:
        """ "states" (batch, 77 + 256, 4096) and "pooled" (batch, 2048)."""
        states, _, pooled, _ = self.pipeline.encode_prompt(
            list(captions), None, None, device=self.device, do_classifier_free_guidance=False
        )
        return {"states": states, "pooled": pooled}

    @property
    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        clip: Any = self.encoders["text_encoder"]
        places = clip.config.max_position_embeddings + self.tokens
        widths = self._settings["joint_attention_dim"], self._settings["pooled_projection_dim"]
        return {"states": (places, widths[0]), "pooled": (widths[1],)}

    def predict(self, noisy: Tensor, conditions: Conditions, times: Tensor) -> Tensor:
        return self.denoiser(
            hidden_states=noisy.to(self.device, self.dtype),
            encoder_hidden_states=conditions["states"].to(self.device, self.dtype),
            pooled_projections=conditions["pooled"].to(self.device, self.dtype),
            timestep=times.to(self.device),
        ).sample.float()
