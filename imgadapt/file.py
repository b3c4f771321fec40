"""AdapterFile, and reading and writing it as safetensors."""

import hashlib
import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from imgadapt.arch import Architecture, architectures
from imgadapt.atomic import atomically
from imgadapt.collector import uncollected
from imgadapt.embeddings import Embedding, read_embeddings, read_pickle, write_embeddings
from imgadapt.errors import ConfigError, FormatError, OutputError, first_few
from imgadapt.formats import DIFFUSERS, FORMATS, Format, Parts, Step, Writer, architecture_of, exact_alpha, read, write
from imgadapt.formats.kohya import HASHES
from imgadapt.formats.peft_config import PEFT_KEY


@dataclass(frozen=True)
class AdapterFile:
    """An adapter: its layers under canonical names, its embeddings by their tokens, and its metadata.

    format, architecture: the tables that knew the file it came from; None for one that was never in a file, or whose
        architecture has no table.
    unknown: keys that a `load(..., strict=False)` left out, and why ("": no table knows them).
    """

    parts: Parts = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    format: str | None = None
    architecture: str | None = None
    unknown: Mapping[str, str] = field(default_factory=dict[str, str])
    embeddings: Mapping[str, Embedding] = field(default_factory=dict[str, Embedding])


def load(path: str | PathLike[str], *, strict: bool = True) -> AdapterFile:
    """Read an adapter that any known tool wrote: a .safetensors file, a .bin or .pt of tensors only, a picture with an
    embedding in it, or a folder of peft's. Tensors stay in the file until they are used.

    strict: what no table knows is an error; else it is listed in `unknown`.

    Raises:
        FormatError: there is no such file, it is not whole, or it is not an adapter that imgadapt knows.
    """
    with uncollected():
        return _load(Path(path), strict=strict)


def _load(path: Path, *, strict: bool) -> AdapterFile:
    tensors, metadata = _contents(path)
    try:
        embeddings, keys = read_embeddings(tensors, metadata, path.stem)
        rest = {key: tensor for key, tensor in tensors.items() if key not in set(keys)}
        if embeddings and not rest:
            return AdapterFile({}, metadata, "embedding", None, {}, embeddings)
        reading = read(rest, metadata, architectures(), strict=strict)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    return AdapterFile(reading.parts, metadata, reading.format, reading.architecture, reading.unknown, embeddings)


