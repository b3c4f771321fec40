"""Optimisers by name, from torch, bitsandbytes and pytorch_optimizer."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from imgadapt.errors import ConfigError, MissingExtra
from imgadapt.training.config import TrainConfig


@dataclass(frozen=True)
class Kind:
    """Where an optimiser comes from, and its arguments beside rate and decay.

    extra: what to install it with. own_rate: it finds its rate itself, so that `learning_rate` is a factor near 1.
    """

    module: str
    name: str
    options: Mapping[str, Any]
    extra: str = "train"
    own_rate: bool = False


KINDS: Mapping[str, Kind] = {
    "adamw": Kind("torch.optim", "AdamW", {}),
    "adamw8bit": Kind("bitsandbytes.optim", "AdamW8bit", {}, "quant"),
    # its authors' advice for diffusion: arXiv 2306.06101, github.com/konstmish/prodigy
    "prodigy": Kind(
        "pytorch_optimizer",
        "Prodigy",
        {"betas": (0.9, 0.99), "bias_correction": True, "safeguard_warmup": True},
        own_rate=True,
    ),
    "adafactor": Kind("pytorch_optimizer", "AdaFactor", {"scale_parameter": False, "relative_step": False}),
    "lion": Kind("pytorch_optimizer", "Lion", {}),
    "schedule-free": Kind("pytorch_optimizer", "ScheduleFreeAdamW", {}),
    "came": Kind("pytorch_optimizer", "CAME", {}),
}


_FACTOR = 0.05  # below it, a learning rate for Prodigy was meant for another optimiser


def build(config: TrainConfig, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser of a config over parameter groups that have their own rates.

    Raises:
        ConfigError: it does not take one of `optimizer_options`, or settings contradict one another.
        MissingExtra: its package is not installed.
    """
    kind = KINDS[config.optimizer]
    try:
        made: Callable[..., torch.optim.Optimizer] = getattr(import_module(kind.module), kind.name)
    except ModuleNotFoundError as error:
        raise MissingExtra(kind.module.partition(".")[0], kind.extra) from error
    if kind.own_rate and config.learning_rate < _FACTOR:
        raise ConfigError(
            f"{config.optimizer} finds its rate, and learning_rate is a factor of it, usually 1; it is "
            f"{config.learning_rate:g}, with which next to nothing is learnt: --learning-rate 1"
        )
    if kind.own_rate and len({group["lr"] for group in groups}) > 1:  # it would take the first group's for all
        raise ConfigError(
            f"{config.optimizer} finds one rate for all tensors: learning_rates and lora_plus cannot be used with it"
        )
    known = inspect.signature(made).parameters
    if wrong := [name for name in config.optimizer_options if name not in known]:
        options = [name for name in known if name not in ("params", "lr", "weight_decay", "kwargs")]
        raise ConfigError(f"{config.optimizer} has no option '{wrong[0]}'; it has: {', '.join(options)}")
    options = {**kind.options, **config.optimizer_options}
    return made([dict(group) for group in groups], lr=config.learning_rate, weight_decay=config.weight_decay, **options)
