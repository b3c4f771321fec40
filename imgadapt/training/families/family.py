"""Family: a kind of base as the trainer sees it: how it encodes pictures and text, and how it is asked."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imgadapt.errors import ConfigError, TrainingError
from imgadapt.targets import DENOISERS, TEXT_ENCODERS
from imgadapt.tensors import tensors_digest
from imgadapt.training.objective import Sampling, Schedule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Conditions = Mapping[str, Tensor]
"""What a prediction depends on beside picture and time, by name: text states (batch, tokens, width) and the like."""

_TOGETHER = 768**2  # pixels that are drawn at once


class Family(ABC):
    """A frozen pipeline of one kind of base. A new kind is one file: a subclass, and its row in `load.FAMILIES`.

    pipeline: the pipeline itself, for sampling; its modules are on `device`, in `dtype`, but for the autoencoder, which
        is in fp32: SDXL's gives NaN in fp16, and so latents are the same, and kept ones good, in every precision.
    denoiser: the UNet or transformer; encoders: text encoders by component; schedule: the forward process.

    Raises:
        ConfigError: the denoiser takes more than a noisy latent, as for inpainting or editing.
    """

    pipelines: ClassVar[tuple[str, ...]]
    """Names of the diffusers classes that it takes."""
    patch: ClassVar[int] = 1
    """Places of a latent's side that the denoiser takes together."""
    grid: ClassVar[int] = 64
    """Sides of buckets are multiples of this many pixels, where the base is large enough."""
    packing: ClassVar[int] = 1
    """Places of a latent that are one place, with as many times the channels, of what the denoiser takes."""
    tokens: int = 256
    """Tokens of a T5, padding included, that the base was trained on."""
    guidance: float = 4.0
    """Of samples."""

    def __init__(self, pipeline: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.pipeline, self.device, self.dtype = pipeline, device, dtype
        parts: Mapping[str, Any] = pipeline.components
        self.component = next(name for name in DENOISERS if parts.get(name) is not None)
        self.denoiser: nn.Module = parts[self.component]
        self.encoders: dict[str, nn.Module] = {
            n: parts[n] for n in TEXT_ENCODERS if isinstance(parts.get(n), nn.Module)
        }
        self.vae: Any = pipeline.vae
        for module in (self.denoiser, self.vae, *self.encoders.values()):
            _move(module, device, torch.float32 if module is self.vae else dtype)
            module.requires_grad_(False).eval()
        self._resting: list[nn.Module] = []
        self._identity: dict[str, str] = {}
        self._check_inputs()
        self.schedule = self._schedule()

    def _check_inputs(self) -> None:
        takes, has = int(self._settings["in_channels"]), self.latent_shape[0] * self.packing
        if takes != has:
            raise ConfigError(
                f"this base's {self.component} takes {takes} channels where a noisy latent has {has}: it is one for "
                "inpainting or editing, which imgadapt does not train; take the plain base"
            )

    @property
    def _settings(self) -> Mapping[str, Any]:
        """The denoiser's config."""
        return _config(self.denoiser)

    def _schedule(self) -> Schedule:
        """The forward process: betas and prediction type are the base's; its sampler (Euler, DPM++) may add noise in
        another way.

        Raises:
            ConfigError: it is not a diffusion with betas, but EDM's (Playground 2.5) or flow matching, or unheard of.
        """
        from diffusers import DDPMScheduler

        sampler = self.pipeline.scheduler
        name, own = type(sampler).__name__, dict(sampler.config)
        if "beta_schedule" not in own or own.get("use_flow_sigmas"):
            raise ConfigError(
                f"this base is sampled by {name}, which has no betas or does not use them: it was trained in another "
                "way than the plain base of its kind (EDM, flow matching), which imgadapt does not do; take that one"
            )
        usual: Any = DDPMScheduler.from_config(own)
        kind: Any = own.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction", "sample"):
            raise ConfigError(
                f"this base's {name} says prediction_type {kind!r}; wanted epsilon, v_prediction or sample"
            )
        return Schedule(kind, usual.alphas_cumprod, int(usual.config["num_train_timesteps"]))

    def follow(self, schedule: Schedule) -> None:
        """Take another forward process than the base's config says; pictures are drawn by it from now on, too."""
        if schedule is self.schedule:
            return
        from diffusers import DDIMScheduler

        own, changes = self.pipeline.scheduler, {"prediction_type": schedule.prediction}
        kind: Any = type(own)
        if schedule.alphas is not None and float(schedule.alphas[-1]) < 1e-9:  # which not all of them take
            kind, changes = DDIMScheduler, {**changes, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        self.pipeline.scheduler, self.schedule = kind.from_config(own.config, **changes), schedule

    @property
    def native(self) -> int:
        """Pixels of a side that the base was trained at."""
        return int(self._settings["sample_size"]) * int(self.pipeline.vae_scale_factor)

    def sampling(self, height: int, width: int) -> Sampling:
        """Which times are trained when nobody says. height, width: of the latents, in places."""
        return Sampling()

    @property
    def step(self) -> int:
        """Pixels that sides of buckets are multiples of."""
        return max(self.factor, min(self.grid, self.native // 8))

    @property
    def factor(self) -> int:
        """Pixels that every side must be a multiple of."""
        return int(self.pipeline.vae_scale_factor) * self.patch

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Channels of a latent, and pixels that one of its places stands for."""
        return int(self.vae.config.latent_channels), int(self.pipeline.vae_scale_factor)

    def check_side(self, side: int) -> None:
        """Raises ConfigError where a side in pixels is not a multiple of what this base needs."""
        if side % self.factor:
            near = max(1, round(side / self.factor)) * self.factor
            raise ConfigError(f"resolution is {side}; it must be a multiple of {self.factor} for this base, say {near}")

    def identity(self) -> dict[str, str]:
        """SHA-256 of each part that decides what is learnt, with its config, as it was at the first call (gigabytes are
        read for it); good as cache keys, too.
        """
        if self._identity:
            return dict(self._identity)
        modules: dict[str, nn.Module] = {self.component: self.denoiser, "vae": self.vae, **self.encoders}
        found = {name: _digest(_config(module), module) for name, module in modules.items()}
        tokenizers = [
            n for n, part in self.pipeline.components.items() if n.startswith("tokenizer") and part is not None
        ]
        found |= {name: _digest(self.pipeline.components[name].get_vocab()) for name in tokenizers}
        alphas = [] if self.schedule.alphas is None else self.schedule.alphas.tolist()
        self._identity = {**found, "schedule": _digest({"predicts": self.schedule.prediction, "alphas": alphas})}
        return dict(self._identity)

    def away(self, *, text: bool) -> None:
        """Move the autoencoder, and the text encoders where `text`, off the GPU: steps do without them."""
        if self.device.type == "cpu":
            return
        self._resting = [self.vae, *(self.encoders.values() if text else ())]
        for module in self._resting:
            module.to("cpu")

    @contextmanager
    def here(self) -> Generator[None]:
        """Within the block all modules are on the device."""
        resting, self._resting = self._resting, []
        for module in resting:
            module.to(self.device)
        try:
            yield
        finally:
            self._resting = resting
            for module in resting:
                module.to("cpu")

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        """Latent (channels, h, w), fp32 on the CPU, of (3, H, W) in [-1, 1]; the mean, where it is a distribution.

        Raises:
            ConfigError: the autoencoder gives NaN or infinity.
        """
        with self.here():
            encoded = self.vae.encode(image[None].to(self.device, self.vae.dtype))
        latent = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        made = ((latent[0].float() - shift) * self.vae.config.scaling_factor).cpu()
        if not made.isfinite().all():
            raise ConfigError(f"the autoencoder gives NaN or infinity in {self.vae.dtype}; are its weights whole?")
        return made

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Any:
        """The PIL picture of a latent (channels, h, w).

        Raises:
            TrainingError: the latent or the picture is NaN or infinite; a pipeline would draw black and go on.
        """
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        unscaled = latent[None].to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor + shift
        made = self.vae.decode(unscaled).sample.float()
        if not made.isfinite().all():
            culprit = "autoencoder" if latent.isfinite().all() else self.component
            raise TrainingError(
                f"a sample is NaN or infinite: the {culprit} gives such in {self.dtype}; use another one"
            )
        return self.pipeline.image_processor.postprocess(made, output_type="pil")[0]

    @abstractmethod
    def text(self, captions: Sequence[str]) -> Conditions:
        """Conditions of captions, each with the batch in front, on the device; gradients reach trained encoders."""

    @property
    @abstractmethod
    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what `text` gives, without the batch."""

    def blank(self, batch: int) -> Conditions:
        """Zeros in the shape of conditions, for steps that are only measured or simulated."""
        made = {n: torch.zeros(batch, *s, device=self.device, dtype=self.dtype) for n, s in self.text_shapes.items()}
        return {**made, "sizes": torch.zeros(batch, 6, device=self.device)}

    @torch.no_grad()
    def encode_text(self, caption: str) -> dict[str, Tensor]:
        """Conditions of one caption without the batch, on the CPU, in the base's dtype; to keep."""
        with self.here():
            return {name: value[0].to("cpu", self.dtype) for name, value in self.text([caption]).items()}

    @abstractmethod
    def predict(self, noisy: Tensor, conditions: Conditions, times: Tensor) -> Tensor:
        """The model's prediction (batch, channels, h, w), fp32.

        conditions: as `text` gives them, and "sizes" (batch, 6): height and width of the picture as it was, top and
            left of the crop, height and width of the crop, in pixels.
        """

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int = 20,
        guidance: float | None = None,
        side: int | None = None,
    ) -> list[Any]:
        """One PIL picture a prompt, each from its own seed, so that it is the same in any batch. side: pixels.

        As many are drawn together as have the pixels of one of 768 x 768, or one by one.

        Raises:
            TrainingError: see `decode`.
        """
        self.pipeline.set_progress_bar_config(disable=True)
        side = side or self.native
        guidance = self.guidance if guidance is None else guidance
        count, places = max(1, _TOGETHER // side**2), side // self.latent_shape[1]
        made: list[Any] = []
        with self.here():
            for first in range(0, len(prompts), count):
                latents = self.pipeline(
                    list(prompts[first : first + count]),
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[first : first + count]],
                    height=side,
                    width=side,
                    output_type="latent",  # decoded here: the pipelines want the autoencoder in the dtype of the rest
                    **self.options(),
                ).images
                made += [self.decode(latent) for latent in self.unpacked(latents, places, places)]
        return made

    def options(self) -> dict[str, Any]:
        """What else the pipeline is called with, so that prompts are encoded as `text` does."""
        return {}

    def unpacked(self, latents: Tensor, height: int, width: int) -> Tensor:
        """(batch, channels, h, w) of what the pipeline and the denoiser call latents."""
        return latents


def _move(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    if getattr(module, "is_quantized", False):
        return
    if getattr(module, "dtype", None) == dtype:
        module.to(device)  # a T5 that was loaded in fp16 keeps some of its layers in fp32, or it would overflow
    else:
        module.to(device, dtype)


def _config(module: Any) -> dict[str, Any]:
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _digest(config: Mapping[str, Any], module: nn.Module | None = None) -> str:
    text = json.dumps(config, sort_keys=True, default=str)
    weights = "" if module is None else tensors_digest(module.state_dict())
    return hashlib.sha256(f"{text} {weights}".encode()).hexdigest()
