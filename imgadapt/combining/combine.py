"""combine_inputs: adapters in memory into one, by a recipe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from imgadapt.arch import Architecture, architectures
from imgadapt.combining.engine import Engine, Input, Merged, whole
from imgadapt.combining.entering import Base
from imgadapt.combining.inheriting import united_words
from imgadapt.combining.keep import Keep, header_bytes, layer_bytes
from imgadapt.combining.lowrank import Spectrum, concat
from imgadapt.combining.recipe import MergeRecipe
from imgadapt.combining.report import Report, Row
from imgadapt.combining.terms import Pair
from imgadapt.embeddings import Embedding
from imgadapt.errors import ConfigError
from imgadapt.file import AdapterFile
from imgadapt.formats import FORMATS, Format, Part, architecture_of
from imgadapt.methods import Full, LoRA, Norm
from imgadapt.sites import Site
from imgadapt.tensors import tensors_digest

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Progress = Callable[[str, int, int], None]
"""(what, done, of): called after each layer."""


def in_memory(file: AdapterFile, name: str, weight: Callable[[str], float]) -> Input:
    """An adapter that may be in no file."""
    tensors = {f"{layer}.{key}": t for layer, part in file.parts.items() for key, t in part.tensors.items()}
    return Input(name, file, tensors_digest(tensors), weight)


def common_architecture(inputs: Sequence[Input]) -> Architecture | None:
    """Whose layers they all have.

    Raises:
        ConfigError: they are for different bases.
    """
    named = {i.file.architecture: i.name for i in inputs if i.file.architecture and i.file.parts}
    if len(named) > 1:
        said = " and ".join(f"{name} is for {base}" for base, name in named.items())
        layers = {name for i in inputs for name in i.file.parts}
        everywhere = [a for a in architectures() if all(a.shape_of(name) is not None for name in layers)]
        if not everywhere:
            raise ConfigError(f"{said}: adapters of different bases cannot be merged")
        return architecture_of({n: p for i in inputs for n, p in i.file.parts.items()}, everywhere)
    name = next(iter(named), None)
    return next((a for a in architectures() if a.name == name), None)


@torch.no_grad()
def combine_inputs(
    recipe: MergeRecipe,
    inputs: Sequence[Input],
    *,
    base: Base | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> tuple[AdapterFile, Report]:
    """The merged adapter, with metadata as given, and what was done.

    Raises:
        ConfigError: different bases, a method that needs the base and has none, nothing to merge, or
            nothing left; a word that two of them have otherwise.
        FormatError, ShapeError: an input does not fit.
        StateError: the result is not finite.
    """
    architecture = common_architecture(inputs)
    engine = Engine(recipe, inputs, architecture, base, form_of(recipe, inputs))
    words, layers = united_words(inputs), [len(i.file.parts) for i in inputs]
    if not engine.names and (any(layers) or not words):
        raise ConfigError("nothing to merge: no input has a layer whose weight is not 0")
    report = Report(recipe, [i.name for i in inputs], engine.skipped, layers, about=[about(i) for i in inputs])
    rest = header_bytes((), metadata or {}) + word_bytes(words)
    form = form_of(recipe, inputs)
    ranks = _ranks(engine, rest, None if form is None else form.name, progress)
    parts: dict[str, Part] = {}
    changes = False  # anything: factors that cancel each other are no zeros themselves
    for k, made in enumerate(engine.cut(lambda name: None if ranks is None else ranks.get(name)), 1):
        own = {one.name: part_of(one) for one in engine.apart(made)}
        parts |= own
        changes |= made.norm > 0 or (made.bias is not None and bool(made.bias.any()))
        row = row_of(made, *own.values())
        report.add(replace(row, who=tuple(engine.order[k] for k in row.who)))
        if progress is not None:
            progress("merging", k, len(engine.names))
    if parts and not changes:
        raise ConfigError(
            "the merged change is 0 everywhere, and nothing would be written: weights that cancel each other, as those "
            "of one file with 1 and -1, or inputs that change nothing; other weights leave something"
        )
    if engine.names and not parts:
        zero = all(row.norm == 0 for row in report.rows)
        why = "the merged change is 0 everywhere" if zero else "ask for more"
        raise ConfigError(f"nothing is left of any layer at this error, energy or size: {why}")
    name = None if architecture is None else architecture.name
    return AdapterFile(parts, metadata or {}, None if form is None else form.name, name, embeddings=words), report


def about(one: Input) -> str:
    """`lora, rank 4 to 16, 722 layers`."""
    parts = one.file.parts.values()
    ranks = sorted({part.method.file_rank for part in parts} - {None}, key=lambda r: r or 0)
    rank = f"rank {ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}, " if ranks else ""
    words = f", {len(one.file.embeddings)} words" if one.file.embeddings else ""
    return f"{', '.join(sorted({part.method.name for part in parts}))}, {rank}{len(parts)} layers{words}".lstrip(", ")


def form_of(recipe: MergeRecipe, inputs: Sequence[Input]) -> Format | None:
    """The format that the result is for: the recipe's, or the one that all inputs are in."""
    names = {recipe.format} if recipe.format else {i.file.format for i in inputs if i.file.parts}
    return next((f for f in FORMATS if {f.name} == names), None)


