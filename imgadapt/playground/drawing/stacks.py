"""Stack: the adapters on the loaded base, by the ids of their cards; they wait there at weight 0 between requests."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import imgadapt
from imgadapt import live, tokens
from imgadapt import targets as where
from imgadapt.arch import Architecture, architectures, canonical
from imgadapt.combining.blocks import CONSTANT
from imgadapt.combining.recipe import Entry
from imgadapt.combining.weights import Factor, factor_of
from imgadapt.embeddings import Embedding
from imgadapt.errors import ConfigError, ImgadaptError
from imgadapt.playground.library.library import Library
from imgadapt.playground.requests import Use
from imgadapt.prompting import stack as prompts
from imgadapt.prompting.attached import Attached
from imgadapt.slot import Slot, Strength
from imgadapt.targets import TEXT_ENCODERS

Stamp = tuple[tuple[str, int, int], ...]
_BLOCKS = 64  # block settings that are remembered of an adapter


@dataclass(eq=False)
class _On:
    """An adapter on the base. stamp: of its file when it was read; layers: its own, and what reads its learned prompt;
    denoiser, text: its slots, by layer.
    """

    stamp: Stamp
    layers: Sequence[str]
    architecture: Architecture | None
    denoiser: Sequence[tuple[str, Slot]]
    text: Sequence[tuple[str, Slot]]
    words: Mapping[str, Embedding]
    prompt: Attached | None
    factors: OrderedDict[str, Factor] = field(default_factory=OrderedDict[str, Factor])


class Stack:
    """Adapters on a pipeline. most: how many stay on it, used or not; those that were not used for longest go first.

    counts: "attaches" and "swaps" (changes of which adapters act) are counted in it.
    """

    def __init__(self, pipeline: Any, library: Library, most: int, counts: Counter[str]) -> None:
        self._pipeline, self._library, self._most, self._counts = pipeline, library, most, counts
        self._on: OrderedDict[str, _On] = OrderedDict()  # the one used last at the end
        self._order: tuple[str, ...] = ()  # in which they come in each layer
        self._acting: frozenset[str] = frozenset()

    def bring(self, uses: Sequence[Use]) -> None:
        """Attach what is not on yet, or whose file has changed; all of them are off.

        Raises:
            ConfigError: one does not go on this base, its blocks are not the base's, or it is a learned prompt that
                cannot act at its strength.
        """
        wanted = [use.adapter for use in uses]
        for id in wanted:
            self._current(id)
        for id, on in list(self._on.items()):  # words have no strength: they would be read in others' prompts
            if on.words and id not in wanted:
                self._drop(id)
        for id in wanted:
            if id not in self._on:
                self._attach(id)
            self._on.move_to_end(id)
        while len(self._on) > max(self._most, len(wanted)):
            self._drop(next(iter(self._on)))
        for use in uses:
            self._check(use)
        self._sort(tuple(wanted))
        if (acting := frozenset(wanted)) != self._acting:
            self._counts["swaps"] += 1
            self._acting = acting

    def text_key(self, uses: Sequence[Use]) -> tuple[Any, ...]:
        """What the text encoders' states depend on, of these adapters."""
        rows = [(use, self._on[use.adapter]) for use in uses]
        return tuple(
            (use.adapter, on.stamp, _text(use), use.blocks)
            for use, on in rows
            if (on.words and not off(use)) or (on.text and _text(use) != 0)
        )

    def say(self, uses: Sequence[Use]) -> None:
        """The words of one request are read, but for those of adapters that are off; no others are.

        Raises:
            ConfigError: two adapters bring the same word.
        """
        wanted = [use.adapter for use in uses if self._on[use.adapter].words and not off(use)]
        there = tokens.names(self._pipeline)
        try:
            tokens.remove(self._pipeline, [id for id in there if id not in wanted])
            for id in wanted:
                if id not in there:
                    tokens.add(self._pipeline, self._on[id].words, id)
        except ImgadaptError as error:
            raise ConfigError(f"the words of these adapters cannot be read together: {error}") from error

    def speak(self, uses: Sequence[Use]) -> None:
        """The strengths of one request on the text encoders; of all others 0."""
        self.say(uses)
        by_id = {use.adapter: use for use in uses}
        for id, on in self._on.items():
            use = by_id.get(id)
            factor = None if use is None else self._factor(use)
            for layer, slot in on.text:
                _set(slot, 0.0 if use is None or factor is None else _text(use) * factor(layer))

    def act(self, rows: Sequence[Sequence[Use]], step: int, *, by_sample: bool) -> None:
        """The strengths of a batch's requests (with the same adapters) on the denoiser in a step; of all others 0."""
        by_id = {column[0].adapter: column for column in zip(*rows, strict=True)}
        for id, on in self._on.items():
            column = by_id.get(id)
            if column is None or not _in_time(column[0], step):
                for _, slot in on.denoiser:
                    _set(slot, 0.0)
                _read(on, None)
                continue
            factors = [self._factor(use) for use in column]

            def told(layer: str, pairs: Sequence[tuple[Use, Factor]] = list(zip(column, factors, strict=True))) -> Any:
                found = [use.weight * factor(layer) for use, factor in pairs]
                return torch.tensor(found, dtype=torch.float64) if by_sample else found[0]

            for layer, slot in on.denoiser:
                _set(slot, told(layer))
            _read(on, told)

    def rest(self) -> None:
        """All off."""
        for on in self._on.values():
            for _, slot in (*on.denoiser, *on.text):
                _set(slot, 0.0)
            _read(on, None)

    @property
    def ids(self) -> list[str]:
        """Of those on the base; the one used last at the end."""
        return list(self._on)

    def _current(self, id: str) -> None:
        """Take an adapter off whose file is another one by now."""
        if id in self._on and self._on[id].stamp != _stamp(self._library.get(id).path):
            self._drop(id)

    def _drop(self, id: str) -> None:
        on = self._on.pop(id)
        if on.denoiser or on.text or on.prompt or id in tokens.names(self._pipeline):  # its words may be out already
            imgadapt.detach(self._pipeline, id)
        self._order = tuple(other for other in self._order if other != id)

    def _attach(self, id: str) -> None:
        card = self._library.get(id)
        if card.fault:
            raise ConfigError(f"{card.name} cannot be used: {card.fault}")
        stamp = _stamp(card.path)
        try:
            file = self._library.file(id)
            imgadapt.attach(self._pipeline, file, name=id, weight=0.0, trainable=False)
        except ImgadaptError as error:
            raise ConfigError(f"{card.name} does not go on this base: {error}") from error
        self._counts["attaches"] += 1
        slots = [] if not file.parts else live.slots(self._pipeline, id)
        named = [(canonical(layer), slot) for layer, _, slot in slots]
        prompt = prompts.attached(where.components(self._pipeline), id)
        self._on[id] = _On(
            stamp,
            [*file.parts, *(canonical(reader) for reader in (prompt.strengths if prompt else ()))],
            next((one for one in architectures() if one.name == file.architecture), None),
            [row for row in named if row[0].partition(".")[0] not in TEXT_ENCODERS],
            [row for row in named if row[0].partition(".")[0] in TEXT_ENCODERS],
            file.embeddings,
            prompt,
        )
        self._order = (*self._order, id)

    def _check(self, use: Use) -> None:
        prompt, factor = self._on[use.adapter].prompt, self._factor(use)
        if prompt is not None:
            prompt.check({reader: use.weight * factor(canonical(reader)) for reader in prompt.strengths})

    def _factor(self, use: Use) -> Factor:
        """Layer -> what its strength is multiplied by, of an adapter's blocks."""
        on = self._on[use.adapter]
        if use.blocks not in on.factors:
            card = self._library.get(use.adapter)
            entry = Entry(card.name, blocks=use.blocks)
            on.factors[use.blocks] = factor_of(entry, on.architecture, on.layers)
            while len(on.factors) > _BLOCKS:
                on.factors.popitem(last=False)
        on.factors.move_to_end(use.blocks)
        return on.factors[use.blocks]

    def _sort(self, wanted: tuple[str, ...]) -> None:
        """Let the adapters of a request act in its order, whenever they came: sums depend on it in their last bits."""
        kept = tuple(id for id in self._order if id in wanted)
        if kept == wanted:
            return
        self._order = (*wanted, *(id for id in self._order if id not in wanted))
        place = {id: k for k, id in enumerate(self._order)}

        def key(slot: Slot) -> int:
            return place[slot.name]

        for _, layer in where.adapted(where.components(self._pipeline)):
            own = list(layer)
            if len(own) > 1:
                layer.slots = nn.ModuleList(sorted(own, key=key))
        if there := prompts.of(where.components(self._pipeline)):
            there.attached.sort(key=lambda one: place[one.name])


