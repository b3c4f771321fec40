"""A safetensors file written like another: the same layout, what has not changed copied as bytes, the rest as it comes.

Layout: https://github.com/huggingface/safetensors#format. Dtypes and shapes stay, so each tensor stays at its place in
the data, and threads may write in any order.
"""

import json
import os
import shutil
import stat
import struct
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread
from typing import BinaryIO

import torch
from torch import Tensor

from imgadapt.atomic import atomically
from imgadapt.errors import FormatError, OutputError, StateError
from imgadapt.header import Row, header_of, stamp_of

_CHUNK = 2**25  # bytes copied at a time
_FLUSH = 0.5  # seconds between flushes
_PIECE = 2**17  # bytes written at a time: more at once takes Linux 6 (ext4) two to four times as long


@dataclass(frozen=True)
class Layout:
    """A safetensors file. rows: what its header says of each tensor, in its order; start: where the data begins; stamp:
    see `Header`.
    """

    path: Path
    rows: Mapping[str, Row]
    metadata: Mapping[str, str]
    start: int
    size: int
    stamp: tuple[int, int]

    def span(self, key: str) -> tuple[int, int]:
        """Where a tensor is within the data: (first byte, last + 1)."""
        return self.rows[key].first, self.rows[key].last

    def between(self, changed: Collection[str]) -> list[tuple[int, int]]:
        """What lies between tensors that change, within the data, in pieces of 32 MB or less."""
        spans = sorted(self.span(key) for key in changed)
        found: list[tuple[int, int]] = []
        place = 0
        for first, last in (*spans, (self.size - self.start,) * 2):
            found += [(k, min(k + _CHUNK, first)) for k in range(place, first, _CHUNK)]
            place = max(place, last)
        return found


def layout_of(path: Path) -> Layout:
    """Raises FormatError: it is not a safetensors file."""
    header = header_of(path)
    return Layout(path, header.rows, header.metadata, header.start, header.size, header.stamp)


class Rewriting:
    """A file that is being written. Its methods may be called by several threads at a time."""

    def __init__(self, layout: Layout, source: int, target: int, start: int) -> None:
        """source, target: open files; start: where the target's data begins."""
        self.layout, self._source, self._target, self._start = layout, source, target, start
        self._lock = Lock()  # the kernel lets one write to a file at a time, and burns the time of those who wait

    def copy(self, first: int, last: int) -> None:
        """These bytes of the data as they are.

        Raises:
            FormatError: they cannot be read. OSError: they cannot be written.
        """
        with self._lock, _named(self.layout.path):
            copy_range(self._source, self._target, self.layout.start + first, self._start + first, last - first)

    def put(self, key: str, tensor: Tensor) -> None:
        """A tensor's new values, in the dtype and shape that it has there."""
        first, last = self.layout.span(key)
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        assert len(data) == last - first, key
        with self._lock:
            _write(self._target, data, self._start + first)


@contextmanager
def rewriting(
    layout: Layout, target: Path, metadata: Mapping[str, str], late: Callable[[], Mapping[str, str]] | None = None
) -> Generator[Rewriting]:
    """A file of this layout with other metadata, which is there, whole, when the block has ended well. late: the
    metadata, as long, in which all is known; asked for at the end.

    Raises:
        OutputError: it cannot be written; what was there is untouched. FormatError: the layout's file cannot be read.
        StateError: that has changed since, or meanwhile.
    """
    text = _header(layout, metadata)
    need = 8 + len(text) + layout.size - layout.start
    room_for(target, need)
    with _opened(layout.path) as source, atomically(target) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()
        with _flushed(file.fileno()):
            yield Rewriting(layout, source.fileno(), file.fileno(), 8 + len(text))
        if late is not None:
            final = _header(layout, late())
            assert len(final) == len(text)
            _write(file.fileno(), memoryview(final), 8)
        if (size := os.fstat(file.fileno()).st_size) != need:
            raise OutputError(f"{target}: {size} bytes written, {need} wanted; not all of its tensors came")
        if stamp_of(source) != layout.stamp:
            raise StateError(f"{layout.path} changed while it was read, so {target} is not written; try again")


def _header(layout: Layout, metadata: Mapping[str, str]) -> bytes:
    rows: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for key, row in layout.rows.items():
        rows[key] = {"dtype": row.dtype, "shape": row.shape, "data_offsets": (row.first, row.last)}
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


@contextmanager
def _flushed(file: int) -> Generator[None]:
    """Within, what is written goes to the disk meanwhile, so that the sync at the end has little left to do.

    Raises:
        OSError: the disk has failed; the sync at the end would not say so again.
    """
    done, failed = Event(), list[OSError]()

    def flush() -> None:
        while not done.wait(_FLUSH):
            try:
                getattr(os, "fdatasync", os.fsync)(file)
            except OSError as error:
                failed.append(error)
                return

    thread = Thread(target=flush, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if failed:
        raise failed[0]


def room_for(path: Path, need: int) -> None:
    """Raises OutputError: the disk has not as many bytes left, or cannot be asked."""
    try:
        folder = next(folder for folder in path.absolute().parents if folder.is_dir())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    if free < need:
        raise OutputError(f"{path} takes {need / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB left")


def copy_file(source: Path, target: Path) -> None:
    """A whole file with its permissions, synced.

    Raises:
        OutputError: it cannot be written. FormatError: the source cannot be read.
    """
    with _opened(source) as old, _named(source):
        about = os.fstat(old.fileno())
        with atomically(target, mode=stat.S_IMODE(about.st_mode) & 0o777) as new:
            for place in range(0, about.st_size, _CHUNK):
                copy_range(old.fileno(), new.fileno(), place, place, min(_CHUNK, about.st_size - place))


@contextmanager
def _opened(path: Path) -> Generator[BinaryIO]:
    """Raises FormatError: it cannot be opened."""
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror or error}") from error
    with file:
        yield file


@contextmanager
def _named(path: Path) -> Generator[None]:
    """What cannot be read within is of this file."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


def copy_range(source: int, target: int, first: int, place: int, count: int) -> None:
    """`count` bytes from `first` of one open file to `place` of another; within the kernel where it can.

    Raises:
        OSError: it cannot be written. FormatError: it cannot be read, or has become shorter; the message names no file.
    """
    while count and hasattr(os, "copy_file_range"):
        try:
            done = os.copy_file_range(source, target, count, first, place)
        except OSError:  # it cannot be done so; or reading or writing fails, and then says below which of them
            break
        if not done:
            break
        first, place, count = first + done, place + done, count - done
    while count:
        try:
            data = os.pread(source, min(count, _CHUNK), first)
        except OSError as error:
            raise FormatError(error.strerror or str(error)) from error
        if not data:
            raise FormatError("it became shorter while it was read")
        _write(target, memoryview(data), place)
        first, place, count = first + len(data), place + len(data), count - len(data)


def _write(target: int, data: memoryview, place: int) -> None:
    while data:
        done = os.pwrite(target, data[:_PIECE], place)
        data, place = data[done:], place + done
