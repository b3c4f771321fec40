"""RoAd: outputs in twos, each turned and scaled (arXiv 2409.00119)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from imgadapt.errors import ConfigError, FormatError, ShapeError
from imgadapt.methods import rotation
from imgadapt.methods.base import Method, Peft, Tensors, Way, linear_only, positive
from imgadapt.sites import Site

_NUMBERS = {"road_1": 0.5, "road_2": 1, "road_4": 2}


@dataclass(frozen=True)
class RoAd(Method):
    """W' = R W with, for outputs i and j = i + group_size / 2 of a group, R of rows (a cos θ, -a sin θ) and
    (a sin θ, a cos θ); angles θ `road_theta` and factors a `road_alpha`, as huggingface/peft tuners/road has them.

    variant: "road_1": one θ and a for each two outputs, (out / 2,); "road_2": one for each row, (out,); "road_4": one
        for each element, (2 * out,), of each group the columns' first.
    group_size: even. A layer whose outputs (those of a group, in grouped convolutions) it does not divide takes the
        largest even divisor below it.
    bias: the bias changes, too, by `diff_b` (out,). peft turns it like the rest of the output: its files have no
        `diff_b`, and `attach` makes it. True on a layer that has none: nothing is left alone.

    Raises:
        ConfigError: an unknown variant, or a group_size that is odd or below 2.
    """

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64
    bias: bool = False

    name = "road"
    rate_over_lora = 3.5
    tensors = ("road_theta", "road_alpha")
    optional = ("diff_b",)
    needs_weight = True
    additive = False

    def __post_init__(self) -> None:
        if self.variant not in _NUMBERS:
            raise ConfigError(f"variant is {self.variant!r}; it is one of {', '.join(_NUMBERS)}")
        positive("group_size", self.group_size)
        if self.group_size % 2:
            raise ConfigError(f"group_size is {self.group_size}; it must be even, 2 or more")

    def check(self, site: Site) -> str | None:
        if reason := super().check(site):
            return reason
        size = rotation.rotated_size(site, "output")
        return f"its {size} outputs do not go in twos" if size % 2 else None

    def at(self, site: Site) -> Self:
        half = rotation.rotated_size(site, "output") // 2
        size = next(2 * b for b in range(min(half, self.group_size // 2), 0, -1) if half % b == 0)
        return replace(self, group_size=size, bias=self.bias or site.bias is None)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        size = (int(_NUMBERS[self.variant] * site.rows),)
        bias = {"diff_b": (site.rows,)} if self.bias and site.bias is not None else {}
        return {"road_theta": size, "road_alpha": size, **bias}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        made = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        return {**made, "road_alpha": made["road_alpha"] + 1}

    def settled(
        self, t: Tensors, weight: Callable[[], Tensor], bias: Callable[[], Tensor | None]
    ) -> tuple[Method, Tensors]:
        if not self.bias or "diff_b" in t or (b := bias()) is None or b.shape[0] % self.group_size:
            return self, t
        own = {name: tensor.float() for name, tensor in t.items()}
        if own["road_theta"].numel() != int(_NUMBERS[self.variant] * len(b)):
            return self, t  # `fits` says what is wrong
        return self, {**t, "diff_b": self._turned(b.float().to(own["road_theta"].device), *self._columns(own))}

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        assert weight is not None
        return self._turned(weight, *self._columns(t))

    def bias_delta(self, t: Tensors) -> Tensor | None:
        return t.get("diff_b")

    def way(self, site: Site) -> Way:
        return Way(act=True, output=True, linear=("less", "across", "bias"))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        less, across = self._columns(t)
        return {"less": less, "across": across, **({"bias": t["diff_b"]} if "diff_b" in t else {})}

    def act(self, o: Tensors, site: Site, x: Tensor, y: Tensor | None, onto: Tensor | None) -> Tensor:
        assert y is not None
        less, across = site.along(o["less"]), site.along(o["across"])
        change = y * less if onto is None else torch.addcmul(onto, y, less)
        return torch.addcmul(change, self._swapped(y, 1 if site.kind == "conv" else -1), across)

    def _columns(self, t: Tensors) -> tuple[Tensor, Tensor]:
        """What each output, less one, and what its other of the two is multiplied by: (out,) each."""
        g, theta, alpha = self.group_size, t["road_theta"], t["road_alpha"]
        if self.variant == "road_4":
            (of_own, of_other), (a_own, a_other) = (v.view(-1, 2, g).unbind(1) for v in (theta, alpha))
        else:
            of_own, a_own = (v.view(-1, g // 2 if self.variant == "road_1" else g) for v in (theta, alpha))
            if self.variant == "road_1":
                of_own, a_own = of_own.repeat(1, 2), a_own.repeat(1, 2)
            of_other, a_other = of_own, a_own
        across = (a_other * of_other.sin()).view(-1, 2, g // 2)
        across = torch.stack((-across[:, 0], across[:, 1]), 1)
        return (a_own * of_own.cos() - 1).flatten(), across.flatten()

    def _turned(self, rows: Tensor, less: Tensor, across: Tensor) -> Tensor:
        """(R - I) of what has outputs along its first axis."""
        shape = (-1, *(1 for _ in rows.shape[1:]))
        return rows * less.reshape(shape) + self._swapped(rows, 0) * across.reshape(shape)

    def _swapped(self, y: Tensor, axis: int) -> Tensor:
        """Halves of each group along the axis, one in the other's place."""
        axis %= y.ndim
        halves = y.unflatten(axis, (-1, 2, self.group_size // 2))
        return halves.flip(axis + 1).flatten(axis, axis + 2)

    def fits(self, t: Tensors, site: Site) -> str | None:
        size = rotation.rotated_size(site, "output")
        undivided = f"groups of {self.group_size} do not divide its {size} outputs"
        return undivided if size % self.group_size else super().fits(t, site)

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        theta, a = tuple(t["road_theta"].shape), tuple(t["road_alpha"].shape)
        if len(theta) != 1 or theta != a:
            raise ShapeError(f"road_theta is {theta} and road_alpha {a}, wanted two of (numbers,)")
        return cls(bias="diff_b" in t)


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple[Method, dict[str, Tensor]]:
    """It turns the bias, too: `settled` knows that, and makes diff_b."""
    RoAd.infer(t, None)
    try:
        method = RoAd(config.get("variant", "road_1"), config.get("group_size", 64), bias=True)
    except (ConfigError, TypeError) as error:  # a variant may be a list
        raise FormatError(f"its config: {error}") from error
    return method, dict(t)


def _write(method: RoAd, t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    linear_only(method, shape)
    if "diff_b" in t or not method.bias:
        raise FormatError(
            "peft's RoAd turns a layer's bias, too, as only what peft trained does; layers without one (targets to_q, "
            "to_k, to_v) can be written"
        )
    return dict(t), {"variant": method.variant, "group_size": method.group_size}


RoAd.peft = Peft("ROAD", ("road_theta", "road_alpha"), _read, _write)
