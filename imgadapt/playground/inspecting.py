"""Inspector: all about one adapter, and what of it would go on the loaded base."""

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imgadapt.combining.recipes import KEY
from imgadapt.file import AdapterFile
from imgadapt.playground.library import telling
from imgadapt.playground.library.cards import plain
from imgadapt.playground.library.library import Card
from imgadapt.playground.library.matching import Match, Places, match
from imgadapt.playground.session import Playground
from imgadapt.summary import NO_CONFIG, alpha_unsaid, summary

__all__ = ["Details", "Inspector", "Match"]

_KEPT = 4  # whole files, in memory
_SHOWN = 20_000  # characters of an entry of metadata


@dataclass(frozen=True)
class Details:
    """norms: Frobenius norm of the change by block; without blocks whose norms depend on the base's weights (DoRA, OFT)
    or are not finite. metadata: from anyone: escape it; as it is, but for an entry's end beyond 20,000 characters.
    training: what is known of its training, in words (pictures, steps, rate, resolution, ...), from anyone, too.
    recipe: TOML, of a merged one. match: None: no base is loaded yet.
    """

    card: Card
    sha256: str
    norms: Mapping[str, float]
    metadata: Mapping[str, str]
    training: Sequence[tuple[str, str]]
    recipe: str
    match: Match | None


@dataclass(frozen=True)
class _Known:
    """What does not depend on the base."""

    file: AdapterFile
    norms: Mapping[str, float]
    sha256: str


class Inspector:
    """See the module. What was looked at last is kept, for as long as its file does not change."""

    def __init__(self, playground: Playground) -> None:
        self._playground = playground
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, float, int], _Known] = OrderedDict()
        self._places: tuple[weakref.ref[Any], Places] | None = None  # a family's number may be another's later

    def look(self, id: str) -> Details:
        """Raises ConfigError, FormatError: see Library."""
        library = self._playground.library
        card = library.get(id)
        status = card.path.stat() if card.path.exists() else None
        key = (id, status.st_mtime if status else 0.0, status.st_size if status else 0)
        with self._lock:
            known = self._known.get(key)
        if known is None:
            file = library.file(id, strict=False)
            norms = {block: norm for block, norm in summary(file).blocks.items() if math.isfinite(norm)}
            known = _Known(file, norms, library.digest(id))
            self._keep(key, known)
        metadata = {plain(name): _cut(value) for name, value in known.file.metadata.items()}
        return Details(
            card, known.sha256, known.norms, metadata, self._training(known.file),
            known.file.metadata.get(KEY, ""), self._match(known.file),
        )  # fmt: skip

    def _keep(self, key: tuple[str, float, int], known: _Known) -> None:
        with self._lock:
            self._known[key] = known
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)

    @staticmethod
    def _training(file: AdapterFile) -> list[tuple[str, str]]:
        rows = telling.training(file.metadata)
        return [*rows, ("Note", NO_CONFIG)] if alpha_unsaid(file) else rows

    def _match(self, file: AdapterFile) -> Match | None:
        studio = self._playground.studio
        base, family = studio.base, studio.family
        if base is None or family is None:
            return None
        with self._lock:
            known = self._places
        if known is None or known[0]() is not family:
            known = (weakref.ref(family), Places.of(base.name, family.pipeline))
            with self._lock:
                self._places = known
        return match(file, known[1])


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text) - _SHOWN:,} more characters)"
