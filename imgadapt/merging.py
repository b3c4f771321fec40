"""The sum of a weight and its adapters, and where the original waits meanwhile."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from imgadapt.errors import StateError, first_few
from imgadapt.sites import Site
from imgadapt.slot import Slot

_BLOCK = 2**18  # elements summed at a time on the CPU: 1 MB in fp32, which stays in a core's cache


@dataclass(frozen=True)
class Stored:
    """An original weight that waits in a checkpoint."""

    file: Path
    key: str

    def read(self) -> Tensor:
        """Its values, memory-mapped.

        Raises:
            StateError: the file is gone, or has changed.
        """
        try:
            with safe_open(self.file, framework="pt") as file:
                return file.get_tensor(self.key)
        except (SafetensorError, OSError) as error:
            raise StateError(f"{self.file}: {self.key} cannot be read any more ({error}); restore the file") from error


def stored(place: Path) -> dict[str, Stored]:
    """All tensors of a safetensors file, or of all in a folder, by key.

    Raises:
        StateError: there is none.
    """
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    found: dict[str, Stored] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                found |= {key: Stored(path, key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise StateError(f"{path}: not a safetensors file to restore weights from ({error})") from error
    if not found:
        raise StateError(f"{place}: no safetensors file in it; wanted the checkpoint that the weights came from")
    return found


@torch.no_grad()
def add_up(original: Tensor, site: Site, slots: Sequence[Slot], out: Tensor) -> None:
    """out = original + sum of strength * delta, in fp32 or better and rounded once. `out` may be the original.

    Raises:
        StateError: the sum is not finite in out's dtype; `out` is then not to be used.
    """
    wide = torch.promote_types(original.dtype, torch.float32)
    on = [slot for slot in slots if slot.on]
    tensors = [slot.tensors(wide, original.device) for slot in on]
    if on and all(slot.way.pair and not slot.method.needs_weight for slot in on):
        pairs = [slot.method.pair(t, site) for slot, t in zip(on, tensors, strict=True)]
        ups = [up * slot.strength for slot, (up, _) in zip(on, (p for p in pairs if p is not None), strict=True)]
        up, down = torch.cat(ups, 1), torch.cat([p[1] for p in pairs if p is not None])
        if site.kind == "embedding":  # stored transposed: rows are entries
            up, down = down.t(), up.t()
        flat = out.flatten(1)
        limits = _add_blocks(original.flatten(1), up, down, flat, wide)
        if flat.data_ptr() != out.data_ptr():  # channels last: what was flattened is a copy
            out.copy_(flat.view(out.shape))
    else:
        weight = original.to(wide)
        total = site.seen(weight.clone() if weight is original else weight)
        pristine = site.seen(original.to(wide, copy=weight is not original))
        for slot, t in zip(on, tensors, strict=True):
            slot.method.accumulate(total, t, site, pristine, slot.strength)
        limits = torch.stack(torch.aminmax(total))
        out.copy_(site.seen(total))
    check_finite(limits, out.dtype, slots)


def check_finite(values: Tensor, dtype: torch.dtype, slots: Sequence[Slot]) -> None:
    """Raises StateError where a value is NaN, or beyond what `dtype` holds."""
    if not bool((values.abs() <= torch.finfo(dtype).max).all()):
        names = first_few([slot.name for slot in slots])
        raise StateError(f"NaN or infinity in the weight merged with {names}; the base is left as it was")


def _add_blocks(original: Tensor, up: Tensor, down: Tensor, out: Tensor, wide: torch.dtype) -> Tensor:
    """out = original + up @ down, some rows at a time; the least and the greatest of each block."""
    rows = max(1, _BLOCK // original.shape[1]) if original.device.type == "cpu" else len(original)
    buffer = torch.empty(min(rows, len(original)), original.shape[1], dtype=wide, device=original.device)
    limits: list[Tensor] = []
    for start in range(0, len(original), rows):
        block = buffer[: min(rows, len(original) - start)]
        block.copy_(original[start : start + rows])
        block.addmm_(up[start : start + rows], down)
        limits.extend(torch.aminmax(block))
        out[start : start + rows].copy_(block)
    return torch.stack(limits)
