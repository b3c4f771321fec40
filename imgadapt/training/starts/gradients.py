"""LoRA-GA: a start whose first step is nearest to that of the whole weight."""

from collections.abc import Sequence

from imgadapt.errors import ConfigError
from imgadapt.formats import Part
from imgadapt.training.starts.place import Place, require, top
from imgadapt.training.starts.shown import MOST, Show, gradients

_GAMMA = 16.0  # as the paper chose it


def lora_ga(places: Sequence[Place], show: Show, *, most: int = MOST) -> dict[str, Part]:
    """down_0 = c V[:r]ᵀ, up_0 = c U[:, r:2r] of the loss's gradient by the weight, G = U S Vᵀ, with c = out^¼ / 4: a
    step of plain descent changes the weight by that of all its numbers, cut to rank 2r, times c² * scale² (arXiv
    2407.05000, algorithm 1).

    As the paper has it; peft's "ArB2r" with its scale "stable" (tuners/lora/layer.py) multiplies up_0 by S and c, and
    leaves down_0 as it is: its step depends on the size of the gradient.

    Raises:
        ConfigError: a gradient is not finite, or a layer reads no numbers.
    """
    require(places, "lora_ga")
    made: dict[str, Part] = {}
    for place, gradient in gradients(places, show, most=most):
        if not gradient.isfinite().all():
            raise ConfigError(f"start = lora_ga: {place.name} has a gradient that is not finite; use --precision fp32")
        rank, c = place.lora.rank, place.site.rows**0.25 / _GAMMA**0.5
        u, _, v = top(gradient, min(2 * rank, *gradient.shape))
        up, down = u[:, -rank:], v[:rank]
        empty = (down == 0).all(1)
        down[empty] = place.drawn().to(down)[empty] / c
        made[place.name] = place.anchored(c * up, c * down)
    return made
