"""combine: a recipe and the files it names into one adapter that says what it was made of."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch

from imgadapt import __version__
from imgadapt.combining.checkpoints.base import BaseFile, open_base
from imgadapt.combining.combine import DTYPES, Progress, combine_inputs, common_architecture
from imgadapt.combining.inheriting import inherited
from imgadapt.combining.layers import Input, order_of
from imgadapt.combining.recipe import Entry, MergeRecipe
from imgadapt.combining.recipes import KEY, public, to_toml
from imgadapt.combining.report import Report
from imgadapt.combining.weights import Factor, factor_of
from imgadapt.errors import FormatError, StateError
from imgadapt.file import AdapterFile, load
from imgadapt.formats import Part

Find = Callable[[Entry], Path]
"""Where an entry's file is."""


def combine(recipe: MergeRecipe, *, progress: Progress | None = None) -> AdapterFile:
    """The adapter that a recipe makes of the files it names, with their words, and metadata that has the recipe. It is
    in the recipe's format and dtype, or else in those that its inputs share: `save` it.

    imgadapt.combine(MergeRecipe((Entry("style.safetensors", 0.8), Entry("hero.safetensors", 0.6)), "svd", rank=16))

    Raises:
        ConfigError: files for different bases, a method that needs the base and none is given, blocks or masks that
            match nothing, nothing to merge, a word that two files have otherwise.
        FormatError, ShapeError: a file cannot be read, is not the one whose SHA-256 the recipe has, or does not fit.
        StateError: the result is not finite.
    """
    return merge_files(recipe, progress=progress)[0]


def merge_files(
    recipe: MergeRecipe, *, find: Find | None = None, version: str = __version__, progress: Progress | None = None
) -> tuple[AdapterFile, Report]:
    """See `combine`; and what was done. find: where files are, if not where the recipe says."""
    recipe, inputs, base = opened(recipe, find)
    metadata = metadata_of(recipe, inputs, version)
    made, report = combine_inputs(recipe, inputs, base=base, metadata=metadata, progress=progress)
    return cast(made, DTYPES[recipe.dtype or "fp32"]), report


def opened(recipe: MergeRecipe, find: Find | None = None) -> tuple[MergeRecipe, list[Input], BaseFile | None]:
    """A recipe with all that it leaves open settled (options, dtype, hashes), its inputs and its base.

    Raises:
        ConfigError, FormatError: see `combine`.
    """
    inputs = [read_input(entry, lambda _: 1.0, find) for entry in recipe.inputs]
    names = told_apart([entry.path for entry in recipe.inputs])
    inputs = [replace(one, name=name) for one, name in zip(inputs, names, strict=True)]
    base, base_sha256 = None, ""
    if recipe.base is not None:
        base = open_base(recipe.base if find is None else find(Entry(recipe.base, sha256=recipe.base_sha256)))
        base_sha256 = _checked(base.path, base_digest(base), recipe.base_sha256)
    entries = tuple(replace(e, sha256=one.digest) for e, one in zip(recipe.inputs, inputs, strict=True))
    recipe = replace(
        recipe,
        inputs=entries,
        options={name: _plain(value) for name, value in recipe.row.checked(recipe.options).items()},
        dtype=recipe.dtype or _dtype(inputs),
        base_sha256=base_sha256,
    )
    architecture = common_architecture(inputs)
    factors = [factor_of(e, architecture, one.file.parts) for e, one in zip(entries, inputs, strict=True)]
    ties = [json.dumps([e.weight, e.components, e.blocks, e.masks], sort_keys=True) for e in entries]
    made = [replace(one, weight=f, tie=t) for one, f, t in zip(inputs, factors, ties, strict=True)]
    return recipe, made, base


def metadata_of(recipe: MergeRecipe, inputs: Sequence[Input], version: str = __version__) -> dict[str, str]:
    """Metadata of what a settled recipe makes: the recipe, and what it has from its inputs; the same for any order of
    inputs that changes nothing else.
    """
    order = order_of(inputs, recipe.row.ordered)
    entries = [replace(recipe.inputs[k], path=public(str(recipe.inputs[k].path))) for k in order]
    told = replace(recipe, inputs=tuple(entries), base=recipe.base and public(recipe.base))
    return {
        **inherited([inputs[k] for k in order], [entry.weight for entry in entries]),
        KEY: to_toml(told, version),
    }


def read_input(entry: Entry, weight: Factor, find: Find | None = None) -> Input:
    """An entry's file.

    Raises:
        FormatError: see `load`; or it is not the file whose SHA-256 the recipe has.
    """
    path = Path(entry.path) if find is None else find(entry)
    file = load(path)
    return Input(Path(entry.path).name, file, _checked(path, digest_of(path), entry.sha256), weight)


def told_apart(paths: Sequence[str | PathLike[str]]) -> list[str]:
    """Names of files; of those of one name with as many folders as tell them apart: `a/adapter.safetensors`."""
    parts = [Path(path).parts for path in paths]
    made: list[str] = []
    for own in parts:
        others = [other for other in parts if other != own]
        count = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        made.append(str(Path(*own[-count:])))
    return made


def _checked(path: Path, digest: str, wanted: str) -> str:
    if wanted and digest != wanted:
        raise FormatError(
            f"{path} is not the file that the recipe means: its SHA-256 is {digest[:12]}..., not {wanted[:12]}..."
        )
    return digest


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; of a folder of peft's, of its weights."""
    if path.is_dir():
        ends = (path / f"adapter_model.{end}" for end in ("safetensors", "bin"))
        path = next((file for file in ends if file.is_file()), path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror or error}") from error


def base_digest(base: BaseFile) -> str:
    """SHA-256 of a base's file; of a folder, of the names and the hashes of its files of weights."""
    if base.path.is_file():
        return digest_of(base.path)
    rows = sorted(f"{file.relative_to(base.path).as_posix()} {digest_of(file)}\n" for file in base.files)
    return hashlib.sha256("".join(rows).encode()).hexdigest()


def _plain(value: float | str | bool) -> float | str | bool:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _dtype(inputs: Sequence[Input]) -> str:
    """The one that all tensors of all inputs are of; else fp32."""
    found = {t.dtype for one in inputs for part in one.file.parts.values() for t in part.tensors.values()}
    return next((name for name, dtype in DTYPES.items() if found == {dtype}), "fp32")


def cast(file: AdapterFile, dtype: torch.dtype) -> AdapterFile:
    """The same adapter in another dtype; words stay as they are.

    Raises:
        StateError: a number is beyond what the dtype holds.
    """
    parts: dict[str, Part] = {}
    for name, part in file.parts.items():
        tensors = {key: t.to(dtype) for key, t in part.tensors.items()}
        if dtype.itemsize < 4 and not all(bool(t.isfinite().all()) for t in tensors.values()):
            said = next(name for name, known in DTYPES.items() if known == dtype)
            raise StateError(f"{name}: the merged change is beyond what {said} holds; take another dtype (bf16, fp32)")
        parts[name] = replace(part, tensors=tensors)
    return replace(file, parts=parts)
