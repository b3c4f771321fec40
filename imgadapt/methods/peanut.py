"""PEANuT: a change of the weight that a small network makes of the weight (arXiv 2410.01870)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imgadapt.errors import ConfigError, FormatError, ShapeError
from imgadapt.methods import sparse
from imgadapt.methods.base import Method, Peft, Tensors, Way, linear_only, positive
from imgadapt.methods.lora import too_large
from imgadapt.sites import Site

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
_DEEPEST = 8


@dataclass(frozen=True)
class PEANuT(sparse.ByScaling):
    """delta = b @ h with h = f(a @ W) over the flattened inputs, a (rank, out), b (out, rank); peanut_a and peanut_b.

    depth: so many layers h <- f(e_k @ h), then as many h <- f(d_k @ h) + what went into e_k, the last first:
        `peanut_encoders` and `peanut_decoders` (depth, rank, rank).
    activation: f: "relu", "gelu", "silu" or "tanh".
    scaling: the delta is multiplied by it.

    Acts as the low-rank pair (b, h), for which W is read once in a forward, as by `rank` tokens. peft, which has linear
    layers only, builds the delta in each forward (huggingface/peft tuners/peanut/layer.py).

    Raises:
        ConfigError: rank below 1, depth not 0 to 8, an activation that is none, a scaling not above 0.
    """

    rank: int = 16
    depth: int = 0
    activation: str = "relu"
    scaling: float = 1.0

    name = "peanut"
    rate_over_lora = 1.4
    tensors = ("peanut_a", "peanut_b")
    optional = ("peanut_encoders", "peanut_decoders")
    needs_weight = True
    additive = False

    def __post_init__(self) -> None:
        positive("rank", self.rank)
        sparse.check_scaling(self.scaling)
        if self.depth != 0 or isinstance(self.depth, bool):
            positive("depth (or 0)", self.depth)
        if self.depth > _DEEPEST:
            raise ConfigError(f"depth is {self.depth}; it must be {_DEEPEST} at most")
        if self.activation not in _ACTIVATIONS:
            raise ConfigError(f"activation is {self.activation!r}; there are {', '.join(_ACTIVATIONS)}")

    def check(self, site: Site) -> str | None:
        return super().check(site) or too_large(self.rank, site)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        made = {"peanut_a": (self.rank, site.rows), "peanut_b": (site.rows, self.rank)}
        deep = (self.depth, self.rank, self.rank)
        return {**made, **({"peanut_encoders": deep, "peanut_decoders": deep} if self.depth else {})}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        made = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        for name in made.keys() - {"peanut_b"}:
            matrices = made[name] if made[name].ndim == 3 else made[name][None]
            for matrix in matrices:
                nn.init.kaiming_uniform_(matrix, a=5**0.5)
        return made

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        assert weight is not None
        return (t["peanut_b"] @ self._made(t, weight)).reshape(site.shape)

    def way(self, site: Site) -> Way:
        return Way(pair=True, weight=True, linear=("up",))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        assert weight is not None
        return {"up": t["peanut_b"], "down": self._made(t, weight).reshape(-1, *site.shape[1:])}

    def _made(self, t: Tensors, weight: Tensor) -> Tensor:
        """h, (rank, inputs)."""
        f, a = _ACTIVATIONS[self.activation], t["peanut_a"]
        h = f((a.to(weight.dtype) @ weight.flatten(1)).to(a.dtype))
        before: list[Tensor] = []
        for matrix in t.get("peanut_encoders", ()):
            before.append(h)
            h = f(matrix @ h)
        for matrix in t.get("peanut_decoders", ()):
            h = f(matrix @ h) + before.pop()
        return h

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        a, b = t["peanut_a"].shape, t["peanut_b"].shape
        if len(a) != 2 or tuple(b) != (a[1], a[0]):
            raise ShapeError(f"peanut_a is {tuple(a)} and peanut_b {tuple(b)}, wanted (rank, out) and (out, rank)")
        deep = [tuple(t[name].shape) for name in cls.optional if name in t]
        if deep and (len(deep) < 2 or deep[0] != deep[1] or deep[0][1:] != (a[0], a[0])):
            raise ShapeError(f"peanut_encoders and peanut_decoders are {deep}, wanted two of (depth, {a[0]}, {a[0]})")
        return cls(a[0], deep[0][0] if deep else 0, scaling=1.0 if alpha is None else alpha)


_KINDS = ("encoders", "decoders")


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple[Method, dict[str, Tensor]]:
    own = {"peanut_a": t["peanut_A.weight"], "peanut_b": t["peanut_B.weight"]}
    depth = (len(t) - 2) // 2
    for kind in _KINDS if depth else ():
        own[f"peanut_{kind}"] = torch.stack([t[f"peanut_{kind}.{k}.weight"] for k in range(depth)])
    if "act_fn" not in config or "scaling" not in config:
        raise FormatError("act_fn and scaling, of its adapter_config.json, are needed")
    made = PEANuT.infer(own, config["scaling"])
    return replace(made, activation=config["act_fn"]), own


def _write(method: PEANuT, t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    linear_only(method, shape)
    made = {"peanut_A.weight": t["peanut_a"], "peanut_B.weight": t["peanut_b"]}
    for kind in _KINDS:
        for k, matrix in enumerate(t.get(f"peanut_{kind}", ())):
            made[f"peanut_{kind}.{k}.weight"] = matrix.contiguous()
    fields = {"r": method.rank, "depth": method.depth, "act_fn": method.activation, "scaling": method.scaling}
    return made, fields


PEANuT.peft = Peft(
    "PEANUT",
    ("peanut_A.weight", "peanut_B.weight", *(f"peanut_{kind}.{k}.weight" for kind in _KINDS for k in range(_DEEPEST))),
    _read,
    _write,
)
