"""One thing that is odd about pictures and captions."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imgadapt.training.data import Example

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that is odd. text: what, and what to do. paths: of what."""

    level: Level
    text: str
    paths: tuple[Path, ...] = ()


def paths_of(examples: Iterable[Example]) -> tuple[Path, ...]:
    """Of pictures, each once."""
    return tuple(dict.fromkeys(example.path for example in examples))
