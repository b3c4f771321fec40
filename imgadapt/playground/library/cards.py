"""Cards: adapters as their headers tell them. Of tensors only lone numbers (alphas) are read."""

import hashlib
import json
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from imgadapt import demo
from imgadapt.errors import FormatError, ImgadaptError
from imgadapt.file import AdapterFile, outline
from imgadapt.formats import FORMATS, LOOSELY
from imgadapt.header import opened, read_header
from imgadapt.playground.desk import public
from imgadapt.summary import misfits, summary, trigger_words

LONGEST = 200
"""Characters of a trigger word, a token."""
_WORDS = 64  # tensors of a file of embeddings
_DESCRIPTIVE = ("ss_", "sshs_", "modelspec.", "imgadapt_")  # metadata that no format is told by, save these:
_TELLING = {key for form in FORMATS for key in (*form.own_metadata, *(name for name, _ in form.claims))}


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
    folder: where in the library, for people. architecture: "demo" (made for the embedded base), "sd1", ...; "" where no
    table knows it. numbers: how many its tensors have; size: bytes. trigger: words that bring it out. words: embeddings
    it brings. weight: what its maker recommends. notes: what a file beside it says, from anyone: escape it. fault: why
    it cannot be used; what comes from its header is empty then.
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
    notes: str = ""


@dataclass(frozen=True)
class Header:
    """What is told of a file by its header; see Card."""

    format: str = ""
    architecture: str = ""
    kinds: tuple[Kind, ...] = ()
    components: tuple[str, ...] = ()
    numbers: int = 0
    dtypes: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    trigger: tuple[str, ...] = ()
    weight: float | None = None
    fault: str = ""


class Reader:
    """Reads headers; of files that are alike but for their tensors' numbers (an epoch and the next), only the first."""

    def __init__(self, most: int = 1024) -> None:
        self._most, self._lock = most, threading.Lock()
        self._known: OrderedDict[str, Header] = OrderedDict()

    def read(self, path: Path) -> Header:
        """Of a .safetensors file, or of a folder of peft's. Never raises for what a file is."""
        file = path / "adapter_model.safetensors" if path.is_dir() else path
        try:
            if path.is_dir() and not file.is_file():
                raise FormatError("a folder of peft's without adapter_model.safetensors (a .bin is a pickle)")
            metadata, structure, tensors = _header(file)
            config = path / "adapter_config.json" if path.is_dir() else file.parent / "adapter_config.json"
            beside = config.read_bytes() if file.stem == "adapter_model" and config.is_file() else b""
            stem = path.stem if tensors <= _WORDS else ""
            likeness = _likeness(structure, metadata, beside, stem)
            made = self._recall(likeness) or self._keep(likeness, described(outline(path)))
        except (ImgadaptError, OSError, ValueError, MemoryError, RecursionError) as error:
            return Header(fault=short(error, path))
        except Exception as error:  # whatever a hostile file brings about: it is one card, not the library
            return Header(fault=f"cannot be read ({type(error).__name__})")
        weight = _number(metadata.get("imgadapt_weight", ""))
        trigger = tuple(plain(word) for word in trigger_words(metadata))
        return replace(made, trigger=tuple(word for word in trigger if word), weight=weight)

    def _recall(self, likeness: str) -> Header | None:
        with self._lock:
            return self._known.get(likeness)

    def _keep(self, likeness: str, made: Header) -> Header:
        with self._lock:
            self._known[likeness] = made
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        return made


def described(file: AdapterFile) -> Header:
    """What a file is, without its trigger words."""
    told = summary(file, norms=False)
    counted = Counter((row.method, row.rank, row.alpha) for row in told.rows)
    if wrong := next((row for row in told.rows if not math.isfinite(row.scale)), None):
        raise FormatError(f"{wrong.layer}: its scale is {wrong.scale}")
    return Header(
        file.format or "",
        _architecture(file),
        tuple(Kind(*kind, layers) for kind, layers in counted.most_common()),
        tuple(
            dict.fromkeys(
                name.partition(".")[0] for name in (*file.parts, *(file.prompts.tensors if file.prompts else ()))
            )
        ),
        told.numbers,
        tuple(told.dtypes),
        tuple(plain(word) for word in file.embeddings),
    )


def _architecture(file: AdapterFile) -> str:
    """Of the tables, or "demo": the embedded base has SD1's names and smaller layers."""
    if file.architecture != "sd1":
        return file.architecture or ""
    return "sd1" if misfits(file, demo.shape_of) else "demo"


def _header(path: Path) -> tuple[Mapping[str, str], bytes, int]:
    """Metadata, a digest of what else tells one file's reading from another's (names, types, shapes, places, lone
    numbers), and how many tensors there are.
    """
    with opened(path) as file:
        header = read_header(file)
        digest = hashlib.sha256(f"{header.size - header.start}{header.rows}".encode("utf-8", "surrogatepass"))
        for row in header.rows.values():
            if math.prod(row.shape) == 1:
                file.seek(header.start + row.first)
                digest.update(file.read(row.last - row.first))
    return header.metadata, digest.digest(), len(header.rows)


def _likeness(structure: bytes, metadata: Mapping[str, str], beside: bytes, stem: str) -> str:
    """The same for files that `load` reads alike. stem: of a file that may be a word's, which is called by it."""
    telling = {k: v for k, v in metadata.items() if k in _TELLING or not k.startswith(_DESCRIPTIVE)}
    digest = hashlib.sha256(structure + json.dumps(telling, sort_keys=True).encode() + b"\n" + beside)
    digest.update(stem.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) <= 10 else None


def plain(text: str, most: int = LONGEST) -> str:
    """One line that is fit to be shown: no control characters, no half ones, no marks that turn the line round."""
    shown = "".join(c if c.isprintable() else " " for c in text[: 4 * most])
    line = " ".join(shown.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def short(error: BaseException, path: Path) -> str:
    """An error's text without the file's own place, or another's."""
    text = str(error).replace(f"{path}: ", "").removesuffix(LOOSELY)
    return plain(public(text or type(error).__name__), 300)
