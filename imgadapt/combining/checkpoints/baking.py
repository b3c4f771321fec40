"""bake: a merge written into a checkpoint, tensor by tensor, in the checkpoint's own names, dtypes and layout."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from imgadapt.atomic import folder_atomically
from imgadapt.combining.checkpoints.adding import Chance, add, turned
from imgadapt.combining.checkpoints.base import BaseFile, Place, rows_in
from imgadapt.combining.checkpoints.shards import index_in
from imgadapt.combining.checkpoints.streams import Layout, Rewriting, copy_file, layout_of, rewriting
from imgadapt.combining.engine import Engine
from imgadapt.combining.layers import Merged
from imgadapt.combining.rules.masks import mask_key, uniform
from imgadapt.combining.terms import Dense, Term
from imgadapt.errors import ConfigError, OutputError, ShapeError, StateError, first_few
from imgadapt.formats.kohya import HASHES
from imgadapt.stored import Stored

Progress = Callable[[str, int, int], None]
"""(what, done, of), in bytes."""
_HASHES = (*HASHES, "modelspec.hash_sha256")
"""Metadata that is of the base's tensors, and would be wrong of the result's."""
_COMPARED = 2**16  # elements at a time
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".gguf")


@dataclass(frozen=True)
class Baking:
    """How changes are written. rounding: to the stored dtype, see `rounding.stochastic`; seed: of what is random.
    strict: what the base has no layer for is an error. metadata: entries for the files that change; late: the same, as
    long, with what is known at the end only.
    """

    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: int = 0
    strict: bool = True
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    late: Callable[[], Mapping[str, str]] | None = None


@dataclass
class Baked:
    """What was done. layers: the merged ones, in the order written, without their terms. missing: layers of the
    adapters that the base does not have. changed, kept: how many tensors, by their bytes; left_out: files of a
    folder that are the base's weights in another form, and were not copied.
    """

    layers: list[Merged] = field(default_factory=list[Merged])
    missing: list[str] = field(default_factory=list[str])
    changed: int = 0
    kept: int = 0
    left_out: list[Path] = field(default_factory=list[Path])


def bake(
    engine: Engine, base: BaseFile, output: Path, how: Baking | None = None, *, progress: Progress | None = None
) -> Baked:
    """Write `base` with what the engine merges added to it: a file, or a folder where the base is one. The engine has
    to have been given the base too, and no format. What is not changed is copied byte for byte.

    Raises:
        ConfigError: nothing of the adapters is in the base, or (strict) not all of it; or the output is the base.
        ShapeError: a layer has another size in the base.
        StateError: a sum is not finite in the base's dtype, or the base has changed meanwhile.
        OutputError: it cannot be written; what was there is untouched.
    """
    how = how or Baking()
    _check_place(base, output)
    missing = [name for name in engine.names if name not in base.names]
    names = [name for name in engine.names if name in base.names]
    _check_names(base, engine, names, missing, how.strict)
    made = Baked(missing=missing)
    plan = _Plan(base, names)
    with ExitStack() as stack:
        if base.path.is_dir():
            folder = stack.enter_context(folder_atomically(output))
            made.left_out = _copy_rest(base, plan, folder)
            targets = {path: folder / path.relative_to(base.path) for path in plan.layouts}
        else:
            targets = {base.path: output}
        files = {
            path: stack.enter_context(rewriting(layout, targets[path], *_metadata(layout, how)))
            for path, layout in plan.layouts.items()
        }
        work = _Work(engine, base, files, how)
        jobs = plan.jobs()
        total, done = sum(job.size for job in jobs), 0
        for job, (merged, changed) in zip(jobs, engine.each(work, jobs), strict=True):
            made.layers += merged
            made.changed += changed
            done += job.size
            if progress is not None:
                progress("baking", done, total)
    made.kept = sum(len(layout.rows) for layout in plan.layouts.values()) - made.changed
    return made


def _check_place(base: BaseFile, output: Path) -> None:
    """Raises ConfigError, OutputError: the output is the base, or cannot be where it is asked for."""
    if base.path.is_dir():
        ours, theirs = output.resolve(), base.path.resolve()
        if ours == theirs or theirs in ours.parents or ours in theirs.parents:
            raise ConfigError(f"{output} is the base, lies in it, or it lies there; name another folder")
        if output.suffix == ".safetensors":
            raise ConfigError(f"{output}: the base is a folder of several files, and so is the result; name a folder")
        return
    if output.exists() and os.path.samefile(output, base.path):
        raise ConfigError(f"{output} is the base itself; name another file")
    if output.suffix != ".safetensors":
        raise ConfigError(f"{output}: the base is a file, and so is the result; its name must end in .safetensors")
    if output.is_dir():
        raise OutputError(f"{output} is a folder; name a file")


def _check_names(base: BaseFile, engine: Engine, names: Sequence[str], missing: Sequence[str], strict: bool) -> None:
    if not names:
        table = base.architecture.name if base.architecture else "no table knows it"
        raise ConfigError(
            f"nothing to bake: {base.path} ({table}) has none of the {len(engine.names)} layers of "
            f"{first_few([i.name for i in engine.inputs])}, {first_few(missing)}; are they for another base?"
        )
    if missing and strict:
        raise ConfigError(
            f"{len(missing)} of {len(engine.names)} layers are not in {base.path}: {first_few(missing)}; "
            "leave them out on purpose (--skip-missing, strict=False in Python), or take a base that has them"
        )


def _metadata(layout: Layout, how: Baking) -> tuple[dict[str, str], Callable[[], dict[str, str]] | None]:
    """Of the result: at the beginning, and at the end."""
    kept, late = {key: text for key, text in layout.metadata.items() if key not in _HASHES}, how.late
    return kept | dict(how.metadata), None if late is None else lambda: kept | dict(late())


@dataclass(frozen=True)
class _Job:
    """Layers, and the tensors that they are in; or, where there are none, bytes to copy. file, span: the (first) bytes;
    size: how many in all.
    """

    layers: tuple[str, ...]
    keys: tuple[str, ...]
    file: Path
    span: tuple[int, int]
    size: int


class _Plan:
    """Which tensors may change, and what can be done at once. Layers that share tensors are one job."""

    def __init__(self, base: BaseFile, names: Sequence[str]) -> None:
        self.base = base
        layers = {name: base.layer(name) for name in names}
        self.keys = {name: [p.key for p in (*layer.weight, *layer.bias)] for name, layer in layers.items()}
        self.changed: dict[Path, set[str]] = {}
        for key in (key for keys in self.keys.values() for key in keys):
            self.changed.setdefault(base.tensors[key].file, set()).add(base.tensors[key].key)
        self.layouts = {path: layout_of(path) for path in sorted(self.changed)}

    def jobs(self) -> list[_Job]:
        """In the order of the files."""
        copies = [
            _Job((), (), path, span, span[1] - span[0])
            for path, layout in self.layouts.items()
            for span in layout.between(self.changed[path])
        ]
        together = [self._merging(layers) for layers in _groups(self.keys)]
        return sorted([*together, *copies], key=lambda job: (job.file, job.span))

    def _merging(self, layers: Sequence[str]) -> _Job:
        keys = tuple(dict.fromkeys(key for name in layers for key in self.keys[name]))
        tensors = [self.base.tensors[key] for key in keys]
        size = sum(t.end - t.start for t in tensors)
        first = min(tensors, key=lambda t: (t.file, t.start))
        return _Job(tuple(layers), keys, first.file, self.layouts[first.file].span(first.key), size)


def _groups(keys: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Layers, those together that share a key."""
    group: dict[str, list[str]] = {}  # key -> the layers of its group, one list for all keys of it
    for name, own in keys.items():
        joined = {id(group[key]): group[key] for key in own if key in group}
        together = [*(layer for one in joined.values() for layer in one), name]
        group |= {key: together for layer in together for key in keys[layer]}
    return [*{id(one): one for one in group.values()}.values()]


