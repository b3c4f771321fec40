"""Reading: which architecture and tool a file's keys are of, and what each layer has."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from imgadapt.arch import Architecture, Slice, form_of
from imgadapt.errors import FormatError, ImgadaptError, first_few
from imgadapt.formats import splitting
from imgadapt.formats.cloneofsimo import CLONEOFSIMO, aliases
from imgadapt.formats.ends import End, beside, split
from imgadapt.formats.format import Format
from imgadapt.formats.layer_config import LayerConfig
from imgadapt.formats.meaning import Note, meaning
from imgadapt.formats.names import PREFIXES, Naming, Place, find, find_without_table, prefixes_of
from imgadapt.formats.own import OWN, is_own, read_own
from imgadapt.formats.part import Part, Parts, Source
from imgadapt.formats.tools import KOHYA_OFT, TOOLS
from imgadapt.methods import Method

_SAMPLE = 40  # layers by which architectures are told apart, before the best ones get a full look
_LAYERS = 2000  # more than any architecture has; of a file of more, as many are looked at to tell what it is
_FIRST = ("sd1", "sdxl", "flux", "sd2", "sd3")  # of those that fit alike

LOOSELY = ". `imgadapt show` lists these; in Python, strict=False reads the rest"
"""The way out of a refusal."""


@dataclass(frozen=True)
class Reading:
    """What a file says: its layers, the tables that knew it; and keys that were left out, with the reason for each."""

    parts: Parts
    format: str
    architecture: str | None
    unknown: Mapping[str, str] = field(default_factory=dict[str, str])


class _Shared:
    """What a file of peft's has once for all layers. tensors: by their names there."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._keys: dict[str, str] = {}
        self._all = tensors
        self._first: dict[tuple[str, str], Tensor] = {}

    def take(self, key: str) -> bool:
        """Whether it is one of these; one that is there twice is none."""
        name = beside(key)
        if name is None or name in self._keys:
            return False
        self._keys[name], self.tensors[name] = key, self._all[key]
        return True

    def of(self, method: Method) -> dict[str, Tensor]:
        """Those that a method has, by their keys."""
        own = () if method.peft is None else method.peft.beside
        return {key: self.tensors[name] for name, key in self._keys.items() if name.partition(".")[0] in own}

    def once(self, method: Method, t: dict[str, Tensor]) -> dict[str, Tensor]:
        """A layer's tensors, with those that layers have in common as one tensor for all."""
        made = dict(t)
        for name in method.common:
            if name in t and torch.equal(first := self._first.setdefault((method.name, name), t[name]), t[name]):
                made[name] = first
        return made

    def idle(self, parts: Mapping[str, Part]) -> dict[str, str]:
        """Keys that no layer reads -> why."""
        used = {key for part in parts.values() for key in self.of(part.method)}
        return dict.fromkeys((key for key in self._keys.values() if key not in used), "")


@dataclass
class _Layer:
    """One layer as a file spells it: place, and tensors by (our name, piece), with their keys."""

    place: Place
    keys: dict[tuple[str, int | None], str] = field(default_factory=dict[tuple[str, int | None], str])
    ends: set[str] = field(default_factory=set[str])


def read(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    architectures: Sequence[Architecture],
    *,
    strict: bool = True,
) -> Reading:
    """Recognise an adapter's tensors.

    Raises:
        FormatError: keys that no table knows, or layers that are no whole adapter: they are counted, the first three
            named. With strict=False the rest is read and these are returned; but a file of which nothing is known is
            still refused.
    """
    if is_own(metadata):
        parts, unknown = read_own(tensors, metadata)
        architecture = architecture_of(parts, architectures)
        if architecture is not None:
            parts = {name: _whole(name, part, architecture) for name, part in parts.items()}
        reading = Reading(parts, OWN.name, architecture.name if architecture else None, unknown)
    else:
        reading = _read(tensors, metadata, architectures)
    if not reading.parts and _is_model(tensors):
        raise FormatError(f"these are a model's own weights ({first_few(list(tensors))}), not an adapter's")
    if not reading.parts and len(reading.unknown) == len(tensors):
        raise (
            FormatError(
                f"not an adapter that imgadapt reads: none of its {len(tensors)} keys is known "
                f"({first_few(list(reading.unknown) or list(tensors))}). "
                f"Formats: {', '.join(tool.name for tool in TOOLS)}"
            )
            if not any(reading.unknown.values())
            else _refusal(reading, len(tensors))
        )
    if reading.unknown and strict:
        raise _refusal(reading, len(tensors))
    return reading


