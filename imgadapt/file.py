"""AdapterFile, and reading and writing it as safetensors."""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from imgadapt.arch import architectures
from imgadapt.atomic import atomically
from imgadapt.errors import ConfigError, FormatError, first_few
from imgadapt.formats import DIFFUSERS, FORMATS, Parts, read, write


@dataclass(frozen=True)
class AdapterFile:
    """An adapter: its layers under canonical names, and its metadata.

    format, architecture: the tables that knew the file it came from; None for one that was never in a file, or whose
        architecture has no table.
    unknown: keys that no table knew and that a `load(..., strict=False)` left out.
    """

    parts: Parts
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    format: str | None = None
    architecture: str | None = None
    unknown: tuple[str, ...] = ()


def load(path: str | PathLike[str], *, strict: bool = True) -> AdapterFile:
    """Read an adapter that any known tool wrote.

    strict: keys that no table knows are an error; else they are listed in `unknown`.

    Raises:
        FormatError: there is no such file, it is not safetensors, or it is not an adapter that imgadapt knows.
    """
    tensors, metadata = read_tensors(path)
    try:
        reading = read(tensors, metadata, FORMATS, architectures(), strict=strict)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    return AdapterFile(reading.parts, metadata, reading.format, reading.architecture, reading.unknown)


def save(
    file: AdapterFile, path: str | PathLike[str], *, format: str | None = None, dtype: torch.dtype | None = None
) -> Path:
    """Write an adapter in a tool's format; the file is whole or, on any failure, as before. Returns its path.

    format: a name of `imgadapt.formats.FORMATS`; None: "diffusers" where that has a word for all of it (LoRA), else
        "imgadapt". dtype: cast the tensors (None: keep theirs).
    The same adapter gives the same bytes.

    Raises:
        ConfigError: no such format, or a dtype that is not one of floating-point numbers in files.
        FormatError: the format cannot say what the adapter holds, or that is not finite (in `dtype`).
        OutputError: the file cannot be written.
    """
    if not isinstance(file, AdapterFile):
        raise ConfigError(
            f"{type(file).__name__} is no adapter; wanted what `load` or `collect` gave, and then the path"
        )
    if format is None:
        format = "diffusers" if all(DIFFUSERS.says(part) for part in file.parts.values()) else "imgadapt"
    form = next((f for f in FORMATS if f.name == format), None)
    if form is None:
        raise ConfigError(f"no format '{format}'; there are: {', '.join(f.name for f in FORMATS)}")
    if dtype is not None and not (dtype in _DTYPES and dtype.is_floating_point):
        raise ConfigError(f"an adapter cannot be written as {dtype}; wanted a floating-point dtype of safetensors")
    others = {key for f in FORMATS if f is not form for key in f.own_metadata}
    tensors, metadata = write(form, file.parts, {k: v for k, v in file.metadata.items() if k not in others})
    if dtype is not None:
        tensors = {k: v if form.alpha and k.endswith(f".{form.alpha}") else v.to(dtype) for k, v in tensors.items()}
    if broken := [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]:
        raise FormatError(f"NaN or infinity in {first_few(broken)}; {path} is not written")
    write_tensors(Path(path), tensors, metadata)
    return Path(path)


def read_tensors(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors (on the CPU) and the metadata of a safetensors file.

    Raises:
        FormatError: there is no such file, or it is not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path}: no such file" + (", only a folder" if path.is_dir() else ""))
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: not a whole safetensors file ({error})") from error
    if strange := [key for key, tensor in tensors.items() if tensor.dtype not in _DTYPES]:
        raise FormatError(f"{path}: {first_few(strange)} of type {tensors[strange[0]].dtype}, which no adapter has")
    return tensors, metadata


_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, whatever the order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


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
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # aligned, as safetensors does
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        dtype, shape = _DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomically(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(_bytes(tensors[name]))
