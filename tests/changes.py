"""Adapters of one layer or a few, for tests of merging, and what they change by their own formulas."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imgadapt import BOFT, IA3, OFT, AdapterFile, DoRA, Full, GLoRA, LoHa, LoKr, LoRA, Norm
from imgadapt.combining.engine import Engine, Input, whole
from imgadapt.combining.recipe import Entry, MergeRecipe
from imgadapt.formats import Part
from imgadapt.methods import Method
from imgadapt.sites import Site

LINEAR, CONV, NORM = (
    Site((24, 40), bias="bias"),
    Site((12, 10, 3, 3), "conv", bias="bias"),
    Site((24,), "norm", bias="bias"),
)


METHODS: dict[str, tuple[Method, Site]] = {
    "lora": (LoRA(rank=4, alpha=2.0), LINEAR),
    "rslora": (LoRA(rank=4, alpha=3.0, rank_stabilised=True), LINEAR),
    "lora with bias": (LoRA(rank=3, alpha=1.0, bias=True), LINEAR),
    "lora on a convolution": (LoRA(rank=4, alpha=2.0), CONV),
    "tucker": (LoRA(rank=4, alpha=2.0, tucker=True), CONV),
    "loha": (LoHa(rank=3, alpha=1.5), LINEAR),
    "loha with cores": (LoHa(rank=2, alpha=1.5, tucker=True), CONV),
    "lokr of low rank": (LoKr(rank=2, alpha=1.0, factor=4), LINEAR),
    "full lokr": (LoKr(rank=None, factor=4), LINEAR),
    "lokr on a convolution": (LoKr(rank=2, alpha=1.0, factor=2), CONV),
    "full": (Full(), LINEAR),
    "full on a convolution": (Full(), CONV),
    "norm": (Norm(), NORM),
    "dora": (DoRA(LoRA(rank=4, alpha=2.0)), LINEAR),
    "oft": (OFT(block_size=4), LINEAR),
    "boft": (BOFT(block_size=4), LINEAR),
    "glora": (GLoRA(rank=3, alpha=1.0), LINEAR),
    "ia3": (IA3(), LINEAR),
}  # fmt: skip
OF_BASE = ("dora", "oft", "boft", "glora", "ia3")


@dataclass(frozen=True)
class Model:
    """A base: one weight for each layer."""

    sites: Mapping[str, Site]

    @property
    def names(self) -> list[str]:
        return list(self.sites)

    def site(self, name: str) -> Site:
        return self.sites[name]

    def weight(self, name: str) -> tuple[Tensor, Site]:
        site = self.sites[name]
        return random(99, *site.shape), site

    def bias(self, name: str) -> Tensor | None:
        return random(98, self.sites[name].rows)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def part(method: Method, site: Site = LINEAR, seed: int = 0, dtype: torch.dtype = torch.float32) -> Part:
    method = method.at(site)
    shapes = method.shapes(site)
    tensors = {key: (0.3 * random(100 * seed + k, *shapes[key])).to(dtype) for k, key in enumerate(sorted(shapes))}
    return Part(method, tensors, shape=site.shape)


def dense(one: Part, site: Site = LINEAR) -> Tensor:
    """Its change by the method's own formula, fp64, (out, fan_in)."""
    t = {key: tensor.double() for key, tensor in one.tensors.items()}
    weight = random(99, *site.shape).double()
    return (one.method.delta(t, site, weight) * one.method.scale).reshape(site.shape[0], -1)


def lora(seed: int, rank: int = 4, alpha: float = 2.0) -> Part:
    return part(LoRA(rank=rank, alpha=alpha), seed=seed)


def file(*parts: Part, names: Sequence[str] = ()) -> AdapterFile:
    return AdapterFile(dict(zip(names or [f"unet.{k}" for k in range(len(parts))], parts, strict=False)))


def engine(
    rule: str,
    files: Sequence[AdapterFile],
    weights: Sequence[float] | None = None,
    *,
    space: Any = "delta",
    base: Model | None = None,
    digests: Sequence[str] = "abcdefgh",
    **options: Any,
) -> Engine:
    recipe = MergeRecipe(tuple(Entry(d) for d in digests[: len(files)]), rule, options, space)
    made = [
        Input(d, f, d, lambda _, w=w: w) for f, d, w in zip(files, digests, weights or [1.0] * len(files), strict=False)
    ]
    return Engine(recipe, made, None, base)


def merged(rule: str, files: Sequence[AdapterFile], weights: Sequence[float] | None = None, **options: Any) -> Tensor:
    """The first layer's merged change."""
    return whole(engine(rule, files, weights, **options).merge("unet.0").terms)


def near(found: Tensor, wanted: Tensor, most: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    assert float((found.double() - wanted.double()).norm()) <= most * float(wanted.double().norm())
