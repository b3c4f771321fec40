"""Studio: the loaded base with adapters on it, and how pictures are drawn. Only the desk's thread uses it."""

import gc
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imgadapt.errors import ConfigError
from imgadapt.playground import prompts, samplers
from imgadapt.playground.drawing import beginnings
from imgadapt.playground.drawing.beginnings import Beginning, Beginnings, steps_of
from imgadapt.playground.drawing.conditions import Texts
from imgadapt.playground.drawing.jobs import Job
from imgadapt.playground.drawing.previews import Previews
from imgadapt.playground.drawing.stacks import Stack, differ
from imgadapt.playground.library.bases import Base
from imgadapt.playground.library.library import Library
from imgadapt.playground.pictures.album import Album
from imgadapt.playground.requests import RANDOM, GenerateRequest, Layout, Use
from imgadapt.playground.settings import Settings
from imgadapt.training import families
from imgadapt.training.families import DTYPES, Family

Watch = Callable[[int, int, bytes | None], None]
"""Told (steps done, steps in all, a preview as WebP or None) after each step; it may raise, which stops the drawing."""


@dataclass(frozen=True)
class Drawn:
    """request: settled, with the layout that it was drawn in. notes: what the user should know (a prompt was cut)."""

    image: Image.Image
    request: GenerateRequest
    seconds: float
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class _Loaded:
    """A base, ready to draw."""

    base: Base
    family: Family
    stack: Stack
    texts: Texts
    beginnings: Beginnings
    previews: Previews
    scheduler: Any


