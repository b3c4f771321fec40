"""Latents and text states on disk, keyed by content: safe to edit the data between runs."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from imgadapt.errors import FormatError
from imgadapt.file import read_tensors, write_tensors


class Cache:
    """Tensors in a folder; a key is hashed text of everything that the tensor depends on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, make: Callable[[], Tensor], *key: str) -> Tensor:
        """The tensor of `key`; made, and kept, when it is not there or not whole."""
        name = hashlib.sha256("\n".join(key).encode()).hexdigest()
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            try:
                return read_tensors(path)[0][name[:8]]
            except (FormatError, KeyError):
                path.unlink()  # torn by a crash; made again below
        value = make()
        write_tensors(path, {name[:8]: value}, {})
        return value


def identity(module: nn.Module) -> str:
    """SHA-256 of a module's weights and dtype: what was encoded with it is good for it alone."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
