"""Latents and text states on disk, keyed by content: safe to edit the data between runs."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from imgadapt.errors import FormatError
from imgadapt.header import header_of
from imgadapt.tensors import read_tensors, write_tensors


class Cache:
    """Tensors in a folder, by name; a key is hashed text of everything that they depend on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, make: Callable[[], Mapping[str, Tensor]], *key: str) -> dict[str, Tensor]:
        """The tensors of `key`; made, and kept, when they are not there or not whole."""
        name, path = self._place(key)
        try:
            tensors, metadata = read_tensors(path)
            if metadata.get("key") == name:
                return tensors
        except FormatError:
            pass  # not there, or torn by a crash; made below
        return self._made(make, name, path)

    def ensure(self, make: Callable[[], Mapping[str, Tensor]], *key: str) -> None:
        """The same for later: of what is there only the header is read, which tells whether all of the file is."""
        name, path = self._place(key)
        try:
            if header_of(path).metadata.get("key") == name:
                return
        except FormatError:
            pass
        self._made(make, name, path)

    def _place(self, key: tuple[str, ...]) -> tuple[str, Path]:
        name = hashlib.sha256("\n".join(key).encode()).hexdigest()
        return name, self.folder / name[:2] / f"{name}.safetensors"

    @staticmethod
    def _made(make: Callable[[], Mapping[str, Tensor]], name: str, path: Path) -> dict[str, Tensor]:
        made = {key: tensor.contiguous() for key, tensor in make().items()}
        write_tensors(path, made, {"key": name})
        return made
