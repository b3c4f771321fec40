"""Tensors in safetensors files: read into memory, written whole and always as the same bytes."""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from imgadapt.atomic import atomically
from imgadapt.errors import FormatError, first_few, shortened
from imgadapt.header import Header, opened, read_header, stamp_of
from imgadapt.pages import roomy

_PIECE = 2**26  # bytes read at a time

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Of adapters and models, by safetensors' name."""
_ORDER = ("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")  # fmt: skip  # noqa: E501


def read_tensors(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors (on the CPU, by key) and the metadata of a safetensors file. It is read, not mapped: what happens to
    the file afterwards, or to the disk it is on, cannot reach them.

    Raises:
        FormatError: there is no such file, it cannot be read, it is not whole safetensors, it has a type that no
            adapter has, or it changed meanwhile.
    """
    found: dict[str, Tensor] = {}
    with opened(Path(path)) as file:
        header, dtypes = _header(file)
        for key, row in sorted(header.rows.items()):
            found[key] = _read(file, header.start + row.first, row.last - row.first, row.shape, dtypes[row.dtype])
        if stamp_of(file) != header.stamp:
            raise FormatError("it changed while it was read; try again when whatever writes it is done")
    return found, dict(header.metadata)


def read_outline(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same, without most numbers: those of tensors of one are read, all others are zeros that take no memory.

    Raises:
        FormatError: as `read_tensors`.
    """
    found: dict[str, Tensor] = {}
    with opened(path) as file:
        header, dtypes = _header(file)
        for key, row in sorted(header.rows.items()):
            dtype, size = dtypes[row.dtype], row.last - row.first
            if size == dtype.itemsize:
                found[key] = _read(file, header.start + row.first, size, row.shape, dtype)
            else:
                found[key] = torch.zeros((), dtype=dtype).expand(row.shape)
    return found, dict(header.metadata)


def _header(file: BinaryIO) -> tuple[Header, dict[str, torch.dtype]]:
    """A header, all of whose tensors are of types that torch has, and these by safetensors' names."""
    header, dtypes = read_header(file), {name: dtype for dtype, name in DTYPES.items()}
    if strange := [key for key, row in header.rows.items() if row.dtype not in dtypes]:
        names = first_few([shortened(key) for key in strange])
        raise FormatError(f"{names} of type {header.rows[strange[0]].dtype}, which no adapter has")
    return header, dtypes


def _read(file: BinaryIO, place: int, size: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in memory of its own, from its bytes in a file."""
    if not size:
        return torch.empty(shape, dtype=dtype)
    try:
        data = roomy(size)
    except (OSError, RuntimeError, MemoryError) as error:
        raise FormatError(f"a tensor of {size / 1e9:.1f} GB, for which memory has no room") from error
    rest = memoryview(data.numpy())  # pyright: ignore[reportArgumentType] # an array is a buffer
    while rest:
        got = os.preadv(file.fileno(), [rest[:_PIECE]], place)
        if not got:
            raise FormatError("it became shorter while it was read")
        rest, place = rest[got:], place + got
    return data.view(dtype).view(shape)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, whatever the order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's memory, row by row; a copy only where it lies otherwise."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, atomically, the same bytes for the same content.

    The safetensors package writes metadata in an order that changes from run to run (0.8.0), so resumed and
    uninterrupted trainings would differ. Layout: https://github.com/huggingface/safetensors#format.

    Raises:
        FormatError: metadata that is not text.
        OutputError: it cannot be written; what was there is untouched.
    """
    if wrong := [key for key, value in metadata.items() if not (isinstance(key, str) and isinstance(value, str))]:
        raise FormatError(f"metadata maps text to text in safetensors; {first_few([str(key) for key in wrong])} is not")
    text, order = header_bytes(tensors, metadata)
    with atomically(path) as file:
        file.write(text)
        for name in order:
            file.write(bytes_of(tensors[name]))


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """What a safetensors file begins with, and the order of its tensors, the package's: by dtype, then by name."""
    rank = {dtype: k for k, dtype in enumerate(_ORDER)}
    order = sorted(tensors, key=lambda name: (rank[DTYPES[tensors[name].dtype]], name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        dtype, shape = DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order
