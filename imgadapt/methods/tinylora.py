"""TinyLoRA: a vector, through random projections, between the weight's largest singular directions
(arXiv 2602.04118).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor

from imgadapt.errors import FormatError, ShapeError
from imgadapt.methods import singular
from imgadapt.methods.base import Method, Peft, Tensors, Way, linear_only, positive
from imgadapt.methods.lora import too_large
from imgadapt.sites import Site


@dataclass(frozen=True)
class TinyLoRA(Method):
    """delta = tinylora_up @ R @ tinylora_down, R = sum of v[k] * tinylora_p[k] over k < u, with v (u,) trained. What
    stays: tinylora_p (u, rank, rank), random, and of W's `rank` largest singular values and vectors tinylora_up =
    U sqrt(S) (out, rank), tinylora_down = sqrt(S) Vᵀ (rank, in / groups, *kernel), as peft shares them out
    (tuners/tinylora/layer.py).

    tied: v is one for all layers, `tinylora_shared`; else each has its own `tinylora_v` (of which rank² numbers can
        say all).

    What stays is in the file: an SVD, or a generator of random numbers, gives others elsewhere. peft's default,
    weight_tying=0, numbers the vectors by the model's layers: which a layer has is told by its projections. It can
    be read, and what is not tied cannot be written there.

    Raises:
        ConfigError: rank or u below 1.
    """

    rank: int = 2
    u: int = 64
    tied: bool = True

    name = "tinylora"
    rate_over_lora = 10.0
    tensors = ("tinylora_p", "tinylora_up", "tinylora_down")
    optional = ("tinylora_v", "tinylora_shared")
    frozen = ("tinylora_p", "tinylora_up", "tinylora_down")
    common = ("tinylora_shared",)
    starts_from_weight = True

    def __post_init__(self) -> None:
        positive("rank", self.rank)
        positive("u", self.u)

    @property
    def file_rank(self) -> int:
        return self.rank

    @classmethod
    def recognises(cls, names: set[str]) -> bool:
        return super().recognises(names) and len(names & set(cls.optional)) == 1

    def check(self, site: Site) -> str | None:
        return super().check(site) or too_large(self.rank, site)

    def resized(self, rank: int) -> Self:
        return self  # another rank is of other projections

    @property
    def _vector(self) -> str:
        return "tinylora_shared" if self.tied else "tinylora_v"

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        r = self.rank
        stay = {"tinylora_p": (self.u, r, r), "tinylora_up": (site.rows, r), "tinylora_down": (r, *site.shape[1:])}
        return {self._vector: (self.u,), **stay}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        assert weight is not None
        u, s, v = (tensor.cpu() for tensor in singular.largest(weight, self.rank))
        return {
            self._vector: torch.zeros(self.u),
            "tinylora_p": torch.randn(self.u, self.rank, self.rank) / math.sqrt(self.rank),
            "tinylora_up": u * s.sqrt(),
            "tinylora_down": (s.sqrt()[:, None] * v).reshape(self.rank, *site.shape[1:]),
        }

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        return (self._up(t) @ t["tinylora_down"].flatten(1)).reshape(site.shape)

    def way(self, site: Site) -> Way:
        return Way(pair=True, linear=("up",))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        return {"up": self._up(t), "down": t["tinylora_down"]}

    def pair(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        return self._up(t), t["tinylora_down"].flatten(1)

    def _up(self, t: Tensors) -> Tensor:
        return t["tinylora_up"] @ torch.einsum("k,kij->ij", t[self._vector], t["tinylora_p"])

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        p, tied = t["tinylora_p"], "tinylora_shared" in t
        vector = t["tinylora_shared" if tied else "tinylora_v"]
        if p.ndim != 3 or p.shape[1] != p.shape[2] or vector.shape != p.shape[:1]:
            raise ShapeError(
                f"tinylora_p is {tuple(p.shape)} and v {tuple(vector.shape)}, wanted (u, rank, rank), (u,)"
            )
        return cls(p.shape[1], len(p), tied)


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple[Method, dict[str, Tensor]]:
    if not {"tinylora_A", "tinylora_B", "tinylora_P"} <= t.keys():
        raise FormatError("its projections are not in the file; train it with save_projection=True")
    p = t["tinylora_P"]
    vectors = {name: tensor for name, tensor in t.items() if name.startswith("tinylora_v.")}
    own = {"tinylora_p": p, "tinylora_up": t["tinylora_B"], "tinylora_down": t["tinylora_A"]}
    if not vectors or p.ndim != 3:
        raise FormatError(f"it has {len(vectors)} vectors, and tinylora_P {tuple(p.shape)}")
    if len(vectors) == 1:
        own["tinylora_shared"] = next(iter(vectors.values()))
    else:
        own["tinylora_v"] = vectors[f"tinylora_v.{_place(p, len(vectors), config)}"]
    return TinyLoRA.infer(own, None), own


def _place(p: Tensor, count: int, config: Mapping[str, Any]) -> int:
    """Which layer of the model drew these projections, with a seed of its own."""
    seed = config.get("projection_seed", 42)
    if config.get("weight_tying", 0.0) != 0 or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise FormatError(
            f"which of its {count} vectors a layer has is not in the file; it can be with weight_tying 0, 1"
        )
    if count * p.numel() > 2**28:
        raise FormatError(f"projections {tuple(p.shape)} of {count} layers are too many to be tried")
    place = _drawn_by(seed, count, tuple(p.shape), p.dtype).get(p.flatten()[:8].float().numpy().tobytes())
    if place is None:
        raise FormatError(f"no layer's projections of the seed {seed} are these; which vector it has is not known")
    return place


@lru_cache(4)
def _drawn_by(seed: int, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> dict[bytes, int]:
    """The first of a layer's projections -> its number (peft's `_init_projection`)."""
    made: dict[bytes, int] = {}
    for k in range(count):
        generator = torch.Generator().manual_seed(seed + k)
        p = torch.normal(0.0, 1 / shape[1] ** 0.5, shape, generator=generator)
        made[p.to(dtype).flatten()[:8].float().numpy().tobytes()] = k
    return made


def _write(method: TinyLoRA, t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    linear_only(method, shape)
    if not method.tied:
        raise FormatError("peft numbers vectors that are not tied by the model's layers")
    named = {"tinylora_A": t["tinylora_down"], "tinylora_B": t["tinylora_up"], "tinylora_P": t["tinylora_p"]}
    config = {"r": method.rank, "u": method.u, "weight_tying": 1.0, "save_projection": True}
    return {**named, "tinylora_v.0": t["tinylora_shared"]}, config


TinyLoRA.peft = Peft(
    "TINYLORA", ("tinylora_A", "tinylora_B", "tinylora_P"), _read, _write, beside=("tinylora_v", "tinylora_v.0")
)