class _Work:
    """What is done with a job, by any thread."""

    def __init__(self, engine: Engine, base: BaseFile, files: Mapping[Path, Rewriting], how: Baking) -> None:
        self.engine, self.base, self.files, self.how = engine, base, files, how

    def __call__(self, job: _Job, workers: int) -> tuple[list[Merged], int]:
        """The layers merged, and how many tensors have changed."""
        if not job.layers:
            self.files[job.file].copy(*job.span)
            return [], 0
        tensors = {key: self.base.readable(key).read() for key in job.keys}
        made: list[Merged] = []
        changed: set[str] = set()
        for name in job.layers:
            merged = self.engine.merge(name, workers)
            changed |= self._add(merged, tensors)
            made.append(replace(merged, terms=(), bias=None, part=None))
        for key, tensor in tensors.items():
            stored = self.base.tensors[key]
            file = self.files[stored.file]
            file.put(stored.key, tensor) if key in changed else file.copy(*file.layout.span(stored.key))
        return made, sum(not _as_stored(tensors[key], self.base.tensors[key]) for key in changed)

    def _add(self, merged: Merged, tensors: Mapping[str, Tensor]) -> set[str]:
        """Add a layer's change to the tensors that it is in; their keys."""
        layer, terms = self.base.layer(merged.name), [*merged.terms]
        size = (layer.site.rows, layer.site.fan_in)
        if wrong := next((term.shape for term in terms if term.shape != size), None):
            raise ShapeError(
                f"{merged.name}: the base's weight is {size} and the adapters' {wrong}; is it another base?"
            )
        if layer.scale is not None:
            terms = [term.scaled(1 / self.base.scale(layer)) for term in terms]
        rows: list[tuple[Place, Sequence[Term]]] = [(place, terms) for place in layer.weight if terms]
        if merged.bias is not None:
            if len(merged.bias) != sum(place.rows for place in layer.bias):
                there = f"{sum(p.rows for p in layer.bias)} rows" if layer.bias else "none"
                raise ShapeError(
                    f"{merged.name}: the adapters change a bias of {len(merged.bias)}, the base has {there}"
                )
            rows += [(place, [Dense(merged.bias[:, None])]) for place in layer.bias]
        for place, own in rows:
            values = tensors[place.key].view(tensors[place.key].shape[0], -1)
            values = values if place.turned else values[place.first : place.first + place.rows]
            first = 0 if place.turned else place.first * values.shape[1]
            own = turned(own) if place.turned else own
            if not add(values, own, place.start, self._chance(place.key, first)):
                raise StateError(
                    f"{merged.name}: NaN or infinity where it is added to {place.key} ({values.dtype}); lower the "
                    "weights, or take a base of a wider dtype; nothing is written"
                )
        return {place.key for place, _ in rows}

    def _chance(self, key: str, first: int) -> Chance | None:
        """first: the element of the tensor that the values begin with."""
        if self.how.rounding == "nearest":
            return None
        own = mask_key(self.how.seed, "rounding", self.base.tensors[key].key)
        return lambda start, count: uniform(own, first + start, count)


def _as_stored(tensor: Tensor, old: Stored) -> bool:
    """Whether all changes were lost in rounding. Most tensors differ in the first rows, and no more is read of them."""
    rows = max(1, _COMPARED * len(tensor) // max(1, tensor.numel()))
    return all(
        torch.equal(_bytes(part), _bytes(rows_in(old, first, len(part)).read()))
        for first in range(0, len(tensor), rows)
        for part in [tensor[first : first + rows]]
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _copy_rest(base: BaseFile, plan: _Plan, folder: Path) -> list[Path]:
    """Copy what is in a base's folder beside the files that change; what is not: its weights in another form."""
    changed = {path.parent for path in plan.layouts} | {base.path}
    left_out: list[Path] = []
    for path in sorted(base.path.rglob("*")):
        inner = path.relative_to(base.path)
        if any(part.startswith(".") for part in inner.parts[:-1]) or not path.is_file() or path in plan.layouts:
            continue
        weights = path.suffix in _WEIGHTS or ".index." in path.name
        if weights and path.parent in changed and path not in base.files and path != index_in(path.parent):
            left_out.append(inner)
            continue
        copy_file(path, folder / inner)
    return left_out
