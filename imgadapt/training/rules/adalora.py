"""AdaLoRA's rule: which ranks of all layers are worth their place, and that vectors stay orthonormal (2303.10512)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imgadapt.arch import canonical
from imgadapt.errors import ConfigError, first_few
from imgadapt.file import AdapterFile
from imgadapt.methods import AdaLoRA
from imgadapt.slot import Slot
from imgadapt.training.checkpoint import Stateful
from imgadapt.training.config import TrainConfig
from imgadapt.training.rules.rule import Rule

_BETA = 0.85  # of both means, as in the paper and in peft
_KEYS = ("adalora_e", "adalora_a", "adalora_b")


class Budget(Rule):
    """The ranks of all layers share a budget, which falls by a cubic curve to `target_rank` a layer (peft's
    tuners/adalora/layer.py, `RankAllocator`, without its fault at a target that is the rank at the start).

    A number w with gradient g has the sensitivity |w g|; its importance is the running mean of that, times the running
    mean of its distance from that mean. A rank's is that of its singular value, and the means over its two vectors. The
    least important ranks have their value set to zero: every `budget_every` steps while the budget falls, from which
    they may recover, and for good when it has fallen.

    The penalty is orthogonality times the mean of ‖bᵀb - 1‖ and ‖a aᵀ - 1‖ over all layers.

    Raises:
        ConfigError: the target is above a layer's rank.
    """

    def __init__(self, config: TrainConfig, rows: Sequence[tuple[str, Slot]]) -> None:
        self._slots = {name: slot for name, slot in rows if self.has(slot)}
        ranks = {name: slot.method.file_rank or 0 for name, slot in self._slots.items()}
        wanted = config.target_rank
        if small := [name for name, rank in ranks.items() if wanted is not None and rank < wanted]:
            raise ConfigError(f"target_rank is {wanted}, and {small[0]} has rank {ranks[small[0]]}; lower it")
        first, last = config.budget_phases
        self.whole = sum(ranks.values())
        self.target = sum(max(1, round(rank * 2 / 3)) if wanted is None else wanted for rank in ranks.values())
        self.warm = int(config.steps * first)
        self.over = max(self.warm + 1, config.steps - int(config.steps * last))
        self.every, self.weight = config.budget_every, config.orthogonality
        self.means: dict[str, list[Tensor]] = {}  # "layer key" -> means of sensitivity and of uncertainty
        self.masks: dict[str, Tensor] = {}  # of the ranks that stay, when that is settled

    @staticmethod
    def has(slot: Slot) -> bool:
        """Whether the rule is for this adapter."""
        return isinstance(slot.method, AdaLoRA)

    def budget(self, done: int) -> int:
        """Ranks of all layers together after so many steps."""
        if done <= self.warm:
            return self.whole
        left = max(0.0, 1 - (done - self.warm) / (self.over - self.warm))
        return int((self.whole - self.target) * left**3 + self.target)

    @torch.no_grad()
    def shape(self) -> None:
        share = self.weight / (2 * len(self._slots))
        for slot in self._slots.values() if self.weight else ():
            for name in ("adalora_a", "adalora_b"):
                parameter = _of(slot, name)
                rows = parameter.flatten(1) if name == "adalora_a" else parameter.t()
                off = rows @ rows.t() - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
                change = 2 * off @ rows / off.norm().clamp(min=1e-12)
                change = change.reshape(parameter.shape) if name == "adalora_a" else change.t()
                parameter.grad.add_(change, alpha=share)

    @torch.no_grad()
    def after(self, step: int) -> None:
        done = step + 1
        if done < self.over:
            self._look()
        if self.warm < done <= self.over and (done % self.every == 0 or done == self.over):
            kept = self._kept(self.budget(done))
            self._cut(kept)
            if done == self.over:
                self.masks, self.means = kept, {}
        elif done > self.over:
            self._cut(self.masks)

    def _look(self) -> None:
        for name, slot in self._slots.items():
            for key in _KEYS:
                parameter = _of(slot, key)
                now = (parameter * parameter.grad).abs()
                place = f"{name} {key}"
                if place not in self.means:
                    self.means[place] = [torch.zeros_like(now), torch.zeros_like(now)]
                mean, spread = self.means[place]
                mean.mul_(_BETA).add_(now, alpha=1 - _BETA)
                spread.mul_(_BETA).add_((now - mean).abs(), alpha=1 - _BETA)

    def importance(self) -> dict[str, Tensor]:
        """Of each layer's ranks, (rank,)."""
        made: dict[str, Tensor] = {}
        for name, slot in self._slots.items():
            if f"{name} adalora_e" not in self.means:
                made[name] = torch.zeros_like(_of(slot, "adalora_e"))
                continue
            e, a, b = (mean * spread for mean, spread in (self.means[f"{name} {key}"] for key in _KEYS))
            made[name] = e + a.flatten(1).mean(1) + b.mean(0)
        return made

    def _kept(self, budget: int) -> dict[str, Tensor]:
        scores = self.importance()
        order = torch.cat([score.cpu() for score in scores.values()]).sort(descending=True, stable=True).indices
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[:budget]] = True
        sizes = [len(score) for score in scores.values()]
        parts = zip(scores.items(), chosen.split(sizes), strict=True)
        return {name: mask.to(score.device) for (name, score), mask in parts}

    def _cut(self, kept: Mapping[str, Tensor]) -> None:
        for name, mask in kept.items():
            _of(self._slots[name], "adalora_e").mul_(mask)

    @torch.no_grad()
    def shown(self) -> None:
        self._cut(self.masks)

    def states(self) -> Mapping[str, Stateful]:
        return {"adalora": self}

    def state_dict(self) -> dict[str, Any]:
        return {"means": self.means, "masks": self.masks}

    def load_state_dict(self, state_dict: Any) -> None:
        devices = {name: _of(slot, "adalora_e").device for name, slot in self._slots.items()}
        self.means = {
            key: [tensor.to(devices[key.rpartition(" ")[0]]) for tensor in pair]
            for key, pair in state_dict["means"].items()
        }
        self.masks = {name: mask.to(devices[name]) for name, mask in state_dict["masks"].items()}

    def said(self) -> Sequence[str]:
        gone = [name for name, mask in self.masks.items() if not mask.any()]
        if not gone:
            return ()
        left = int(sum(mask.sum() for mask in self.masks.values()))
        whole = f"{len(gone)} of {len(self.masks)} layers have no rank left and are not in the file"
        return [f"adalora: {left} of {self.whole} ranks are left; {whole}: {first_few(gone)}"]

    def file(self, file: AdapterFile) -> AdapterFile:
        """Of each layer the ranks that stay; one that has none is left out."""
        masks = {canonical(name): mask.cpu() for name, mask in self.masks.items()}
        parts = dict(file.parts)
        for name in masks.keys() & parts.keys():
            ranks = masks[name].nonzero().flatten()
            if not len(ranks):
                del parts[name]
                continue
            method, tensors = parts[name].method.only(parts[name].tensors, ranks)
            parts[name] = replace(parts[name], method=method, tensors=tensors)
        return replace(file, parts=parts)


def _of(slot: Slot, key: str) -> Any:
    """A parameter, as such."""
    return slot._parameters[key]
