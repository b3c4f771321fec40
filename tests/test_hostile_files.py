"""Files of anyone: each is read right or refused with a clear word, in bounded time and memory."""

import base64
import gzip
import io
import json
import os
import pickle
import random
import re
import resource
import signal
import socket
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imgadapt import load
from imgadapt.header import MOST_BYTES, MOST_TENSORS
from imgadapt.tensors import write_tensors
from tests.hostile import INF, LAYER, NAN, lora, raw, row

DOTTED = "unet.mid_block.attentions.0.proj_in"
SECONDS = 4.0  # of CPU: twice what the slowest takes on a machine that has nothing else to do


# --- making them


def numbered(count: int) -> bytes:
    rows = (f'"{k}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for k in range(count))
    return raw(b"{" + ",".join(rows).encode() + b"}")


def tensors(
    of: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]], metadata: Mapping[str, str] = {}
) -> Callable[[Path], None]:
    return lambda path: write_tensors(path, of() if callable(of) else of, metadata)


def renamed(name: str) -> dict[str, Tensor]:
    return {key.replace(LAYER, name): tensor for key, tensor in lora().items()}


def many(name: str, ends: Sequence[str]) -> dict[str, Tensor]:
    return {name.format(k, end): torch.zeros(1, 1) for k in range(25_000) for end in ends}


def with_config(**fields: Any) -> Callable[[Path], None]:
    of = {f"{DOTTED}.lora_{x}.weight": tensor for x, tensor in (("A", torch.ones(2, 8)), ("B", torch.ones(8, 2)))}
    return tensors(of, {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in fields.items()})})


def ours(dtype: torch.dtype) -> Callable[[Path], None]:
    said = {"methods": [{"method": "lora", "rank": 2, "alpha": 1.0}], "layers": {DOTTED: 0}}
    of = {f"{DOTTED}.down": torch.ones(2, 8, dtype=dtype), f"{DOTTED}.up": torch.ones(8, 2, dtype=dtype)}
    return tensors(of, {"imgadapt": json.dumps(said)})


def peft(config: bytes | Callable[[Path], object], key: str = "base_model.model.mid_block.attentions.0.proj_in") -> Any:
    def make(path: Path) -> None:
        path.mkdir()
        of = {f"{key}.lora_A.weight": torch.ones(2, 8), f"{key}.lora_B.weight": torch.ones(8, 2)}
        write_tensors(path / "adapter_model.safetensors", of, {})
        beside = path / "adapter_config.json"
        config(beside) if callable(config) else beside.write_bytes(config)

    return make


def linked(path: Path) -> None:
    write_tensors(path.with_name("real"), lora(), {})
    path.symlink_to(path.with_name("real"))


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket is short
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


