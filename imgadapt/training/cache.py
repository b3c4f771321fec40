"""Latents and text states on disk, keyed by content: safe to edit the data between runs."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

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
