"""Weights: what an entry of a recipe multiplies each of its layers by."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, partial

from imgadapt.arch import Architecture
from imgadapt.combining.blocks import CONSTANT, LISTS, PRESETS, block_of, expanded
from imgadapt.combining.recipe import Entry
from imgadapt.errors import ConfigError, first_few
from imgadapt.patterns import Budget, Pattern
from imgadapt.targets import DENOISERS, TEXT_ENCODERS, matches

Factor = Callable[[str], float]

_GROUPS = {"te": TEXT_ENCODERS, "denoiser": DENOISERS}
"""What `components` calls several of them."""


def factor_of(entry: Entry, architecture: Architecture | None, layers: Collection[str]) -> Factor:
    """Layer (canonical or native name) -> its weight: the entry's, times those of its component, its block and all
    masks that match.

    layers: those that the entry's file has; what is said of layers must be of one of them.

    Raises:
        ConfigError: no such component, block or preset; a list of the wrong length; layers in blocks that a list has no
            number for; a mask or a glob that matches nothing. When a layer is asked for: one of the file's that is
            several of the model's, whose weights are not the same.
    """
    own = {layer for name in layers for layer in _canonical(name, architecture)}
    factors = [_components(entry), _blocks(entry, architecture, own), _masks(entry, own)]

    def of_layer(layer: str) -> float:
        return math.prod((factor(layer) for factor in factors), start=float(entry.weight))

    @cache
    def factor(name: str) -> float:
        found = {layer: of_layer(layer) for layer in _canonical(name, architecture)}
        if len(set(found.values())) > 1:
            said = ", ".join(f"{layer} {value:g}" for layer, value in found.items())
            raise ConfigError(f"{entry.path}: {name} is one layer of the file, and must have one weight: {said}")
        return next(iter(found.values()))

    return factor


def _canonical(name: str, architecture: Architecture | None) -> tuple[str, ...]:
    """The layers that a name stands for: of a fused layer that nothing can split, several."""
    if architecture is None or name in architecture.shapes:
        return (name,)
    return tuple(s.layer for s in architecture.native.get(name, ())) or (name,)


def _components(entry: Entry) -> Factor:
    known = [*_GROUPS, *DENOISERS, *TEXT_ENCODERS]
    for name in entry.components:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f", did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"{entry.path}: no component '{name}'{hint}; there are: {', '.join(known)}")
    made = [(_GROUPS.get(name, (name,)), float(value)) for name, value in entry.components.items()]

    def factor(layer: str) -> float:
        component = layer.partition(".")[0]
        return math.prod(value for names, value in made if component in names)

    return factor


def _masks(entry: Entry, own: Collection[str]) -> Factor:
    budget = Budget()  # of all searches of an entry: recipes come from anyone
    made: list[tuple[Callable[[str], bool], float]] = []
    for text, value in entry.masks.items():
        found = cache(partial(_found, entry, text, Pattern(text, budget)))
        if not sum(map(found, own)):  # all of them: what takes too long says so now
            raise ConfigError(f"{entry.path}: the mask '{text}' matches none of its {_shown(own)}")
        made.append((found, float(value)))
    return lambda layer: math.prod(value for found, value in made if found(layer))


def _found(entry: Entry, text: str, pattern: Pattern, layer: str) -> bool:
    try:
        return pattern.search(layer)
    except ConfigError as error:
        raise ConfigError(f"{entry.path}: the mask '{text[:80]}': {error}") from error


def _shown(own: Collection[str]) -> str:
    return f"{len(own)} layers, such as {first_few(sorted(own), 2)}"


def _blocks(entry: Entry, architecture: Architecture | None, own: Collection[str]) -> Factor:
    said, name = entry.blocks, "" if architecture is None else architecture.name
    if not said:
        return lambda layer: 1.0
    if not isinstance(said, str):
        return _by_block(entry, said, name, own)
    if said in CONSTANT:
        return lambda layer: CONSTANT[said]
    numbers = _numbers(entry, said, name)
    if outside := sorted({str(block_of(layer, name)) for layer in own} - numbers.keys()):
        longest = LISTS[name][-1]
        raise ConfigError(
            f"{entry.path}: blocks '{said}' have no number for {', '.join(outside)}, where it has layers; "
            f"give {len(expanded(longest))} ({longest}), or block -> factor"
        )
    return lambda layer: numbers.get(block_of(layer, name) or "", 1.0)


def _numbers(entry: Entry, said: str, name: str) -> Mapping[str, float]:
    """Block -> number, of a preset or a list."""
    if name not in LISTS:
        raise ConfigError(
            f"{entry.path}: blocks '{said}': there are lists and presets for {', '.join(LISTS)} only, not for "
            f"{name or 'a base without a table'}; give globs: {{'transformer.blocks.1*' = 0.5}}"
        )
    lists = {len(expanded(text)): text for text in LISTS[name]}
    if (kept := PRESETS.get(name, {}).get(said)) is not None:
        return {block: float(block in expanded(kept)) for block in expanded(LISTS[name][-1])}
    words = [word.strip() for word in said.strip("[]").split(",")]
    values = [_number(word) for word in words]
    if len(words) == 1 and values[0] is None:
        presets = [*PRESETS.get(name, ()), *CONSTANT]
        raise ConfigError(f"{entry.path}: no block preset '{said}' for {name}; there are: {', '.join(presets)}")
    if len(words) not in lists:
        wanted = " or ".join(f"{n} ({text})" for n, text in lists.items())
        raise ConfigError(f"{entry.path}: {len(words)} block weights; {name} has {wanted}")
    if None in values:
        raise ConfigError(f"{entry.path}: block weight '{words[values.index(None)]}' is not a finite number")
    return {
        block: value
        for block, value in zip(expanded(lists[len(words)]), values, strict=True)
        if value is not None
    }  # fmt: skip


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _by_block(entry: Entry, said: Mapping[str, float], name: str, own: Collection[str]) -> Factor:
    """Factors by blocks' names (`IN04`), and by targets: globs over layers' names, and presets of `targets.py`."""
    known: Sequence[str] = expanded(LISTS[name][-1]) if name in LISTS else ()
    made: list[tuple[str, float]] = []
    for key, value in said.items():
        there = [layer for layer in own if _inside(layer, key, name, known)]
        if not there and key not in known:
            raise ConfigError(f"{entry.path}: the block '{key}' matches none of its {_shown(own)}")
        made.append((key, float(value)))
    return lambda layer: math.prod(value for key, value in made if _inside(layer, key, name, known))


def _inside(layer: str, key: str, name: str, known: Sequence[str]) -> bool:
    return block_of(layer, name) == key if key in known else matches(layer, key)
