"""Starts that are made of the weight alone."""

import torch
from torch import Tensor

from imgadapt.formats import Part
from imgadapt.training import noise
from imgadapt.training.starts.place import Place, top


def pissa(place: Place) -> Part:
    """up_0 = U √S, down_0 = √S Vᵀ of the weight's largest singular values: scale * up_0 @ down_0 is the best of that
    rank (arXiv 2404.02948). On convolutions, which peft's has not, of the weight as (out, in * kernel).
    """
    return place.anchored(*place.split(*top(place.weight(), place.lora.rank)))


def olora(place: Place) -> Part:
    """up_0 = Q, down_0 = R, their first columns and rows, of W = Q R (arXiv 2406.01775). As in peft the scale is not
    taken out: scale * up_0 @ down_0 is what W is without only where it is 1.
    """
    q, r = torch.linalg.qr(place.weight())
    rank = place.lora.rank
    return place.anchored(q[:, :rank], r[:rank])


def orthogonal(place: Place) -> Part:
    """up and down random, in ranks of which each has but one of them: their product is zero, and both learn at once
    (datta0.github.io, "Rethink LoRA init"). peft's turns both by a random rotation of the ranks, which changes no
    product and is left out: so it is zero to the bit.
    """
    rank, generator = place.lora.rank, noise.generator(place.seed, "start", place.name)
    down = torch.randn(rank, place.site.fan_in, generator=generator) / 10
    up = torch.randn(place.site.rows, rank, generator=generator) / 10
    down[1::2], up[:, 0::2] = 0, 0
    return place.plain(up, down)


def loftq(place: Place, original: Tensor | None) -> Part:
    """up = U √S, down = √S Vᵀ of what quantising took: of W - Q(W), the original less what the base has of it (arXiv
    2310.08659 with one iteration, as peft's `replace_lora_weights_loftq`: more of them quantise the base anew).

    original: None where the layer was not quantised; then it starts as LoRA does.
    """
    if original is None:
        return place.plain(torch.zeros(place.site.rows, place.lora.rank), place.drawn())
    weight = place.weight()
    return place.plain(*place.split(*top(original.to(weight).flatten(1) - weight, place.lora.rank)))


def lost(place: Place, part: Part, original: Tensor) -> tuple[float, float]:
    """‖W - Q(W)‖ / ‖W‖ without and with what a layer starts from."""
    weight = place.weight()
    whole = original.to(weight).flatten(1)
    up, down = (part.tensors[name].to(weight.device).flatten(1) for name in ("up", "down"))
    gap, size = whole - weight, whole.norm().clamp(min=torch.finfo(whole.dtype).tiny)
    return float(gap.norm() / size), float((gap - part.method.scale * (up @ down)).norm() / size)
