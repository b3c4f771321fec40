"""Provenance: the versions, the machine and the files that decide what a picture looks like, to the bit."""

import functools
import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imgadapt import demo

_PACKAGES = ("imgadapt", "torch", "diffusers", "transformers")
_ENDS = 2**20
"""Bytes of a file's beginning and end that stand for the whole of a base, which is too large to be read."""


def versions() -> dict[str, str]:
    """Of the packages that decide what is drawn."""
    return dict(_versions())


@functools.cache
def _versions() -> Mapping[str, str]:
    found = dict[str, str]()
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


@functools.cache
def machine(device: str) -> str:
    """What computes, as far as it decides the last bits."""
    import torch

    if device.startswith("cuda"):
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"{device} {torch.backends.cpu.get_cpu_capability()}" if device == "cpu" else device


def threads() -> int:
    import torch

    return torch.get_num_threads()


def differences(record: Mapping[str, Any], device: str, dtype: str) -> tuple[str, ...]:
    """What of versions and machine a picture's record has otherwise than they are here, in words; () for nothing."""
    told: object = record.get("versions")
    then = {str(name): said for name, said in told.items()} if isinstance(told, Mapping) else {}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType] # JSON
    pairs = [
        *((name, then.get(name), here) for name, here in versions().items()),
        ("device", record.get("device"), machine(device)),
        ("numbers", record.get("dtype"), dtype),
        ("threads", record.get("threads"), threads()),
    ]
    more = [f"{name[:40]} is none of those that are known here" for name in sorted(then.keys() - versions().keys())[:4]]
    return (*(f"{name}: {_brief(was)} there, {_brief(here)} here" for name, was, here in pairs if was != here), *more)


def _brief(said: object) -> str:
    return (
        "not said"
        if said in (None, "")
        else (repr(said) if isinstance(said, str) and said.isdigit() else str(said))[:60]
    )


def fingerprint(place: str) -> str:
    """Of a base's files: their sizes, beginnings and ends; "" where the place is none of this machine's."""
    path = demo.PIPELINE if place == "demo" else Path(place)
    if not path.exists():
        return ""
    try:
        files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
        stats = [(one, one.stat()) for one in files if not one.name.startswith(".")]
        return _fingerprint(path, tuple((str(one), about.st_size, about.st_mtime_ns) for one, about in stats))
    except OSError:  # it goes away in this moment
        return ""


@functools.lru_cache(64)
def _fingerprint(root: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    whole = hashlib.sha256()
    for name, size, _ in files:
        whole.update(f"{Path(name).relative_to(root).as_posix() if Path(name) != root else ''}:{size}\n".encode())
        with open(name, "rb") as file:
            whole.update(file.read(_ENDS))
            file.seek(max(_ENDS, size - _ENDS))
            whole.update(file.read(_ENDS))
    return whole.hexdigest()


def autov3(path: Path) -> str:
    """SHA-256 of a safetensors file's tensors, without its header: A1111's and Civitai's hash of a LoRA. A folder is
    peft's.
    """
    path = path / "adapter_model.safetensors" if path.is_dir() else path
    about = path.stat()
    return _autov3(path, about.st_size, about.st_mtime_ns)


@functools.lru_cache(512)
def _autov3(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
