"""Rules: what a training does in a step beside its loss and its optimiser."""

from collections.abc import Mapping, Sequence
from typing import Any

from imgadapt import live
from imgadapt.errors import ConfigError
from imgadapt.file import AdapterFile
from imgadapt.slot import Slot
from imgadapt.training.checkpoint import Stateful
from imgadapt.training.config import TrainConfig
from imgadapt.training.rules.adalora import Budget
from imgadapt.training.rules.fixed import FixedDown
from imgadapt.training.rules.nested import Nested
from imgadapt.training.rules.rule import Rule

__all__ = ["Rule", "Rules", "hold", "of"]


class Rules(Rule):
    """Several rules, one after the other."""

    def __init__(self, rules: Sequence[Rule] = ()) -> None:
        self.rules = tuple(rules)

    def begin(self, step: int) -> None:
        for rule in self.rules:
            rule.begin(step)

    def end(self) -> None:
        for rule in self.rules:
            rule.end()

    def shape(self) -> None:
        for rule in self.rules:
            rule.shape()

    def correct(self) -> None:
        for rule in self.rules:
            rule.correct()

    def after(self, step: int) -> None:
        for rule in self.rules:
            rule.after(step)

    def shown(self) -> None:
        for rule in self.rules:
            rule.shown()

    def states(self) -> Mapping[str, Stateful]:
        return {name: state for rule in self.rules for name, state in rule.states().items()}

    def said(self) -> Sequence[str]:
        return [line for rule in self.rules for line in rule.said()]

    def file(self, file: AdapterFile) -> AdapterFile:
        for rule in self.rules:
            file = rule.file(file)
        return file


def hold(config: TrainConfig, model: Any) -> None:
    """Leave those tensors of a fresh adapter alone that are not to be trained.

    Raises:
        ConfigError: a rule is for other methods than those on the model, or two do not go together.
    """
    rows = _rows(model)
    if config.freeze_down and config.nested_ranks:
        raise ConfigError("freeze_down and nested_ranks do not go together: what is frozen cannot learn an order")
    for setting, on, plain in (("freeze_down", config.freeze_down, True), ("nested_ranks", config.nested_ranks, False)):
        if on and not rows:
            raise ConfigError(f"{setting} is for lora, and the method is {config.method}; leave one of them out")
        for name, slot in rows if on else ():
            if "down" not in slot.method.cut or (plain and slot.method.needs_weight):
                raise ConfigError(f"{setting} is for lora without a core, and {name} has {slot.method}")
    if over := [name for name, slot in rows if "adalora_e" in slot.keys and not Budget.has(slot)]:
        raise ConfigError(f"{over[0]} has adalora within dora, which has no budget of ranks; give adalora alone")
    budget = [row for row in rows if Budget.has(row[1])]
    if budget:
        Budget(config, budget)  # whose target is looked at
    for _, slot in rows if config.freeze_down else ():
        slot.hold("down")


def of(config: TrainConfig, model: Any) -> Rules:
    """The rules of a config, for the adapter that is on the model and as it is to begin with; see `hold`."""
    rows = _rows(model)
    rules: list[Rule] = []
    if any(Budget.has(slot) for _, slot in rows):
        rules.append(Budget(config, rows))
    if config.freeze_down:
        rules.append(FixedDown(rows))
    if config.nested_ranks:
        rules.append(Nested(config, rows))
    return Rules(rules)


def _rows(model: Any) -> list[tuple[str, Slot]]:
    return [(name, slot) for name, _, slot in live.slots(model) if slot.name == "default"]
