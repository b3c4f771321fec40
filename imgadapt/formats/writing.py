"""Writing: an adapter as another tool has it, and what that costs, said before it happens."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from imgadapt.arch import Architecture, Slice
from imgadapt.errors import FormatError, first_few
from imgadapt.formats.format import Format
from imgadapt.formats.fusing import Unfusable, fuse, written_out
from imgadapt.formats.joining import Beside, sized
from imgadapt.formats.part import Part, Parts
from imgadapt.formats.spelling import held, in_lycoris
from imgadapt.formats.splitting import by_layer, rows_of, scaled, taken
from imgadapt.methods import Full, LoRA
from imgadapt.sites import Site

Loss = Literal["exact", "aligned", "dense", "impossible"]
_NONE: Mapping[str, str] = {}
_NOTHING = torch.empty(0)
_KEPT = (".alpha", ".on_input", "scaled_oft", "shira_indices")


@dataclass(frozen=True)
class Step:
    """One layer as a tool writes it.

    loss: "exact"; "aligned": exact because the edges of fused layers fall between the adapter's blocks; "dense": only
        its whole difference can be written, which is exact too and as large as the weight; "impossible".
    reason: why it is not exact, and what to do.
    layers: the layers of ours it is made of. tensors: what is written, by key; of "dense" ones that difference, if it
        was asked for. verbatim: whether that is what the file had. parts: what it is as written, by layer. beside:
        tensors that it has in common with other layers, by key.
    """

    name: str
    layers: tuple[str, ...]
    loss: Loss
    reason: str = ""
    tensors: Mapping[str, Tensor] | None = field(default=None, repr=False)
    verbatim: bool = False
    parts: Mapping[str, Part] = field(default_factory=dict[str, Part], repr=False)
    beside: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)


@dataclass(frozen=True)
class Writer:
    """One format for one architecture (None: one without a table).

    dense: whether whole differences are worked out where nothing less will do. known: architectures, for messages.
    """

    form: Format
    architecture: Architecture | None
    known: Sequence[Architecture]
    dense: bool = False

    def steps(self, parts: Parts) -> list[Step]:
        """How each layer is written; nothing is written yet."""
        left = dict(parts)
        done: list[Step] = []
        for names in self._untouched(parts):
            own = {name: left.pop(name) for name in names}
            source = own[names[0]].source
            assert source is not None
            stem = next(iter(source.tensors)).rpartition(".")[0]
            done.append(
                Step(stem, tuple(names), "exact", "", source.tensors, verbatim=True, parts=own, beside=source.beside)
            )
        groups = self._fused(left)
        inside = {s.layer for slices in groups.values() for s in slices}
        apart, beside = self.form.beside(parts), Beside()
        for step in done:
            beside.add(step.beside)
        for name, part in left.items():
            if name not in inside:
                step = self._step(name, (name,), part, apart.get(name, {}))
                beside.add(step.beside)  # one at a time: of many layers they would be large
                done.append(replace(step, beside=dict.fromkeys(step.beside, _NOTHING)))
        for name, slices in groups.items():
            own = {s.layer: left[s.layer] for s in slices if s.layer in left}
            done.append(self._fused_step(name, slices, own))
        if not beside.wrong and not all(step.verbatim for step in done):
            sizes = self.form.sizes({name: part for step in done for name, part in step.parts.items()})
            beside.tensors |= {key: sized(beside.tensors[key], shape) for key, shape in sizes.items()}
        done = [replace(step, beside={key: beside.tensors[key] for key in step.beside}) for step in done]
        kinds = {(name.partition(".")[0], part.method.name) for step in done for name, part in step.parts.items()}
        if self.form.single and len(kinds) > 1:
            reason = self._several(parts, done, kinds)
            return [replace(step, loss="impossible", reason=reason, tensors=None) for step in done]
        if self.form.single and done and all(step.tensors is not None for step in done):
            try:  # it may have no words for them together
                self.form.metadata({name: part for step in done for name, part in step.parts.items()}, {})
                beside.check()
            except FormatError as error:
                if not all(step.verbatim for step in done):
                    return [replace(step, loss="impossible", reason=str(error), tensors=None) for step in done]
        return done

    def _several(self, parts: Parts, done: Sequence[Step], kinds: Collection[tuple[str, str]]) -> str:
        """Why layers of these components and methods are not in one file."""
        form, methods = self.form.name, {part.method.name for part in parts.values()}
        others = [step for step in done if step.reason]
        if len(methods) == 1 and others and len(others) < len(done):  # some of them would be LoRA
            rest = f"{len(done) - len(others)} of the {len(done)} layers can be written, and {len(others)} only as LoRA"
            return f"{form} has one method in a file; of this {next(iter(methods))} {rest}: {others[0].reason}"
        said = ", ".join(f"{kind} on {component}" for component, kind in sorted(kinds))
        return f"{form} has one method and one component in a file; this has {said}: write them apart"

    def _untouched(self, parts: Parts) -> list[list[str]]:
        """Layers still as this format's file had them, together with all that one of its layers became."""
        by_source: dict[int, list[str]] = {}
        for name, part in parts.items():
            if part.source is not None and part.source.format == self.form.name:
                by_source.setdefault(id(part.source), []).append(name)
        groups = [(names, parts[names[0]].source) for names in by_source.values()]
        return [n for n, source in groups if source is not None and source.is_of({name: parts[name] for name in n})]

    def _fused(self, parts: Parts) -> dict[str, tuple[Slice, ...]]:
        """Layers of the model's own code -> their slices, where the format has those and parts have some of them."""
        architecture = self.architecture
        if architecture is None or not self.form.native or architecture.name in self.form.except_for:
            return {}
        owner = {s.layer: name for name, slices in architecture.native.items() for s in slices}
        return {owner[name]: architecture.native[owner[name]] for name in parts if name in owner}

    def _fused_step(self, name: str, slices: Sequence[Slice], own: Mapping[str, Part]) -> Step:
        """Layers of ours as the one layer that they are there."""
        layers = tuple(own)
        assert self.architecture is not None
        total = self.architecture.native_rows[name]
        try:
            fitted = scaled(slices, total, _whole_rows(slices, own, total))
            if fitted is None:
                raise Unfusable(f"its layers' rows do not make up those of {self.architecture.name}", dense=False)
            method, t = fuse(own, fitted)
        except Unfusable as error:
            what = "these layers are" if len(own) > 1 else "this layer is"
            reason = f"{what} a part of one in {self.form.name}, and {error}"
            return self._lossy(name, layers, Unfusable(reason, dense=error.dense), own, slices)
        step = self._step(name, layers, Part(method, t))
        if step.loss == "exact" and len(own) > 1 and method.name in ("lokr", "oft"):
            return replace(step, loss="aligned", reason="the edges of its layers fall between its blocks")
        return step

    def _step(self, name: str, layers: tuple[str, ...], part: Part, apart: Mapping[str, str] = _NONE) -> Step:
        """apart: ends of what stands beside the layers -> key."""
        form, architecture = self.form, self.architecture
        spelled = form.spell_name(name, architecture.name if architecture else None)
        if spelled is None:
            component = name.partition(".")[0]
            return Step(name, layers, "impossible", f"{form.name} has no word for the component {component}")
        if form.separator != "." and architecture is None:
            known = ", ".join(a.name for a in self.known)
            reason = f"how {form.name} names this model's layers is not known yet (known: {known}); dotted formats can"
            return Step(name, layers, "impossible", reason)
        if part.slices and not (form.native or form.name == "imgadapt"):
            return self._split_step(name, layers, part)
        shape = self._shape(name, part)
        try:
            known = architecture.shape_of(name) if architecture else None
            ends = form.spell(replace(part, shape=shape), _axes(part, known))
            tensors = {form.key(spelled, end): tensor for end, tensor in ends.items() if end not in apart}
            beside = {apart[end]: tensor for end, tensor in ends.items() if end in apart}
            own = {name: replace(part, shape=shape)}
            return Step(spelled, layers, "exact", "", tensors, parts=own, beside=beside)
        except Unfusable as error:
            if (plain := _as_lora(part, shape)) is not None:
                step = replace(self, dense=False)._step(name, layers, plain)
                if step.loss == "exact":
                    return replace(step, reason=f"{error}; as LoRA of rank {plain.method.file_rank} it is the same")
            return self._lossy(name, layers, error, {name: part}, ())

    def _split_step(self, name: str, layers: tuple[str, ...], part: Part) -> Step:
        """A fused layer's adapter that no rows can be taken of, for a tool that knows its layers only."""
        reason = f"{part.method.name} of this fused layer mixes rows of its layers"
        shape = self._shape(name, part)
        if part.method.needs_weight or "diff" not in self.form.ends or shape is None:
            return Step(name, layers, "impossible", f"{reason}: attach it, and collect what it is on each layer")
        if not self.dense:
            return Step(name, layers, "dense", f"{reason}; dense=True (--dense) writes whole differences")
        whole = difference(part, shape)
        tensors: dict[str, Tensor] = {}
        made: dict[str, Part] = {}
        for layer, slices in by_layer(part.slices).items():
            rows = [(s.first, s.rows) for s in slices]
            step = self._step(layer, layers, Part(*taken(whole.method, whole.tensors, rows)))
            if step.tensors is None:
                return step
            tensors |= step.tensors
            made |= step.parts
        return Step(name, layers, "dense", reason, tensors, parts=made)

    def _lossy(
        self, name: str, layers: tuple[str, ...], error: Unfusable, own: Mapping[str, Part], slices: Sequence[Slice]
    ) -> Step:
        """A whole difference where the format has one and no weights are needed for it."""
        shapes = {layer: self._shape(layer, part) for layer, part in own.items()}
        no_weights = error.dense and all(
            written_out(part.method) and not getattr(part.method, "absolute", False) for part in own.values()
        )
        if not no_weights or "diff" not in self.form.ends or None in shapes.values():
            return Step(name, layers, "impossible", f"{error}; {_remedy(own.values()) if not slices else _APART}")
        if not self.dense:
            return Step(name, layers, "dense", f"{error}; dense=True (--dense) writes its whole difference")
        made = {layer: difference(own[layer], shape) for layer, shape in shapes.items() if shape is not None}
        step = self._fused_step(name, slices, made) if slices else self._step(name, layers, made[name])
        return replace(step, loss="dense" if step.tensors else step.loss, reason=str(error))

    def _shape(self, name: str, part: Part) -> tuple[int, ...] | None:
        """The weight's shape: the architecture's if the tensors fit it, else what the tensors themselves say."""
        if part.shape is not None:
            return part.shape
        known = self.architecture.shape_of(name) if self.architecture else None
        if known is not None and part.method.fits(part.tensors, Site.of_shape(known, part.method.kinds)) is None:
            return known
        rows, t = rows_of(part.method, part.tensors), part.tensors
        kernel = known[2:] if known is not None else ()
        if rows is None:
            return None
        if "down" in t:
            return (rows, t["down"].shape[1], *(t["mid"].shape[2:] if "mid" in t else t["down"].shape[2:]))
        if "core_1" in t:
            return (rows, t["down_1"].shape[1], *t["core_1"].shape[2:])
        if "diff" in t:
            return tuple(t["diff"].shape)
        if "down_1" in t:
            inputs = t["down_1"].shape[1]
        elif part.method.name == "lokr":
            inputs = (t["w1"] if "w1" in t else t["w1_b"]).shape[1] * (t["w2"] if "w2" in t else t["w2_b"]).shape[1]
            if "w2" in t or "t2" in t:
                return (rows, inputs, *(t["w2"] if "w2" in t else t["t2"]).shape[2:])
        else:
            return None
        return None if inputs % math.prod(kernel) else (rows, inputs // math.prod(kernel), *kernel)


_APART = "diffusers' names, which 'imgadapt' has, keep them apart"


def _remedy(parts: Collection[Part]) -> str:
    """What to do with what a format has no word for."""
    methods = [part.method for part in parts]
    if still := next((method for method in methods if not method.merges), None):
        if still.timed:
            return (
                f"{still.name} {still.apart}: --average-times (`untimed`) makes the LoRA that is nearest over all times"
            )
        return "it is no change of a weight, so only the format 'imgadapt' holds it"
    if all(map(in_lycoris, methods)):
        return "'lycoris' has words for most of its settings, 'imgadapt' for all"
    base = " --base BASE" if any(method.needs_weight for method in methods) else ""
    lora = (
        f"`imgadapt resize FILE OUTPUT --rank 16{base} --format FORMAT` makes LoRA of it and says what that leaves out"
    )
    return f"the format 'imgadapt' holds it as it is; {lora}"


def _whole_rows(slices: Sequence[Slice], own: Mapping[str, Part], total: int) -> int:
    """Rows of the fused layer of this model, whose architecture's has `total`."""
    for layer, part in own.items():
        if size := rows_of(part.method, part.tensors):
            return total * size // sum(s.rows for s in slices if s.layer == layer)
    return total


def _as_lora(part: Part, shape: tuple[int, ...] | None) -> Part | None:
    """The same change as LoRA, where it is of no higher rank than the weight; None if it is none, or is LoRA."""
    method = part.method
    if shape is None or len(shape) < 2 or not written_out(method) or method.name == "lora":
        return None
    site = Site.of_shape(shape, method.kinds)
    t = {name: tensor.float() for name, tensor in part.tensors.items()}
    if method.fits(t, site) is not None or method.check(site) is not None:
        return None
    pair, bias = method.pair(t, site), method.bias_delta(t)
    if pair is None or not 0 < pair[0].shape[1] <= min(site.rows, site.fan_in):
        return None
    up, down = pair
    dtype, rank = next(iter(part.tensors.values())).dtype, up.shape[1]
    tensors = {
        "down": held(down.reshape(rank, *shape[1:]), dtype),
        "up": held(up.reshape(*up.shape, *site.ones), dtype),
        **({} if bias is None else {"bias": held(bias, dtype)}),
    }
    return Part(LoRA(rank=rank, alpha=method.scale * rank, bias=bias is not None), tensors)


def difference(part: Part, shape: tuple[int, ...]) -> Part:
    """scale * delta of a method that needs no weight, and of the bias, in fp32."""
    t = {name: tensor.float() for name, tensor in part.tensors.items()}
    site = Site.of_shape(shape, part.method.kinds)
    if wrong := part.method.fits(t, site):
        raise FormatError(f"the layer's weight is {shape}, as it seems, and {wrong}")
    made = {"diff": part.method.scale * part.method.delta(t, site, None)}
    if (bias := part.method.bias_delta(t)) is not None:
        made["diff_b"] = part.method.scale * bias
    return Part(Full(bias=bias is not None), made)


def _axes(part: Part, known: tuple[int, ...] | None) -> int:
    """Of the layer's weight."""
    if (shape := part.shape or known) is not None:
        return len(shape)
    return max(
        (tensor.ndim for name, tensor in part.tensors.items() if name in ("down", "w2", "diff", "b2", "rescale")),
        default=2,
    )


def write(writer: Writer, parts: Parts, metadata: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata in the tool's spelling; foreign metadata is kept.

    Raises:
        FormatError: something of it cannot be said in this format, or only by its whole difference and dense is False.
    """
    form = writer.form
    if not parts:
        raise FormatError("the adapter has no layers; there is nothing to write")
    steps = writer.steps(dict(sorted(parts.items())))  # so that the same adapter gives the same metadata, too
    if lost := [step for step in steps if step.tensors is None]:
        by_reason: dict[str, list[str]] = {}
        for step in lost:
            by_reason.setdefault(step.reason, []).append(step.name)
        reasons = [f"{reason} ({first_few(names)})" for reason, names in by_reason.items()]
        raise FormatError(f"{len(lost)} of {len(steps)} layers cannot be written as {form.name}: {first_few(reasons)}")
    tensors: dict[str, Tensor] = {}
    for step in steps:
        tensors |= step.beside
    for step in steps:
        for key, tensor in (step.tensors or {}).items():
            if key in tensors:
                both = f"{first_few(list(step.layers))} and another layer are both {step.name}"
                raise FormatError(f"{both} in {form.name}; one would be lost")
            tensors[key] = tensor
    if all(step.verbatim for step in steps) and not (form.single and not metadata.keys() >= {*form.own_metadata}):
        return tensors, dict(metadata)  # what it says is as true as it was
    written = {name: part for step in steps for name, part in step.parts.items()}
    return tensors, {**metadata, **form.metadata(written, metadata)}


def exact_alpha(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast to `dtype`, all but alphas and what is no number of the adapter."""
    return {
        key: tensor.to(tensor.dtype if key.endswith(_KEPT) or not tensor.is_floating_point() else dtype)
        for key, tensor in tensors.items()
    }
