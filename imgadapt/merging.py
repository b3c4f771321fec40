"""The sum of a weight and its adapters."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imgadapt.dequantize import is_plain, restore, values_of
from imgadapt.errors import StateError, first_few
from imgadapt.pages import roomy_like
from imgadapt.sites import Site
from imgadapt.slot import Slot

_BLOCK = 2**18  # elements summed at a time on the CPU: 1 MB in fp32, which stays in a core's cache


def merged(
    base: nn.Module, site: Site, slots: Sequence[Slot], originals: Mapping[str, Any]
) -> tuple[dict[str, nn.Parameter], float | None]:
    """The merged parameters, stored as the originals are, and the relative error of that where they are quantised.

    Raises:
        StateError: there are no weights to merge, their sum is not finite, a strength differs from sample to sample, or
            the storage cannot be written.
    """
    weight = originals[site.parameter]
    if weight.is_meta or is_plain(base, weight):
        return sums(site, slots, originals), None
    values = {name: values_of(base, original).detach().float() for name, original in originals.items()}
    totals = sums(site, slots, {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()})
    made = {name: restore(base, originals[name], total.detach()) for name, total in totals.items()}
    errors = [error for _, error in made.values() if error is not None]
    return {name: parameter for name, (parameter, _) in made.items()}, max(errors)


@torch.no_grad()
def sums(
    site: Site, slots: Sequence[Slot], originals: Mapping[str, Any], *, in_place: bool = False
) -> dict[str, nn.Parameter]:
    """`merged` for plain parameters: the weight (unless it is changed in place), and the bias if an adapter changes it.

    Raises:
        StateError: as `merged`.
    """
    parameter, bias = site.parameter, site.bias
    weight: Any = originals[parameter]
    if weight.is_meta:
        raise StateError("the weights are offloaded (on 'meta'): merge before offloading the model")
    if sampled := [slot.name for slot in slots if slot.per_sample]:
        raise StateError(f"the strength of {sampled[0]} differs from sample to sample and cannot be merged")
    if apart := [slot for slot in slots if slot.on and not slot.method.merges]:
        name, method = apart[0].name, apart[0].method
        raise StateError(f"{name} ({method.name}) {method.apart} and cannot be merged: keep it live")
    total: Tensor = weight if in_place else roomy_like(weight)
    add_up(weight, site, slots, total)
    made: dict[str, Tensor] = {} if in_place else {parameter: total}
    for slot in slots:
        change = slot.method.bias_delta(slot.tensors()) if slot.on else None
        if change is not None and bias is not None:
            old = originals[bias]
            start = made[bias] if bias in made else old.to(torch.promote_types(old.dtype, torch.float32))
            made[bias] = start + slot.strength * change.to(start.device, start.dtype)
            check_finite(made[bias], originals[bias].dtype, slots)
    return {
        name: nn.Parameter(tensor.to(originals[name].dtype), originals[name].requires_grad)
        for name, tensor in made.items()
    }


@torch.no_grad()
def add_up(original: Tensor, site: Site, slots: Sequence[Slot], out: Tensor) -> None:
    """out = original + sum of strength * delta, in fp32 or better and rounded once. `out` may be the original itself.

    Raises:
        StateError: the sum is not finite in out's dtype; `out` is then not to be used.
    """
    wide = wider(original.dtype)
    on = [slot for slot in slots if slot.on]
    tensors = [slot.whole(site.seen(original), wide) for slot in on]
    if on and all(slot.way.pair and not slot.method.needs_weight for slot in on):
        pairs = [slot.method.pair(t, site) for slot, t in zip(on, tensors, strict=True)]
        ups = [up * slot.strength for slot, (up, _) in zip(on, (p for p in pairs if p is not None), strict=True)]
        up, down = torch.cat(ups, 1), torch.cat([p[1] for p in pairs if p is not None])
        if site.kind == "embedding":  # stored transposed: rows are entries
            up, down = down.t(), up.t()
        flat = out.flatten(1)
        limits = add_product(original.flatten(1), up, down, flat)
        if flat.data_ptr() != out.data_ptr():  # channels last: what was flattened is a copy
            out.copy_(flat.view(out.shape))
    else:
        weight = original.to(wide)
        total = site.seen(weight.clone() if weight is original else weight)
        pristine = site.seen(original.to(wide, copy=weight is not original))
        for slot, t in zip(on, tensors, strict=True):
            check_finite(torch.tensor(slot.strength, dtype=torch.float64), wide, slots)
            slot.method.accumulate(total, t, site, pristine, slot.strength)
        limits = torch.stack(torch.aminmax(total))
        out.copy_(site.seen(total))
    check_finite(limits, out.dtype, slots)


def wider(dtype: torch.dtype) -> torch.dtype:
    """What sums are taken in: fp32, or fp64 where the weight is."""
    return dtype if dtype.itemsize > 4 else torch.float32


def add_product(original: Tensor, up: Tensor, down: Tensor, out: Tensor) -> Tensor:
    """out = original + up @ down, in fp32 or better and rounded once; original, out (rows, fan_in), which may be the
    same, up (rows, r), down (r, fan_in). Gives its least and greatest values, or 0 where it cannot overflow.
    """
    wide = wider(original.dtype)
    # what the change can be at most; beside it a weight of a wide exponent cannot overflow, and needs no look
    most = up.abs().max() * down.abs().max() * len(down)
    near = torch.finfo(out.dtype).max < 1e30 or not bool(most <= 1e30)
    return _add_blocks(original, up, down, out, wide, near)


def check_finite(values: Tensor, dtype: torch.dtype, slots: Sequence[Slot]) -> None:
    """Raises StateError where a value is NaN, or beyond what `dtype` holds."""
    if not bool((values.abs() <= torch.finfo(dtype).max).all()):
        names = first_few([slot.name for slot in slots])
        raise StateError(
            f"NaN or infinity in the weight merged with {names}; the base is left as it was: "
            "lower a strength, or detach it"
        )


def _rounds_once(dtype: torch.dtype) -> bool:
    """Whether this processor's products of matrices sum up in fp32 or better, and are rounded to `dtype` at the end."""
    return dtype.itemsize > 2 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _halved(up: Tensor, down: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """up @ down in a narrow dtype to twice its digits: each is a high and a low half, and low times low is left out."""
    high_up, high_down = up.to(dtype), down.to(dtype)
    low_up, low_down = (up - high_up).to(dtype), (down - high_down).to(dtype)
    return torch.cat([high_up, low_up, high_up], 1), torch.cat([high_down, high_down, low_down])


def _add_blocks(original: Tensor, up: Tensor, down: Tensor, out: Tensor, wide: torch.dtype, measure: bool) -> Tensor:
    """out = original + up @ down; the least and the greatest of each block of rows, if they are wanted."""
    if not measure and original.device.type == "cpu" and original.dtype == out.dtype and _rounds_once(out.dtype):
        pair = (up, down) if out.dtype == wide else _halved(up, down, out.dtype)
        torch.addmm(original, *pair, out=out)
        return out.new_zeros(())
    rows = max(1, _BLOCK // original.shape[1]) if original.device.type == "cpu" else len(original)
    buffer = torch.empty(min(rows, len(original)), original.shape[1], dtype=wide, device=original.device)
    limits = [buffer.new_zeros(())]
    for start in range(0, len(original), rows):
        block = buffer[: min(rows, len(original) - start)]
        block.copy_(original[start : start + rows])
        block.addmm_(up[start : start + rows], down)
        if measure:
            limits.extend(torch.aminmax(block))
        out[start : start + rows].copy_(block)
    return torch.stack(limits)
