"""DeLoRA: a low-rank change whose size is learned apart from its direction (arXiv 2503.18225)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from imgadapt.errors import ConfigError, FormatError, ShapeError
from imgadapt.methods.base import Method, Peft, Tensors, Way, above_zero, linear_only, positive
from imgadapt.methods.lora import too_large
from imgadapt.sites import Site


@dataclass(frozen=True)
class DeLoRA(Method):
    """delta = lambda / rank * sum over i of b_i a_i / (‖b_i‖ ‖a_i‖), times norm for each input.

    `delora_a` (rank, in / groups, *kernel), `delora_b` (out, rank), `delora_lambda` (1,), and `delora_norm`
    (in / groups, *kernel): W's column norms, which stay as they are (huggingface/peft tuners/delora).

    bound: lambda when fresh (peft's `delora_lambda`, 15 there). The change is at most lambda / sqrt(inputs) of ‖W‖,
        where W's columns are of one size. Only b is 0 when fresh: after one step, however small, the change is of the
        order of its bound. A small bound is mild.

    Lengths below 1e-4 count as that, as in peft, which is for linear layers only.

    Raises:
        ConfigError: rank below 1, or bound not a finite number above 0.
    """

    rank: int = 8
    bound: float = 1.0

    name = "delora"
    rate_over_lora = 5.0
    fresh_only = ("bound",)
    tensors = ("delora_a", "delora_b", "delora_lambda", "delora_norm")
    frozen = ("delora_norm",)
    starts_from_weight = True
    additive = False

    def __post_init__(self) -> None:
        positive("rank", self.rank)
        if self.bound is None:  # pyright: ignore[reportUnnecessaryComparison] # a file may say so
            raise ConfigError("bound is None; it must be a finite number above 0")
        above_zero("bound", self.bound, "none")

    @property
    def ranked(self) -> dict[str, int]:
        return {"delora_a": 0}

    def check(self, site: Site) -> str | None:
        return super().check(site) or too_large(self.rank, site)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        inputs = site.shape[1:]
        a, b = (self.rank, *inputs), (site.rows, self.rank)
        return {"delora_lambda": (1,), "delora_a": a, "delora_b": b, "delora_norm": inputs}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        assert weight is not None
        made = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        nn.init.kaiming_uniform_(made["delora_a"], a=math.sqrt(5))
        norm = torch.linalg.vector_norm(weight.detach().float(), dim=0).cpu()
        return {**made, "delora_lambda": torch.tensor([float(self.bound)]), "delora_norm": norm}

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        up, down = self._pair(t)
        return (up @ down.flatten(1)).reshape(site.shape)

    def way(self, site: Site) -> Way:
        return Way(pair=True, linear=("up",))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        up, down = self._pair(t)
        return {"up": up, "down": down}

    def _pair(self, t: Tensors) -> tuple[Tensor, Tensor]:
        a, b = t["delora_a"], t["delora_b"]
        sizes = torch.linalg.vector_norm(a.flatten(1), dim=1).clamp(min=1e-4)
        sizes = sizes * torch.linalg.vector_norm(b, dim=0).clamp(min=1e-4)
        return b * (t["delora_lambda"] / len(a) / sizes), a * t["delora_norm"]

    def pair(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        up, down = self._pair(t)
        return up, down.flatten(1)

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        a, b, norm = (tuple(t[name].shape) for name in ("delora_a", "delora_b", "delora_norm"))
        if len(a) < 2 or len(b) != 2 or b[1] != a[0] or norm != a[1:] or tuple(t["delora_lambda"].shape) != (1,):
            said = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in t.items())
            raise ShapeError(f"{said} do not belong together")
        return cls(rank=a[0])


_NAMES = {
    "delora_A": "delora_a",
    "delora_B": "delora_b",
    "delora_lambda": "delora_lambda",
    "delora_w_norm": "delora_norm",
}


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple[Method, dict[str, Tensor]]:
    if set(t) != set(_NAMES):
        raise FormatError(f"it has {', '.join(sorted(t)) or 'nothing'}; wanted {', '.join(sorted(_NAMES))}")
    made = {_NAMES[name]: tensor for name, tensor in t.items()}
    return DeLoRA.infer(made, None), made


def _write(method: DeLoRA, t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    linear_only(method, shape)
    return {name: t[own] for name, own in _NAMES.items()}, {"r": method.rank}


DeLoRA.peft = Peft("DELORA", tuple(_NAMES), _read, _write)
