"""Latents and text states on disk, keyed by content: safe to edit the data between runs."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from imgadapt.errors import FormatError
from imgadapt.tensors import read_tensors, write_tensors


class Cache:
    """Tensors in a folder, by name; a key is hashed text of everything that they depend on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, make: Callable[[], Mapping[str, Tensor]], *key: str) -> dict[str, Tensor]:
        """The tensors of `key`; made, and kept, when they are not there or not whole. They are the file's own pages."""
        name = hashlib.sha256("\n".join(key).encode()).hexdigest()
        path = self.folder / name[:2] / f"{name}.safetensors"
        if path.exists():
            try:
                tensors, metadata = read_tensors(path)
                if metadata.get("key") == name:
                    return tensors
            except FormatError:
                pass  # torn by a crash; made again below
        write_tensors(path, {k: v.contiguous() for k, v in make().items()}, {"key": name})
        return read_tensors(path)[0]
