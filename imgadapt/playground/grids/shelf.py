"""Shelf: grids on disk, a folder each, by which they outlive their playground."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from imgadapt.atomic import write_bytes
from imgadapt.errors import ConfigError
from imgadapt.playground.grids.cells import Cell, Grid, GridRequest
from imgadapt.playground.pictures.album import Album
from imgadapt.playground.pictures.comparing import Difference
from imgadapt.playground.requests import GenerateRequest

VERSION = 1
_ID = re.compile(r"[0-9a-f]{16}")
_UNREADABLE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ConfigError),
    *(OverflowError, RecursionError),  # whole numbers without end, brackets without end
)
_READ = 64
"""Grids that are kept in memory."""


class Shelf:
    """Grids in a folder."""

    def __init__(self, folder: Path, album: Album) -> None:
        self._folder, self._album = folder, album
        self._read: dict[str, tuple[int, Grid]] = {}

    def folder(self, id: str) -> Path:
        """Raises ConfigError where there is no such grid."""
        folder = self._folder / id
        if not _ID.fullmatch(id) or not (folder / "grid.json").is_file():
            raise ConfigError("there is no such grid (any more)")
        return folder

    def write(self, grid: Grid) -> None:
        """Raises OutputError: it cannot be written."""
        data = json.dumps({**told(grid), "owner": grid.owner, "more": dict(grid.more)}, ensure_ascii=False)
        write_bytes(self._folder / grid.id / "grid.json", data.encode())

    def read(self, id: str) -> Grid:
        """A grid, with those of its pictures that are still there.

        Raises:
            ConfigError: there is none, or it cannot be read.
        """
        path = self.folder(id) / "grid.json"
        try:
            stamp = path.stat().st_mtime_ns
            if id in self._read and self._read[id][0] == stamp:
                return self._read[id][1]
            grid = self._of(id, json.loads(path.read_bytes()))
        except _UNREADABLE as error:
            raise ConfigError(f"the grid {id} cannot be read any more ({type(error).__name__})") from error
        self._read[id] = stamp, grid
        while len(self._read) > _READ:
            self._read.pop(next(iter(self._read)), None)
        return grid

    def ids(self) -> list[str]:
        """Newest first."""
        found = [path for path in self._folder.glob("*/grid.json") if _ID.fullmatch(path.parent.name)]
        return [path.parent.name for path in sorted(found, key=_time, reverse=True)]

    def _of(self, id: str, said: Mapping[str, Any]) -> Grid:
        if said["version"] != VERSION:
            raise ValueError(said["version"])
        x, y, z = (tuple(str(label) for label in labels) for labels in said["labels"])
        cells = [self._cell(k, row) for k, row in enumerate(said["cells"])]
        request = GridRequest.of(said["request"])
        if not all(_is_laid_out(cell, (x, y, z), len(cells)) for cell in cells):
            raise ValueError("a cell lies outside of it")
        more = {str(name): str(value) for name, value in said["more"].items()}
        return Grid(id, request, (x, y, z), cells, str(said["owner"]), float(said["made"]), more)

    def _cell(self, index: int, row: Mapping[str, Any]) -> Cell:
        x, y, z = (int(at) for at in row["place"])
        picture = None
        if row["picture"] is not None:
            try:
                picture = self._album.get(str(row["picture"]))
            except ConfigError:  # it was deleted: the cell can be drawn again
                picture = None
        difference = Difference(**row["difference"]) if picture is not None and row["difference"] else None
        return Cell(index, (x, y, z), GenerateRequest.of(row["request"]), picture, difference, row["base"])


def _is_laid_out(cell: Cell, labels: Sequence[Sequence[str]], count: int) -> bool:
    """Whether it is at one of these labels, and compared with one of so many cells."""
    inside = all(0 <= at < len(row) for at, row in zip(cell.place, labels, strict=True))
    return inside and (cell.base is None or (isinstance(cell.base, int) and 0 <= cell.base < count))


def told(grid: Grid) -> dict[str, Any]:
    """A grid as JSON that is fit for anyone."""
    return {
        "version": VERSION,
        "id": grid.id,
        "name": grid.request.name,
        "made": grid.made,
        "request": grid.request.model_dump(mode="json"),
        "labels": [list(labels) for labels in grid.labels],
        "cells": [
            {
                "place": list(cell.place),
                "request": cell.request.model_dump(mode="json"),
                "picture": cell.picture.id if cell.picture else None,
                "difference": asdict(cell.difference) if cell.difference else None,
                "base": cell.base,
            }
            for cell in grid.cells
        ],
    }


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
