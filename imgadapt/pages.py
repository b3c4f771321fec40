"""Memory for large weights, in pages of 2 MB: writing 4 GB to fresh pages of 4 KB takes longer than merging does."""

import mmap

import torch
from torch import Tensor

_LARGE = 2**22  # bytes from which a tensor gets pages of its own


def roomy_like(tensor: Tensor) -> Tensor:
    """An uninitialised tensor like this one; on the CPU, in huge pages where the system has them to give."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return torch.empty_like(tensor)
    return roomy(tensor.numel() * tensor.element_size()).view(tensor.dtype).view(tensor.shape)


def roomy(size: int) -> Tensor:
    """(size,) uninitialised bytes; in huge pages where the system has them to give."""
    if size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=torch.uint8)
