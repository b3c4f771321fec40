"""Pickles and pictures with embeddings: what runs nothing, and takes no more memory than the file has bytes."""

import base64
import io
import json
import pickle
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import imgadapt
from tests.fuzz.files import placed
from tests.fuzz.target import Target

_RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.remove", "os.putenv", "subprocess.Popen", "socket.connect",
         "pickle.find_class", "shutil.rmtree", "ctypes.dlopen", "code.__new__")  # fmt: skip
"""Python's audit events, none of which reading data brings about."""
_STORAGE = struct.pack("<8f", *range(8))
_LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
_watching: list[bool] = []


class _Ran(BaseException):
    """A file was able to run something."""


def _watch(event: str, _arguments: Any) -> None:
    if _watching and event in _RUNS:
        raise _Ran(event)


def _load(data: bytes, name: str) -> None:
    if not hasattr(sys, "_imgadapt_watched"):
        sys._imgadapt_watched = True  # pyright: ignore[reportAttributeAccessIssue] # a hook stays for ever
        sys.addaudithook(_watch)
    path = placed(data, name)
    _watching.append(True)
    try:
        file = imgadapt.load(path, strict=False, pickle=True)
    finally:
        _watching.clear()
    tensors = [t for part in file.parts.values() for t in part.tensors.values()]
    tensors += [t for one in file.embeddings.values() for t in one.source.values()]
    taken = sum(t.untyped_storage().nbytes() for t in {t.untyped_storage().data_ptr(): t for t in tensors}.values())
    assert taken <= 16 * len(data) + 2**16, f"{taken} bytes of tensors from {len(data)}"


# --- a pickle's own steps, in a zip as torch writes it


def _in_zip(steps: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("x/data.pkl", steps)
        archive.writestr("x/byteorder", "little")
        for k in range(3):
            archive.writestr(f"x/data/{k}", _STORAGE)
        archive.writestr("x/version", "3\n")
    return made.getvalue()


def _steps(steps: bytes) -> None:
    _load(_in_zip(steps), "x.pt")


def _contents() -> Iterator[Any]:
    down, up = torch.arange(8.0).reshape(1, 8), torch.arange(8.0).reshape(8, 1)
    yield {f"{_LAYER}.lora_down.weight": down, f"{_LAYER}.lora_up.weight": up}
    yield {"string_to_param": {"*": torch.ones(2, 4)}, "name": "cat", "step": 10, "sd_checkpoint": None}
    yield {"string_to_param": nn.ParameterDict({"*": nn.Parameter(torch.ones(1, 8))}), "name": "dog"}
    yield torch.ones(2, 8, dtype=torch.float16)[:, ::2].clone().float()
    yield OrderedDict({"<cat>": torch.ones(8)})


def _saved(content: Any, *, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


class _Calls:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def _hostile() -> Iterator[bytes]:
    import builtins
    import os

    for call in (
        _Calls(os.putenv, "a", "b"),
        _Calls(builtins.eval, "1"),
        _Calls(bytearray, 2**40),
        _Calls(torch.empty, 2**40),
        _Calls(torch.Tensor, 2**36),
        _Calls(getattr, "a", "upper"),
    ):
        for protocol in (2, 4):
            yield pickle.dumps({"emb_params": call}, protocol)
    yield b"\x80\x02" + b"(" * 5000 + b"t." + b"." * 10
    yield b"\x80\x02" + b"]" + b"(" * 20000 + b"l" * 20000 + b"."
    yield b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."
    yield b"\x80\x02X\xff\xff\xff\x7fa."
    yield b"\x80\x02r\xff\xff\xff\xff."
    yield b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R."


def _pickles() -> Iterator[bytes]:
    for content in _contents():
        with zipfile.ZipFile(io.BytesIO(_saved(content))) as archive:
            yield archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    yield from _hostile()


def _files() -> Iterator[bytes]:
    for content in _contents():
        yield _saved(content)
    yield _saved(next(_contents()), zipped=False)
    yield from (_in_zip(steps) for steps in _hostile())
    deflated = io.BytesIO()
    with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(2**22))
    yield deflated.getvalue()


# --- a picture of A1111's


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of one pixel with further chunks."""
    head = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    body = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(bytes(4))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*one) for one in body)


def _embedding(text: bytes) -> None:
    _load(png((b"tEXt", b"sd-ti-embedding\0" + base64.b64encode(text))), "word.png")


def _texts() -> Iterator[bytes]:
    one = {"string_to_param": {"*": {"TORCHTENSOR": [[0.5, 1.0, -2.0], [1, 2, 3]]}}, "name": "cat", "step": 7}
    yield json.dumps({**one, "string_to_token": {"*": 265}}).encode()
    yield json.dumps({"emb_params": {"TORCHTENSOR": [1.0, 2.0]}}).encode()
    yield b'{"a":{"TORCHTENSOR":' + b"[" * 5000


def _pictures() -> Iterator[bytes]:
    text = base64.b64encode(next(_texts()))
    yield png((b"tEXt", b"sd-ti-embedding\0" + text))
    yield png((b"zTXt", b"sd-ti-embedding\0\0" + zlib.compress(text)))
    yield png((b"iTXt", b"sd-ti-embedding\0\0\0\0\0" + text))
    yield png((b"zTXt", b"sd-ti-embedding\0\0" + zlib.compress(bytes(2**24))))


_STEPS = (
    *("\x80\x02", "ctorch._utils\n_rebuild_tensor_v2\n", "ctorch\nFloatStorage\n", "ccollections\nOrderedDict\n"),
    *("ctorch.nn.modules.container\nParameterDict\n", "cbuiltins\nset\n", "cbuiltins\ngetattr\n", "cos\nsystem\n"),
    *(
        "ctorch\nSize\n",
        "ctorch._utils\n_rebuild_parameter\n",
        "cpu",
        "storage",
        "Q",
        "R",
        "K\x01",
        "J\xff\xff\xff\x7f",
    ),
    *(
        "\x85",
        "\x86",
        "\x87",
        "(",
        "t",
        "u",
        "]",
        "}",
        "\x89",
        "N",
        "q\x01",
        "h\x01",
        "b",
        "\x81",
        "\x93",
        "e",
        "a",
        "s",
    ),
)

TARGETS = (
    Target("pickle-steps", _steps, _pickles, _STEPS),
    Target("pickle-file", lambda data: _load(data, "x.pt"), _files, ("PK\x01\x02", "PK\x03\x04", "data.pkl", *_STEPS)),
    Target("embedding-text", _embedding, _texts, ('{"TORCHTENSOR":', "[[", "]]", "1e999", "NaN", "true", "null", "-")),
    Target(
        "embedding-png", lambda data: _load(data, "word.png"), _pictures, ("tEXt", "zTXt", "iTXt", "sd-ti-embedding")
    ),
)