class Studio:
    """See the module. counts: "encodes" of prompts, "attaches" of adapters, "swaps" of which of them act, "calls" of
    the pipeline, since it was made.
    """

    def __init__(self, settings: Settings, library: Library, album: Album) -> None:
        self._settings, self._library, self._album = settings, library, album
        self._loaded: _Loaded | None = None
        self.counts: Counter[str] = Counter()

    @property
    def base(self) -> Base | None:
        """The one that is loaded."""
        return None if self._loaded is None else self._loaded.base

    @property
    def family(self) -> Any:
        """Of the loaded base; None: none is."""
        return None if self._loaded is None else self._loaded.family

    @property
    def attached(self) -> list[str]:
        """Ids of the adapters that are on the base, acting or not; the one used last at the end."""
        return [] if self._loaded is None else self._loaded.stack.ids

    def load(self, base: Base) -> None:
        """Make a base the loaded one; the one before is let go first. Nothing happens when it is loaded already.

        Raises:
            ConfigError: see `families.load`; no base is loaded then.
        """
        if self.base == base:
            return
        self._loaded = None
        gc.collect()  # modules and their hooks refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        family = families.load(base.place, device=self._settings.device, dtype=DTYPES[self._settings.dtype])
        family.pipeline.set_progress_bar_config(disable=True)
        family.pipeline._callback_tensor_inputs = ["latents", "noise_pred"]  # previews are made of both
        stack = Stack(family.pipeline, self._library, self._settings.limits.attached, self.counts)
        texts, begin = Texts(family, stack, self.counts), Beginnings(family, self._album)
        self._loaded = _Loaded(base, family, stack, texts, begin, Previews(family), family.pipeline.scheduler)

    def settle(self, request: GenerateRequest) -> GenerateRequest:
        """The request with nothing left open (seed, sides, guidance, base), its prompt without tags, their adapters in
        the stack.

        Raises:
            ConfigError: sides that the base does not draw, a sampler that it has no use for, adapters that do not go
                on it (how many of their layers do not, and why).
        """
        on = self._ready()
        if request.base not in (None, on.base.id):
            raise ConfigError(f"the request is for another base than {on.base.name}, which is loaded")
        samplers.check(request.sampler, request.steps, on.family)
        prompt, uses = self._untagged(request)
        width, height = self._sides(request, on)
        self._check_size(request, width, height)
        on.stack.bring(uses)
        return request.model_copy(
            update={
                "prompt": prompt,
                "adapters": uses,
                "base": on.base.id,
                "seed": secrets.randbelow(2**32) if request.seed == RANDOM else request.seed,
                "guidance": on.family.guidance if request.guidance is None else request.guidance,
                "width": width,
                "height": height,
            }
        )

    def draw(self, requests: Sequence[GenerateRequest], watch: Watch) -> list[Drawn]:
        """Settled requests that differ in prompt, seed and strengths only, drawn together; see `alike`.

        Raises:
            TrainingError: NaN. Whatever `watch` raises.
        """
        on = self._ready()
        if len({alike(request) for request in requests}) != 1:
            raise ConfigError("requests that are not alike cannot be drawn together")
        again = requests[0].layout if len(requests) == 1 else None
        rows = list(requests) * again.rows if again else list(requests)
        by_sample = again.by_sample if again else differ([request.adapters for request in rows])
        began = time.monotonic()
        on.stack.bring(requests[0].adapters)
        notes = [[*on.texts.notes(request), *self._late(request)] for request in requests]
        begin = on.beginnings.of(requests[0], _size(requests[0]))
        latents = self._latents(on, rows, begin, watch, by_sample=by_sample)
        wanted = [again.row] if again else range(len(rows))
        with on.family.here():
            images = [on.family.decode(latents[k]) for k in wanted]
        if begin is not None:
            images = [begin.finished(image) for image in images]
            notes = [[*note, *begin.notes] for note in notes]
        seconds = (time.monotonic() - began) / len(rows)
        layouts = [again or Layout(rows=len(rows), row=k, by_sample=by_sample) for k in range(len(requests))]
        return [
            Drawn(image, request.model_copy(update={"layout": layout}), seconds, note)
            for image, request, layout, note in zip(images, requests, layouts, notes, strict=True)
        ]

    def _latents(
        self, on: _Loaded, rows: Sequence[GenerateRequest], begin: Beginning | None, watch: Watch, *, by_sample: bool
    ) -> Tensor:
        """(batch, channels, h, w) of the pictures."""
        first, family, pipeline = rows[0], on.family, on.family.pipeline
        sides, skip = _size(first), 0 if begin is None else begin.skip
        watch(0, steps_of(first), None)
        try:
            with family.here():
                embeds = on.texts.together(rows)
                noise, generators = beginnings.noise(family, rows, sides, embeds["prompt_embeds"].dtype)
                plan = samplers.scheduler(first.sampler, family, on.scheduler, sides, skip, plain=begin is None)
                on.stack.act([request.adapters for request in rows], 0, by_sample=by_sample)
                job = Job(family, on.stack, on.previews, rows, begin, noise, watch, by_sample)
                latents = beginnings.packed(family, job.start(plan))
                pipeline.scheduler = plan
                self.counts["calls"] += 1
                made = pipeline(
                    **embeds,
                    latents=latents,
                    num_inference_steps=first.steps,
                    guidance_scale=first.guidance,
                    generator=generators,
                    height=sides[1],
                    width=sides[0],
                    output_type="latent",
                    callback_on_step_end=job.stepped,
                    callback_on_step_end_tensor_inputs=["latents", "noise_pred"],
                    **family.options(),
                ).images
        finally:
            pipeline.scheduler = on.scheduler
            on.stack.rest()
        return job.unpacked(made)

    def _late(self, request: GenerateRequest) -> list[str]:
        """Which adapters begin after the last step."""
        last, late = steps_of(request), [use for use in request.adapters if use.start >= steps_of(request)]
        return [
            f"{self._library.get(use.adapter).name} does not act on the picture: it starts at step {use.start}, and "
            f"the last is {last - 1} (the first is 0)"
            for use in late
        ]

    def _ready(self) -> _Loaded:
        if self._loaded is None:
            raise ConfigError("no base is loaded; choose one first")
        return self._loaded

    def _untagged(self, request: GenerateRequest) -> tuple[str, tuple[Use, ...]]:
        """The prompt without tags, and the stack with theirs."""
        parsed = prompts.parse(request.prompt)
        uses = list(request.adapters)
        for tag in parsed.tags:
            card = self._library.named(tag.name)
            if any(use.adapter == card.id for use in uses):
                raise ConfigError(f"{card.name} is used twice; its weights do not add up: leave one of them out")
            uses.append(tag.use(card.id))
        most = self._settings.limits.adapters
        if len(uses) > most:
            raise ConfigError(f"{len(uses)} adapters at once; {most} are allowed")
        return parsed.prompt, tuple(uses)

    def _sides(self, request: GenerateRequest, on: _Loaded) -> tuple[int, int]:
        """Width and height in pixels; one that is not said is the base's, or as the picture to begin from has it."""
        family = on.family
        width, height = (family.native, family.native) if request.init is None else on.beginnings.sides(request.init)
        width, height = request.width or width, request.height or height
        for name, side in (("width", width), ("height", height)):
            if side % family.factor:
                near = max(1, round(side / family.factor)) * family.factor
                raise ConfigError(
                    f"{name} is {side}; it must be a multiple of {family.factor} for this base, say {near}"
                )
        return width, height

    def _check_size(self, request: GenerateRequest, width: int, height: int) -> None:
        limits = self._settings.limits
        if width * height > limits.pixels:
            raise ConfigError(f"{width} x {height} pixels are too many; {limits.pixels:,} are allowed")
        rows = request.layout.rows if request.layout else 1
        if rows > 1 and rows * width * height > limits.drawn_together:
            raise ConfigError(f"layout: {rows} rows of {width} x {height} pixels are more than one batch has here")
        count = max(request.count, rows)
        if width * height * request.steps * count > limits.work:
            raise ConfigError(f"{count} x {width} x {height} pixels in {request.steps} steps are too much at once")


def alike(request: GenerateRequest) -> tuple[Any, ...]:
    """Requests with the same of this can share a batch."""
    stack = tuple((use.adapter, use.start, use.stop) for use in request.adapters)
    return (
        *(stack, request.base, request.width, request.height, request.steps, request.guidance, request.sampler),
        *(request.init, request.mask, request.denoise, request.layout),
    )


def _size(settled: GenerateRequest) -> tuple[int, int]:
    """Width and height."""
    assert settled.width is not None
    assert settled.height is not None
    return settled.width, settled.height
