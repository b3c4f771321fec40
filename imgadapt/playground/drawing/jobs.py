"""Job: one call of a pipeline, step by step: strengths that come and go, masks, previews, and stopping."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from imgadapt.playground import samplers
from imgadapt.playground.drawing.beginnings import Beginning, packed, steps_of
from imgadapt.playground.drawing.previews import Previews
from imgadapt.playground.drawing.stacks import Stack
from imgadapt.playground.requests import GenerateRequest
from imgadapt.training.families import Family


@dataclass
class Job:
    """rows: of the batch; noise: (batch, channels, h, w), what each begins with."""

    family: Family
    stack: Stack
    previews: Previews
    rows: Sequence[GenerateRequest]
    begin: Beginning | None
    noise: Tensor
    watch: Callable[[int, int, bytes | None], None]
    by_sample: bool
    _begun: Tensor = field(init=False)
    _before: Tensor | None = field(default=None, init=False)

    def start(self, plan: Any) -> Tensor:
        """The latents (batch, channels, h, w) to call the pipeline with; it multiplies them by the sampler's first
        sigma, where it has such.
        """
        self._begun = self.noise
        if self.begin is not None and self.begin.skip:
            samplers.prepare(plan, self.rows[0].steps, self.family, self._places)
            at = samplers.level(plan, 0)
            mixed = at.signal * self.begin.latent.to(self.noise) + at.noise * self.noise
            self._begun = (mixed / samplers.first_sigma(plan)).to(self.noise.dtype)
        return self._begun

    def stepped(self, pipeline: Any, index: int, time: Any, state: dict[str, Any]) -> dict[str, Any]:
        """Called by the pipeline after each call of the denoiser."""
        plan, request = pipeline.scheduler, self.rows[0]
        latents, done, total = self.unpacked(state["latents"]), index // plan.order + 1, steps_of(request)
        if self.begin is not None and self.begin.free is not None:
            latents = self.begin.blended(latents, self.noise, samplers.level(plan, index + 1))
            state["latents"] = packed(self.family, latents)
        last = index + 1 == len(plan.timesteps)
        preview = None
        if self.previews.due(last=last):
            preview = self.previews.of(latents if last else self._clean(plan, index, state["noise_pred"]))
        self._before = latents
        self.watch(min(done, total), total, preview)
        if any(use.start or use.stop is not None for use in request.adapters):
            uses = [row.adapters for row in self.rows]
            self.stack.act(uses, (index + 1) // plan.order, by_sample=self.by_sample)
        return {"latents": state["latents"]}

    def _clean(self, plan: Any, index: int, output: Tensor) -> Tensor:
        """What the picture would be if all the rest were as the denoiser sees it now."""
        before = self._begun * samplers.first_sigma(plan) if self._before is None else self._before
        at = samplers.level(plan, index)
        return samplers.clean(self.family.schedule.prediction, before, self.unpacked(output), at)

    def unpacked(self, latents: Tensor) -> Tensor:
        """(batch, channels, h, w) of what the pipeline calls latents."""
        return self.family.unpacked(latents, *self._places)

    @property
    def _places(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return int(self.noise.shape[2]), int(self.noise.shape[3])
