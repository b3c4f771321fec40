"""The header of a safetensors file: read within bounds and checked whole, before anything is made of what it says.

Layout: https://github.com/huggingface/safetensors#format.
"""

import json
import math
import os
import re
import struct
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from imgadapt import reading
from imgadapt.errors import FormatError, shortened
from imgadapt.kinds import START, kind_of

MOST_BYTES = 32 * 2**20
"""Of a header; the largest of real files are metadata of 5 MB."""
MOST_TENSORS = 50_000
"""Of a file; real ones have some 5,000 at most."""
_LONGEST_ROW = 2000  # characters of what is said of one tensor
_LARGEST = 2**60  # elements of a tensor, bytes of a file
_NOT_A_LENGTH = 2**32  # beyond, it is text or noise that is taken for one
_N = "(?:0|[1-9][0-9]{0,17})"
_USUAL_TEXT = re.compile(r'"([^"\\\x00-\x1f]*)"')
_USUAL_ROW = re.compile(
    rf'{{"dtype":"(\w{{1,12}})","shape":\[({_N}(?:,{_N}){{0,7}})?\],"data_offsets":\[({_N}),({_N})\]}}', re.ASCII
)
"""A text, and a row, as nearly every file has it: read so in a third of the time that it takes by way of JSON."""

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
"""Of an element, by safetensors' name of its type."""


@dataclass(frozen=True, slots=True)
class Row:
    """A tensor in a file. dtype: safetensors' name; first, last: bytes within the data, [first, last)."""

    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


@dataclass(frozen=True)
class Header:
    """What a file says of its tensors. rows: by key, as they lie in the header; start: where the data begins; size: of
    the file; stamp: size and time of change, which tell whether a file is still the same.
    """

    rows: Mapping[str, Row] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    start: int
    size: int
    stamp: tuple[int, int]


