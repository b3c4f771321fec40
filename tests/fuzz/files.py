"""Files of tensors, as bytes: their headers, configs beside them."""

import json
import math
import os
import re
import struct
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as bytes_of

import imgadapt
from imgadapt.combining.checkpoints.streams import layout_of
from imgadapt.errors import ImgadaptError
from imgadapt.header import header_of
from imgadapt.playground.library.cards import Reader
from imgadapt.stored import DTYPES as READABLE
from imgadapt.stored import stored
from imgadapt.tensors import read_tensors
from tests.fuzz.target import Target

_ROOM = 2**16  # bytes of data that a header gets, at most
_LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"


@cache
def _scratch(process: int) -> Path:
    return Path(tempfile.mkdtemp())


def scratch() -> Path:
    """A folder of this process alone."""
    return _scratch(os.getpid())


def placed(data: bytes, name: str) -> Path:
    """A file of these bytes."""
    path = scratch() / name
    path.write_bytes(data)
    return path


def _adapter(**metadata: str) -> bytes:
    down, up = torch.arange(8.0).reshape(1, 8), torch.arange(8.0).reshape(8, 1)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    return bytes_of({f"{_LAYER}.{end}": tensor for end, tensor in tensors.items()}, metadata or None)


# --- a whole file, and the card of it


def _load(data: bytes) -> None:
    path = placed(data, "x.safetensors")
    card = Reader().read(path)
    assert "cannot be read (" not in card.fault, card.fault  # its last resort
    try:
        imgadapt.load(path)
    except ImgadaptError:
        assert card.fault, "refused, and yet there is a card of it"
        raise


def _files() -> Iterator[bytes]:
    yield _adapter(ss_network_module="networks.lora", ss_network_dim="1", ss_tag_frequency='{"a": {"b c": 3}}')
    yield bytes_of({"emb_params": torch.ones(1, 8)})
    yield bytes_of({"clip_l": torch.ones(1, 8), "clip_g": torch.ones(1, 12, dtype=torch.bfloat16)})


# --- a header, with data of as many bytes as it says


def _with_data(text: bytes) -> bytes:
    """A file of this header."""
    last = max([0, *(int(n) for n in re.findall(rb"\b\d{1,6}\b", text) if int(n) <= _ROOM)])
    whole = max([0, *(int(n) for n in re.findall(rb"(\d{1,6})\s*\]\s*\}", text) if int(n) <= _ROOM)])
    return struct.pack("<Q", len(text)) + text + bytes(whole or last)


def _header(text: bytes) -> None:
    path = placed(_with_data(text), "h.safetensors")
    header = header_of(path)
    with safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == header.rows.keys()
        assert (theirs.metadata() or {}) == dict(header.metadata)
        for key in theirs.keys():  # noqa: SIM118 # it is no mapping
            assert tuple(theirs.get_slice(key).get_shape()) == header.rows[key].shape
    layout = layout_of(path)
    assert layout.rows == header.rows
    assert sum(last - first for first, last in layout.between(())) == header.size - header.start
    try:
        read, _ = read_tensors(path)
    except ImgadaptError:
        return  # of a type that no adapter has
    with safe_open(path, "pt") as theirs:
        assert all(torch.equal(theirs.get_tensor(key).view(torch.uint8), read[key].view(torch.uint8))
                   for key in read if read[key].numel() and read[key].ndim)  # fmt: skip
    for key, one in stored(path).items() if read else ():
        if one.dtype in READABLE:
            assert one.matches(read[key])
            assert one.read().shape == read[key].shape


def _refused_by_all(text: bytes) -> None:
    """What safetensors takes, and imgadapt refuses: a header may say more than any tensor needs."""
    path = placed(_with_data(text), "r.safetensors")
    try:
        with safe_open(path, "pt") as theirs:
            keys = list(theirs.keys())
    except (SafetensorError, OSError):
        header_of(path)  # refuses it, too
        raise AssertionError("taken, and safetensors refuses it") from None
    try:
        assert header_of(path).rows.keys() == set(keys)
    except ImgadaptError as error:
        if not re.search("twice|two tensors|is no tensor's|no text", str(error)):
            raise AssertionError("refused, and safetensors takes it") from error
        raise


def _headers() -> Iterator[bytes]:
    for data in _files():
        (length,) = struct.unpack("<Q", data[:8])
        yield data[8 : 8 + length].strip()
    rows: dict[str, Any] = {"a": ["F16", [2, 3], [0, 12]], "b": ["I64", [], [12, 20]], "c": ["F32", [0], [20, 20]]}
    names = ("dtype", "shape", "data_offsets")
    made = {key: dict(zip(names, row, strict=True)) for key, row in rows.items()}
    yield json.dumps({"__metadata__": {"é": "\u2028"}, **made}, ensure_ascii=False).encode()
    yield b"{}"
    yield b'{"__metadata__":{}}'


_WORDS = (
    *('"__metadata__":{', '"dtype":"F32"', '"dtype":"BF16"', '"dtype":"F8_E4M3"', '"dtype":"F4"', '"dtype":"BOOL"'),
    *('"shape":[', '"data_offsets":[', '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}', "18446744073709551615"),
    *("-1", "1e3", "0.0", "true", "null", "\\u0000", "\\ud800", "[[", "{", "}", '"', ",", ":", ".alpha", "emb_params"),
)


# --- peft's config beside its weights


def _peft_folder(config: bytes) -> None:
    folder = scratch() / "peft"
    folder.mkdir(exist_ok=True)
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        layer = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_"
        rank = torch.arange(8.0).reshape(1, 8)
        tensors = {
            f"{layer}{n}.lora_{e}.weight": (rank.clone() if e == "A" else rank.T.clone()) for n in "qv" for e in "AB"
        }
        weights.write_bytes(bytes_of(tensors))
    (folder / "adapter_config.json").write_bytes(config)
    file = imgadapt.load(folder)
    again = imgadapt.load(imgadapt.save(file, scratch() / "peft_again", format="peft"))
    assert again.parts.keys() == file.parts.keys()
    for name, part in file.parts.items():
        assert again.parts[name].method.file_rank == part.method.file_rank
        assert math.isclose(again.parts[name].method.scale, part.method.scale, rel_tol=1e-12)


def _configs() -> Iterator[bytes]:
    common = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["to_q", "to_v"], "bias": "none"}
    yield json.dumps(common).encode()
    yield json.dumps({**common, "alpha_pattern": {"attn1.to_q": 4}, "rank_pattern": {"^down.*to_v": 1}}).encode()
    yield json.dumps({**common, "use_rslora": True, "use_dora": False, "lora_bias": False, "feedforward": []}).encode()


_CONFIG_WORDS = (
    *('"lora_alpha":', '"alpha_pattern":{', '"rank_pattern":{', '"r":', '"use_rslora":true', '"use_dora":true'),
    *("1e999", "NaN", "-1", "null", "[]", "{}", "(a+)+$", "\\\\1", "9" * 40, "[" * 40, '"feedforward_modules":'),
)

TARGETS = (
    Target("safetensors", _load, _files, _WORDS),
    Target("header", _header, _headers, _WORDS),
    Target("header-theirs", _refused_by_all, _headers, _WORDS),
    Target("peft-config", _peft_folder, _configs, _CONFIG_WORDS),
)
