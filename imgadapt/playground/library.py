"""Library: the adapters in some folders, as cards; a card is known by an id that is no path."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from imgadapt.file import AdapterFile
from imgadapt.playground.settings import Settings


@dataclass(frozen=True)
class Kind:
    """How many layers are of a method, a rank and an alpha (None: it has none)."""

    method: str
    rank: int | None
    alpha: float | None
    layers: int


@dataclass(frozen=True)
class Card:
    """An adapter file as its header tells it; nothing of its tensors has been read.

    name: its file's, without the ending; unique for `<lora:name:1>` (a folder is put before it where it must be).
    folder: where in the library, for people. architecture: "sd1", ...; "" where no table knows it. numbers: how many
    its tensors have; size: bytes. trigger: words that bring it out. words: embeddings it brings. weight: what its maker
    recommends. fault: why it cannot be used; its other fields are empty then.
    path: never told to a client.
    """

    id: str
    name: str
    folder: str
    path: Path = field(repr=False)
    size: int
    modified: float
    format: str = ""
    architecture: str = ""
    kinds: Sequence[Kind] = ()
    components: Sequence[str] = ()
    numbers: int = 0
    dtypes: Sequence[str] = ()
    trigger: Sequence[str] = ()
    words: Sequence[str] = ()
    weight: float = 1.0
    preview: Path | None = field(default=None, repr=False)
    fault: str = ""


class Library:
    """All adapters in the home's `adapters/`, the settings' folders, finished trainings, and those of the package."""

    def __init__(self, settings: Settings) -> None:
        raise NotImplementedError

    def scan(self) -> None:
        """Look into the folders again; files that did not change are not read again."""
        raise NotImplementedError

    def cards(self, search: str = "", architecture: str = "", folder: str = "") -> list[Card]:
        """Those whose name, folder, trigger words or methods have all words of `search`, usable ones first."""
        raise NotImplementedError

    def get(self, id: str) -> Card:
        """Raises ConfigError where there is none, or no longer."""
        raise NotImplementedError

    def named(self, name: str) -> Card:
        """The card that `<lora:name:1>` means, capitals or not.

        Raises:
            ConfigError: none, with the closest names, or several.
        """
        raise NotImplementedError

    def file(self, id: str) -> AdapterFile:
        """Its contents.

        Raises:
            ConfigError: there is no such card. FormatError: it is gone, has changed into no adapter, is not whole.
        """
        raise NotImplementedError

    def digest(self, id: str) -> str:
        """SHA-256 of the file; kept while the file does not change."""
        raise NotImplementedError