def _is_model(tensors: Mapping[str, Tensor]) -> bool:
    """Whether they are called as whole weights are, and by none of the words that adapters' are."""
    weights = sum(tensor.ndim > 1 and key.endswith(".weight") for key, tensor in tensors.items())
    return weights > len(tensors) / 4 and not any(
        word in key for key in tensors for word in ("lora", "lokr", "hada", "oft", "ia3")
    )


def _whole(name: str, part: Part, architecture: Architecture) -> Part:
    """A part of a fused layer with its slices, if it is one."""
    if name in architecture.shapes or name not in architecture.native:
        return part
    total, rows = architecture.native_rows[name], splitting.rows_of(part.method, part.tensors)
    slices = splitting.scaled(architecture.native[name], total, total if rows is None else rows)
    if slices is None:
        raise FormatError(f"{name}: its {rows} rows do not divide as the {total} of {architecture.name} do")
    return replace(part, slices=slices)


def _refusal(reading: Reading, total: int) -> FormatError:
    broken = {key: reason for key, reason in reading.unknown.items() if reason}
    table = f"the nearest table, {reading.format}{f' for {reading.architecture}' if reading.architecture else ''}"
    strange = [key for key in reading.unknown if key not in broken]
    words: list[str] = []
    if strange:
        words.append(f"{len(strange)} of {total} keys are unknown to {table}: {first_few(strange)}")
    if broken:
        reasons = list(dict.fromkeys(broken.values()))
        words.append(f"{len(broken)} of {total} keys make no adapter: {first_few(reasons)}")
    return FormatError("; ".join(words) + LOOSELY)


def _read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], architectures: Sequence[Architecture]) -> Reading:
    renamed = aliases(tensors, metadata)
    unknown: dict[str, str] = {}
    stems: dict[str, dict[str, tuple[str, End]]] = {}  # layer as spelled -> key -> (end, what it says)
    shared = _Shared(tensors)
    for key in tensors:
        if shared.take(key):
            continue
        found = split(renamed.get(key, key))
        if found is None:
            unknown[key] = ""
        else:
            stems.setdefault(found[0], {})[key] = found[1:]
    architecture, naming = _architecture(stems, tensors, architectures)
    component = _component(list(stems), architecture, naming) if architecture else None
    layers: dict[tuple[str, str], _Layer] = {}
    for stem, keys in stems.items():
        place = find(stem, architecture, naming, component) if architecture else None
        place = place or (find_without_table(stem) if architecture is None else None)
        if place is None:
            unknown |= dict.fromkeys(keys, "")
            continue
        layer = layers.setdefault((place.naming, place.name), _Layer(place))
        for key, (end, said) in keys.items():
            if (said.tensor, said.piece) in layer.keys:
                unknown[key] = f"{place.name} has {said.tensor} twice ({key} and {layer.keys[said.tensor, said.piece]})"
            else:
                layer.keys[said.tensor, said.piece] = key
                layer.ends.add(end)
    tool = CLONEOFSIMO if renamed else _tool(list(layers.values()), metadata, architecture, naming)
    parts: dict[str, Part] = {}
    config = LayerConfig(metadata)
    for layer in layers.values():
        try:
            made = _parts(layer, tensors, config, tool, architecture, shared)
            if again := [name for name in made if name in parts]:
                raise FormatError(f"it has {first_few(again)} twice, under two names")
            parts |= made
        except (ImgadaptError, ValueError, TypeError, OverflowError, IndexError, RuntimeError) as error:
            shapes = ", ".join(f"{end} {tuple(tensors[key].shape)}" for (end, _), key in layer.keys.items())
            unknown |= dict.fromkeys(layer.keys.values(), f"{layer.place.name} ({shapes}): {error}")
    unknown |= shared.idle(parts)
    return Reading(parts, tool.name, architecture.name if architecture else None, unknown)


