"""Ladder: what to change, the cheapest first, in a training that does not fit into memory."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from imgadapt.training import memory
from imgadapt.training.config import TrainConfig

_LOW = 4  # rank
_GROUP = Path("/sys/fs/cgroup")

Peak = Callable[[TrainConfig], int]
"""Bytes that a training needs."""


@dataclass(frozen=True)
class Change:
    """Settings to change, and what that does; peak: bytes needed then, with all changes before it."""

    settings: Mapping[str, Any]
    text: str
    peak: int = 0

    @property
    def flags(self) -> str:
        """As they are typed."""
        return " ".join(_flag(name, value) for name, value in self.settings.items())


def available(device: torch.device) -> int:
    """Bytes that a training may have in memory: of the GPU, or of the machine and the container that this runs in; what
    this process has is among them, for the training will be in its place.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    free = int(psutil.virtual_memory().available)
    try:
        most, now = (int((_GROUP / name).read_text("ascii")) for name in ("memory.max", "memory.current"))
        rows = dict(line.split() for line in (_GROUP / "memory.stat").read_text("ascii").splitlines())
        free = min(free, most - now + int(rows["inactive_file"]))  # files that the system keeps at hand give way
    except (OSError, ValueError, KeyError):
        pass  # there is no limit ("max"), or no such system
    return free + int(psutil.Process().memory_info().rss)


def fits(peak: int, room: int) -> bool:
    """Whether so many bytes, and what allocators waste (`memory.RESERVE`), are in so many."""
    return peak * (1 + memory.RESERVE) <= room


def ladder(
    config: TrainConfig, room: int, peak: Peak, floor: Peak, *, sides: Sequence[int] = (), blocks: int = 0
) -> list[Change]:
    """The cheapest changes after which a training that does not fit does: more pieces, checkpointing, an optimiser of
    8 bits, bf16, blocks that wait in RAM, the base in 8 and in 4 bits, fewer pixels, a lower rank, in this order; those
    that a later one makes needless are left out. The last one's peak says whether they are enough.

    floor: bytes that are no activations, which is quicker to know. sides: resolutions to go down to, the largest first.
    blocks: how many the denoiser has; 0 on the CPU, where waiting in RAM saves nothing.
    """
    taken: list[Change] = []
    pieces = _pieces(config, room, peak, floor)
    for change in _rungs(config, sides, blocks):
        if pieces is not None:
            break
        taken = [*(one for one in taken if not set(one.settings) & set(change.settings)), change]
        pieces = _pieces(_with(config, taken), room, peak, floor)
    if pieces is not None:
        for change in reversed(taken[:-1]):
            fewer = [one for one in taken if one is not change]
            enough = _pieces(_with(config, fewer), room, peak, floor)
            if enough is not None:
                taken, pieces = fewer, enough
    pieces = pieces or config.batch_size
    if pieces != config.pieces:
        taken = [Change({"pieces": pieces}, "the batch is computed in parts, with the same result"), *taken]
    return [Change(c.settings, c.text, peak(_with(config, taken[: k + 1]))) for k, c in enumerate(taken)]


def _with(config: TrainConfig, changes: Sequence[Change]) -> TrainConfig:
    return config.model_copy(update={name: value for change in changes for name, value in change.settings.items()})


def _rungs(config: TrainConfig, sides: Sequence[int], blocks: int) -> Iterator[Change]:
    if not config.checkpointing:
        yield Change({"checkpointing": True}, "activations are computed twice: a third slower, with the same result")
    if config.optimizer == "adamw":
        yield Change({"optimizer": "adamw8bit"}, "the optimiser's state in 8 bits: next to no difference")
    if config.precision == "fp32":
        yield Change({"precision": "bf16"}, "the base in half the memory, a little less exact")
    if blocks > config.swap_blocks and config.quantise is None:
        text = "blocks wait in RAM while they do not compute: slower, with the same result"
        yield Change({"swap_blocks": blocks, "checkpointing": True}, text)
    for kind, bits in (("int8", 8), ("nf4", 4)):
        if config.quantise is None or (config.quantise, kind) == ("int8", "nf4"):
            waiting = {"swap_blocks": 0, "checkpointing": True} if blocks else {}
            yield Change({"quantise": kind, **waiting}, f"the base's layers in {bits} bits, less exact")
    for side in sides:
        kept = [own for own in config.resolution if own < side]
        yield Change({"resolution": [*kept, side]}, "fewer pixels: the adapter learns less of details")
    if config.rank is not None and config.rank > _LOW:
        scaled = {} if config.alpha is None else {"alpha": config.alpha * _LOW / config.rank}
        yield Change({"rank": _LOW, **scaled}, "a smaller adapter, which can learn less")


def _pieces(config: TrainConfig, room: int, peak: Peak, floor: Peak) -> int | None:
    """The least number of pieces with which a config fits, from its own; None where it does in none."""
    if not fits(floor(config), room):
        return None
    whole = peak(config)
    if fits(whole, room):
        return config.pieces
    single = config.model_copy(update={"pieces": config.batch_size})
    if config.pieces >= config.batch_size or not fits(one := peak(single), room):
        return None
    # what a picture takes is the same for each, so that one more simulation is enough to know
    most = math.ceil(config.batch_size / config.pieces)
    count = 1 + int((room / (1 + memory.RESERVE) - one) / max(1, (whole - one) / max(1, most - 1)))
    for held in range(min(count, most - 1), 1, -1):
        pieces = math.ceil(config.batch_size / held)
        if fits(peak(config.model_copy(update={"pieces": pieces})), room):
            return pieces
    return config.batch_size


def _flag(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    if value is True:
        return flag
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}"
