"""Ready: one adapter in one forward, and the sum of all that are low-rank pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from imgadapt.methods.base import Method, Tensors, Way
from imgadapt.sites import Site


@dataclass(eq=False)
class Ready:
    """One adapter in one forward: operands with the strength in them, or `gain` (batch,) where it is per sample.

    ranks: which of a pair's ranks act, 1 or 0, (1 or batch, r); None: all.
    """

    method: Method
    way: Way
    site: Site
    operands: Tensors
    gain: Tensor | None
    dropped: float
    ranks: Tensor | None = None

    def read(self, x: Tensor) -> Tensor:
        """The activation as this adapter reads it."""
        return F.dropout(x, self.dropped) if self.dropped and x.is_floating_point() else x

    def scaled(self, change: Tensor) -> Tensor:
        if self.gain is None:
            return change
        gain = self.gain.to(change.device, change.dtype)
        return change * gain.reshape(-1, *(1 for _ in change.shape[1:]))

    def turn(self, x: Tensor, onto: Tensor) -> Tensor:
        """onto + the change of the input."""
        if self.gain is None:
            return self.method.turn(self.operands, self.site, self.read(x), onto)
        return onto + self.scaled(self.method.turn(self.operands, self.site, self.read(x), None))

    def act(self, x: Tensor, y: Tensor | None, out: Tensor) -> Tensor:
        """out + the change of the output."""
        if self.way.input:
            x = self.read(x)
        elif y is not None and not (self.way.pair or self.way.turn):
            y = self.read(y)  # it reads nothing but the base's output
        if self.gain is None and (self.dtype == out.dtype or torch.is_autocast_enabled(out.device.type)):
            return self.method.act(self.operands, self.site, x, y, out)
        return out + self.scaled(self.method.act(self.operands, self.site, x, y, None)).to(out.dtype)

    def delta(self) -> Tensor:
        """The dense change of the weight."""
        return self.operands["delta"]

    def bias_delta(self) -> Tensor | None:
        return self.operands.get("bias")

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.operands.values())).dtype


def add_pairs(site: Site, pairs: Sequence[Ready], x: Tensor, out: Tensor) -> Tensor:
    """out + all low-rank changes; those that read the same input in one product down and one up."""
    while pairs:
        together = [adapter for adapter in pairs if not adapter.dropped] or pairs[:1]
        pairs = [adapter for adapter in pairs if adapter not in together]
        down = _joined([adapter.operands["down"] for adapter in together], 0)
        up = _joined([adapter.operands["up"] for adapter in together], 1)
        h = site.spread(together[0].read(x), down)
        if any(adapter.gain is not None or adapter.ranks is not None for adapter in together):
            h = h * _gains(site, together, h)
        if h.dtype != out.dtype and not torch.is_autocast_enabled(h.device.type):
            out = out + site.mix(h, up, None).to(out.dtype)
        else:
            out = site.mix(h, up, out)
    return out


def _gains(site: Site, pairs: Sequence[Ready], h: Tensor) -> Tensor:
    """Each sample's strength for each rank of what `spread` gave."""
    rows: list[Tensor] = []
    for adapter in pairs:
        row = h.new_ones(1, 1) if adapter.gain is None else adapter.gain.to(h.device, h.dtype)[:, None]
        if adapter.ranks is not None:
            row = row * adapter.ranks.to(h.device, h.dtype)
        rows.append(row.expand(len(h), adapter.operands["up"].shape[1]))
    gains = torch.cat(rows, 1).repeat(1, site.groups)
    middle = (1,) * (h.ndim - 2)
    return gains.reshape(len(h), -1, *middle) if site.kind == "conv" else gains.reshape(len(h), *middle, -1)


def _joined(tensors: Sequence[Tensor], axis: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), axis)