def _architecture(
    stems: Mapping[str, Mapping[str, tuple[str, End]]],
    tensors: Mapping[str, Tensor],
    architectures: Sequence[Architecture],
) -> tuple[Architecture | None, Naming]:
    """The one that has most of the layers; of those that have as many, the one whose shapes agree."""
    names = _some(list(stems), _LAYERS)
    sample = _some(names, _SAMPLE)
    forms = [{form_of(stem[len(prefix.text) :]) for prefix in prefixes_of(stem)} for stem in sample]
    hits = {a: sum(not a.forms.isdisjoint(spelled) for spelled in forms) for a in architectures}
    most = max(hits.values(), default=0)
    if not most:
        return None, "diffusers"
    looked = _some(names, 100)
    sizes = {stem: _sizes(stems[stem], tensors) for stem in looked}
    rows: list[tuple[int, int, int, Architecture, Naming]] = []
    for architecture in (a for a, n in hits.items() if n >= most - len(sample) // 10):
        for naming in ("diffusers", "native") if architecture.native else ("diffusers",):
            places = {stem: find(stem, architecture, naming) for stem in names}
            own = {name.partition(".")[0] for name in architecture.native}  # the rest has no naming of its own
            in_it = sum(
                place is not None and (place.naming == naming or place.name.partition(".")[0] not in own)
                for place in places.values()
            )
            there = sum(place is not None for place in places.values())
            agree = sum(_agrees(architecture, places[stem], sizes[stem]) for stem in looked)
            order = _FIRST.index(architecture.name) if architecture.name in _FIRST else len(_FIRST)
            rows.append(
                (there, agree, 10000 * in_it // len(names) * 100 - order - (naming == "native"), architecture, naming)
            )
    there, *_, best, naming = max(rows, key=lambda row: row[:3])
    return (best, naming) if there else (None, "diffusers")


def _some(names: Sequence[str], count: int) -> Sequence[str]:
    """About as many of them, from all over."""
    return names[:: max(1, len(names) // count)]


def _component(stems: Sequence[str], architecture: Architecture, naming: Naming) -> str | None:
    """The component that most layers are of where a prefix says none: peft's files are of one, and CLIP's two encoders
    have layers of the same names.
    """
    unsaid = [stem for stem in _some(stems, _LAYERS) if len(prefixes_of(stem)[0].components) > 3]
    counts = (
        {
            component: sum(
                (place := find(stem, architecture, naming, component)) is not None
                and place.name.startswith(f"{component}.")
                for stem in unsaid
            )
            for component in prefixes_of(unsaid[0])[0].components
        }
        if unsaid
        else {}
    )
    return max(counts, key=lambda component: counts[component]) if counts else None


def _sizes(keys: Mapping[str, tuple[str, End]], tensors: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    """(outputs, inputs) of the layer that a file's tensors are for, as far as they tell."""
    try:
        method, t = meaning({said.tensor: tensors[key] for key, (_, said) in keys.items()}, Note())
        return splitting.rows_of(method, t), splitting.inputs_of(method, t)
    except (ImgadaptError, ValueError, TypeError, OverflowError, IndexError, RuntimeError, KeyError):
        return None, None  # it is told when the layer is read


def _agrees(architecture: Architecture, place: Place | None, sizes: tuple[int | None, int | None]) -> bool:
    """Whether a layer's size is that of the architecture."""
    shape = architecture.shape_of(place.name) if place is not None else None
    if shape is None or sizes == (None, None):
        return False
    return sizes[0] in (None, shape[0]) and sizes[1] in (None, math.prod(shape[1:]))


def _tool(
    layers: Sequence[_Layer], metadata: Mapping[str, str], architecture: Architecture | None, naming: Naming
) -> Format:
    """The first tool that writes such prefixes and ends, and says so in the metadata."""
    prefixes = {layer.place.prefix.text for layer in layers}
    ends = {end for layer in layers for end in layer.ends}
    distinct = architecture is not None and bool(architecture.native)

    def strangeness(tool: Format) -> tuple[bool, int, int, bool, bool]:
        native = distinct and tool.native and (architecture is None or architecture.name not in tool.except_for)
        foreign_ends = len(ends - set(tool.ends))
        foreign = len(prefixes - tool.every_prefix)
        other_naming = distinct and native != (naming == "native")
        return foreign_ends + foreign > 0, foreign, foreign_ends, other_naming, not tool.claimed_by(metadata)

    claimed = [tool for tool in TOOLS if tool.claimed_by(metadata) and not strangeness(tool)[0]]
    return min(claimed or TOOLS, key=strangeness)


def _parts(
    layer: _Layer,
    tensors: Mapping[str, Tensor],
    config: LayerConfig,
    tool: Format,
    architecture: Architecture | None,
    shared: "_Shared",
) -> dict[str, Part]:
    """The layers of ours that one of the file is: itself, or what a fused one is split into."""
    place = layer.place
    raw = {key: tensors[key] for key in layer.keys.values()}
    shape = architecture.shape_of(place.name) if architecture else None
    note = Note("kohya-oft" if tool is KOHYA_OFT else tool.name, config.of(place.name), shape, shared.tensors)
    # what a config says that the tool does not write must be spelled out, so it cannot be written back as it was
    origin = tool.name if not note.config or config.key in tool.own_metadata else ""
    slices = architecture.native.get(place.name, ()) if architecture and place.naming == "native" else ()
    pieces = sorted({piece for _, piece in layer.keys if piece is not None})
    if pieces:
        return _from_pieces(layer, tensors, note, origin, slices, pieces)
    method, own = meaning({name: tensors[key] for (name, _), key in layer.keys.items()}, note)
    own = shared.once(method, own)
    if not slices:
        source = Source(origin, raw, {place.name: (method, own)}, len(tensors), shared.of(method))
        return {place.name: Part(method, own, source)}
    assert architecture is not None
    rows = splitting.rows_of(method, own)
    total = architecture.native_rows[place.name]
    own_slices = splitting.scaled(slices, total, total if rows is None else rows)
    if own_slices is None:
        raise FormatError(f"its {rows} rows do not divide as the {total} of {architecture.name} do")
    split_up: Mapping[str, tuple[Method, dict[str, Tensor]]] | None = splitting.split(method, own, own_slices)
    if split_up is None:
        return {
            place.name: Part(method, own, Source(origin, raw, {place.name: (method, own)}, len(tensors)), own_slices)
        }
    source = Source(origin, raw, split_up, len(tensors))
    return {name: Part(made, t, source) for name, (made, t) in split_up.items()}


def _from_pieces(
    layer: _Layer,
    tensors: Mapping[str, Tensor],
    note: Note,
    origin: str,
    slices: Sequence[Slice],
    pieces: Sequence[int],
) -> dict[str, Part]:
    """A fused layer that the tool trained as several: each piece is the next of its layers' rows."""
    order = sorted(slices, key=lambda s: s.first)
    if pieces != list(range(len(order))):
        raise FormatError(f"it has pieces {', '.join(map(str, pieces))}, and {len(order)} layers are fused here")
    common = {name: tensors[key] for (name, piece), key in layer.keys.items() if piece is None}
    made: dict[str, tuple[Method, dict[str, Tensor]]] = {}
    for piece, row in enumerate(order):
        own = {name: tensors[key] for (name, k), key in layer.keys.items() if k == piece}
        made[row.layer] = meaning({**common, **own}, note)
    source = Source(origin, {key: tensors[key] for key in layer.keys.values()}, made, len(tensors))
    return {name: Part(method, t, source) for name, (method, t) in made.items()}


def architecture_of(parts: Mapping[str, Part], architectures: Sequence[Architecture]) -> Architecture | None:
    """The first that has all of these layers, by its shapes if several have."""
    fitting = [a for a in architectures if all(a.shape_of(name) is not None for name in parts)]

    def agreeing(architecture: Architecture) -> tuple[int, int, int]:
        own = sum(name in architecture.shapes for name in parts)
        alike = sum(
            _agrees(
                architecture,
                Place(PREFIXES[0], "diffusers", name),
                (splitting.rows_of(part.method, part.tensors), splitting.inputs_of(part.method, part.tensors)),
            )
            for name, part in parts.items()
        )
        first = _FIRST.index(architecture.name) if architecture.name in _FIRST else len(_FIRST)
        return own, alike, -first

    return max(fitting, key=agreeing) if fitting and parts else None
