"""Remembering: headers and digests of a library's files, kept between starts for as long as a file does not change."""

import json
import os
import threading
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

import imgadapt
from imgadapt import __version__
from imgadapt.atomic import write_bytes
from imgadapt.errors import OutputError
from imgadapt.playground.library.cards import Header

Stamp = tuple[int, int]
"""When a file was changed (ns), and its bytes."""


class Memory:
    """A file of JSON; one that is broken, or another version's, is forgotten."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock, self._changed = path, threading.Lock(), False
        self._headers: dict[str, tuple[Stamp, Header]] = {}
        self._digests: dict[str, tuple[Stamp, str]] = {}
        try:
            kept = _Kept.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return
        if kept.version == _VERSION:
            self._headers = {id: ((row[0], row[1]), row[2]) for id, row in kept.headers.items()}
            self._digests = {id: ((row[0], row[1]), row[2]) for id, row in kept.digests.items()}

    def header(self, id: str, stamp: Stamp) -> Header | None:
        with self._lock:
            known = self._headers.get(id)
        return known[1] if known is not None and known[0] == stamp else None

    def keep_header(self, id: str, stamp: Stamp, header: Header) -> None:
        with self._lock:
            self._headers[id], self._changed = (stamp, header), True

    def digest(self, id: str, stamp: Stamp) -> str | None:
        with self._lock:
            known = self._digests.get(id)
        return known[1] if known is not None and known[0] == stamp else None

    def keep_digest(self, id: str, stamp: Stamp, digest: str) -> None:
        with self._lock:
            self._digests[id], self._changed = (stamp, digest), True

    def save(self, ids: Iterable[str]) -> None:
        """Write what is known of these, where anything changed; where it cannot be, the next start takes longer."""
        with self._lock:
            if not self._changed:
                return
            here = set(ids)
            self._headers = {id: row for id, row in self._headers.items() if id in here}
            self._digests = {id: row for id, row in self._digests.items() if id in here}
            rows = {
                "version": _VERSION,
                "headers": {id: [*stamp, asdict(header)] for id, (stamp, header) in self._headers.items()},
                "digests": {id: [*stamp, digest] for id, (stamp, digest) in self._digests.items()},
            }
            self._changed = False
        try:
            write_bytes(self._path, json.dumps(rows).encode())
        except OutputError:
            self._changed = True


class _Kept(BaseModel):
    """What the file has: headers and digests by id, each behind its stamp."""

    model_config = ConfigDict(extra="forbid", strict=True)  # of headers, too

    version: list[str | int]
    headers: dict[str, tuple[int, int, Header]]
    digests: dict[str, tuple[int, int, str]]


def _version() -> list[str | int]:
    """Another imgadapt may read a file in another way; so may the same one, changed in place."""
    package = Path(imgadapt.__file__).parent
    files = [*package.glob("formats/*.py"), *package.glob("methods/*.py"), package / "file.py", package / "summary.py"]
    return [__version__, 1, max((os.stat(file).st_mtime_ns for file in files if file.is_file()), default=0)]


_VERSION = _version()
