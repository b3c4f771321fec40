"""Library: the adapters in some folders, as cards; a card is known by an id that is no path."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from imgadapt import demo
from imgadapt.atomic import write_bytes
from imgadapt.errors import ConfigError, DataError, FormatError, first_few
from imgadapt.file import AdapterFile, load, outline
from imgadapt.playground.library import remembering, sidecars
from imgadapt.playground.library.cards import Card, Header, Kind, Reader, plain, short
from imgadapt.playground.library.naming import NAME, Row, id_of, names
from imgadapt.playground.library.scanning import Found, Scan, is_inside
from imgadapt.playground.settings import Settings

__all__ = ["Card", "Kind", "Library"]

_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_PEFT, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_THUMBNAIL = 256  # pixels
_THUMBNAILS = 512
_NO_RESULTS = ("cache", "checkpoints", "samples", "class", "check", "tensorboard", "embeddings")  # in a run's folder
_OF_A_RUN = ("adapter.safetensors", "best.safetensors")


@dataclass(frozen=True)
class _Root:
    """key: what ids are made of, the same after a restart; label: what its folders are shown under."""

    key: str
    label: str
    path: Path


class Library:
    """All adapters in the home's `adapters/`, the settings' folders, finished trainings, and those of the package.

    left_out: what the last scan did not look at, in words.
    """

    def __init__(self, settings: Settings) -> None:
        extra = [path.expanduser().absolute() for path in settings.adapters]
        self._roots = [
            _Root("adapters", "", settings.folder("adapters")),
            *(_Root(str(path), path.name if _has_many(path) else "", path) for path in extra),
            _Root("demo", "demo", demo.ADAPTERS),
        ]
        self._runs, self._previews = settings.folder("runs"), settings.folder("previews")
        self._within = tuple(root.path.resolve() for root in self._roots)
        self._most_pixels = settings.limits.upload_pixels
        self._reader = Reader()
        self._memory = remembering.Memory(settings.home / "library.json")
        self._lock, self._scanning = threading.RLock(), threading.Lock()
        self._cards: dict[str, Card] = {}
        self._thumbnails: OrderedDict[tuple[Path, int, int, int], bytes] = OrderedDict()
        self.left_out: Sequence[str] = ()
        self.scan()

    def scan(self) -> None:
        """Look into the folders again; files that did not change are not read again."""
        with self._scanning:
            left_out: list[str] = []
            rows = list({row.id: row for row in self._rows(left_out)}.values())
            cards = [self._card(row, name) for row, name in zip(rows, names(rows), strict=True)]
            self._memory.save(card.id for card in cards)
            with self._lock:
                self._cards, self.left_out = {card.id: card for card in cards}, tuple(left_out)

    def cards(self, search: str = "", architecture: str = "", folder: str = "") -> list[Card]:
        """Those whose name, folder, trigger words or methods have all words of `search`, usable ones first."""
        words = search.casefold().split()
        with self._lock:
            cards = list(self._cards.values())
        chosen = [
            card
            for card in cards
            if (not architecture or card.architecture == architecture)
            and (not folder or card.folder == folder or card.folder.startswith(f"{folder}/"))
            and all(word in _searched(card) for word in words)
        ]
        return sorted(chosen, key=lambda card: (bool(card.fault), card.folder.casefold(), card.name.casefold()))

    def get(self, id: str) -> Card:
        """Raises ConfigError where there is none, or no longer."""
        with self._lock:
            card = self._cards.get(id)
        if card is None or not card.path.exists():
            raise ConfigError(
                f"{card.name if card else 'this adapter'} is not in the library (any more); scan it again"
            )
        return card

    def named(self, name: str) -> Card:
        """The card that `<lora:name:1>` means, capitals or not.

        Raises:
            ConfigError: none, with the closest names, or several.
        """
        wanted = plain(name, NAME).casefold()
        with self._lock:
            cards = list(self._cards.values())
        if exact := [card for card in cards if card.name.casefold() == wanted]:
            return exact[0]
        alike = [card for card in cards if card.name.casefold().rpartition("/")[2] == wanted]
        if len(alike) == 1:
            return alike[0]
        if alike:
            names = [card.name for card in alike]
            raise ConfigError(
                f"'{plain(name, 80)}' may be {first_few(names)}; write the whole name, as in <lora:{names[0]}:1>"
            )
        near = get_close_matches(wanted, {card.name.casefold(): card for card in cards}, 3, 0.5)
        shown = [card.name for close in near for card in cards if card.name.casefold() == close]
        hint = f"; close: {', '.join(shown)}" if shown else ""
        raise ConfigError(f"there is no adapter '{plain(name, 80)}' in the library{hint}")

    def at(self, path: Path) -> Card:
        """The card of a file, or of a folder of peft's, that the settings name.

        Raises:
            ConfigError: it is none.
        """
        found = next((card for card in self.cards() if card.path == path.expanduser().absolute()), None)
        if found is None:
            what = "a folder, and not one of peft's: name one of its files" if path.is_dir() else "no adapter"
            raise ConfigError(f"{path} is {what}")
        return found

    def file(self, id: str, *, strict: bool = True) -> AdapterFile:
        """Its contents. strict: as in `load`.

        Raises:
            ConfigError: there is no such card. FormatError: it is gone, has changed into no adapter, is not whole.
        """
        return self._read(id, load, strict)

    def outline(self, id: str, *, strict: bool = True) -> AdapterFile:
        """The same without its tensors' numbers, which are most of its memory; see `imgadapt.file.outline`."""
        return self._read(id, outline, strict)

    def _read(self, id: str, read: Callable[..., AdapterFile], strict: bool) -> AdapterFile:
        card = self.get(id)
        self._check_place(card)
        if strict and card.fault:
            raise FormatError(f"{card.name} cannot be used: {card.fault}")
        try:
            return read(card.path, strict=strict)
        except FormatError as error:
            raise FormatError(f"{card.name}: {short(error, card.path)}") from error
        except (OSError, ValueError, MemoryError) as error:
            raise FormatError(f"{card.name} cannot be read any more: {short(error, card.path)}") from error

    def download(self, id: str) -> tuple[Path, str]:
        """(file, name for the user). To be asked before a file's bytes are given away: no link that leads out, no
        device, and no folder is.

        Raises:
            ConfigError: there is no such card, or it is a folder. FormatError: it is not to be opened.
        """
        card = self.get(id)
        self._check_place(card)
        if card.path.is_dir():
            raise ConfigError(f"{card.name} is a folder of peft's: convert it, which makes one file of it")
        if not card.path.is_file():
            raise FormatError(f"{card.name} is not a plain file")
        return card.path, f"{card.name.rpartition('/')[2]}{card.path.suffix}"

    def digest(self, id: str) -> str:
        """SHA-256 of the file (of its weights, where it is a folder); kept while the file does not change.

        Raises:
            ConfigError: there is no such card. FormatError: it cannot be read.
        """
        card = self.get(id)
        self._check_place(card)
        path = card.path / _WEIGHTS if card.path.is_dir() else card.path
        try:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if known := self._memory.digest(id, stamp):
                return known
            with path.open("rb") as file:
                made = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise FormatError(f"{card.name} cannot be read any more ({error.strerror})") from error
        self._memory.keep_digest(id, stamp, made)
        return made

    def mark(self, id: str) -> str:
        """Of all of an adapter that decides what it does: its digest, and of a folder of peft's its config's.

        Raises:
            ConfigError, FormatError: see `digest`.
        """
        made, config = self.digest(id), self.get(id).path / _PEFT
        try:
            return f"{made}-{hashlib.sha256(config.read_bytes()).hexdigest()}" if config.is_file() else made
        except OSError as error:
            raise FormatError(f"{self.get(id).name} cannot be read any more ({error.strerror})") from error

    def preview_of(self, card: Card, side: int = _THUMBNAIL) -> bytes | None:
        """WebP, of so many pixels at most; None where there is none that can be shown."""
        if card.preview is None or not is_inside(card.preview, (*self._within, self._previews.resolve())):
            return None
        try:
            status = card.preview.stat()
            key = (card.preview, status.st_mtime_ns, status.st_size, side)
            with self._lock:
                if key in self._thumbnails:
                    self._thumbnails.move_to_end(key)
                    return self._thumbnails[key]
            made = sidecars.thumbnail(sidecars.picture_bytes(card.preview), side, self._most_pixels)
        except (DataError, OSError):
            return None
        with self._lock:
            self._thumbnails[key] = made
            while len(self._thumbnails) > _THUMBNAILS:
                self._thumbnails.popitem(last=False)
        return made

    def set_preview(self, id: str, picture: bytes) -> Card:
        """Keep a picture as a card's preview, in the home; what lies beside the file is left alone.

        Raises:
            ConfigError: there is no such card. DataError: no picture, or too large. OutputError: it cannot be written.
        """
        self.get(id)
        path = self._previews / f"{id}.webp"
        write_bytes(path, sidecars.thumbnail(picture, 2 * _THUMBNAIL, self._most_pixels))
        with self._lock:
            self._cards[id] = replace(self._cards[id], preview=path)
            return self._cards[id]

    def _rows(self, left_out: list[str]) -> Iterator[Row]:
        for root in self._roots:
            scan = Scan(root.path, (".safetensors", *_PICKLES), _PEFT, self._within)
            for found in scan:
                parent, _, last = found.relative.rpartition("/")
                folder = "/".join(part for part in (root.label, parent) if part)
                stem = last if found.is_folder else last.rpartition(".")[0]
                yield Row(id_of(root.key, found.relative), stem, plain(folder), found)
            left_out += scan.left_out
        scan = Scan(self._runs, (".safetensors",), _PEFT, (self._runs.resolve(),), 2, passed=_is_no_result)
        for found in scan:
            run, _, rest = found.relative.partition("/")
            if rest in _OF_A_RUN or rest.startswith("snapshots/"):
                which = "" if rest == _OF_A_RUN[0] else f"-{Path(rest).stem}"
                yield Row(id_of("runs", found.relative), f"{run}{which}", plain(f"runs/{run}"), found)

    def _card(self, row: Row, name: str) -> Card:
        found, beside = row.found, row.found.beside
        modified, size = _stamp(found)
        header = self._header(row, (modified, size))
        texts = [found.path.parent / text for text in sidecars.texts_of(row.stem, beside)]
        said = sidecars.said_in([text for text in texts if is_inside(text, self._within)])
        weight = said.weight if said.weight is not None else header.weight
        return Card(
            row.id, name, row.folder, found.path, size, modified / 1e9,
            header.format, header.architecture, header.kinds, header.components, header.numbers, header.dtypes,
            tuple(said.trigger) or header.trigger, header.words, 1.0 if weight is None else weight,
            self._preview(row), header.fault, said.notes,
        )  # fmt: skip

    def _header(self, row: Row, stamp: remembering.Stamp) -> Header:
        found = row.found
        if found.fault:
            return Header(fault=found.fault)
        if found.path.suffix.lower() in _PICKLES and not found.is_folder:
            return Header(fault="a pickle, which may run code: `imgadapt convert --pickle` makes a .safetensors of it")
        if found.is_folder and not self._is_inside(found.path):
            return Header(fault="its files are links that lead out of the library; name their folder instead")
        if (known := self._memory.header(row.id, stamp)) is not None:
            return known
        made = self._reader.read(found.path)
        self._memory.keep_header(row.id, stamp, made)
        return made

    def _preview(self, row: Row) -> Path | None:
        own = self._previews / f"{row.id}.webp"
        if own.is_file():
            return own
        name = sidecars.preview_of(row.stem, row.found.beside)
        path = row.found.path.parent / name if name else None
        return path if path is not None and is_inside(path, self._within) else None

    def _check_place(self, card: Card) -> None:
        if not self._is_inside(card.path):
            raise FormatError(f"{card.name} is a link that leads out of the library")

    def _is_inside(self, path: Path) -> bool:
        """Whether all that is read of an adapter is in the library."""
        return all(is_inside(one, (*self._within, self._runs.resolve())) for one in (path, *_parts(path)))


def _parts(path: Path) -> list[Path]:
    """Of a folder of peft's, the files that are read."""
    return [path / _WEIGHTS, path / _PEFT] if path.is_dir() else []


def _stamp(found: Found) -> remembering.Stamp:
    """Of a folder of peft's, when the later of its files was changed, and the bytes of both."""
    try:
        about = [part.stat() for part in _parts(found.path)] if found.is_folder else []
    except OSError:
        about = []
    if not about:
        return found.modified, found.size
    return max(one.st_mtime_ns for one in about), sum(one.st_size for one in about)


def _has_many(path: Path) -> bool:
    """Whether it is a folder of adapters; else it is one."""
    return path.is_dir() and not (path / _PEFT).is_file()


def _is_no_result(name: str) -> bool:
    """Folders of a training that are full of tensors and of no adapters."""
    other_format = name.startswith("adapter.") and name != _OF_A_RUN[0]
    return other_format or name in _NO_RESULTS


def _searched(card: Card) -> str:
    methods = " ".join(kind.method for kind in card.kinds)
    return " ".join((card.name, card.folder, *card.trigger, *card.words, methods)).casefold()
