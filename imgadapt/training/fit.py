"""Fit: what memory a planned training takes, predicted without its weights.

A step is simulated on the base's sketch (families/sketch.py, memory.py); so is what goes on beside the steps: the
autoencoder takes more for one large picture than a frugal step does.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from imgadapt import attaching, live
from imgadapt.methods import AdaLoRA
from imgadapt.training import memory, recipe
from imgadapt.training.buckets import Size, View, views
from imgadapt.training.config import DreamBoothConfig, InversionConfig, TrainConfig
from imgadapt.training.data import Example
from imgadapt.training.families import DTYPES, Conditions, Family
from imgadapt.training.families.sketch import length, sketch
from imgadapt.training.job import _FOLLOWED
from imgadapt.training.memory import Estimate
from imgadapt.training.swap import repeated


@dataclass(frozen=True)
class Need:
    """Bytes that a training has in memory.

    step: in its steps. further: in all, at other times, by what is done then.
    """

    step: Estimate
    further: Mapping[str, int]

    @property
    def peak(self) -> int:
        """The most at any time."""
        return max(self.step.peak, *self.further.values())

    @property
    def when(self) -> str:
        """When that is."""
        return max({"in the steps": self.step.peak, **self.further}.items(), key=lambda item: item[1])[0]


def bucketed(config: TrainConfig, family: Family, examples: Sequence[Example]) -> list[View]:
    """The pictures in their buckets, as `Material` has them.

    Raises:
        ConfigError, DataError: see `buckets.views`, `Family.check_side`.
    """
    resolutions = config.resolution or [family.native]
    for side in resolutions:
        family.check_side(side)
    return views(examples, resolutions, family.step, square=not config.buckets, batch=config.batch_size)


def largest(found: Sequence[View]) -> Size:
    """(width, height) of the bucket of the largest area, pixels."""
    return max({view.size for view in found}, key=lambda size: (size[0] * size[1], size))


def micro_batch(config: TrainConfig) -> int:
    """Pictures that are computed at once."""
    return math.ceil(config.batch_size / config.pieces)


def latents(family: Family, size: Size, count: int) -> Tensor:
    """Zeros (count, channels, h, w) for pictures of a size (width, height) in pixels."""
    channels, factor = family.latent_shape
    return torch.zeros(count, channels, size[1] // factor, size[0] // factor)


# --- what is trained, and a step of it, simulated here and real in trial.py


@dataclass(frozen=True)
class Learner:
    """What of a family is trained. rows: its tensors; words: those of new words among them."""

    rows: Sequence[recipe.Tensor]
    words: nn.ParameterDict

    @property
    def live(self) -> bool:
        """Whether captions are encoded in every step."""
        return any(row.layer.startswith("text_encoder") for row in self.rows)


@contextmanager
def learner(config: TrainConfig, family: Family) -> Generator[Learner]:
    """Put on what a config trains; take it off again afterwards.

    Raises:
        ConfigError, TargetError: see `recipe.put_on`.
    """
    device = next(family.denoiser.parameters()).device
    words = nn.ParameterDict()
    hooks: list[Any] = []
    adapts = config.adapter if isinstance(config, InversionConfig) else True
    try:
        if isinstance(config, InversionConfig):
            for name, encoder in family.encoders.items():
                if hasattr(encoder.config, "max_position_embeddings"):  # CLIP
                    table: Any = encoder.get_input_embeddings()  # pyright: ignore[reportCallIssue] # of transformers
                    words[name] = nn.Parameter(torch.zeros(config.vectors, table.weight.shape[1], device=device))
                    hooks.append(table.register_forward_hook(_added(words, name)))
        if adapts:
            with torch.device(device):
                recipe.put_on(config, family.pipeline)
        if config.checkpointing:
            _checkpoint(family.denoiser, True)
        rows = recipe.tensors(family.pipeline) if adapts else []
        new = [recipe.Tensor(f"{name}.words", "vectors", value) for name, value in words.items()]
        yield Learner([*rows, *new], words)
    finally:
        for hook in hooks:
            hook.remove()
        if live.adapters(family.pipeline):
            attaching.detach(family.pipeline)
        if config.checkpointing:
            _checkpoint(family.denoiser, False)


def learns_text(config: TrainConfig, family: Family) -> bool:
    """Whether text encoders are trained, so that captions are encoded in every step."""
    with learner(config, family) as trained:
        return trained.live


def _added(words: nn.ParameterDict, name: str) -> Callable[..., Tensor]:
    return lambda _module, _inputs, out: out + words[name].mean().to(out.dtype)  # looked up: a simulation has its own


def _checkpoint(denoiser: Any, on: bool) -> None:
    """As `Job.checkpoint_activations` does."""
    (denoiser.enable_gradient_checkpointing if on else denoiser.disable_gradient_checkpointing)()
    denoiser.train(on)


def loss(config: TrainConfig, family: Family, noisy: Tensor, conditions: Callable[[], Conditions]) -> Tensor:
    """A step's loss, (), with the passes that it takes, and the prediction's square in the place of its error.

    conditions: encodes the captions where text encoders are trained.
    """
    half = family.schedule.total // 2
    times = torch.full((len(noisy),), half, dtype=torch.float32 if family.schedule.alphas is None else torch.long)
    total = F.mse_loss(family.predict(noisy, conditions(), times), noisy)
    if not isinstance(config, DreamBoothConfig) or config.preservation == "none":
        return total
    wanted = noisy
    if config.preservation == "class-free":
        with torch.no_grad(), live.disabled(family.pipeline):
            wanted = family.predict(noisy, conditions(), times)
    return total + F.mse_loss(family.predict(noisy, conditions(), times), wanted)


# --- prediction


def predicted(
    config: TrainConfig, family: Family, size: Size, *, device: str = "cpu", base: int = 0, bare: bool = False
) -> Estimate:
    """What a step takes. family: a sketch in the config's precision; size: (width, height) of its largest bucket.

    device: type of the one that is trained on. On a GPU the autoencoder, and text encoders that are not trained, are
    elsewhere during the steps. base: bytes of the process (`memory.process()`), 0 on a GPU. bare: activations left out.

    Raises:
        ConfigError, TargetError, StateError: see `learner` and `memory.estimate`.
    """
    count = micro_batch(config)
    with learner(config, family) as trained:
        parameters = [row.parameter for row in trained.rows]

        def step() -> Tensor:
            if bare:  # they are not `parameters`: others stand for those in the simulation
                modules = (family.denoiser, *family.encoders.values(), trained.words)
                return torch.stack([p.sum() for m in modules for p in m.parameters() if p.requires_grad]).sum()
            return loss(config, family, latents(family, size, count), lambda: _conditions(family, count, trained.live))

        away = _away(family, device, trained.live)
        kept = [module for module in (family.vae, *family.encoders.values()) if module not in away]
        made = memory.estimate(
            family.denoiser, parameters, step,
            optimizer=config.optimizer.replace("-", "_"), ema=config.ema is not None,
            accumulate=not bare and config.pieces > 1, kept=[*kept, trained.words], storage=config.quantise,
            device=device, base=base,
        )  # fmt: skip
        ranked = sum(row.parameter.numel() for row in trained.rows if row.key in AdaLoRA.tensors)
        return replace(
            made,
            weights=made.weights - _swapped(config, family.denoiser, device),
            optimizer=made.optimizer + 8 * ranked,  # two means in fp32, by which ranks are chosen
        )


def _swapped(config: TrainConfig, denoiser: nn.Module, device: str) -> int:
    """Bytes of the blocks that wait in RAM (`Swap`), but for the largest, which is there in its turn."""
    if not config.swap_blocks or device == "cpu":
        return 0
    blocks = repeated(denoiser)[: config.swap_blocks]
    sizes = [memory._bytes(p for p in block.parameters() if not p.requires_grad) for block in blocks]
    return sum(sizes) - max(sizes, default=0)


def _away(family: Family, device: str, live: bool) -> list[nn.Module]:
    """What is off the device during the steps (`Family.away`)."""
    return [] if device == "cpu" else [family.vae, *(() if live else family.encoders.values())]


def _conditions(family: Family, count: int, live: bool) -> Conditions:
    """Of the right shapes; where they are `live`, the states depend on all that the encoders compute."""
    made = dict(family.blank(count))
    if live:
        for encoder in family.encoders.values():
            ids = torch.zeros(count, length(family, encoder), dtype=torch.long)
            made["states"] = made["states"] + encoder(ids).last_hidden_state.mean()
    return made


def beside(config: TrainConfig, family: Family, size: Size, step: Estimate, *, device: str = "cpu") -> dict[str, int]:
    """Bytes that a training takes in all when it does other things than the steps, by what that is.

    step: as `predicted`.
    """
    fixed = step.weights + step.adapter + step.optimizer + step.ema + step.base
    coder = fixed
    if device != "cpu":  # then all is there
        away = _away(family, device, learns_text(config, family))
        coder += memory._bytes(tensor for module in away for tensor in module.parameters())
    side = max(config.resolution or [family.native])
    watched = 2 * micro_batch(config)  # `Material.all`
    if not config.held_out:
        watched = min(watched, max(_FOLLOWED, config.held_out_count))
    works: dict[str, tuple[int, nn.Module, Callable[[], Any]]] = {
        "when pictures become latents": (coder, family.vae, lambda: family.vae.encode(torch.zeros(1, 3, *size[::-1]))),
        "when losses are watched": (
            fixed,
            family.denoiser,
            lambda: family.predict(latents(family, size, watched), family.blank(watched), torch.zeros(watched)),
        ),
    }
    if config.sample_prompts:
        works["when samples are drawn"] = (
            coder,
            family.vae,
            lambda: family.vae.decode(latents(family, (side, side), 1)),
        )
    found = {name: there + _unlearnt(module, device, run) for name, (there, module, run) in works.items()}
    if config.quantise and device == "cpu":
        modules = (family.denoiser, family.vae, *family.encoders.values())
        found["when the base is read"] = step.base + sum(memory._bytes(module.parameters()) for module in modules)
    return found


def _unlearnt(module: nn.Module, device: str, run: Callable[[], Any]) -> int:
    """The most that is alive while something runs without gradients."""
    fakes, ledger = FakeTensorMode(allow_non_fake_inputs=True), memory._Ledger(device == "cpu")
    with memory._faked([module], fakes) as made:
        ledger.enter(made.values(), set())
        with torch.no_grad(), fakes, ledger:
            run()
    return ledger.peak


class Predictor:
    """What trainings of some pictures on one kind of device take; each is simulated once.

    device: its type. base: bytes of the process (`memory.process()`), 0 on a GPU.
    """

    def __init__(self, examples: Sequence[Example], *, device: str = "cpu", base: int = 0) -> None:
        self.examples, self.device, self.base = examples, device, base
        self._families: dict[tuple[str, str], Family] = {}
        self._steps: dict[str, Estimate] = {}
        self._beside: dict[str, dict[str, int]] = {}

    def family(self, config: TrainConfig) -> Family:
        """The base's sketch, in the config's precision."""
        key = config.base, config.precision
        if key not in self._families:
            self._families[key] = sketch(config.base, DTYPES[config.precision])
        return self._families[key]

    def need(self, config: TrainConfig) -> Need:
        """What it needs, in its steps and beside them."""
        family = self.family(config)
        size, key = largest(bucketed(config, family, self.examples)), config.model_dump_json()
        if key not in self._steps:
            self._steps[key] = predicted(config, family, size, device=self.device, base=self.base)
        step, other = self._steps[key], f"{config.precision} {size} {config.resolution} {config.quantise}"
        fixed = step.weights + step.adapter + step.optimizer + step.ema
        if other not in self._beside:
            found = beside(config, family, size, step, device=self.device)
            self._beside[other] = {name: peak - fixed for name, peak in found.items()}
        return Need(step, {name: peak + fixed for name, peak in self._beside[other].items()})

    def peak(self, config: TrainConfig) -> int:
        """The most that it has in memory."""
        return self.need(config).peak

    def floor(self, config: TrainConfig) -> int:
        """Of that, what is there all the time; quick to know."""
        family = self.family(config)
        size = largest(bucketed(config, family, self.examples))
        made = predicted(config, family, size, device=self.device, base=self.base, bare=True)
        return made.weights + made.adapter + made.optimizer + made.ema + made.base
