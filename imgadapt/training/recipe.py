"""The adapter that settings ask for: methods, on the model, and its tensors in groups for the optimiser."""

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from imgadapt import attaching, live
from imgadapt import targets as where
from imgadapt.errors import ConfigError, first_few
from imgadapt.methods import Anchored, DoRA, LoRA, Method
from imgadapt.prompting import Prompting
from imgadapt.prompting import stack as prompts
from imgadapt.slot import Dropout
from imgadapt.training import rules
from imgadapt.training.config import TrainConfig
from imgadapt.training.spelling import Trained, innermost, method
from imgadapt.training.starts import ANCHORED


def methods(config: TrainConfig) -> dict[str, Trained]:
    """Targets -> methods, those with settings of their own first.

    Raises:
        ConfigError: a method is not known, or does not take its settings.
    """
    usual = {"rank": config.rank, "alpha": config.alpha, "rank_stabilised": config.rank_stabilised or None}
    main = method(config.method, usual)
    given = [name for name, value in usual.items() if value is not None]
    deaf = [name for name in given if name not in {f.name for f in fields(innermost(main))}]
    if deaf and not config.methods:
        raise ConfigError(f"{config.method} has no {first_few(deaf)}; leave it out, or choose another method")
    found = {glob: method(text, usual) for glob, text in config.methods.items()}
    for glob, rank in config.ranks.items():
        inner = innermost(main)
        if "rank" not in {f.name for f in fields(inner)}:
            raise ConfigError(f"ranks: {inner.name} has no rank")
        own = replace(inner, rank=rank)  # pyright: ignore[reportCallIssue] # it has one
        found.setdefault(glob, DoRA(own) if isinstance(main, DoRA) and isinstance(own, Method) else own)
    return {glob: _startable(config, one) for glob, one in {**found, "*": main}.items()}


def _startable(config: TrainConfig, method: Trained) -> Trained:
    """What a start can be put in the place of.

    Raises:
        ConfigError: none can, of the kind that is asked for.
    """
    start = config.start
    if start is None:
        return method
    if not isinstance(method, LoRA) or method.tucker or method.bias:
        raise ConfigError(f"start is for plain lora, and the method is {method}; leave one of them out")
    if start == "loftq" and config.quantise is None:
        raise ConfigError("start = loftq makes up for what quantising takes, and nothing is quantised: give --quantise")
    if start == "lora_ga" and config.precision == "fp16":
        raise ConfigError("start = lora_ga needs gradients, which fp16 does not hold before they are scaled; use bf16")
    anchored = Anchored(method.rank, method.alpha, method.rank_stabilised)
    return anchored if start in ANCHORED else method


def put_on(config: TrainConfig, model: Any) -> None:
    """Attach a fresh adapter, its tensors a function of the seed.

    Raises:
        ConfigError, TargetError: see `methods` and `attach`; targets with settings of their own must be targets, too.
    """
    chosen = methods(config)
    main = chosen["*"]
    dropout = Dropout(config.dropout, config.rank_dropout, config.module_dropout)
    if isinstance(main, Prompting):
        if len(chosen) > 1:
            raise ConfigError(f"{main.name} is for all of the denoiser; leave methods and ranks out")
        presets = set(config.targets) <= where.PRESETS.keys()  # of layers: the usual ones say nothing of prompts
        attaching.attach(model, main, targets=None if presets else config.targets, dropout=dropout)
        rules.hold(config, model)
        return
    layered = {glob: one for glob, one in chosen.items() if isinstance(one, Method)}
    if prompted := [one.name for one in chosen.values() if isinstance(one, Prompting)]:
        raise ConfigError(f"methods: {prompted[0]} is no method of layers; it can only be the main one, --method")
    attaching.attach(model, layered["*"] if len(layered) == 1 else layered, targets=config.targets, dropout=dropout)
    rules.hold(config, model)


@dataclass(frozen=True)
class Tensor:
    """One tensor that is trained: `unet.mid_block...to_q` and `up`, for messages."""

    layer: str
    key: str
    parameter: nn.Parameter

    def __str__(self) -> str:
        return f"{self.layer} ({self.key})"


def tensors(model: Any) -> list[Tensor]:
    """What of a model's adapter is trained, in its order; what layers share is the first one's."""
    prompted = [Tensor(*row) for row in prompts.learning(where.components(model), "default")]
    found = [] if prompted else live.slots(model, "default")
    rows = [*(Tensor(name, key, getattr(slot, key)) for name, _, slot in found for key in slot.learning), *prompted]
    first: dict[int, Tensor] = {}
    for row in rows:
        first.setdefault(id(row.parameter), row)
    return list(first.values())


def groups(config: TrainConfig, rows: list[Tensor]) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser, each of one learning rate.

    Raises:
        ConfigError: `learning_rates` names what is not trained, or `lora_plus` has nothing to speed up.
    """
    layers = list(dict.fromkeys(row.layer for row in rows))
    if wrong := where.idle(list(config.learning_rates), [*layers, *(f"{row.layer}.{row.key}" for row in rows)]):
        raise ConfigError(
            f"learning_rates names {first_few(wrong)}, which no trained layer matches, and none of its tensors "
            f"({', '.join(dict.fromkeys(row.key for row in rows))}): {first_few(layers)}"
        )
    late = {id(row.parameter) for row in rows if _starts_at_zero(row)}
    if config.lora_plus is not None and not late:
        raise ConfigError(f"lora_plus is for tensors that start at zero, and {config.method} has none; leave it out")
    by_rate: dict[float, list[nn.Parameter]] = {}
    for row in rows:
        faster = config.lora_plus if config.lora_plus is not None and id(row.parameter) in late else 1
        by_rate.setdefault(_rate(config, row) * faster, []).append(row.parameter)
    return [{"params": found, "lr": rate, "peak": rate} for rate, found in by_rate.items()]


def _rate(config: TrainConfig, row: Tensor) -> float:
    """That of the first glob which the layer matches, or the layer and the tensor after a dot."""
    names = (row.layer, f"{row.layer}.{row.key}")
    own = (rate for glob, rate in config.learning_rates.items() if any(where.matches(name, glob) for name in names))
    return next(own, config.learning_rate)


def _starts_at_zero(row: Tensor) -> bool:
    """Or would, without a start."""
    return row.key in ("up", "anchored_up") or not row.parameter.detach().any()
