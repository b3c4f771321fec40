"""Inspector: all about one adapter, and what of it would go on the loaded base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from imgadapt.playground.library import Card
from imgadapt.playground.session import Playground


@dataclass(frozen=True)
class Match:
    """Against the loaded base. matched of total layers; unmatched: layer -> why; unknown: keys that no table knows.
    verdict: "all", "some", "none"; none is a red error.
    """

    base: str
    matched: int
    total: int
    unmatched: Mapping[str, str]
    unknown: Mapping[str, str]
    verdict: str


@dataclass(frozen=True)
class Details:
    """norms: Frobenius norm of the change by block (None where it depends on the base's weights). metadata: as it is,
    from anyone: escape it. training: what is known of its training, in words (pictures, steps, rate, resolution, ...).
    recipe: TOML, of a merged one.
    """

    card: Card
    sha256: str
    norms: Mapping[str, float]
    metadata: Mapping[str, str]
    training: Sequence[tuple[str, str]]
    recipe: str
    match: Match | None


class Inspector:
    def __init__(self, playground: Playground) -> None:
        raise NotImplementedError

    def look(self, id: str) -> Details:
        """Raises ConfigError, FormatError: see Library."""
        raise NotImplementedError
