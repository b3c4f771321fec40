"""Matching: what of an adapter goes on a base, layer by layer, without putting it on."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from imgadapt import targets
from imgadapt.arch import canonical
from imgadapt.embeddings import Embedding
from imgadapt.errors import TargetError
from imgadapt.file import AdapterFile
from imgadapt.formats import Part
from imgadapt.prompting.kind import Prompts
from imgadapt.prompting.places import Reads, find
from imgadapt.sites import Site
from imgadapt.targets import TEXT_ENCODERS

_TURNS = 100


@dataclass(frozen=True)
class Match:
    """Against the loaded base. matched of total layers and words; unmatched: layer -> why; unknown: keys that no table
    knows, and why.
    verdict: "all", "some", "none"; none is a red error.
    """

    base: str
    matched: int
    total: int
    unmatched: Mapping[str, str]
    unknown: Mapping[str, str]
    verdict: Literal["all", "some", "none"]


@dataclass(frozen=True)
class Places:
    """Where adapters can go on a base: canonical layer name -> site, text encoder -> width of its words, and what reads
    learned prompts (None: nothing does).
    """

    base: str
    sites: Mapping[str, Site] = field(repr=False)
    widths: Mapping[str, int]
    reads: Reads | None = field(default=None, repr=False)

    @classmethod
    def of(cls, base: str, pipeline: Any) -> Self:
        """Of a pipeline, which is only looked at; adapters may be on it, and the desk may put others on meanwhile."""
        sites, reads = _looked(pipeline)
        encoders = {name: pipeline.components.get(name) for name in TEXT_ENCODERS}
        return cls(
            base,
            sites,
            {name: int(one.get_input_embeddings().weight.shape[-1]) for name, one in encoders.items() if one},
            reads,
        )


def _looked(pipeline: Any) -> tuple[dict[str, Site], Reads | None]:
    """Looked up again where a layer was wrapped or unwrapped between two looks at it, which takes the desk a moment."""
    for turn in range(_TURNS):
        try:
            parts = targets.components(pipeline)
            return {canonical(layer.name): layer.site for layer in targets.layers(parts)}, _reads(parts)
        except (KeyError, RuntimeError):
            if turn == _TURNS - 1:
                raise
            time.sleep(0.02)
    raise AssertionError("a turn returns or raises")


def _reads(parts: Mapping[str, nn.Module]) -> Reads | None:
    try:
        return find(parts)
    except TargetError:
        return None


def match(file: AdapterFile, places: Places) -> Match:
    """What of a file would go on, and why the rest would not. A layer with NaN in it does not."""
    unmatched: dict[str, str] = {}
    for name, part in file.parts.items():
        if why := _why_not(name, part, places):
            unmatched[name] = why
    for word, embedding in file.embeddings.items():
        if why := _why_no_word(embedding, places):
            unmatched[f"word '{word}'"] = why
    if (prompt := file.prompts) is not None:
        unmatched |= {name: why for name in prompt.tensors if (why := _why_no_prompt(name, prompt, places))}
    total = len(file.parts) + len(file.embeddings) + len(prompt.tensors if prompt else ())
    matched = total - len(unmatched)
    whole = matched == total and not file.unknown
    return Match(
        places.base,
        matched,
        total,
        unmatched,
        dict(file.unknown),
        "none" if not matched else "all" if whole else "some",
    )


def _why_not(name: str, part: Part, places: Places) -> str:
    if part.slices:  # of a fused layer: it is split on the base's own weights
        missing = [s.layer for s in part.slices if s.layer not in places.sites]
        return f"it is made of layers that {places.base} does not have" if missing else _broken(part)
    site = places.sites.get(name)
    if site is None:
        component = name.partition(".")[0]
        has = any(layer.startswith(f"{component}.") for layer in places.sites)
        return f"{places.base} has no such layer" if has else f"{places.base} has no {component}"
    return part.method.fits(part.tensors, site) or part.method.check(site) or _broken(part)


def _broken(part: Part) -> str:
    wrong = [key for key, tensor in part.tensors.items() if not _finite(tensor)]
    return f"{wrong[0]} has NaN or infinity, or is not of floating-point numbers" if wrong else ""


def _finite(tensor: Tensor) -> bool:
    # one pass, for NaN and infinity go through a sum; what is only too large for it is looked at closely
    return tensor.is_floating_point() and (
        bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor.float()).all())
    )


def _why_no_prompt(name: str, prompt: Prompts, places: Places) -> str:
    reads, t = places.reads, prompt.tensors[name]
    if reads is None or not (reads.attentions or prompt.kind.joint):
        return f"{places.base} reads no {prompt.kind.name}"
    by_name = {canonical(key): place for key, (_, place) in reads.attentions.items()}
    place = {reads.component: reads.whole}.get(name) if prompt.kind.shared else by_name.get(name)
    if place is None:
        return f"{places.base} has nothing of that name that reads texts"
    wrong = [key for key, tensor in t.items() if not _finite(tensor)]
    return prompt.kind.fits(t, place) or (f"{wrong[0]} has NaN or infinity" if wrong else "")


def _why_no_word(embedding: Embedding, places: Places) -> str:
    if embedding.outputs:
        return "it replaces what a text encoder puts out, for which there is no place"
    for vectors in embedding.vectors.values():
        if vectors.shape[-1] not in places.widths.values():
            widths = ", ".join(map(str, places.widths.values())) or "none"
            return f"its vectors are {vectors.shape[-1]} wide; those of {places.base} are {widths}"
        if not _finite(vectors):
            return "its vectors have NaN or infinity"
    return "" if embedding.vectors else "it has no vectors"
