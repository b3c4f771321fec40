"""What the base is shown before the first step, and what is gathered of it: inputs' moments and weights' gradients.

Both are as large as weights, and more: they are gathered of as many layers at a time as memory is set aside for, and
what is shown is shown again for the next ones, the same to the bit.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from imgadapt.methods import Full
from imgadapt.slot import Slot
from imgadapt.training import noise
from imgadapt.training.families import Family
from imgadapt.training.material import Material
from imgadapt.training.objective import Objective
from imgadapt.training.starts.place import Place

Show = Callable[[], Iterator[Tensor]]
"""Puts every batch to the base, each time the same ones; yields the losses (n,) of each."""

MOST = 2**31  # bytes that are gathered at a time
_ROWS = 4096  # places of a sample that a layer is looked at; of more, so many at random


def stratified(family: Family, objective: Objective, material: Material, *, samples: int, seed: int) -> Show:
    """Batches of a training, each sample at a time of its own: one in each of `samples` equal parts of the times'
    distribution, so that all noise levels are seen, however few samples are."""
    config, own = material.config, noise.number(seed, "start")
    piece = -(-config.batch_size // config.pieces)

    def show() -> Iterator[Tensor]:
        for first in range(0, samples, config.batch_size):
            end = min(first + config.batch_size, samples)
            for start in range(first, end, piece):
                places = range(start, min(start + piece, end))
                batch = material.batch(first // config.batch_size, range(places.start - first, places.stop - first))
                asked = objective.ask(batch.latents, own, 0, places, samples)
                guess = family.predict(asked.noisy, batch.conditions, asked.times)
                yield objective.losses(guess, batch.latents, asked.noise, asked.times, batch.mask).weighted

    return show


def moments(places: Sequence[Place], show: Show, *, most: int = MOST) -> Iterator[tuple[Place, Tensor]]:
    """Each layer with the mean of x xᵀ over what it reads, (fan_in, fan_in), fp32; x is what one place of the output
    depends on: the features of a linear layer, the patch of a convolution.
    """
    for group in _groups(places, [4 * place.site.fan_in**2 for place in places], most):
        found = [_Moment(place) for place in group]
        hooks = [one.place.layer.register_forward_pre_hook(one, with_kwargs=True) for one in found]
        try:
            with torch.no_grad(), _off(places):
                for _ in show():
                    pass
        finally:
            for hook in hooks:
                hook.remove()
        while found:
            one = found.pop(0)
            yield one.place, one.total / max(1, one.count)


class _Moment:
    """A hook that sums up what a layer reads."""

    def __init__(self, place: Place) -> None:
        self.place, self.count, self.seen = place, 0, 0
        self.total = torch.zeros(place.site.fan_in, place.site.fan_in, device=_device(place))

    def __call__(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = (args or tuple(kwargs.values()))[0].detach()
        single = x.ndim == (len(self.place.site.shape) - 1 if self.place.site.kind == "conv" else 1)
        for sample in x[None] if single else x:
            rows = self._rows(sample).float()
            if len(rows) > _ROWS:
                generator = noise.generator(self.place.seed, "rows", self.seen)
                rows = rows[torch.randperm(len(rows), generator=generator)[:_ROWS].to(rows.device)]
            self.total.addmm_(rows.t(), rows)
            self.count, self.seen = self.count + len(rows), self.seen + 1

    def _rows(self, sample: Tensor) -> Tensor:
        site = self.place.site
        if site.kind == "linear":
            return sample.reshape(-1, site.fan_in)
        every = torch.eye(site.fan_in, device=sample.device, dtype=sample.dtype).reshape(-1, *site.shape[1:])
        patches = site.spread(sample[None], every)  # (1, groups * fan_in, ...): each patch as it is
        return patches.reshape(site.groups, site.fan_in, -1).transpose(1, 2).reshape(-1, site.fan_in)


def gradients(places: Sequence[Place], show: Show, *, most: int = MOST) -> Iterator[tuple[Place, Tensor]]:
    """Each layer with the gradient of the mean loss by its weight, (out, fan_in), fp32."""
    for group in _groups(places, [12 * place.site.rows * place.site.fan_in for place in places], most):
        method = Full(bias=False)
        slots = [Slot("start", method, p.site, method.init(p.site, None)) for p in group]
        with _off(places):
            try:
                for place, slot in zip(group, slots, strict=True):
                    place.layer.add(slot)
                count = 0
                with torch.enable_grad():
                    for losses in show():
                        losses.sum().backward()
                        count += len(losses)
            finally:
                for place in group:
                    place.layer.remove(["start"])
        for place, slot in zip(group, slots, strict=True):
            diff: Any = slot.diff
            made = torch.zeros_like(diff) if diff.grad is None else diff.grad / max(1, count)
            diff.grad = None
            yield place, made.detach().flatten(1)


@contextmanager
def _off(places: Sequence[Place]) -> Generator[None]:
    """Within the block these layers' adapters change nothing; those that are added within it do."""
    before = [(slot, slot.weight) for place in places for slot in place.layer]
    for slot, _ in before:
        slot.set(0.0)
    try:
        yield
    finally:
        for slot, weight in before:
            slot.set(weight)


def _groups(places: Sequence[Place], sizes: Sequence[int], most: int) -> Iterator[list[Place]]:
    """Places in their order, as many at a time as do not exceed `most`; at least one."""
    group: list[Place] = []
    total = 0
    for place, size in zip(places, sizes, strict=True):
        if group and total + size > most:
            yield group
            group, total = [], 0
        group.append(place)
        total += size
    if group:
        yield group


def _device(place: Place) -> torch.device:
    weight: Any = place.layer._parameters[place.site.parameter]
    return weight.device
