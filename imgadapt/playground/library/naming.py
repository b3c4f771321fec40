"""Naming: ids and names of what lies in a library."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from imgadapt.playground.library.cards import plain
from imgadapt.playground.library.scanning import Found

NAME = 120
"""Characters of a name, at most."""


@dataclass(frozen=True)
class Row:
    """A file before it has a card."""

    id: str
    stem: str
    folder: str
    found: Found


def id_of(root: str, relative: str) -> str:
    """The same after a restart, and no path: sixteen digits of 0-9, a-f."""
    return hashlib.sha256(f"{root}\n{relative}".encode("utf-8", "surrogatepass")).hexdigest()[:16]


def names(rows: Sequence[Row]) -> list[str]:
    """A name for each, no two the same, capitals or not, and fit for `<lora:name:1>`."""
    plainly = [_usable(row.stem) for row in rows]
    counts = Counter(name.casefold() for name in plainly)
    full = [
        name if counts[name.casefold()] == 1 or not row.folder else _usable(f"{row.folder}/{name}")
        for row, name in zip(rows, plainly, strict=True)
    ]
    taken: set[str] = set()
    alike = Counter[str]()
    made_up: list[str] = []
    for name in full:
        made = name
        while made.casefold() in taken:
            alike[name.casefold()] += 1
            end = f" ({alike[name.casefold()] + 1})"
            made = f"{name[: NAME - len(end)].rstrip()}{end}"  # cut: a longer one is not looked up whole
        taken.add(made.casefold())
        made_up.append(made)
    return made_up


def _usable(name: str) -> str:
    cleaned = plain("".join("_" if c in ':<>"\\' else c for c in name), NAME)
    return cleaned or "adapter"
