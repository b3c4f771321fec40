"""IA3: a factor for each output or input channel (arXiv 2205.05638)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from imgadapt.errors import ConfigError, ShapeError
from imgadapt.methods.base import Method, Tensors, Way
from imgadapt.sites import Site


@dataclass(frozen=True)
class IA3(Method):
    """delta = W * vector along one axis; vector (out,) or, on the input, (in / groups,).

    axis: "output", or "input" (peft's `feedforward_modules`, LyCORIS' `train_on_input`).
    absolute: vector is the factor itself, 1 when fresh, as peft stores it; else what is added to 1, as LyCORIS does.
    bias: the bias changes, too, by `diff_b` (out,). peft multiplies it like the rest of the output: its files have no
        `diff_b`, and `attach` makes it.

    Raises:
        ConfigError: an axis that is neither.
    """

    axis: Literal["output", "input"] = "output"
    absolute: bool = False
    bias: bool = False

    name = "ia3"
    rate_over_lora = 5.3
    tensors = ("vector",)
    optional = ("diff_b",)
    needs_weight = True

    def __post_init__(self) -> None:
        if self.axis not in ("output", "input"):
            raise ConfigError(f"axis is {self.axis!r}; it must be 'output' or 'input'")

    def check(self, site: Site) -> str | None:
        if self.axis == "input" and site.kind == "embedding":
            return "its inputs are token ids, which have no channels; use axis='output'"
        return super().check(site)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        bias = {"diff_b": (site.rows,)} if self.bias else {}
        return {"vector": (site.shape[0 if self.axis == "output" else 1],), **bias}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        made = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        return {**made, "vector": made["vector"] + float(self.absolute)}

    def settled(
        self, t: Tensors, weight: Callable[[], Tensor], bias: Callable[[], Tensor | None]
    ) -> tuple[Method, Tensors]:
        if not self.bias or "diff_b" in t:
            return self, t
        vector, b = t["vector"], bias()
        if b is None or b.shape != vector.shape:
            return replace(self, bias=False), t
        return self, {**t, "diff_b": (vector.float() - 1) * b.float().to(vector.device)}

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        assert weight is not None
        axis = 0 if self.axis == "output" else 1
        return weight * self._less(t).reshape([-1 if d == axis else 1 for d in range(weight.ndim)])

    def way(self, site: Site) -> Way:
        on_output = self.axis == "output"
        return Way(turn=not on_output, act=on_output, output=on_output, linear=("less", "bias"))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        return {"less": self._less(t), **({"bias": t["diff_b"]} if "diff_b" in t else {})}

    def bias_delta(self, t: Tensors) -> Tensor | None:
        return t.get("diff_b")

    def _less(self, t: Tensors) -> Tensor:
        return t["vector"] - 1 if self.absolute else t["vector"]

    def turn(self, o: Tensors, site: Site, x: Tensor, onto: Tensor | None) -> Tensor:
        less = site.along(o["less"].repeat(site.groups))
        return x * less if onto is None else torch.addcmul(onto, x, less)

    def act(self, o: Tensors, site: Site, x: Tensor, y: Tensor | None, onto: Tensor | None) -> Tensor:
        assert y is not None
        less = site.along(o["less"])
        return y * less if onto is None else torch.addcmul(onto, y, less)

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        if t["vector"].ndim != 1:
            raise ShapeError(f"vector is {tuple(t['vector'].shape)}, wanted (channels,)")
        return cls(bias="diff_b" in t)