def differ(rows: Sequence[Sequence[Use]]) -> bool:
    """Whether requests have other strengths for their denoiser."""
    return len({tuple((use.weight, use.blocks) for use in uses) for uses in rows}) > 1


def off(use: Use) -> bool:
    """Whether an adapter changes nothing, on the denoiser and on text encoders; its words are not read then."""
    return CONSTANT.get(use.blocks) == 0 or (use.weight == 0 and not use.text)


def _text(use: Use) -> float:
    return use.weight if use.text is None else use.text


def _in_time(use: Use, step: int) -> bool:
    return use.start <= step and (use.stop is None or step < use.stop)


def _read(on: _On, told: Callable[[str], Strength] | None) -> None:
    """The strengths at which a learned prompt is read; None: it is not."""
    if on.prompt is not None:
        found = {reader: 0.0 if told is None else told(canonical(reader)) for reader in on.prompt.strengths}
        on.prompt.check(found)
        on.prompt.strengths = found


def _set(slot: Slot, weight: Strength) -> None:
    if (
        slot.per_sample or isinstance(weight, Tensor) or slot.weight != weight
    ):  # operands with the strength in them are kept while it stays
        slot.set(weight)


def _stamp(path: Path) -> Stamp:
    """Of a file, or of what is in a folder."""
    try:
        found = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
        stats = [(p.name, p.stat()) for p in found]
    except OSError as error:
        raise ConfigError(f"{path.name} is gone from the library") from error
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)