def _contents(path: Path, *, inside: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, or of a folder that peft wrote."""
    if path.is_dir():
        config = path / "adapter_config.json"
        files = [
            path / f"adapter_model.{end}" for end in ("safetensors", "bin") if (path / f"adapter_model.{end}").is_file()
        ]
        if not config.is_file() or not files:
            raise FormatError(
                f"{path}: a folder without adapter_config.json and adapter_model.safetensors, as peft writes"
            )
        tensors, metadata = _contents(files[0], inside=True)
        try:
            return tensors, {**metadata, PEFT_KEY: config.read_text("utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(f"{config}: {error}") from error
    if path.stem == "adapter_model" and (path.parent / "adapter_config.json").is_file() and not inside:
        return _contents(path.parent)  # peft's file says nothing of alpha, the config beside it does
    if path.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt", ".png", ".webp"):
        if not path.is_file():
            raise FormatError(f"{path}: no such file")
        return read_pickle(path)
    return read_tensors(path)


def plan(file: AdapterFile, format: str) -> list[Step]:
    """What writing a file in a format costs, layer by layer, before anything is written.

    Raises:
        ConfigError: no such format.
    """
    return Writer(_format(format), _architecture(file), architectures()).steps(file.parts)


def save(
    file: AdapterFile,
    path: str | PathLike[str],
    *,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    dense: bool = False,
) -> Path:
    """Write an adapter in a tool's format; the file is whole or, on any failure, as before. Returns its path.

    format: a name of `imgadapt.formats.FORMATS`; None: the one it came in, or "diffusers" where that has a word for all
        of it (LoRA), else "imgadapt". "peft" writes a folder where the path has no suffix. dtype: cast the tensors
        (None: keep theirs). dense: write whole differences of what the format has no word for (see `plan`).
    The same adapter gives the same bytes. What has not changed since it was read in this format is written as it was.

    Raises:
        ConfigError: no such format, a name that ends as pickles' do, or a dtype that is not of floating-point numbers.
        FormatError: the format cannot say what the adapter holds, or that is not finite (in `dtype`).
        OutputError: the file cannot be written.
    """
    if not isinstance(file, AdapterFile):
        raise ConfigError(
            f"{type(file).__name__} is no adapter; wanted what `load` or `collect` gave, and then the path"
        )
    if Path(path).suffix.lower() in (".pt", ".pth", ".bin", ".ckpt"):
        raise ConfigError(f"{path}: only safetensors is written; other tools would take this name for a pickle")
    architecture = _architecture(file)
    form = _default(file, architecture) if format is None else _format(format)
    if dtype is not None and not (dtype in _DTYPES and dtype.is_floating_point):
        raise ConfigError(f"an adapter cannot be written as {dtype}; wanted a floating-point dtype of safetensors")
    mine = {*form.own_metadata} if form.name == file.format else set[str]()
    others = {key for f in FORMATS for key in f.own_metadata} - mine
    kept = {key: value for key, value in file.metadata.items() if key not in others}
    if file.parts or not file.embeddings:
        tensors, metadata = write(Writer(form, architecture, architectures(), dense), file.parts, kept)
    else:
        tensors, metadata = {}, kept
    if file.embeddings:
        own = {"diffusers": "diffusers", "kohya": "kohya", "onetrainer": "pair"}
        in_form = write_embeddings(file.embeddings, "bundled" if file.parts else own.get(format or ""))  # pyright: ignore[reportArgumentType] # they are forms
        tensors = {**tensors, **in_form}
    if dtype is not None:
        tensors = exact_alpha(tensors, dtype)
    if broken := [key for key, tensor in tensors.items() if not _finite(tensor)]:
        raise FormatError(f"NaN or infinity in {first_few(broken)}; {path} is not written")
    of = {part.source.of if part.source and part.source.format == form.name else 0 for part in file.parts.values()}
    untouched = dtype is None and of == {len(tensors)} and HASHES[0] in metadata and _as_read(form, file, architecture)
    if HASHES[0] in form.own_metadata and file.parts and not untouched:  # LyCORIS hashes in an order of its own
        metadata |= _kohya_hashes(tensors, metadata)
    path = Path(path)
    if form.name == "peft" and not path.suffix:
        config = metadata.pop(PEFT_KEY, None) or form.metadata(file.parts, {})[PEFT_KEY]
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {path}: {error}") from error
        write_tensors(path / "adapter_model.safetensors", tensors, metadata)
        with atomically(path / "adapter_config.json") as written:
            written.write(json.dumps(json.loads(config), indent=2).encode())
        return path
    write_tensors(path, tensors, metadata)
    return path


def _as_read(form: Format, file: AdapterFile, architecture: Architecture | None) -> bool:
    return all(step.verbatim for step in Writer(form, architecture, ()).steps(file.parts))


def _format(name: str) -> Format:
    form = next((f for f in FORMATS if f.name == name), None)
    if form is None:
        raise ConfigError(f"no format '{name}'; there are: {', '.join(f.name for f in FORMATS)}")
    return form


def _default(file: AdapterFile, architecture: Architecture | None) -> Format:
    came_in = [f for f in FORMATS if f.name == file.format]
    for form in (*came_in, DIFFUSERS):
        if all(
            step.loss in ("exact", "aligned") for step in Writer(form, architecture, architectures()).steps(file.parts)
        ):
            return form
    return _format("imgadapt")


def _architecture(file: AdapterFile) -> Architecture | None:
    named = next((a for a in architectures() if a.name == file.architecture), None)
    return named if named is not None else architecture_of(file.parts, architectures())


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    # one pass, for NaN and infinity go through a sum; what is only too large for it is looked at closely
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor.float()).all())


def read_tensors(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors (on the CPU) and the metadata of a safetensors file. The tensors are the file's own pages, read when
    they are used; what is written into one stays in this process.

    Raises:
        FormatError: there is no such file, or it is not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path}: no such file" + (", only a folder" if path.is_dir() else ""))
    try:
        with safe_open(path, framework="pt") as file:  # it checks the header
            metadata = dict(file.metadata() or {})
            tensors = _mapped(path)
            if tensors is None:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: not a whole safetensors file ({error})") from error
    if strange := [key for key, tensor in tensors.items() if tensor.dtype not in _DTYPES]:
        raise FormatError(f"{path}: {first_few(strange)} of type {tensors[strange[0]].dtype}, which no adapter has")
    return tensors, metadata


def _mapped(path: Path) -> dict[str, Tensor] | None:
    """The tensors as views of the file's pages; None where it has some that the package must read (other dtypes, none
    of a whole number of elements from the start).
    """
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(size))
        header.pop("__metadata__", None)
        start = 8 + size
        known = all(row["dtype"] in dtypes for row in header.values())
        if not header or not known or start % max(dtypes[row["dtype"]].itemsize for row in header.values()):
            return None
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    found: dict[str, Tensor] = {}
    for key, row in sorted(header.items()):
        dtype, first, last = dtypes[row["dtype"]], *row["data_offsets"]
        if first % dtype.itemsize:
            return None
        count = (last - first) // dtype.itemsize
        empty = torch.empty(0, dtype=dtype)
        flat = torch.frombuffer(pages, dtype=dtype, count=count, offset=start + first) if count else empty
        found[key] = flat.view(row["shape"])
    return found


_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


_ORDER = ("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")  # fmt: skip  # noqa: E501


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, whatever the order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
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
    text, order = _header(tensors, metadata)
    with atomically(path) as file:
        file.write(text)
        for name in order:
            file.write(_bytes(tensors[name]))


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """What a safetensors file begins with, and the order of its tensors, the package's: by dtype, then by name."""
    rank = {dtype: k for k, dtype in enumerate(_ORDER)}
    order = sorted(tensors, key=lambda name: (rank[_DTYPES[tensors[name].dtype]], name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        dtype, shape = _DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order


def _kohya_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """What sd-scripts writes of a file: SHA-256 of all its tensors, and A1111's older one, of 64 KiB at 1 MiB, where
    the file has the `ss_` entries alone (library/train_util.py: precalculate_safetensors_hashes). LyCORIS writes 0x
    before the first.
    """
    text, order = _header(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    model, legacy, place = hashlib.sha256(), hashlib.sha256(), 0
    for chunk in (text, *(_bytes(tensors[name]) for name in order)):
        model.update(chunk if place else b"")
        first, last = max(0, 0x100000 - place), max(0, 0x110000 - place)
        legacy.update(chunk[first:last])
        place += len(chunk)
    start = "0x" if metadata.get(HASHES[0], "").startswith("0x") else ""
    return {HASHES[0]: start + model.hexdigest(), HASHES[1]: legacy.hexdigest()[:8]}
