"""Architectures: which layers each has, under their canonical names, and what the model's own code calls them.

Data in `*.json`, derived from the models by `converters/derive_architecture.py`. A row of a component is
[path, shape of the weight, native]: native null where the model's own code has the same name, or else the rows of its
layers that this one's are, in order: [[native path, first row, rows], ...]. `{0-18}` in a path stands for each of these
numbers, and `{}` in native paths for the same one.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

_RANGE = re.compile(r"\{(\d+)-(\d+)\}")


@dataclass(frozen=True)
class Slice:
    """Rows of a native layer that are rows of one of ours: `rows` from `first` there, from `start` here."""

    layer: str
    start: int
    first: int
    rows: int


@dataclass(frozen=True, eq=False)
class Architecture:
    """One model family's layers that can carry adapters, by canonical name (`unet.conv_in`)."""

    name: str
    file: Path

    @cached_property
    def _data(self) -> dict[str, list[list[Any]]]:
        return json.loads(self.file.read_text("utf-8"))["components"]

    @cached_property
    def _rows(self) -> list[tuple[str, str, tuple[int, ...], Any]]:
        """(component, path, shape, native) of every layer."""
        return [
            (component, path, tuple(shape), native)
            for component, rows in self._data.items()
            for row in rows
            for path, shape, native in _expanded(*row)
        ]

    @cached_property
    def forms(self) -> frozenset[str]:
        """Paths in both namings, flattened, `#` for each number: to tell quickly what a file may be for."""
        rows = [row for rows in self._data.values() for row in rows]
        paths = {path for path, *_ in rows} | {name for *_, native in rows for name, *_ in native or ()}
        return frozenset(form_of(path) for path in paths | {path.replace("text_model.", "", 1) for path in paths})

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Canonical name -> shape of the weight."""
        return {f"{component}.{path}": shape for component, path, shape, _ in self._rows}

    @cached_property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    @cached_property
    def native(self) -> Mapping[str, tuple[Slice, ...]]:
        """Full native name (`transformer.double_blocks.0.img_attn.qkv`) -> what of our layers it is; empty where the
        model's own code has diffusers' names, or none are known. Components without native names are not in it.
        """
        found: dict[str, list[Slice]] = {}
        named = {component for component, _, _, native in self._rows if native is not None}
        for component, path, shape, native in self._rows:
            if component not in named:
                continue
            start = 0
            pieces: list[Any] = native if native is not None else [[path, 0, shape[0]]]
            for name, first, rows in pieces:
                found.setdefault(f"{component}.{name}", []).append(Slice(f"{component}.{path}", start, first, rows))
                start += rows
        return {name: tuple(slices) for name, slices in found.items()}

    @cached_property
    def native_rows(self) -> Mapping[str, int]:
        """Native name -> rows of its weight."""
        return {name: max(s.first + s.rows for s in slices) for name, slices in self.native.items()}

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Of a layer under its canonical or its native name; None if there is none."""
        if (shape := self.shapes.get(name)) is not None:
            return shape
        slices = self.native.get(name)
        return None if slices is None else (self.native_rows[name], *self.shapes[slices[0].layer][1:])


def form_of(path: str) -> str:
    """A path or a pattern of paths, dotted or flattened, flattened and with `#` for each number."""
    return re.sub(r"\{\d+-\d+\}|\{\}|\d+", "#", path).replace(".", "_")


def _expanded(path: str, shape: list[int], native: Any) -> Iterator[tuple[str, list[int], Any]]:
    found = _RANGE.search(path)
    if found is None:
        yield path, shape, native
        return
    for number in map(str, range(int(found[1]), int(found[2]) + 1)):
        names = None if native is None else [[name.replace("{}", number), *rows] for name, *rows in native]
        yield path.replace(found[0], number), shape, names


@cache
def architectures() -> tuple[Architecture, ...]:
    """All that are known, by name; each file is read when it is first asked."""
    return tuple(Architecture(file.stem, file) for file in sorted(Path(__file__).parent.glob("*.json")))


def canonical(name: str) -> str:
    """A live layer's name as files write it: CLIP's with `text_model.`, which transformers 5.6 took away."""
    component, _, path = name.partition(".")
    if component.startswith("text_encoder") and path.startswith("encoder.layers."):
        return f"{component}.text_model.{path}"
    return name
