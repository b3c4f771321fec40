"""Studio: the loaded base with adapters on it, and how pictures are drawn. Only the desk's thread uses it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from imgadapt.playground.album import Album
from imgadapt.playground.bases import Base
from imgadapt.playground.library import Library
from imgadapt.playground.requests import GenerateRequest
from imgadapt.playground.settings import Settings

Watch = Callable[[int, int, bytes | None], None]
"""Told (steps done, steps in all, a preview as WebP or None) after each step; it may raise, which stops the drawing."""


@dataclass(frozen=True)
class Drawn:
    """request: settled, with the layout that it was drawn in. notes: what the user should know (a prompt was cut)."""

    image: Image.Image
    request: GenerateRequest
    seconds: float
    notes: Sequence[str] = ()


class Studio:
    """See the module."""

    base: Base | None
    family: Any

    def __init__(self, settings: Settings, library: Library, album: Album) -> None:
        raise NotImplementedError

    def load(self, base: Base) -> None:
        """Make a base the loaded one; the one before is let go first. Nothing happens when it is loaded already.

        Raises:
            ConfigError: see `families.load`; no base is loaded then.
        """
        raise NotImplementedError

    def settle(self, request: GenerateRequest) -> GenerateRequest:
        """The request with nothing left open (seed, sides, guidance, base), its prompt without tags, their adapters in
        the stack.

        Raises:
            ConfigError: sides that the base does not draw, a sampler that it has no use for, adapters that do not go
                on it (how many of their layers do not, and why).
        """
        raise NotImplementedError

    def draw(self, requests: Sequence[GenerateRequest], watch: Watch) -> list[Drawn]:
        """Settled requests that differ in prompt, seed and strengths only, drawn together; see `alike`.

        Raises:
            TrainingError: NaN. Whatever `watch` raises.
        """
        raise NotImplementedError


def alike(request: GenerateRequest) -> tuple[Any, ...]:
    """Requests with the same of this can share a batch."""
    raise NotImplementedError
