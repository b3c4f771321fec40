"""Architectures: which layers each has, under their canonical names. Data in `*.json`, derived from the models."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Architecture:
    """One model family's layers that can carry adapters, by canonical name (`unet.conv_in`)."""

    name: str
    layers: tuple[str, ...]


@cache
def architectures() -> tuple[Architecture, ...]:
    """All that are known, by name."""
    files = sorted(Path(__file__).parent.glob("*.json"))
    return tuple(Architecture(file.stem, tuple(_names(json.loads(file.read_text("utf-8"))))) for file in files)


def _names(components: dict[str, list[str]]) -> Iterator[str]:
    for component, paths in components.items():
        for path in paths:
            yield f"{component}.{path}"


def canonical(name: str) -> str:
    """A live layer's name as files write it: CLIP's with `text_model.`, which transformers 5.6 took away."""
    component, _, path = name.partition(".")
    if component.startswith("text_encoder") and path.startswith("encoder.layers."):
        return f"{component}.text_model.{path}"
    return name
