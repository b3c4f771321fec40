"""Bases: the models that a playground may load; known by ids, like adapters."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from imgadapt.playground.settings import Settings


@dataclass(frozen=True)
class Base:
    """kind: "demo", "sd1", ... (see plan.USUAL). place: what `families.load` takes; never told to a client."""

    id: str
    name: str
    kind: str
    place: str = field(repr=False)


class Bases:
    """The embedded base, the settings' base, and what lies in the settings' folders of models."""

    def __init__(self, settings: Settings) -> None:
        raise NotImplementedError

    @property
    def all(self) -> Sequence[Base]:
        raise NotImplementedError

    @property
    def first(self) -> Base:
        """The settings' base."""
        raise NotImplementedError

    def get(self, id: str) -> Base:
        """Raises ConfigError where there is none."""
        raise NotImplementedError

    def named(self, name: str) -> Base:
        """Of a name; of `owner/name` in the hub's cache, where the settings allow it.

        Raises:
            ConfigError: there is none, or it is not allowed.
        """
        raise NotImplementedError
