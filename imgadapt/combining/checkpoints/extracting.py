"""extract: what a fine-tuned checkpoint changed of its base, as an adapter, one layer in memory at a time."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch

from imgadapt.combining.checkpoints.base import BaseFile, open_base
from imgadapt.combining.checkpoints.differences import Checkpoints, Difference, Together
from imgadapt.combining.combine import Progress, part_of, row_of
from imgadapt.combining.cutting import truncated
from imgadapt.combining.fused import split
from imgadapt.combining.keep import Keep, header_bytes, layer_bytes
from imgadapt.combining.layers import Merged
from imgadapt.combining.lowrank import Spectrum, spectrum
from imgadapt.combining.recipe import Entry, MergeRecipe
from imgadapt.combining.resizing import smaller
from imgadapt.combining.shrunk import Shrunk
from imgadapt.combining.terms import Dense, Pair
from imgadapt.combining.threads import in_order, one_thread_each
from imgadapt.errors import ConfigError, first_few
from imgadapt.file import AdapterFile
from imgadapt.formats import FORMATS, Part
from imgadapt.formats.kohya import BASES
from imgadapt.sites import Site
from imgadapt.targets import Targets

_LOUD = 0.5  # of a component's difference: rounding that is more of it is pointed out


@dataclass(frozen=True)
class Settings:
    """What is extracted, beside how much.

    targets: which layers, as `attach` has them; None: all. whole: layers whose factors would have more than half of the
        numbers of their whole difference get that instead, which is exact (not under a `size`). embeddings: those of
        tokens and positions become LoRA, too, which most tools do not read; else they are left out, and that is said.
    format: which tool the adapter is for: what is one layer there gets one rank. dtype: of the tensors. strict: layers
        that only one of the checkpoints has are an error. hashes: the files' SHA-256 are in the metadata.
    """

    targets: Targets | None = None
    whole: bool = True
    embeddings: bool = False
    format: str | None = None
    dtype: torch.dtype = torch.float32
    strict: bool = True
    hashes: bool = True


@torch.no_grad()
def extract(
    tuned: str | PathLike[str],
    base: str | PathLike[str],
    keep: Keep,
    settings: Settings | None = None,
    *,
    progress: Progress | None = None,
) -> tuple[AdapterFile, Shrunk]:
    """The difference of two checkpoints (diffusers' folders or single files) as an adapter, and what was cut off.

    Weights become LoRA at alpha = rank, the best of their rank; norms and biases travel as they differ; layers that are
    the same to the bit are left out.

    Raises:
        ConfigError: nothing differs, or they are not of one model.
        FormatError, ShapeError, StateError: see `open_base` and `Checkpoints`; values that are not finite.
        TargetError: a target matches no layer.
    """
    settings = settings or Settings()
    pair = Checkpoints(open_base(tuned), open_base(base), settings.strict)
    form = next((f for f in FORMATS if f.name == (settings.format or "kohya")), None)
    names = pair.asked(settings.targets)
    left_out = [n for n in names if pair.tuned.site(n).kind == "embedding" and not settings.embeddings]
    todo = pair.together([n for n in names if n not in set(left_out)], form)
    with ThreadPoolExecutor(1) as pool:  # beside the layers, from the same pages
        hashing = pool.submit(_sources, pair) if settings.hashes else None
        work = _Extraction(pair, keep, settings, todo, progress)
        parts, report = work.run()
        _notes(work, left_out, report)
        sources = _names(pair) if hashing is None else hashing.result()
    if not parts:
        why = " ".join(report.notes)
        raise ConfigError(f"nothing differs: {pair.tuned.path} has the weights of {pair.base.path}. {why}".rstrip())
    metadata = {
        "extracted_from": json.dumps(sources, sort_keys=True),
        "imgadapt_extracted": json.dumps({"keep": keep.said(), "residual": float(f"{report.residual:.6g}")}),
    }
    lora = all(part.method.name == "lora" and "bias" not in part.tensors for part in parts.values())
    known = pair.architecture.name if pair.architecture else None
    if known is not None and known in BASES:
        spec, metadata["ss_base_model_version"], _ = BASES[known]
        metadata |= {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"{spec}/lora"}
    format_ = settings.format or (("kohya" if lora else "lycoris") if known else None)  # the rest is not read back
    return AdapterFile(dict(sorted(parts.items())), metadata, format_, known), report


class _Extraction:
    """The layers of two checkpoints, one after the other; counts what is not in the adapter."""

    def __init__(
        self, pair: Checkpoints, keep: Keep, settings: Settings, todo: list[Together], progress: Progress | None
    ) -> None:
        self.pair, self.keep, self.settings, self.todo, self.progress = pair, keep, settings, todo, progress
        self.same: list[str] = []
        self.rounding: list[str] = []
        self.noise: dict[str, tuple[float, float]] = {}
        """Component -> squared norms of what rounding would make, and of the difference."""

    def run(self) -> tuple[dict[str, Part], Shrunk]:
        keep, name = self.keep, self.pair.tuned.path.name
        recipe = MergeRecipe((Entry(name),), rank=keep.rank, error=keep.error, energy=keep.energy, size=keep.size)
        report = Shrunk(recipe, [name], [], [len(self.todo)], said=keep.said(), notes=list(self.pair.notes))
        ranks = self._shared() if keep.whole else {}
        parts: dict[str, Part] = {}
        for one, (found, made) in self._each("extracting", lambda one: self._cut(one, ranks)):
            self._count(one, found)
            if made is None:
                continue
            own = {layer: self._part(each) for layer, each in _apart(made, one).items()}
            parts |= own
            report.add(row_of(made, next(iter(own.values()), None)))
        return parts, report

    def _each(self, what: str, work: Any) -> Iterator[tuple[Together, Any]]:
        with one_thread_each() as workers:
            done = in_order(work, self.todo, workers)
            for k, (one, made) in enumerate(zip(self.todo, done, strict=True), 1):
                yield one, made
                if self.progress is not None:
                    self.progress(what, k, len(self.todo))

    def _cut(self, one: Together, ranks: Mapping[str, int]) -> tuple[Difference, Merged | None]:
        found = self.pair.difference(one)
        if found.values is None and found.bias is None:
            return found, None
        gram = torch.tensor([[found.norm**2]], dtype=torch.float64)
        term = Pair(torch.zeros(one.site.rows, 1), torch.zeros(1, one.site.fan_in))
        made = Merged(one.name, one.site, (term,), found.bias, (0,), gram, found.norm)
        if found.values is not None:
            made = replace(made, terms=(Dense(found.values),))
            rank = self._rank(made, ranks)
            if rank is not None:
                made = truncated(made, rank)
        return replace(found, values=None), made

    def _rank(self, made: Merged, ranks: Mapping[str, int]) -> int | None:
        """None: it stays whole."""
        site, keep = made.site, self.keep
        if len(site.shape) < 2:
            return None
        if keep.whole:
            rank = ranks[made.name]
        elif keep.rule is None:
            rank = keep.limit(site) or 1
        else:
            rank = keep.of(site, spectrum(made.terms, vectors=False).values)
        most = min(site.rows, site.fan_in)
        if self.settings.whole and keep.size is None and not smaller(site, 2 * min(rank, most)):
            return None
        return min(rank, most)

    def _shared(self) -> Mapping[str, int]:
        """Ranks by what is asked of the whole: all singular values of all layers."""
        width = self.settings.dtype.itemsize
        rest = header_bytes((), {"": "-" * 500})
        found: dict[str, tuple[Site, Spectrum]] = {}
        for one, (values, vectors) in self._each("measuring", self._measured):
            rest += vectors * (width * one.site.rows + layer_bytes(one.name))
            if values is not None:
                found[one.name] = one.site, values
        return self.keep.shared(found, width, rest, self.settings.format or "kohya") if found else {}

    def _measured(self, one: Together) -> tuple[Spectrum | None, int]:
        """Singular values, and how many vectors differ: a bias, a norm."""
        found = self.pair.difference(one)
        none = found.values is None or len(one.site.shape) < 2
        values = None if none else spectrum((Dense(found.values),), vectors=False)  # pyright: ignore[reportArgumentType] # it is not None
        norm = found.values is not None and len(one.site.shape) < 2
        return values, (found.bias is not None) + norm

    def _count(self, one: Together, found: Difference) -> None:
        if found.rounding:
            self.rounding += one.layers
        elif found.norm == 0 and found.bias is None:
            self.same += one.layers
        component = one.layers[0].partition(".")[0]
        noise, norm = self.noise.get(component, (0.0, 0.0))
        self.noise[component] = noise + found.noise**2, norm + found.norm**2

    def _part(self, made: Merged) -> Part:
        part = part_of(made)
        return replace(part, tensors={key: t.to(self.settings.dtype) for key, t in part.tensors.items()})


def _apart(made: Merged, one: Together) -> dict[str, Merged]:
    """Layer -> what of a merged layer is its own; none where nothing is left of it."""
    if not made.terms:
        return {}
    if len(one.slices) == 1:
        return {one.layers[0]: made}
    sites = {s.layer: replace(one.site, shape=(s.rows, *one.site.shape[1:])) for s in one.slices}
    return {
        layer: replace(made, name=layer, site=sites[layer], terms=tuple(terms), bias=bias)
        for layer, (terms, bias) in split(made.terms, made.bias, one.slices).items()
    }


def _notes(work: _Extraction, left_out: list[str], report: Shrunk) -> None:
    """What the adapter does not have, and how far it may be believed."""
    pair, notes = work.pair, report.notes
    if work.same:
        notes.append(f"{len(work.same)} layers are the same in both.")
    if work.rounding:
        notes.append(
            f"{len(work.rounding)} layers differ by the rounding of their dtypes only: {first_few(work.rounding)}."
        )
    for component, (noise, norm) in work.noise.items():
        if norm and (share := (noise / norm) ** 0.5) >= _LOUD:
            notes.append(
                f"{component}: rounding to the dtype stored makes about {share:.0%} of the difference's norm: it is "
                "within rounding, and no rank holds that; take checkpoints of a finer dtype if there are any."
            )
    if changed := [n for n in left_out if pair.difference(pair.together([n], None)[0]).norm > 0]:
        notes.append(f"{first_few(changed)} differ, and are left out: embeddings=True (--embeddings) makes them LoRA.")
    if others := pair.others():
        notes.append(f"{len(others)} tensors of no layer differ, and no adapter has them: {first_few(others)}.")
    gone = [row.layer for row in report.rows if row.rank == 0]
    if gone:
        notes.append(f"{len(gone)} layers are left no rank: {first_few(gone)}.")


def _names(pair: Checkpoints) -> dict[str, Any]:
    return {"tuned": {"name": pair.tuned.path.name}, "base": {"name": pair.base.path.name}}


def _sources(pair: Checkpoints) -> dict[str, Any]:
    """Names and SHA-256 of both; of folders, of each file."""
    made = _names(pair)
    for key, one in (("tuned", pair.tuned), ("base", pair.base)):
        hashes = _hashes(one)
        made[key]["sha256"] = next(iter(hashes.values())) if one.path.is_file() else hashes
    return made


def _hashes(one: BaseFile) -> dict[str, str]:
    made: dict[str, str] = {}
    for path in one.files:
        with path.open("rb") as file:
            name = str(path.relative_to(one.path)) if one.path.is_dir() else path.name
            made[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return made
