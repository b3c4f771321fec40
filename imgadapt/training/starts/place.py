"""Place: a layer whose LoRA is to start somewhere else than at zero, and what starts are made of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imgadapt import live
from imgadapt.errors import ConfigError
from imgadapt.formats import Part
from imgadapt.layer import AdapterLayer
from imgadapt.methods import Anchored, LoRA, Method
from imgadapt.sites import Site
from imgadapt.training import noise

_DEAD = 1e-6  # singular values below this share of the largest are none


@dataclass(frozen=True, eq=False)
class Place:
    """A layer by its name, and the LoRA that its start is made for; what is drawn at random is so by `seed`."""

    name: str
    layer: AdapterLayer
    lora: LoRA
    seed: int = 0

    @property
    def site(self) -> Site:
        return self.layer.site

    def weight(self) -> Tensor:
        """The base's, (out, fan_in), fp32.

        Raises:
            StateError: it cannot be read.
        """
        return self.layer.pristine().detach().float().flatten(1)

    def drawn(self) -> Tensor:
        """A `down` as LoRA has it when nothing is said, (rank, fan_in)."""
        down = torch.empty(self.lora.rank, self.site.fan_in)
        generator = noise.generator(self.seed, "start", self.name)
        return nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)

    def plain(self, up: Tensor, down: Tensor, lora: LoRA | None = None) -> Part:
        """LoRA of up (out, rank) and down (rank, fan_in)."""
        return Part(lora or self.lora, {"down": self._down(down), "up": self._up(up)}, shape=self.site.shape)

    def anchored(self, up: Tensor, down: Tensor) -> Part:
        """What starts from these, and changes nothing yet."""
        method = Anchored(self.lora.rank, self.lora.alpha, self.lora.rank_stabilised)
        return Part(method, Anchored.started(self._down(down), self._up(up)), shape=self.site.shape)

    def split(self, u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(up, down) with scale * up @ down = u @ diag(s) @ v, s shared by both; u (out, rank), v (rank, fan_in).

        A rank with s = 0 could never learn: it starts as LoRA's do, from a `down` that is drawn and an `up` of zero.
        """
        root = (s / self.lora.scale).sqrt()
        down = torch.where((s > 0)[:, None], root[:, None] * v, self.drawn().to(v))
        return u * root, down

    def _down(self, down: Tensor) -> Tensor:
        return down.float().cpu().reshape(-1, *self.site.shape[1:]).contiguous()

    def _up(self, up: Tensor) -> Tensor:
        return up.float().cpu().reshape(*up.shape, *self.site.ones).contiguous()


def places(model: Any, *, name: str = "default", seed: int = 0) -> list[Place]:
    """The layers of an adapter whose methods are LoRA, or Anchored.

    Raises:
        ConfigError: a layer has another method.
        StateError: there is no such adapter.
    """
    return [Place(n, layer, _lora(n, slot.method), seed) for n, layer, slot in live.slots(model, name)]


def _lora(name: str, method: Method) -> LoRA:
    if isinstance(method, LoRA) and not (method.tucker or method.bias):
        return method
    if isinstance(method, Anchored):
        return LoRA(method.rank, method.alpha, method.rank_stabilised)
    raise ConfigError(f"{name}: a start is for plain LoRA, and this layer has {method}")


def require(places: Sequence[Place], start: str) -> None:
    """Raises ConfigError where a layer is none that reads numbers."""
    if other := [place for place in places if place.site.kind not in ("linear", "conv")]:
        raise ConfigError(
            f"start = {start} looks at what linear layers and convolutions read, and {other[0].name} is "
            f"{other[0].site.kind}: leave it out of the targets, or choose another start"
        )


def largest(square: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(values, vectors) of the `count` largest eigenvalues of a symmetric matrix that has none below 0, largest first:
    vectors (n, count), double.
    """
    wide = square.double()
    try:
        values, vectors = torch.linalg.eigh(wide)
    except torch.linalg.LinAlgError:  # which LAPACK's gives up on now and then, where few of many values are not small
        vectors, values, _ = torch.linalg.svd(wide)
        values, vectors = values.flip(0), vectors.flip(1)
    return values[-count:].flip(0).clamp(min=0), vectors[:, -count:].flip(1)


def top(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(u, s, v) of the `count` largest singular values, largest first: u (rows, count), v (count, columns),
    double.

    By way of the smaller of its two squares, in double precision: 20 times as fast as all of its singular vectors on a
    CPU, as exact for these, and the same each time. Values that are none are 0, with vectors of 0.
    """
    wide = matrix.double()
    if wide.shape[0] > wide.shape[1]:
        v, s, u = top(wide.t(), count)
        return u.t().contiguous(), s, v.t().contiguous()
    squares, u = largest(wide @ wide.t(), count)
    s = squares.sqrt()
    s = torch.where(s > _DEAD * s[:1], s, 0)
    v = torch.where((s > 0)[:, None], (u.t() @ wide) / s[:, None].clamp(min=torch.finfo(s.dtype).tiny), 0)
    return torch.where(s > 0, u, 0), s, v
