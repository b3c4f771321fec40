"""VeRA: two trained vectors between random projections that all layers share (arXiv 2310.11454)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from imgadapt.errors import FormatError, ShapeError
from imgadapt.methods import projections
from imgadapt.methods.base import Method, Peft, Tensors, Way, above_zero, linear_only, positive
from imgadapt.shared import corner
from imgadapt.sites import Site


@dataclass(frozen=True)
class VeRA(Method):
    """delta = diag(vera_b) up diag(vera_d) down, with vera_b (out,), vera_d (rank,) and random up (out, rank), down
    (rank, in / groups, *kernel), which nothing trains.

    seed: 0 to 65535; of the projections, uniform within sqrt(6 / inputs) (Kaiming's, as peft draws them), of which a
        smaller layer has the first columns, or rows, of a larger one's; no file has them. None: they are tensors of
        the layer, `vera_down` and `vera_up`, as in files that another tool made.
    d_initial: vera_d when fresh; vera_b is 0.

    Its numbers are few, its cost that of a LoRA of its rank: up takes both vectors, and `down` has no gradient.
    peft (tuners/vera/layer.py) has linear layers only; a convolution's inputs are flattened here.

    Raises:
        ConfigError: rank below 1, a seed out of range, d_initial not above 0.
    """

    rank: int = 256
    seed: int | None = 0
    d_initial: float = 0.1

    name = "vera"
    rate_over_lora = 10.0
    fresh_only = ("d_initial",)
    tensors = ("vera_b", "vera_d")
    optional = ("vera_down", "vera_up")
    frozen = ("vera_down", "vera_up")
    common = ("vera_down", "vera_up")

    def __post_init__(self) -> None:
        positive("rank", self.rank)
        projections.check_seed(self.seed)
        above_zero("d_initial", self.d_initial, "the default")

    @property
    def file_rank(self) -> int:
        return self.rank

    @property
    def ranked(self) -> dict[str, int]:
        return {"vera_d": 0}

    def check(self, site: Site) -> str | None:
        return super().check(site) or projections.too_large(self.rank * (site.rows + site.fan_in))

    def resized(self, rank: int) -> Self:
        return self  # another rank is of other projections

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        vectors = {"vera_b": (site.rows,), "vera_d": (self.rank,)}
        return vectors if self.seed is not None else {**vectors, **self._projected(site)}

    def _projected(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"vera_down": (self.rank, *site.shape[1:]), "vera_up": (site.rows, self.rank)}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        made = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        made["vera_d"].fill_(self.d_initial)
        for name in made.keys() & set(self.frozen):
            nn.init.kaiming_uniform_(made[name], nonlinearity="relu")
        return made

    @property
    def constant_names(self) -> frozenset[str]:
        return frozenset() if self.seed is None else frozenset(self.frozen)

    def constants(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        if self.seed is None:
            return {}
        narrow, wide = (math.sqrt(6 / inputs) for inputs in (site.fan_in, self.rank))
        return {
            "vera_down": projections.columns(self.seed, 0, self.rank, site.shape[1:], narrow),
            "vera_up": projections.rows(self.seed, 1, site.rows, self.rank, wide),
        }

    def settled(
        self, t: Tensors, weight: Callable[[], Tensor], bias: Callable[[], Tensor | None]
    ) -> tuple[Method, Tensors]:
        """Of projections that a file has for all layers, those of this one."""
        if self.seed is not None or any(name not in t or t[name].ndim != 2 for name in self.frozen):
            return self, t  # `fits` says what is wrong
        shape = weight().shape
        if len(shape) != 2 or t["vera_down"].shape[1] < shape[1] or len(t["vera_up"]) < shape[0]:
            return self, t
        down, up = corner(t["vera_down"], (self.rank, shape[1])), corner(t["vera_up"], (shape[0], self.rank))
        return self, {**t, "vera_down": down, "vera_up": up}

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        up, down = self._pair(t, site)
        return (up @ down.flatten(1)).reshape(site.shape)

    def way(self, site: Site) -> Way:
        return Way(pair=True, linear=("up",))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        up, down = self._pair(t, site)
        return {"up": up, "down": down}

    def pair(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        up, down = self._pair(t, site)
        return up, down.flatten(1)

    def _pair(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        t = self.whole(t, site, None)
        # the outer product first: autograd then keeps the vectors and what all layers share, and nothing else
        return torch.outer(t["vera_b"], t["vera_d"]) * t["vera_up"], t["vera_down"]

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        b, d = t["vera_b"], t["vera_d"]
        if b.ndim != 1 or d.ndim != 1:
            raise ShapeError(f"vera_b is {tuple(b.shape)} and vera_d {tuple(d.shape)}, wanted (out,) and (rank,)")
        have = t.keys() & set(cls.frozen)
        if len(have) == 1:
            raise ShapeError(f"{have.pop()} is there, and the other projection is not")
        return cls(rank=len(d), seed=None if have else 0)


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple[Method, dict[str, Tensor]]:
    b, d = t["vera_lambda_b"], t["vera_lambda_d"]
    if not {"vera_A", "vera_B"} <= t.keys():
        raise FormatError("its projections are not in the file; train it with save_projection=True")
    a, whole = t["vera_A"], t["vera_B"]
    if b.ndim != 1 or d.ndim != 1 or a.ndim != 2 or whole.ndim != 2 or len(a) < len(d) or whole.shape[1] < len(d):
        raise FormatError(f"vera_A is {tuple(a.shape)} and vera_B {tuple(whole.shape)}, of another rank than {len(d)}")
    shape = shape or (len(b), a.shape[1])  # how many inputs it has is not in the file: `settled` cuts
    if len(shape) != 2 or shape[0] != len(b) or a.shape[1] < shape[1] or len(whole) < shape[0]:
        raise FormatError(f"a layer of {shape} is larger than vera_A {tuple(a.shape)} and vera_B {tuple(whole.shape)}")
    own = {"vera_down": corner(a, (len(d), shape[1])), "vera_up": corner(whole, (len(b), len(d)))}
    return VeRA(rank=len(d), seed=None), {"vera_b": b, "vera_d": d, **own}


def _write(method: VeRA, t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Of a seed the projections are those before scaling by the layer's size, which vera_d gets."""
    linear_only(method, shape)
    config = {"r": method.rank, "save_projection": True, "d_initial": method.d_initial}
    if method.seed is None:
        a, b, d = t["vera_down"], t["vera_up"], t["vera_d"]
    else:
        a = projections.columns(method.seed, 0, method.rank, shape[1:])
        b = projections.rows(method.seed, 1, shape[0], method.rank, math.sqrt(6 / method.rank))
        d = t["vera_d"] * math.sqrt(6 / shape[1])
        config["projection_prng_key"] = method.seed
    return {"vera_lambda_b": t["vera_b"], "vera_lambda_d": d, "vera_A": a, "vera_B": b}, config


VeRA.peft = Peft("VERA", ("vera_lambda_b", "vera_lambda_d"), _read, _write, beside=("vera_A", "vera_B"))
