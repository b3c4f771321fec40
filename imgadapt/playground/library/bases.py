"""Bases: the models that a playground may load; known by ids, like adapters."""

import hashlib
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from safetensors import SafetensorError

from imgadapt.errors import ConfigError, ImgadaptError
from imgadapt.playground.desk import public
from imgadapt.playground.library.scanning import Found, Scan, is_inside
from imgadapt.playground.settings import Settings
from imgadapt.training.families import hub
from imgadapt.training.families.load import family_of
from imgadapt.training.plan import kind_of_base

_INDEX = "model_index.json"
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_DEPTH, _MOST = 4, 2000
_UNREADABLE = (ImgadaptError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError)
_PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer")


@dataclass(frozen=True)
class Base:
    """kind: "demo", "sd1", ... (see plan.USUAL). place: what `families.load` takes; never told to a client."""

    id: str
    name: str
    kind: str
    place: str = field(repr=False)


class Bases:
    """The embedded base, the settings' base, and what lies in the settings' folders of models.

    faults: what of those cannot be loaded, and why.

    Raises:
        ConfigError: the settings' base is not there, or of no kind that is known.
    """

    def __init__(self, settings: Settings) -> None:
        self._hub = settings.hub and not settings.shared
        self._models = settings.models
        self._lock = threading.RLock()
        if settings.base in hub.NAMES:
            hub.folder(settings.base)  # it is on this machine, or this is the time to say so
        self._first = _base(settings.base, _name(settings.base))
        self._asked: list[Base] = []  # out of the hub's cache
        self._found: list[Base] = []
        self.faults: Sequence[str] = ()
        self.scan()

    def scan(self) -> None:
        """Look into the folders of models again."""
        faults: list[str] = []
        found: list[Base] = []
        within = tuple(root.expanduser().resolve() for root in self._models)
        for root in self._models:
            root = root.expanduser()
            if not root.exists():
                faults.append(f"{root.name}: no such folder")
                continue
            single = root.is_file() or (root / _INDEX).is_file()
            rows = [Found(root, root.name, 0, 0)] if single else self._rows(root, within, faults)
            for row in rows:
                try:
                    found.append(self._of(row))
                except _UNREADABLE as error:
                    faults.append(f"{row.relative}: {_short(error)}")
        with self._lock:
            self.faults, self._found = tuple(faults), found

    def _rows(self, root: Path, within: tuple[Path, ...], faults: list[str]) -> list[Found]:
        scan = Scan(root, (".safetensors", *_PICKLES), _INDEX, within, _DEPTH, _MOST, lambda name: name in _PARTS)
        rows = list(scan)
        faults += scan.left_out
        return rows

    @staticmethod
    def _of(row: Found) -> Base:
        if row.fault:
            raise ConfigError(row.fault)
        if row.path.suffix.lower() in _PICKLES and row.path.is_file():
            raise ConfigError("a pickle, which may run code; save it as .safetensors first")
        return _base(str(row.path), row.relative.removesuffix(".safetensors"))

    @property
    def all(self) -> Sequence[Base]:
        """Each once, the settings' first; names are unique."""
        with self._lock:
            rows = [self._first, _base("demo", "demo"), *self._found, *self._asked]
        taken: set[str] = set()
        bases: dict[str, Base] = {}
        for base in rows:
            if base.id in bases:
                continue
            name, k = base.name, 1
            while name.casefold() in taken:
                k += 1
                name = f"{base.name} ({k})"
            taken.add(name.casefold())
            bases[base.id] = Base(base.id, name, base.kind, base.place)
        return list(bases.values())

    @property
    def first(self) -> Base:
        """The settings' base."""
        return self._first

    def get(self, id: str) -> Base:
        """Raises ConfigError where there is none."""
        found = next((base for base in self.all if base.id == id), None)
        if found is None:
            raise ConfigError("there is no such base (any more); choose another")
        return found

    def named(self, name: str) -> Base:
        """Of a name; of `owner/name` in the hub's cache, where the settings allow it.

        Raises:
            ConfigError: there is none, or it is not allowed.
        """
        bases = self.all
        found = next((base for base in bases if base.name.casefold() == name.strip().casefold()), None)
        if found is not None:
            return found
        shown = name.strip()[:80]
        if name in hub.NAMES or re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
            if not self._hub:
                raise ConfigError(f"there is no base '{shown}' here, and this playground takes none out of the hub")
            hub.folder(name)
            made = _base(name, name)
            with self._lock:
                self._asked.append(made)
            return self.get(made.id)
        near = get_close_matches(shown, [base.name for base in bases], 3, 0.5)
        raise ConfigError(f"there is no base '{shown}'; " + (f"close: {', '.join(near)}" if near else "see the list"))


def _base(place: str, name: str) -> Base:
    """Raises ConfigError, and what a broken file raises: see _UNREADABLE."""
    folder = Path(place).expanduser()
    if place != "demo" and folder.is_dir():
        index = folder / _INDEX
        if not index.is_file():
            raise ConfigError(f"{name} is a folder without {_INDEX}, which diffusers writes")
        if not is_inside(index, (folder.resolve(),)):
            raise ConfigError(f"{name}: its {_INDEX} is a link out of the folder")
        said = json.loads(index.read_text("utf-8"))
        if not isinstance(said, dict) or not isinstance(said.get("_class_name"), str):  # pyright: ignore[reportUnknownMemberType] # JSON
            raise ConfigError(f"{name}: its {_INDEX} does not say of which class it is")
        family_of(name, said["_class_name"])  # pyright: ignore[reportUnknownArgumentType] # a str, see above
    kind = kind_of_base(place)
    there = place if place == "demo" or not folder.exists() else str(folder.resolve())
    return Base(hashlib.sha256(f"base\n{there}".encode()).hexdigest()[:16], name, kind, place)


def _name(base: str) -> str:
    return Path(base).expanduser().name.removesuffix(".safetensors") if Path(base).expanduser().exists() else base


def _short(error: BaseException) -> str:
    text = public(str(error) or type(error).__name__).replace("\n", " ")
    return text if len(text) <= 300 else f"{text[:299]}…"
