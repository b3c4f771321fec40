"""Tensors of files that are not safetensors: torch's pickles, where that is asked for, and A1111's pictures."""

import base64
import io
import json
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from imgadapt.errors import FormatError, shortened
from imgadapt.header import MOST_TENSORS, opened

_PLAIN = re.compile(
    r"collections OrderedDict|(torch|torch\.storage) \w+Storage|torch Size|torch\.nn\.modules\.container ParameterDict"
    r"|torch\._utils _rebuild_(tensor(_v2)?|parameter)|(__builtin__|builtins) set"
)
"""What a pickle of tensors needs of Python. torch allows more when it loads weights only: some of that takes memory as
large as the file wants, whatever the file's size (`bytearray`, `torch.Tensor`)."""
_MOST_STEPS = 400_000  # of a pickle; a file of 5,000 tensors takes 200,000
_MOST_NAMES = 2**23  # bytes of a zip's list of names
_LONGEST_TEXT = 2**22  # characters in a picture; 75 vectors for SDXL take 3 million
_LONE = "emb_params"  # what a tensor without a name is called: as in kohya's embeddings
_UNREADABLE = (
    *(
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
    ),
    *(
        AssertionError,
        AttributeError,
        TypeError,
        IndexError,
        MemoryError,
        RecursionError,
        OverflowError,
        NotImplementedError,
    ),
)


def is_picture(start: bytes) -> bool:
    """Whether a file that begins so is a PNG or a WebP."""
    return start[:4] in (b"\x89PNG", b"RIFF")


def read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors under dotted keys, the rest as text) of a pickle that holds data only, by torch's loader of weights
    only. A lone tensor is an `emb_params`. Memory is bounded by the file's size, time by a count of the pickle's steps.

    Raises:
        FormatError: it is none, it wants to run anything, or it claims more than it has.
    """
    with opened(path) as file:
        try:
            with torch.serialization.safe_globals([nn.ParameterDict]):
                content: Any = torch.load(_checked(file), map_location="cpu", weights_only=True)
            return _taken({_LONE: content} if isinstance(content, Tensor) else content)
        except _UNREADABLE as error:
            raise FormatError(f"not a file of tensors that is safe to load ({_wish(error)})") from error


def read_picture(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same of a PNG in which A1111 wrote an embedding: base64 of JSON, in its text `sd-ti-embedding`
    (modules/textual_inversion). No pixel is looked at.

    Raises:
        FormatError: there is none.
    """
    with opened(path) as file:
        try:
            text = _text(file)
            if text is None:
                raise FormatError("a picture without an embedding in its text (those in pixels are not read)")
            return _taken(json.loads(base64.b64decode(text), object_hook=_tensor))
        except _UNREADABLE as error:
            raise FormatError(f"no embedding can be read from this picture ({shortened(str(error))})") from error


def _checked(file: BinaryIO) -> BinaryIO:
    """A zip of torch's, copied entry by entry, if it unpacks to no more than it is and its pickle is a plain one.

    What is loaded is this copy, so that nothing can be read otherwise than it was checked.
    """
    size = file.seek(0, io.SEEK_END)
    if _length_of_names(file, size) > _MOST_NAMES:
        raise FormatError("a zip of more entries than any adapter has")
    with zipfile.ZipFile(file) as archive:
        rows = archive.infolist()
        if not any(row.filename.endswith("data.pkl") for row in rows):
            raise FormatError("a zip archive, and not a file of tensors, which has a data.pkl: unpack it")
        if any(row.compress_type != zipfile.ZIP_STORED for row in rows) or sum(row.file_size for row in rows) > size:
            raise FormatError("a zip that unpacks to more than it is, which torch never writes")
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as copy:
            names = set[str]()
            for row in rows:
                if row.filename in names:
                    raise FormatError(f"two entries of the zip are called {shortened(row.filename)}")
                names.add(row.filename)
                data = archive.read(row)
                if row.filename.endswith(".pkl"):
                    _check_steps(data)
                copy.writestr(zipfile.ZipInfo(row.filename), data)
    made.seek(0)
    return made


