"""RandLoRA: a full-rank change, of random bases that all layers share and that two small matrices weigh
(arXiv 2502.00987).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor

from imgadapt.errors import FormatError, ShapeError
from imgadapt.methods import projections
from imgadapt.methods.base import Method, Peft, Tensors, linear_only
from imgadapt.methods.lora import Scaled
from imgadapt.shared import corner
from imgadapt.sites import Site


@dataclass(frozen=True)
class RandLoRA(Scaled):
    """delta = large @ small, or its transpose where a layer has fewer outputs than inputs. With `least` and `most` the
    two sizes of the weight, and n = least / rank bases, rounded up: small (n rank, least) is randlora_a (rank, least)
    times randlora_lambda (rank, n) times randlora_gamma (n, least), large (most, n rank) is randlora_b (most, n, rank).
    a and b are random, lambda and gamma are trained. Row k of small is of lambda's row k // n and column k % n, column
    k of large of basis k // rank, as peft pairs them (tuners/randlora/layer.py): the paper's sum over bases pairs equal
    ones.

    rank: of a basis. The larger, the fewer numbers are trained; the change is of full rank always.
    alpha: the delta is multiplied by alpha / rank; peft's usual is 20 rank. None means rank.
    seed: 0 to 65535; of the projections, uniform with deviation 1, of which a smaller layer has the first elements of a
        larger one's; no file has them. None: they are tensors of the layer, as in files that another tool made.

    Its two products cost more than twice the layer's, so the delta is built, in one product with `large`, and goes into
    the one product with the weight. peft has linear layers only, and its files hold the projections once more for each
    layer; a convolution's inputs are flattened here.

    Raises:
        ConfigError: rank below 1, alpha not a finite positive number, a seed out of range.
    """

    rank: int = 32
    alpha: float | None = 640.0
    seed: int | None = 0

    name = "randlora"
    rate_over_lora = 0.25
    tensors = ("randlora_lambda", "randlora_gamma")
    optional = ("randlora_a", "randlora_b")
    frozen = ("randlora_a", "randlora_b")
    common = ("randlora_a", "randlora_b")

    def __post_init__(self) -> None:
        super().__post_init__()
        projections.check_seed(self.seed)

    @property
    def ranked(self) -> dict[str, int]:
        return {"randlora_lambda": 0}

    def check(self, site: Site) -> str | None:
        return super().check(site) or projections.too_large(math.prod(self._projected(site)["randlora_b"]))

    def resized(self, rank: int) -> Self:
        return self  # another rank is of other projections

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        least = min(site.rows, site.fan_in)
        count = _bases(least, self.rank)
        trained = {"randlora_lambda": (self.rank, count), "randlora_gamma": (count, least)}
        return trained if self.seed is not None else {**trained, **self._projected(site)}

    def _projected(self, site: Site) -> dict[str, tuple[int, ...]]:
        least, most = sorted((site.rows, site.fan_in))
        return {"randlora_a": (self.rank, least), "randlora_b": (most, _bases(least, self.rank), self.rank)}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        made = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        gamma = made["randlora_gamma"]
        gamma.fill_(1 / max(gamma.shape))
        for name in made.keys() & set(self.frozen):
            made[name].uniform_(-math.sqrt(3), math.sqrt(3))
        return made

    @property
    def constant_names(self) -> frozenset[str]:
        return frozenset() if self.seed is None else frozenset(self.frozen)

    def constants(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        return {} if self.seed is None else _drawn(self.seed, self._projected(site))

    def settled(
        self, t: Tensors, weight: Callable[[], Tensor], bias: Callable[[], Tensor | None]
    ) -> tuple[Method, Tensors]:
        """Of projections that a file has for all layers, those of this one."""
        if self.seed is not None or (b := t.get("randlora_b")) is None or b.ndim != 3:
            return self, t  # `fits` says what is wrong
        wanted = self._projected(Site(tuple(weight().shape)))["randlora_b"]
        cut = all(have >= need for have, need in zip(b.shape, wanted, strict=True))
        return self, {**t, "randlora_b": corner(b, wanted)} if cut else t

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        t = self.whole(t, site, None)
        # the outer product first: autograd then keeps its factors and what all layers share, and nothing else
        small = t["randlora_lambda"][:, :, None] * t["randlora_gamma"] * t["randlora_a"][:, None]
        small, large = small.flatten(0, 1), t["randlora_b"].flatten(1)
        made = large @ small if site.fan_in <= site.rows else small.t() @ large.t()
        return made.reshape(site.shape)

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        weights, gamma = t["randlora_lambda"], t["randlora_gamma"]
        if weights.ndim != 2 or gamma.ndim != 2 or weights.shape[1] != len(gamma):
            raise ShapeError(
                f"randlora_lambda is {tuple(weights.shape)} and randlora_gamma {tuple(gamma.shape)}, "
                "wanted (rank, bases) and (bases, least of the layer's sizes)"
            )
        have = t.keys() & set(cls.frozen)
        if len(have) == 1:
            raise ShapeError(f"{have.pop()} is there, and the other projection is not")
        return cls(rank=len(weights), alpha=alpha, seed=None if have else 0)


def _bases(least: int, rank: int) -> int:
    return -(-least // rank)


def _drawn(seed: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    rank, least = shapes["randlora_a"]
    most, count, _ = shapes["randlora_b"]
    a = projections.columns(seed, 0, rank, (least,), math.sqrt(3))
    return {"randlora_a": a, "randlora_b": _stacked(seed, most, count, rank)}


@lru_cache(maxsize=16)
def _stacked(seed: int, most: int, count: int, rank: int) -> Tensor:
    """(most, count, rank): each basis from a stream of its own, so that fewer of them, and of fewer rows, are the first
    ones.
    """
    if wrong := projections.too_large(most * count * rank):
        raise ShapeError(wrong)
    bases = [projections.drawn(seed, 1 + k, most, rank, math.sqrt(3)) for k in range(count)]
    with torch.inference_mode(False), torch.no_grad():
        return torch.stack(bases, 1)


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple[Method, dict[str, Tensor]]:
    if not {"randlora_A", "randlora_B"} <= t.keys():
        raise FormatError("its projections are not in the file; train it with save_projection=True")
    if shape is not None and len(shape) != 2:
        raise FormatError(f"peft's RandLoRA is for linear layers, and this weight is {shape}")
    own = {"randlora_lambda": t["randlora_lambda"], "randlora_gamma": t["randlora_gamma"]}
    alpha = config.get("randlora_alpha", 640)
    method = RandLoRA(RandLoRA.infer(own, None).rank, alpha, None)
    a, b = t["randlora_A"], t["randlora_B"]
    if a.ndim != 3 or b.ndim != 3 or a.shape[1] != 1:
        raise FormatError(f"randlora_A is {tuple(a.shape)} and randlora_B {tuple(b.shape)}, wanted three axes")
    least = t["randlora_gamma"].shape[1]
    if shape is None:  # its larger size is not in the file: `settled` cuts
        shape = (max(len(b), least), least)
    wanted = method._projected(Site(shape))  # pyright: ignore[reportPrivateUsage]
    rank = method.rank
    if min(shape) != least or len(a) != rank or a.shape[2] < least or b.shape[2] != rank:
        raise FormatError(f"randlora_A is {tuple(a.shape)}, randlora_B {tuple(b.shape)}, and a basis of rank {rank}")
    if any(have < need for have, need in zip(b.shape, wanted["randlora_b"], strict=True)):
        raise FormatError(f"randlora_B is {tuple(b.shape)}, and a layer of {shape} needs {wanted['randlora_b']}")
    return method, {
        **own,
        "randlora_a": corner(a, (rank, 1, least)).view(rank, least),
        "randlora_b": corner(b, wanted["randlora_b"]),
    }


def _write(method: RandLoRA, t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    linear_only(method, shape)
    site = Site(shape)
    drawn = {} if method.seed is None else _drawn(method.seed, method._projected(site))  # pyright: ignore[reportPrivateUsage]
    whole = {**t, **drawn}
    config = {
        "r": method.rank,
        "randlora_alpha": method.scale * method.rank,
        "save_projection": True,
        **({} if method.seed is None else {"projection_prng_key": method.seed}),
    }
    return {
        "randlora_lambda": t["randlora_lambda"],
        "randlora_gamma": t["randlora_gamma"],
        "randlora_A": whole["randlora_a"][:, None],
        "randlora_B": whole["randlora_b"],
    }, config


def _widest(method: RandLoRA, largest: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    least, most = sorted(largest[:2])
    rank = method.rank
    if wrong := projections.too_large(most * _bases(least, rank) * rank):
        raise FormatError(wrong)
    return {"randlora_A": (rank, 1, least), "randlora_B": (most, _bases(least, rank), rank)}


RandLoRA.peft = Peft(
    "RANDLORA", ("randlora_lambda", "randlora_gamma"), _read, _write, ("randlora_A", "randlora_B"), _widest
)
