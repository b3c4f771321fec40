"""Stacking: uses of adapters in a stack as entries of a recipe for merging, and back."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from imgadapt.combining.layers import Input
from imgadapt.combining.recipe import Entry
from imgadapt.combining.recipes import public
from imgadapt.combining.rules.rotations import is_rotation
from imgadapt.combining.rules.rule import Rule
from imgadapt.errors import ConfigError
from imgadapt.playground.library.library import Library
from imgadapt.playground.requests import Use
from imgadapt.targets import DENOISERS
from imgadapt.training.families import hub

_DENOISER, _TEXT = "denoiser", "te"


def entry(use: Use, path: Path) -> Entry:
    """What a stack does with an adapter, as a merge says it."""
    if use.text is None or use.text == use.weight:
        return Entry(path, use.weight, blocks=use.blocks)
    return Entry(path, 1.0, {_DENOISER: use.weight, _TEXT: use.text}, blocks=use.blocks)


def use_of(entry: Entry, id: str) -> dict[str, Any]:
    """An entry as a use, in plain values.

    Raises:
        ConfigError: it says what a stack cannot do.
    """
    said = {name: value for name, value in entry.components.items() if name not in (_DENOISER, _TEXT, *DENOISERS)}
    if entry.masks or said or not isinstance(entry.blocks, str):
        what = "masks" if entry.masks else f"a weight for {next(iter(said))} alone" if said else "blocks by name"
        raise ConfigError(
            f"the recipe has {what} for {Path(entry.path).name}, which a stack cannot have; imgadapt merge replays it"
        )
    weight = text = entry.weight
    for name, value in entry.components.items():
        weight, text = (weight, text * value) if name == _TEXT else (weight * value, text)
    return {"adapter": id, "weight": weight, "text": None if text == weight else text, "blocks": entry.blocks}


def found(entries: Sequence[Entry], library: Library) -> list[dict[str, Any]]:
    """The entries' adapters, which are known by their SHA-256, as uses in plain values.

    Raises:
        ConfigError: some are not in the library, or say what a stack cannot do.
    """
    known = _digests(entries, library)
    if lost := [Path(one.path).name for one in entries if one.sha256 not in known]:
        raise ConfigError(f"{len(lost)} of its {len(entries)} inputs are not in the library: {', '.join(lost[:3])}")
    return [use_of(one, known[one.sha256]) for one in entries]


def _digests(entries: Sequence[Entry], library: Library) -> Mapping[str, str]:
    """SHA-256 -> id of what is looked for; files that are called so first, and no more than it takes."""
    wanted, made = {one.sha256 for one in entries}, dict[str, str]()
    names = {Path(one.path).name for one in entries}
    for card in sorted(library.cards(), key=lambda card: card.path.name not in names):
        if wanted <= made.keys():
            break
        if not card.fault:
            made.setdefault(library.digest(card.id), card.id)
    return made


def strengths(uses: Sequence[Use], names: Sequence[str]) -> Iterator[str]:
    """What a report's lines do not show: weights by component, and blocks."""
    for k, (use, name) in enumerate(zip(uses, names, strict=True), 1):
        if use.text is not None and use.text != use.weight:
            yield f"[{k}] {name}: {use.weight:g} on the denoiser, {use.text:g} on text encoders"
        if use.blocks:
            yield f"[{k}] {name}: blocks {use.blocks}"


def needs_base(inputs: Sequence[Input], row: Rule) -> bool:
    """Whether some input's change depends on the base's weights (DoRA, OFT, IA3, ...), as the rule takes it."""
    parts = [part for one in inputs for part in one.file.parts.values()]
    asks = [p for p in parts if p.method.needs_weight or getattr(p.method, "absolute", False)]
    return any(row.rotations is None or not is_rotation(part) for part in asks)


def base_place(place: str) -> str:
    """A base as merging opens it: "demo", or a path; of a name in the hub's cache, its folder there."""
    return place if place == "demo" or Path(place).expanduser().exists() else str(hub.folder(place))


def base_name(place: str) -> str:
    """What recipes call it."""
    return public(base_place(place))
