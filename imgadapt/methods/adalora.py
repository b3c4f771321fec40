"""AdaLoRA: singular values and vectors, of which training keeps the ranks that matter (arXiv 2303.10512)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from imgadapt.errors import ConfigError, FormatError, ShapeError
from imgadapt.methods.base import Method, Peft, Tensors, Way, positive
from imgadapt.methods.lora import check_alpha, too_large
from imgadapt.sites import Site

_EPSILON = 1e-5  # which peft adds to the rank that it divides by
_LARGEST = 4096  # that is filled up to
_MOST = 2**31  # that a rank or an alpha of a file may be


@dataclass(frozen=True)
class AdaLoRA(Method):
    """delta = b @ diag(e) @ a; adalora_a is (rank, in / groups, *kernel), adalora_e (rank,), adalora_b (out, rank).

    Which ranks stay is a rule of training (`training/rules/adalora.py`), which also keeps a and b near orthonormal; a
    layer then has the ranks that are left. Fresh as peft has it (tuners/adalora/layer.py): e zero, the others normal of
    0.02. peft has it on linear layers and 2-d convolutions without groups.

    alpha: the delta is multiplied by alpha / start; None means start.
    start: the rank that it began with; None: that it has.

    Raises:
        ConfigError: a rank below 1 or above start, or alpha not a finite positive number.
    """

    rank: int = 12
    alpha: float | None = None
    start: int | None = None

    name = "adalora"
    rate_over_lora = 16.0
    tensors = ("adalora_a", "adalora_e", "adalora_b")

    def __post_init__(self) -> None:
        positive("rank", self.rank)
        check_alpha(self.alpha)
        if self.start is not None:
            positive("start", self.start)
            if self.start < self.rank:
                raise ConfigError(f"start is {self.start}; it cannot be below the rank, {self.rank}")

    @property
    def began(self) -> int:
        """The rank that it began with."""
        return self.rank if self.start is None else self.start

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.began

    @property
    def file_rank(self) -> int:
        return self.rank

    @property
    def ranked(self) -> dict[str, int]:
        return {"adalora_e": 0}

    @property
    def cut(self) -> dict[str, int]:
        return {"adalora_a": 0, "adalora_e": 0, "adalora_b": 1}

    def check(self, site: Site) -> str | None:
        return super().check(site) or too_large(self.rank, site)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        r = self.rank
        return {"adalora_a": (r, *site.shape[1:]), "adalora_e": (r,), "adalora_b": (site.rows, r)}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        made = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        for name in ("adalora_a", "adalora_b"):
            nn.init.normal_(made[name], std=0.02)
        return made

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        up, down = self._pair(t)
        return (up @ down).reshape(site.shape)

    def way(self, site: Site) -> Way:
        return Way(pair=True, linear=("up",))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        return {"up": t["adalora_b"] * t["adalora_e"], "down": t["adalora_a"]}

    def _pair(self, t: Tensors) -> tuple[Tensor, Tensor]:
        return t["adalora_b"] * t["adalora_e"], t["adalora_a"].flatten(1)

    def pair(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        return self._pair(t)

    def resized(self, rank: int) -> Self:
        if rank == self.rank:
            return self
        start = max(rank, self.began)
        return replace(self, rank=rank, start=start, alpha=self.scale * start)

    def unscaled(self) -> Self:
        return replace(self, alpha=None, start=None)

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        a, e, b = (t[name] for name in cls.tensors)
        if a.ndim < 2 or e.ndim != 1 or b.ndim != 2 or not a.shape[0] == e.shape[0] == b.shape[1]:
            said = ", ".join(f"{name} {tuple(t[name].shape)}" for name in cls.tensors)
            raise ShapeError(f"{said}: wanted (rank, in, ...), (rank,) and (out, rank)")
        return cls(rank=e.shape[0], alpha=alpha)


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple[Method, dict[str, Tensor]]:
    """peft multiplies by lora_alpha / (init_r + 1e-5), whatever ranks are left; what is not above 0 is init_r."""
    a, e, b = (t[f"lora_{key}"] for key in "AEB")
    if a.ndim != 2 or e.ndim != 2 or b.ndim != 2 or not a.shape[0] == e.numel() == b.shape[1]:
        raise FormatError(f"lora_A is {tuple(a.shape)}, lora_E {tuple(e.shape)}, lora_B {tuple(b.shape)}: not one rank")
    rank, start, alpha = e.numel(), config.get("init_r", 12), config.get("lora_alpha", config.get("alpha", 8))
    if type(start) is not int or not rank <= start < _MOST or type(alpha) not in (int, float) or not alpha < _MOST:
        raise FormatError(f"init_r is {start!r} and lora_alpha {alpha!r}, for a layer of rank {rank}")
    alpha = alpha if alpha > 0 else start
    made = AdaLoRA(rank, alpha * start / (start + _EPSILON), start)
    kernel = () if shape is None else shape[2:]
    a = a.reshape(rank, -1, *kernel) if kernel and shape is not None and a.numel() == rank * _fan(shape) else a
    return made, {"adalora_a": a, "adalora_e": e.reshape(-1), "adalora_b": b}


def _write(method: AdaLoRA, t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """With zeros up to the rank that it began with, for peft's config has one rank for all layers."""
    start, alpha = method.began, method.scale * method.began
    if start > max(method.rank, _LARGEST):
        raise FormatError(f"it began with {start} ranks, and peft's file has zeros for those that are gone")
    a, e, b = t["adalora_a"].flatten(1), t["adalora_e"][:, None], t["adalora_b"]
    more = start - method.rank
    made = {
        "lora_A": nn.functional.pad(a, (0, 0, 0, more)),
        "lora_E": nn.functional.pad(e, (0, 0, 0, more)),
        "lora_B": nn.functional.pad(b, (0, more)),
    }
    # peft wants a schedule; one of a single step does nothing
    return made, {"init_r": start, "lora_alpha": alpha * (start + _EPSILON) / start, "total_step": 1}


def _fan(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape[1:]).numel())


AdaLoRA.peft = Peft("ADALORA", ("lora_A", "lora_E", "lora_B"), _read, _write)