def stamp_of(file: BinaryIO) -> tuple[int, int]:
    """Size and time of change of an open file."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


@contextmanager
def opened(path: Path) -> Generator[BinaryIO]:
    """A file, open to be read; see `reading.opened`.

    Raises:
        FormatError: it is none, or cannot be read; or what is done within raises one, whose message names no file.
    """
    try:
        with reading.opened(path) as file:
            yield file
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror or error}") from error


def header_of(path: Path) -> Header:
    """The header of a file.

    Raises:
        FormatError: it cannot be read, or `read_header` refuses it.
    """
    with opened(path) as file:
        return read_header(file)


def read_header(file: BinaryIO) -> Header:
    """The header of an open file, from its start. The tensors it tells of fill the rest of the file, one after another
    without gaps, each of just the bytes that its type and shape take.

    Memory and time are bounded by the header's size, and that by `MOST_BYTES` and `MOST_TENSORS`.

    Raises:
        FormatError: it is not safetensors, not whole, or so large that it is no model's. The message names no file.
        OSError: it cannot be read.
    """
    stamp = stamp_of(file)
    size = stamp[0]
    head = file.read(8)
    if len(head) < 8:
        raise FormatError("an empty file" if not head else f"only {len(head)} bytes; not a whole safetensors file")
    (length,) = struct.unpack("<Q", head)
    if length > min(MOST_BYTES, size - 8):
        raise FormatError(_no_header(head + file.read(START), length, size))
    text = file.read(length)
    if len(text) < length:
        raise FormatError("not whole: it ends within its header")
    try:
        rows, metadata = _Reader(text.decode()).read()
    except UnicodeDecodeError as error:
        what = (text[:1] != b"{" and kind_of(head + text[:START])) or "its header is no UTF-8 text"
        raise FormatError(f"not safetensors: {what}") from error
    _check_places(rows, size - 8 - length)
    return Header(rows, metadata, 8 + length, size, stamp)


def _no_header(start: bytes, length: int, size: int) -> str:
    if length >= _NOT_A_LENGTH or start[8:9] != b"{":
        if kind := kind_of(start):
            return f"not a safetensors file, but {kind}"
        if length >= _NOT_A_LENGTH:
            return "not a safetensors file"
    if length > MOST_BYTES:
        return f"a header of {length:,} bytes, which no model's file has"
    return f"not whole: its header takes {length:,} bytes, and there are {size - 8:,}"


class _Reader:
    """A pass over a header's text that keeps no more than rows and metadata: JSON that says something else is refused
    where it begins to, and so cannot grow to a hundred times its size in memory, as it does for a parser of all JSON.
    """

    def __init__(self, text: str) -> None:
        self._text, self._place = text, 0
        self._decoder = json.JSONDecoder(object_pairs_hook=_once)

    def read(self) -> tuple[dict[str, Row], dict[str, str]]:
        rows: dict[str, Row] = {}
        metadata: dict[str, str] | None = None
        for key in self._keys():
            if key == "__metadata__":
                if metadata is not None:
                    raise FormatError("not safetensors: it has __metadata__ twice")
                metadata = self._metadata()
            elif key in rows:
                raise FormatError(f"not safetensors: it has two tensors called {shortened(key)}")
            elif len(rows) == MOST_TENSORS:
                raise FormatError(f"more than {MOST_TENSORS:,} tensors, which no model has")
            else:
                rows[key] = self._row(key)
        if self._text[self._place :].strip(" \n\r\t"):
            raise FormatError("not safetensors: there is something after its header's end")
        return rows, metadata or {}

    def _keys(self) -> Any:
        """Each key of the table that begins here; what follows it is for the caller to read."""
        if self._next() != "{":
            raise FormatError("not safetensors: its header is no table")
        self._place += 1
        if self._next() == "}":
            self._place += 1
            return
        while True:
            yield self._string()
            mark = self._next()
            self._place += 1
            if mark == "}":
                return
            if mark != ",":
                raise FormatError(f"not safetensors: its header is not JSON at character {self._place}")

    def _next(self) -> str:
        """The next character that is no space, where the place then is."""
        text, place = self._text, self._place
        while (mark := text[place : place + 1]) and mark in " \n\r\t":
            place += 1
        self._place = place
        return mark

    def _string(self, *, colon: bool = True) -> str:
        """The text that begins here, and the colon after it."""
        if self._next() != '"':
            raise FormatError(f"not safetensors: its header is not JSON at character {self._place}")
        if usual := _USUAL_TEXT.match(self._text, self._place):
            value, self._place = usual[1], usual.end()
        else:
            value = self._escaped()
        if colon:
            if self._next() != ":":
                raise FormatError(f"not safetensors: its header is not JSON at character {self._place}")
            self._place += 1
        return value

    def _escaped(self) -> str:
        try:
            value, self._place = self._decoder.raw_decode(self._text, self._place)
            value.encode()
        except ValueError as error:  # not JSON; half of a character
            raise FormatError(f"not safetensors: no text at character {self._place} of its header") from error
        return value

    def _metadata(self) -> dict[str, str]:
        if self._next() == "n" and self._text.startswith("null", self._place):
            self._place += 4
            return {}
        found: dict[str, str] = {}
        for key in self._keys():
            if key in found:
                raise FormatError(f"not safetensors: its metadata has {shortened(key)} twice")
            if len(found) == MOST_TENSORS:
                raise FormatError(f"more than {MOST_TENSORS:,} entries of metadata")
            if self._next() != '"':
                raise FormatError(f"not safetensors: {shortened(key)} in its metadata is no text")
            found[key] = self._string(colon=False)
        return found

    def _row(self, key: str) -> Row:
        self._next()
        if usual := _USUAL_ROW.match(self._text, self._place):
            self._place = usual.end()
            dtype, sides, first, last = usual.groups()
            shape = tuple(map(int, sides.split(","))) if sides else ()
            return _row(key, dtype, shape, int(first), int(last))
        end = self._text.find("}", self._place, self._place + _LONGEST_ROW) + 1
        begins = self._text.startswith("{", self._place)
        try:
            said: dict[str, Any] = self._decoder.decode(self._text[self._place : end]) if begins and end else {}
            dtype, shape, places = said["dtype"], said["shape"], said["data_offsets"]
            first, last = places
            numbers = [*shape, first, last]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError(f"not safetensors: what its header says of {shortened(key)} is no tensor's") from error
        self._place = end
        sound = len(said) == 3 and isinstance(shape, list) and isinstance(places, list)
        if not sound or not all(type(number) is int and number >= 0 for number in numbers):
            raise FormatError(f"not safetensors: what its header says of {shortened(key)} is no tensor's")
        return _row(key, dtype, tuple(shape), first, last)


def _row(key: str, dtype: Any, shape: tuple[int, ...], first: int, last: int) -> Row:
    """Raises FormatError: no such type, or not the bytes that it takes."""
    if max(first, last, *shape) > _LARGEST:
        raise FormatError(f"not safetensors: what its header says of {shortened(key)} is no tensor's")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise FormatError(f"{shortened(key)} is of type {shortened(str(dtype))}, which safetensors has not")
    count = math.prod(shape)
    if count > _LARGEST or count * BITS[dtype] != 8 * (last - first):
        wanted = f"{count * BITS[dtype] / 8:,.0f}" if count <= _LARGEST else "more than all"
        what = f"{shortened(key)}, {dtype} {shortened(str(shape))},"
        raise FormatError(f"not safetensors: {what} takes {wanted} bytes and has {last - first:,}")
    return Row(dtype, shape, first, last)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The table of these entries. Raises ValueError: it has one twice."""
    if len(made := dict(pairs)) != len(pairs):
        raise ValueError("an entry is there twice")
    return made


def _check_places(rows: Mapping[str, Row], size: int) -> None:
    place, before = 0, ""
    for key, row in sorted(rows.items(), key=lambda item: (item[1].first, item[1].last)):
        if row.first != place:
            what = "overlap" if row.first < place else "leave a gap"
            raise FormatError(f"not safetensors: {shortened(before) or 'its start'} and {shortened(key)} {what}")
        place, before = row.last, key
    if place != size:
        wanted = "not whole: " if place > size else "not safetensors: "
        raise FormatError(f"{wanted}its tensors take {place:,} bytes, and there are {size:,}")