def sparse(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        count = size // 4
        head = raw({f"{LAYER}.lora_up.weight": row([count], 0, 4 * count)})
        path.write_bytes(head)
        os.truncate(path, len(head) + 4 * count)

    return make


Make = bytes | Callable[[Path], object]


def later(make: Callable[[], bytes]) -> Make:
    """A large file, made when it is wanted."""
    return lambda path: path.write_bytes(make())


ONE = b"\0" * 8
HEADERS: dict[str, tuple[Make, str | int]] = {
    "nothing": (b"", "an empty file"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "only 7 bytes"),
    "no tensors": (raw(b"{}"), "none of its 0 keys"),
    "header of 2^63": (raw(b"{}", length=2**63), "not a safetensors file"),
    "header past the end": (raw(b"{}", length=3), "not whole: its header takes 3 bytes, and there are 2"),
    "header of no bytes": (raw(b""), "its header is no table"),
    "not UTF-8": (raw(b'{"\xff":1}'), "no UTF-8"),
    "UTF-16": (raw('{"a":1}'.encode("utf-16")), "no UTF-8"),
    "a byte order mark": (raw(b"\xef\xbb\xbf{}"), "no table"),
    "not JSON": (raw(b"{]"), "not JSON"),
    "deep": (raw(b"[" * 2**20), "no table"),
    "deep in a row": (raw(b'{"a":' + b"[" * 2**20), "no tensor's"),
    "deep in a shape": (raw(b'{"a":{"dtype":"F32","shape":' + b"[" * 500 + b"]" * 500 + b"}}"), "no tensor's"),
    "something after its end": (raw(b"{}{}"), "something after its header's end"),
    "a key twice": (raw(b'{"a":%b,"a":%b}' % ((json.dumps(row()).encode(),) * 2), ONE), "two tensors called a"),
    "dtype twice": (raw(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', ONE), "no tensor's"),
    "__metadata__ twice": (raw(b'{"__metadata__":{},"__metadata__":{}}'), "__metadata__ twice"),
    "metadata's key twice": (raw(b'{"__metadata__":{"a":"b","a":"c"}}'), "its metadata has a twice"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "a in its metadata is no text"),
    "metadata of lists": (raw(b'{"__metadata__":{"a":' + b"[" * 10**5 + b"}}"), "is no text"),
    "metadata that is a list": (raw({"__metadata__": []}), "no table"),
    "overlap": (raw({"a": row(), "b": row()}, ONE), "a and b overlap"),
    "half an overlap": (raw({"a": row(), "b": row((2,), 4, 12)}, b"\0" * 12), "a and b overlap"),
    "a gap": (raw({"a": row(), "b": row((2,), 12, 20)}, b"\0" * 20), "a and b leave a gap"),
    "a gap at the start": (raw({"a": row((2,), 4, 12)}, b"\0" * 12), "its start and a leave a gap"),
    "more than its tensors": (raw({"a": row()}, ONE * 2), "its tensors take 8 bytes, and there are 16"),
    "less than its tensors": (raw({"a": row()}, ONE[:5]), "not whole: its tensors take 8 bytes, and there are 5"),
    "reversed": (raw({"a": row((2,), 8, 0)}, ONE), "takes 8 bytes and has -8"),
    "negative": (raw({"a": row((2,), -8, 0)}, ONE), "no tensor's"),
    "offsets of bool": (raw({"a": row((), False, True, "U8")}, b"\0"), "no tensor's"),
    "offsets of float": (raw({"a": row((2,), 0.0, 8.0)}, ONE), "no tensor's"),
    "an offset of 1e400": (raw(json.dumps({"a": row()}).replace("8]", "1e400]").encode(), ONE), "no tensor's"),
    "an offset of 5,000 digits": (
        raw(json.dumps({"a": row()}).replace("8]", "8" * 5000 + "]").encode(), ONE), "no tensor's"),
    "a side of 02": (raw(b'{"a":{"dtype":"F32","shape":[02],"data_offsets":[0,8]}}', ONE), "no tensor's"),
    "a side in Arabic": (raw('{"a":{"dtype":"F32","shape":[٢],"data_offsets":[0,8]}}'.encode(), ONE), "no tensor's"),
    "a tab in a key": (raw(b'{"a\tb":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', ONE), "no text at character"),
    "an offset of NaN": (raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,NaN]}}', ONE), "no tensor's"),
    "three offsets": (raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, ONE), "no tensor's"),
    "a shape of no text": (raw({"a": row("", 0, 4)}, ONE[:4]), "no tensor's"),
    "a shape that is a table": (raw({"a": row({}, 0, 4)}, ONE[:4]), "no tensor's"),
    "a shape of text": (raw({"a": row("22")}, ONE), "no tensor's"),
    "a negative shape": (raw({"a": row((-1, -2))}, ONE), "no tensor's"),
    "a huge shape": (raw({"a": row((2**40, 2**40))}, ONE), "takes more than all bytes and has 8"),
    "a shape that wraps round to 0": (raw({"a": row((2**32, 2**32), 0, 0)}), "takes more than all bytes and has 0"),
    "a shape of 600 sides": (raw({"a": row((1,) * 600, 0, 4)}, ONE[:4]), "none of its 1 keys"),
    "a shape of 2^60 and 0": (raw({"a": row((2**60, 0), 0, 0)}), r"a is \(1152921504606846976, 0\)"),
    "a row that is a list": (raw({"a": [1]}), "no tensor's"),
    "an empty row": (raw({"a": {}}), "no tensor's"),
    "a row with more": (raw({"a": {**row(), "x": 1}}, ONE), "no tensor's"),
    "an unknown dtype": (raw({"a": row(dtype="F33")}, ONE), "of type F33, which safetensors has not"),
    "a dtype that is a number": (raw({"a": row(dtype=7)}, ONE), "of type 7"),
    "a dtype that no adapter has": (raw({"a": row((1,), dtype="C64")}, ONE), "of type C64, which no adapter has"),
    "half a character": (raw(b'{"\\ud800":1}'), "no text at character"),
    "a row of 10 MB": (later(lambda: raw(b'{"a":{"dtype":"' + b"F" * 10**7 + b'"}}')), "no tensor's"),
    "most tensors": (later(lambda: numbered(MOST_TENSORS)), "none of its 50000 keys"),
    "a tensor more": (later(lambda: numbered(MOST_TENSORS + 1)), "more than 50,000 tensors, which no model has"),
    "half a million tensors": (later(lambda: numbered(550_000)), "more than 50,000 tensors"),
    "a million entries of metadata": (
        later(lambda: raw({"__metadata__": {str(k): "" for k in range(10**6)}})), "more than 50,000 entries"),
    "32 MB of junk": (later(lambda: raw(b"x" * MOST_BYTES)), "no table"),
    "32 MB of brackets": (later(lambda: raw(b'{"a":' + b"[]," * (MOST_BYTES // 3 - 2))), "no tensor's"),
    "32 MB of one key": (later(lambda: raw(b'{"' + b"a" * (MOST_BYTES - 9) + b'":[]}')), "no tensor's"),
    "32 MB of escapes": (later(lambda: raw(b'{"' + b"\\u0041" * (MOST_BYTES // 6 - 2) + b'":1}')), "no tensor's"),
    "32 MB of spaces": (later(lambda: raw(b"{}" + b" " * (MOST_BYTES - 2))), "none of its 0 keys"),
    "more than 32 MB": (later(lambda: raw(b"{}" + b" " * MOST_BYTES)), "which no model's file has"),
    "an HTML page": (b"<!DOCTYPE html><html><title>404</title></html>", "file, but a web page .*the download failed$"),
    "an HTML page after a mark and lines": (b"\xef\xbb\xbf\n\n<html><title>404</title></html>", "but a web page"),
    "JSON": (b'{"error": "Entry not found"}', "but JSON: the download failed"),
    "JSON with a table where a header begins": (b'{"data":{"error":"Entry not found"}}', "but JSON: the download"),
    "a pointer of git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "a git-lfs pointer: .*git lfs pull"),
    "gzip": (gzip.compress(bytes(99)), "gzip: unpack it"),
    "gzip without a time": (later(lambda: gzip.compress(random.Random(0).randbytes(2**20), mtime=0)), "gzip: unpack"),
    "a zip": (later(lambda: zipped(("a.safetensors", bytes(9)))), "but a zip archive: unpack it$"),
    "a JPEG": (b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\1", "but a picture$"),
    "cut in its header, of a length that is a pickle's start": (struct.pack("<Q", 0x0280) + b'{"a":', "takes 640 "),
    "not UTF-8, of a length that is a pickle's start": (
        struct.pack("<Q", 0x0280) + b'{"\xff' + bytes(0x027d), "its header is no UTF-8 text"),
}  # fmt: skip

ADAPTERS: dict[str, tuple[Make, str | int]] = {
    "a good one": (tensors(lora()), 1),
    "NaN": (tensors(lora(up=torch.full((8, 2), NAN))), 1),
    "infinity": (tensors(lora(down=torch.full((2, 8), -INF))), 1),
    "rank 0": (tensors(lora(up=torch.ones(8, 0), down=torch.ones(0, 8))), "is empty"),
    "a pair of numbers": (tensors(lora(up=torch.tensor(1.0), down=torch.tensor(1.0))), "make no adapter"),
    "rank 10^6 of a layer of 1": (tensors(lora(up=torch.ones(1, 10**6), down=torch.ones(10**6, 1))), 1),
    "rank 10^6, said and not there": (
        raw({f"{LAYER}.lora_up.weight": row((8, 10**6)), f"{LAYER}.lora_down.weight": row((10**6, 8))}, ONE), "takes"),
    "alpha 0": (tensors(lora(alpha=torch.tensor(0.0))), 1),  # the rank, as sd-scripts has it
    "alpha NaN": (tensors(lora(alpha=torch.tensor(NAN))), "alpha is nan, wanted one number, 0 or more"),
    "alpha infinite": (tensors(lora(alpha=torch.tensor(INF))), "alpha is inf"),
    "alpha negative": (tensors(lora(alpha=torch.tensor(-1.0))), "alpha is -1.0"),
    "alpha huge": (tensors(lora(alpha=torch.tensor(3e38))), 1),
    "alpha of two": (tensors(lora(alpha=torch.ones(2))), "wanted one number"),
    "alpha of none": (tensors(lora(alpha=torch.ones(0))), "alpha is empty"),
    "alpha of a million": (tensors(lora(alpha=torch.ones(10**6))), r"alpha is of shape \(1000000,\), wanted"),
    "mismatched": (tensors(lora(down=torch.ones(3, 8))), "make no adapter"),
    "no up": (tensors(lora(up=None)), "make no adapter"),
    "no down": (tensors(lora(down=None)), "make no adapter"),
    "alpha alone": (tensors(lora(up=None, down=None)), "make no adapter|none of its 1 keys"),
    "dora_scale of another shape": (tensors(lora(dora_scale=torch.ones(5, 3))), 1),
    "dora_scale empty": (tensors(lora(dora_scale=torch.ones(0))), "make no adapter"),
    "int8": (tensors({k: t.to(torch.int8) for k, t in lora().items()}), "down, up is torch.int8, wanted"),
    "uint8": (tensors({k: t.to(torch.uint8) for k, t in lora().items()}), "down, up is torch.uint8, wanted"),
    "bool": (tensors({k: t.to(torch.bool) for k, t in lora().items()}), "down, up is torch.bool, wanted"),
    "our own, of int8": (ours(torch.int8), "down, up is torch.int8, wanted"),
    "our own": (ours(torch.float16), 1),
    "an alpha of int64": (tensors(lora(alpha=torch.tensor(1))), 1),
    "F64": (tensors({k: t.double() for k, t in lora().items()}), 1),
    "fp8": (tensors({k: t.to(torch.float8_e4m3fn) for k, t in lora().items()}), 1),
    "a key of 1 MB": (tensors(renamed("lora_unet_" + "a_" * 500_000)), "none of its 3 keys"),
    "a key of 1 MB of dots": (tensors(renamed("unet." + "a." * 500_000 + "b")), 1),
    "a key of a path": (tensors(renamed("lora_unet_../../../etc/passwd")), "none of its 3 keys"),
    "a key of zeros": (tensors(renamed("\0\0\0")), "none of its 3 keys"),
    "a key that moves a cursor": (tensors(renamed("\x1b[2J\x1b]0;owned\x07\r\n\u202e")), "none of its 3 keys"),
    "a key of emoji": (tensors(renamed("🦊")), "none of its 3 keys"),
    "a key of HTML": (tensors(renamed("<script>alert(1)</script>")), "none of its 3 keys"),
    "no key": (tensors({"": torch.ones(2)}), "a word without a letter"),
    "50,000 unknown keys": (
        tensors(lambda: {f"what.{k}.x": torch.zeros(1) for k in range(50_000)}), "none of its 50000 keys"),
    "25,000 layers of no base we know": (tensors(lambda: many("transformer.b.{}.lora_{}.weight", "AB")), 25_000),
    "25,000 layers, 19 of Flux": (
        tensors(lambda: many("lora_unet_double_blocks_{}_img_attn_proj.lora_{}.weight", ("up", "down"))),
        "49962 of 50000 keys are unknown to the nearest table"),
    "a model's own weights": (tensors({f"model.{k}.weight": torch.ones(2, 2) for k in range(9)}), "a model's own"),
    "metadata of HTML": (tensors(lora(), {"ss_output_name": "<script>\x1b[2J", "ss_tag_frequency": "[" * 9999}), 1),
    "our own metadata, broken": (tensors(lora(), {"imgadapt": "[" * 10**6}), "is not what imgadapt writes"),
    "our own metadata, too long": (tensors(lora(), {"imgadapt": "[" + "[]," * 2**21 + "[]]"}), "is larger than any"),
    "a config with patterns that re tries for ever": (with_config(r=2, lora_alpha=2, alpha_pattern={"(a+)+!": 1}), 1),
    "a config with 101 patterns": (
        with_config(r=2, lora_alpha=2, alpha_pattern={f"a{k}.*": k for k in range(101)}), "more than 100 regular"),
    "a config with 50,000 names": (
        with_config(r=2, lora_alpha=2, alpha_pattern={f"^b{k}": k for k in range(50_000)}), 1),
    "a config of lists": (with_config(r=[2], lora_alpha=[2]), "make no adapter"),
    "a config that is no object": (tensors(lora(), {"lora_adapter_metadata": "[]"}), "list, wanted an object"),
    "a folder": (lambda path: path.mkdir(), "a folder without adapter_config.json"),
    "a folder of peft's": (peft(b'{"r": 2, "lora_alpha": 4}'), 1),
    "a config of nothing": (peft(b""), "is not JSON"),
    "a config of brackets": (peft(b"[" * 10**6), "is not JSON"),
    "a config of 100 MB": (
        peft(lambda path: path.write_bytes(b"[" + b"[]," * (10**8 // 3) + b"[]]")), "larger than any config"),
    "a config that is not UTF-8": (peft(b"\xff\xfe{}"), "no UTF-8"),
    "a config that is null": (peft(b"null"), "wanted an object"),
    "a config of wrong types": (peft(b'{"r": "two", "lora_alpha": {}, "rank_pattern": 5}'), "wanted an object"),
    "a config of paths": (peft(b'{"r": 2, "lora_alpha": 4, "base_model_name_or_path": "../../../../etc/passwd"}'), 1),
    "a config that is a folder": (peft(lambda path: path.mkdir()), "a folder without adapter_config.json"),
    "a config that is a pipe": (peft(os.mkfifo), "a folder without adapter_config.json"),
    "a link": (linked, 1),
    "a link to itself": (lambda path: path.symlink_to(path), "symbolic links"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "no such file, only a link to one"),
    "a pipe": (os.mkfifo, "no file, but a pipe"),
    "a socket": (listening, "no file, but a pipe"),
    "/dev/zero": (lambda path: path.symlink_to("/dev/zero"), "no file, but a pipe"),
    "/dev/full": (lambda path: path.symlink_to("/dev/full"), "no file, but a pipe"),
    "a sparse file of 4 TB": (sparse(2**42), "has no room"),
}  # fmt: skip


# --- pickles


def zipped(*entries: tuple[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", how) as archive:
        for name, data in entries:
            with warnings.catch_warnings(action="ignore"):  # of a name that is there twice
                archive.writestr(name, data)
    return made.getvalue()


def saved(content: Any, **options: Any) -> bytes:
    made = io.BytesIO()
    torch.save(content, made, **options)
    return made.getvalue()


def asked(data: bytes, number: bytes = b"\0" * 4) -> bytes:
    """A file of torch's whose pickle is this."""
    return zipped(("a/data.pkl", data), ("a/data/0", number), ("a/version", b"3\n"), ("a/byteorder", b"little"))


def nested(depth: int) -> Any:
    """A list that is ten times a list, and so on: small in a file, and 10^depth to walk."""
    made: list[Any] = []
    for _ in range(depth):
        made = [made] * 10
    return made


GLOBAL = b"\x80\x02c%b\n%b\n%bR."
PICKLES: dict[str, tuple[bytes, str | int]] = {
    "a good one": (saved(lora()), 1),
    "a good one, nested": (saved({"state_dict": lora()}), 1),
    "a tensor of 2^40 rows by one number": (
        saved({"a": torch.ones(1).expand(2**40, 4)}), "more than the numbers in the file"),
    "a bomb": (zipped(("a/data.pkl", bytes(2**26)), how=zipfile.ZIP_DEFLATED), "unpacks to more than it is"),
    "deflated": (zipped(("a/data.pkl", b"\x80\x02}."), how=zipfile.ZIP_DEFLATED), "unpacks to more"),
    "bytearray": (asked(GLOBAL % (b"builtins", b"bytearray", b"\x8a\x05\0\0\0\0\x10\x85")), "run builtins.bytearray"),
    "torch.Tensor": (asked(GLOBAL % (b"torch", b"Tensor", b"\x8a\x05\0\0\0\0\x10\x85")), "run torch.Tensor"),
    "os.system": (asked(GLOBAL % (b"os", b"system", b"X\1\0\0\0a\x85")), "run os.system"),
    "a place in the memo": (asked(b"\x80\x02}r\xff\xff\xff\x7f."), "not a pickle as torch.save writes it"),
    "laughs": (asked(pickle.dumps(nested(12), 2)), "more than 50,000 values"),
    "a list in itself": (asked(b"\x80\x02]q\0h\0a."), "depth exceeded|more than"),
    "deep": (asked(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."), "depth exceeded"),
    "steps": (asked(b"\x80\x02}" + b"N0" * 10**6 + b"."), "more steps"),
    "half of it": (saved(lora())[:-30], "not a whole zip"),
    "no pickle in it": (zipped(("a/version", b"3")), "a zip archive, and not a file of tensors.*: unpack it$"),
    "pickle.dump": (pickle.dumps(list(range(999)), 4), "but a pickle .*not of the form that can be read"),
    "pickle.dump, of a few bytes": (pickle.dumps({"a": 1.5}, 2), "but a pickle .*not of the form that can be read"),
    "a name twice": (
        zipped(("a/data.pkl", b"\x80\x02}."), ("a/data.pkl", b"\x80\x02N."), ("a/version", b"3")), "two entries"),
    "the form before torch 1.6": (saved(lora(), _use_new_zipfile_serialization=False), "before 1.6"),
    "many entries": (zipped(*((f"{k:09000}", b"") for k in range(1000))), "more entries"),
    "a comment that is a zip": (saved(lora())[:-2] + b"\x05\0hello", "not a whole zip"),
}  # fmt: skip


BARE = "^(?!.*(--pickle|load))(.*but a pickle .*not of the form that can be read)"
UNASKED = {
    "no pickle in it": "but a zip archive: unpack it$",
    "many entries": "but a zip archive: unpack it$",
    "the form before torch 1.6": "^(?!.*--pickle).*before 1.6, .* only where you trust whoever made it",
    "pickle.dump": BARE,
    "pickle.dump, of a few bytes": BARE,
}


def picture(text: bytes, kind: bytes = b"tEXt") -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">II5B", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)  # of pixels that are not looked at
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(kind, b"sd-ti-embedding\0" + text) + chunk(b"IEND", b"")


def embedding(value: Any) -> bytes:
    return base64.b64encode(json.dumps({"string_to_param": {"*": {"TORCHTENSOR": value}}, "name": "fox"}).encode())


PICTURES: dict[str, tuple[Make, str | int]] = {
    "a good one": (picture(embedding([[1.0] * 8])), 0),
    "a good one, packed": (picture(b"\0" + zlib.compress(embedding([[1.0] * 8])), b"zTXt"), 0),
    "lists in lists": (picture(base64.b64encode(b"[" * 10**6)), "no embedding can be read"),
    "many lists": (picture(base64.b64encode(b"[" + b"[]," * 10**6 + b"[]]")), "embedding|values|adapter"),
    "uneven lists": (picture(embedding([[1.0], [1.0, 2.0]])), "no embedding can be read"),
    "not base64": (picture(b"\xff\xfe&&"), "no embedding can be read"),
    "a bomb": (picture(b"\0" + zlib.compress(bytes(2**26)), b"zTXt"), "more than any embedding"),
    "a text of 64 MB": (later(lambda: picture(b"A" * 2**26)), "without an embedding"),
    "a chunk past the end": (b"\x89PNG\r\n\x1a\n\xff\xff\xff\xfftEXt", "without an embedding"),
    "a WebP": (b"RIFF\xff\xff\xff\xffWEBPVP8X" + bytes(40), "without an embedding"),
}


# --- judging them


def in_child(work: Callable[[], str], room: int) -> tuple[str, float]:
    """(what it says, seconds of CPU) of work in a child that may take `room` bytes more memory, and ten seconds."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + room
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            signal.alarm(60)
            began = time.process_time()
            try:
                said = work()
            except BaseException as error:  # the parent judges it
                said = f"{type(error).__name__}: {str(error)[:3000]}"
            os.write(writing, f"{time.process_time() - began:.3f} {said}".encode("utf-8", "backslashreplace"))
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        seconds, _, said = pipe.read().decode().partition(" ")
    _, status = os.waitpid(child, 0)
    assert status == 0, f"it died of signal {status}"
    return said, float(seconds)


def judged(make: Make, wanted: str | int, path: Path, **options: Any) -> None:
    make(path) if callable(make) else path.write_bytes(make)
    files = [path] if path.is_file() else [one for one in path.iterdir() if one.is_file()] if path.is_dir() else []
    size = sum(min(one.stat().st_size, 2**30) for one in files if not str(one.resolve()).startswith("/dev"))

    def work() -> str:
        return f"{len(load(path, **options).parts)} layers"

    said, seconds = in_child(work, 8 * size + 2**26)
    if isinstance(wanted, int):
        assert said == f"{wanted} layers"
    else:
        assert said.startswith((f"FormatError: {path}: ", f"FormatError: {path}/")), said[:500]
        assert re.search(wanted, said), said[:500]
        assert len(said) < 3000
        assert said.isprintable()
    assert seconds < SECONDS, f"{seconds:.1f} s of CPU"


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_is_refused_with_a_clear_word(what: str, tmp_path: Path) -> None:
    judged(*HEADERS[what], tmp_path / "x.safetensors")


@pytest.mark.parametrize("what", ADAPTERS)
def test_an_adapter_is_read_or_refused_with_a_clear_word(what: str, tmp_path: Path) -> None:
    judged(*ADAPTERS[what], tmp_path / "x.safetensors")


@pytest.mark.parametrize("what", PICKLES)
def test_a_pickle_is_refused_unasked_and_bounded_asked(what: str, tmp_path: Path) -> None:
    data, wanted = PICKLES[what]
    unasked = UNASKED.get(what, r"a pickle, as torch\.save writes; .*show --pickle.*load\(path, pickle=True\)")
    for name in ("x.pt", "x.safetensors"):
        judged(data, unasked, tmp_path / name)
    judged(data, wanted, tmp_path / "x.bin", pickle=True)


@pytest.mark.parametrize("what", PICTURES)
def test_a_picture_is_read_by_its_text_alone(what: str, tmp_path: Path) -> None:
    judged(*PICTURES[what], tmp_path / "x.png")