def _ranks(engine: Engine, rest: float, form: str | None, progress: Progress | None) -> Mapping[str, int] | None:
    """What each layer is cut to; None: no layer is. rest: bytes of the file besides the layers' tensors."""
    recipe = engine.recipe
    if recipe.rank is not None:
        return dict.fromkeys(engine.names, recipe.rank)
    if recipe.error is None and recipe.energy is None and recipe.size is None:
        if recipe.rule == "svd":
            return {name: max(engine.ranks(name)) for name in engine.names}
        dense = recipe.row.elements is not None and recipe.space == "delta" and not recipe.whole
        return {name: sum(engine.ranks(name)) for name in engine.names} if dense else None
    keep = Keep(error=recipe.error, energy=recipe.energy, size=recipe.size)
    return shared_ranks(engine, keep, DTYPES[recipe.dtype or "fp32"].itemsize, rest, form, progress)


def shared_ranks(
    engine: Engine, keep: Keep, width: int, rest: float, form: str | None, progress: Progress | None = None
) -> Mapping[str, int]:
    """Ranks of all layers by an error, an energy or a size of the whole. width: bytes of a number; rest: what the file
    has besides the layers and the names of their tensors; form: the name of its format.

    Raises:
        ConfigError: the file is larger than the size without any rank.
    """
    found: dict[str, tuple[Site, Spectrum]] = {}
    for k, (made, values) in enumerate(engine.spectra(), 1):
        if made.bias is not None:  # such a layer stays, at rank 1 if need be
            rest += width * len(made.bias) + layer_bytes(made.name)
        if values is None:
            rest += width * made.site.rows + layer_bytes(made.name)
        else:
            found[made.name] = made.site, values
        if progress is not None:
            progress("measuring", k, len(engine.names))
    return keep.shared(found, width, rest, form) if found else {}


def word_bytes(words: Mapping[str, Embedding]) -> int:
    """What words take in a file."""
    tensors = [t for word in words.values() for t in (*word.vectors.values(), *word.outputs.values())]
    return sum(t.numel() * t.element_size() for t in tensors)


def part_of(made: Merged) -> Part:
    """A merged layer as an adapter has it: LoRA where it is a pair, else a whole difference."""
    if made.part is not None:
        return made.part
    bias: dict[str, Tensor] = {} if made.bias is None else {"bias": made.bias}
    if len(made.site.shape) == 1:
        diff = whole(made.terms).flatten()
        norm = {"w_norm": diff, **({} if made.bias is None else {"b_norm": made.bias})}
        return Part(Norm(bias=made.bias is not None), norm, shape=made.site.shape)
    most = min(made.site.rows, made.site.fan_in)
    pairs = [term for term in made.terms if isinstance(term, Pair)]
    if len(pairs) == len(made.terms):
        pair = pairs[0] if len(pairs) == 1 else concat(pairs)  # what was fused has one `down`, which stays as it is
        rank = pair.up.shape[1]
        if rank <= most:
            method = LoRA(rank=rank, alpha=float(rank), bias=bool(bias))
            shape = made.site.shape
            tensors = {"up": pair.up.reshape(-1, rank, *made.site.ones), "down": pair.down.reshape(rank, *shape[1:])}
            return Part(method, {**tensors, **bias}, shape=shape)
    diff = whole(made.terms).reshape(made.site.shape)
    rest = {} if made.bias is None else {"diff_b": made.bias}
    return Part(Full(bias=made.bias is not None), {"diff": diff, **rest}, shape=made.site.shape)


def row_of(made: Merged, *parts: Part | None) -> Row:
    """parts: the layers that it is in the file; None, or none of them, where nothing is left of it."""
    there = [part for part in parts if part is not None]
    rank, method = (there[0].method.file_rank, there[0].method.name) if there else (0, "")
    numbers = sum(tensor.numel() for part in there for tensor in part.tensors.values())
    return Row(made.name, made.who, made.gram, made.norm, rank, made.residual, method, numbers)