def _length_of_names(file: BinaryIO, size: int) -> int:
    """Bytes of the list at a zip's end, which Python's reader takes in whole."""
    file.seek(max(0, size - 98))
    end = file.read(98)
    if end[:1] == b"" or end[-22:-18] != b"PK\5\6":
        raise FormatError("not a whole zip, as torch.save writes: was all of it downloaded?")
    if end[-42:-38] == b"PK\6\7":
        return int(struct.unpack("<Q", end[40:48])[0]) if end[:4] == b"PK\6\6" else size
    return int(struct.unpack("<L", end[-10:-6])[0])


def _check_steps(data: bytes) -> None:
    """Raises FormatError: a pickle asks for more than tensors, or for memory."""
    for count, (step, value, _) in enumerate(pickletools.genops(data)):
        if count == _MOST_STEPS:
            raise FormatError("a pickle of more steps than any adapter takes")
        if step.name in ("GLOBAL", "INST") and not _PLAIN.fullmatch(str(value)):
            raise FormatError(f"not a file of tensors that is safe to load (it wants to run {_dotted(str(value))})")
        place = int(value) if step.name == "LONG_BINPUT" and value is not None else 0
        if step.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4") or place > _MOST_STEPS:
            raise FormatError("not a pickle as torch.save writes it")


def _dotted(name: str) -> str:
    return shortened(name.replace(" ", "."))


def _wish(error: BaseException) -> str:
    """What a refused pickle wanted to call, or else what is wrong with the file."""
    text = str(error)
    said = text.partition("WeightsUnpickler error:")[2].strip() or text or repr(error)
    return shortened(said.splitlines()[0], 200)


def _taken(content: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for count, (key, value) in enumerate(_flat(content, "")):
        if count == MOST_TENSORS:
            raise FormatError(f"more than {MOST_TENSORS:,} values, which no adapter has")
        key = key.removeprefix("state_dict.")
        if isinstance(value, Tensor):
            if key in tensors:
                raise FormatError(f"two tensors are called '{shortened(key)}'")
            tensors[key] = _whole(key, value.detach())
        elif isinstance(value, str | int | float | bool):
            metadata[key] = str(value)
    return tensors, metadata


def _whole(key: str, tensor: Tensor) -> Tensor:
    """The same tensor, if all its numbers are in the file: one that repeats a few may be larger than any memory."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.is_complex():
        raise FormatError(
            f"{shortened(key)} is {tensor.dtype}, {tensor.layout}, on {tensor.device}; wanted plain numbers"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise FormatError(f"{shortened(key)} is {tuple(tensor.shape)}, more than the numbers in the file")
    return tensor


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, leaf) of nested mappings and lists, each of which counts as a leaf, too, for it may be there often.
    Mappings in a list at the top are taken as one.
    """
    if isinstance(value, nn.ParameterDict):
        value = value._parameters  # before torch 1.12 it was pickled without the names that .items() reads
    if isinstance(value, Mapping):
        yield key, None
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        yield key, None
        for number, inner in enumerate(value):
            merged = not key and isinstance(inner, Mapping)
            yield from _flat(inner, "" if merged else f"{key}.{number}" if key else str(number))
    else:
        yield key, value


def _text(file: BinaryIO) -> bytes | None:
    """The text `sd-ti-embedding` of a PNG; None where it has none. Layout: https://www.w3.org/TR/png-3/#11textinfo."""
    if file.read(8)[:4] != b"\x89PNG":
        return None
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">L4s", head)
        if kind in (b"tEXt", b"zTXt") and length <= _LONGEST_TEXT:
            name, _, text = file.read(length).partition(b"\0")
            if name == b"sd-ti-embedding":
                return text if kind == b"tEXt" else _unpacked(text[1:])
            file.seek(4, io.SEEK_CUR)
        else:
            file.seek(length + 4, io.SEEK_CUR)
    return None


def _unpacked(data: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(data, _LONGEST_TEXT)
    if unpacker.unconsumed_tail:
        raise FormatError("its text unpacks to more than any embedding takes")
    return text


def _tensor(row: dict[str, Any]) -> Any:
    return torch.tensor(row["TORCHTENSOR"], dtype=torch.float32) if "TORCHTENSOR" in row else row
