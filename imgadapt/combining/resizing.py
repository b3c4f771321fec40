"""resize: an adapter at lower ranks, each layer the best approximation that its rank has.

A resize is a merge of one input: what is LoRA in other words (LoHa, LoKr, ...) becomes it exactly before it is cut, and
any other change of the weight is cut as the whole difference that it is.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from imgadapt.arch import architectures
from imgadapt.combining.combine import Progress, part_of, row_of, shared_ranks, word_bytes
from imgadapt.combining.cutting import truncated
from imgadapt.combining.engine import Engine
from imgadapt.combining.entering import Base, no_change
from imgadapt.combining.keep import Keep, header_bytes
from imgadapt.combining.layers import Input, Merged
from imgadapt.combining.lowrank import spectrum
from imgadapt.combining.recipe import Entry, MergeRecipe
from imgadapt.combining.shrunk import Shrunk
from imgadapt.combining.terms import Pair
from imgadapt.combining.threads import in_order, one_thread_each
from imgadapt.errors import ConfigError, first_few
from imgadapt.file import AdapterFile
from imgadapt.formats import FORMATS, Part
from imgadapt.sites import Site

_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
_ARGUMENTS = ("algo", "conv_dim", "conv_alpha", "factor", "decompose_both", "full_matrix", "use_tucker")
"""Of `ss_network_args`: what is of ranks, or of a method that the layers no longer have."""


@torch.no_grad()
def resize(
    file: AdapterFile,
    keep: Keep,
    *,
    name: str = "adapter",
    base: Base | None = None,
    others: bool = False,
    progress: Progress | None = None,
) -> tuple[AdapterFile, Shrunk]:
    """The adapter cut down, in the dtypes it had and at alpha = rank, and what was cut.

    Layers that are of no higher rank already stay as they are, to the byte. Norms, changes of biases, words and
    metadata stay; metadata that would lie (hashes, the size of convolutions) does not. A whole difference that is
    smaller than its factors would be stays whole.

    name: of the adapter, for the report. base: for methods that read the base's weights (DoRA, OFT, ...): what they
        change there is worked out and becomes LoRA. others: without a base, leave such layers as they are.

    Raises:
        ConfigError: methods that read the base's weights, and neither; a size that cannot be met; nothing is left.
        FormatError, ShapeError, StateError: see `combine`.
    """
    bound = sorted(
        layer for layer, part in file.parts.items() if not part.method.merges or (base is None and _reads_weights(part))
    )
    if bound and not others:
        kinds = ", ".join(sorted({file.parts[layer].method.name for layer in bound}))
        if still := [layer for layer in bound if not file.parts[layer].method.merges]:
            raise ConfigError(
                f"{len(still)} layers ({first_few(still)}): {no_change(file.parts[still[0]].method)}; keep them as "
                "they are (--keep-others, others=True in Python)"
            )
        raise ConfigError(
            f"{len(bound)} layers ({first_few(bound)}) are {kinds}, and what they change depends on the base's "
            "weights; give the base (--base), or keep them as they are (--keep-others, others=True in Python)"
        )
    own = {layer: part for layer, part in file.parts.items() if layer not in set(bound)}
    if not own:
        raise ConfigError("nothing to resize: the adapter has no layers" + ", save those that are kept" * bool(bound))
    recipe = MergeRecipe((Entry(name),), rank=keep.rank, error=keep.error, energy=keep.energy, size=keep.size)
    known = next((a for a in architectures() if a.name == file.architecture), None)
    form = next((f for f in FORMATS if f.name == file.format), None)
    engine = Engine(recipe, [Input(name, replace(file, parts=own), "", lambda _: 1.0)], known, base, form)
    report = Shrunk(recipe, [name], [], [len(own)], said=keep.said(), kept=list(bound))
    parts = {layer: file.parts[layer] for layer in bound}
    gone: list[str] = []
    for k, (made, cut) in enumerate(_cut(engine, keep, dict(parts), _width(file), progress), 1):
        layers = {one.name: one for one in engine.apart(made)}
        if not layers:
            gone += [s.layer for s in engine.fused.get(made.name, ())] or [made.name]
        if cut or not _same(file.parts, layers, made):
            parts |= {layer: _in_dtype(part_of(one), file.parts.get(layer)) for layer, one in layers.items()}
        else:
            parts |= {layer: file.parts[layer] for layer in layers}
            report.kept += [layer for layer in layers if len(made.site.shape) > 1]
        report.add(row_of(made, next((parts[layer] for layer in layers), None)))
        if progress is not None:
            progress("resizing", k, len(engine.names))
    if not parts:
        raise ConfigError(f"nothing is left at {keep.said()}: ask for more")
    if gone:
        report.notes.append(f"{len(gone)} layers have no rank left and are gone: {first_few(gone)}")
    if keep.error is not None and report.residual > keep.error * (1 + 1e-6):
        report.notes.append(f"the error is {report.residual:.3g}: rank {keep.most} at most leaves out more than asked")
    return replace(file, parts=dict(sorted(parts.items())), metadata=_told(file.metadata, keep, report)), report


def _reads_weights(part: Part) -> bool:
    method: Any = part.method
    return method.needs_weight or getattr(method, "absolute", False) or bool(part.slices)


def _cut(
    engine: Engine, keep: Keep, others: Mapping[str, Part], width: int, progress: Progress | None
) -> Iterator[tuple[Merged, bool]]:
    """Each layer in order, and whether anything of it was cut off."""
    ranks: Mapping[str, int] = _shared(engine, keep, others, width, progress) if keep.whole else {}

    def one(name: str) -> tuple[Merged, bool]:
        made = engine.merge(name)
        if len(made.site.shape) < 2:
            return made, False
        if not keep.whole and keep.rule is None:
            rank = keep.limit(made.site)
            assert rank is not None
        elif keep.rule is None:
            rank = ranks[name]
        else:
            rank = keep.of(made.site, spectrum(made.terms, vectors=False).values)
        if _wide(made) <= rank or not (_low(made) or smaller(made.site, rank)):
            return made, False
        return truncated(made, rank), True

    with one_thread_each() as workers:
        yield from in_order(one, engine.names, workers)


def _shared(
    engine: Engine, keep: Keep, others: Mapping[str, Part], width: int, progress: Progress | None
) -> Mapping[str, int]:
    """Ranks by what is asked of the whole."""
    file = engine.inputs[0].file
    kept = sum(t.numel() * t.element_size() for part in others.values() for t in part.tensors.values())
    rest = kept + word_bytes(file.embeddings) + header_bytes(others, file.metadata)
    return shared_ranks(engine, keep, width, rest, file.format, progress)


def _wide(made: Merged) -> int:
    """The width of its factors, or that of the weight where it has none."""
    if _low(made):
        return sum(term.up.shape[1] for term in made.terms if isinstance(term, Pair))
    return min(made.site.rows, made.site.fan_in) + 1


def _low(made: Merged) -> bool:
    return all(isinstance(term, Pair) for term in made.terms)


def smaller(site: Site, rank: int) -> bool:
    """Whether factors of a rank are smaller than the whole difference."""
    return rank * (site.rows + site.fan_in) < site.rows * site.fan_in


def _same(before: Mapping[str, Part], layers: Mapping[str, Merged], made: Merged) -> bool:
    """Whether what was not cut is what the file had, and not another method made LoRA."""
    whole = len(made.site.shape) < 2 or not _low(made)
    return all(
        layer in before
        and not _reads_weights(before[layer])
        and (whole or (before[layer].method.name == "lora" and before[layer].method.file_rank == _wide(made)))
        for layer in layers
    )


def _width(file: AdapterFile) -> int:
    return max(t.element_size() for part in file.parts.values() for t in part.tensors.values())


def _in_dtype(part: Part, before: Part | None) -> Part:
    if before is None:
        return part
    dtype = next(iter(before.tensors.values())).dtype
    return replace(part, tensors={key: t.to(dtype) for key, t in part.tensors.items()})


def _told(metadata: Mapping[str, str], keep: Keep, report: Shrunk) -> dict[str, str]:
    """What is still true of the metadata, and what was done."""
    made = {key: value for key, value in metadata.items() if key not in _STALE}
    try:
        arguments: Any = json.loads(made.get("ss_network_args", "null"))
    except ValueError:
        arguments = None
    if isinstance(arguments, dict):
        made["ss_network_args"] = json.dumps({k: v for k, v in arguments.items() if k not in _ARGUMENTS})  # pyright: ignore[reportUnknownVariableType] # of JSON
    done = {"keep": keep.said(), "residual": float(f"{report.residual:.6g}")}
    return {**made, "imgadapt_resized": json.dumps(done)}
