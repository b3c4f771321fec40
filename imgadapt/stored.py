"""Stored: an original weight that waits in a checkpoint while its layer is merged in place."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imgadapt.errors import FormatError, StateError
from imgadapt.header import header_of, stamp_of

_BLOCK = 2**20  # bytes compared at a time
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in _NAMES.items()}
"""What values can be read of, by safetensors' names."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor's bytes are: dtype in safetensors' spelling, start and end within the file, whose size and time of
    change (`stamp`) tell whether it is still the same.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    stamp: tuple[int, int]

    def matches(self, tensor: Tensor) -> bool:
        """Whether the file has this very tensor, to the bit.

        Raises:
            StateError: the file is gone or has changed.
        """
        if (self.dtype, self.shape) != (_NAMES.get(tensor.dtype), tuple(tensor.shape)):
            return False
        ours = _bytes(tensor.detach().cpu().contiguous())
        buffer = np.empty(min(_BLOCK, len(ours)), np.uint8)
        with self._open() as file:
            for place in range(0, len(ours), _BLOCK):
                block = buffer[: min(_BLOCK, len(ours) - place)]
                self._read(file.fileno(), block, place)
                if not np.array_equal(block, ours[place : place + len(block)]):
                    return False
        return True

    @torch.no_grad()
    def fill(self, tensor: Tensor) -> None:
        """Read it into a tensor of its shape, in place, cast if the model was moved to another dtype meanwhile.

        Raises:
            StateError: the file is gone or has changed.
        """
        dtype = DTYPES[self.dtype]
        direct = tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.dtype == dtype
        into = tensor.detach() if direct else torch.empty(self.shape, dtype=dtype)
        with self._open() as file:
            self._read(file.fileno(), _bytes(into), 0)
        if direct:
            torch.autograd.graph.increment_version(tensor)
        else:
            tensor.copy_(into)

    def read(self) -> Tensor:
        """Its values."""
        dtype = DTYPES[self.dtype]
        made = torch.empty(self.shape, dtype=dtype)
        self.fill(made)
        return made

    def check(self) -> None:
        """Raises StateError unless the file is there, as it was."""
        self._open().close()

    def _open(self) -> Any:
        try:
            file = self.file.open("rb", buffering=0)
        except OSError as error:
            raise StateError(f"{self.file}, which keeps {self.key}, cannot be read: {error}; put it back") from error
        if stamp_of(file) != self.stamp:
            file.close()
            raise StateError(f"{self.file}, which keeps {self.key}, has changed since the merge; load the model anew")
        return file

    def _read(self, descriptor: int, into: "np.ndarray[Any, np.dtype[np.uint8]]", place: int) -> None:
        done = 0
        while done < len(into):
            rest = memoryview(into[done:])  # pyright: ignore[reportArgumentType] # an array is a buffer
            try:
                got = os.preadv(descriptor, [rest], self.start + place + done)
            except OSError as error:
                raise StateError(f"{self.file}, which keeps {self.key}, cannot be read: {error.strerror}") from error
            if not got:
                raise StateError(f"{self.file}, which keeps {self.key}, has become shorter; put it back")
            done += got


def _bytes(tensor: Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def stored(place: Path) -> dict[str, Stored]:
    """All tensors of a safetensors file, or of all in a folder, by key.

    Raises:
        StateError: there is none.
    """
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    found = {one.key: one for path in files for one in _index(path)}
    if not found:
        raise StateError(f"{place}: no safetensors file in it; wanted the checkpoint that the weights came from")
    return found


def _index(path: Path) -> Iterator[Stored]:
    try:
        header = header_of(path)
    except FormatError as error:
        raise StateError(f"{error}; wanted safetensors to restore weights from") from error
    for key, row in header.rows.items():
        places = header.start + row.first, header.start + row.last
        yield Stored(path, key, row.dtype, row.shape, *places, header.stamp)


def in_parallel(work: Callable[[Any], Any], rows: Sequence[Any]) -> list[Any]:
    """work(row) of every row, by as many threads as torch uses: reading and comparing leave Python's lock."""
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        return list(pool.map(work, rows))
