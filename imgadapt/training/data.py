"""The pictures of a folder, whatever its layout, each with its captions and its mask."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from imgadapt.errors import DataError, first_few, printable
from imgadapt.reading import read
from imgadapt.training import decoding
from imgadapt.training.captions import beside, table, with_trigger, wordings
from imgadapt.training.listing import METADATA, SUFFIXES, UNREAD, Listing, is_folder

SMALLEST = 8  # pixels of a side
_NAMED = 50  # of those at fault, so that all can be mended at once
_CONCEPT = re.compile(r"(\d{1,3})_(.*)")  # kohya's `10_ohwx man`; four digits are a year


@dataclass(frozen=True)
class Example:
    """One picture with all that is known of it.

    captions: one or more wordings; ("",) for a picture that is trained without. digest: SHA-256 of the file's bytes.
    width, height: pixels, upright. mask: a picture, white where to train. alpha: some pixels are transparent.
    repeats, concept: of kohya's folder `repeats_concept`. mask_digest: of the mask, as it was scanned.
    """

    path: Path
    captions: tuple[str, ...]
    digest: str
    width: int
    height: int
    mask: Path | None = None
    alpha: bool = False
    repeats: int = 1
    concept: str = ""
    mask_digest: str = ""


def scan(folder: Path, caption: str | None = None, trigger: str | None = None) -> list[Example]:
    """The pictures of a folder, by name, each opened once to the last pixel.

    The layout is found by looking: pictures in the folder, kohya's folders `10_ohwx man` in it (or such a folder
    itself), or the rows of a metadata.jsonl or metadata.csv. Captions are in .txt or .caption files beside the
    pictures, or in a column text, caption or prompt.

    caption: for pictures that have none of their own; without it kohya's folder name is taken, then the trigger alone.
    trigger: stands for `[trigger]` in captions, and is put before those that do not have it.

    Raises:
        DataError: the folder is not there, has no pictures, or two layouts; pictures or masks cannot be read or used;
            captions are missing, cannot be read or contradict each other. All at fault are counted, and named up to 50.
    """
    trigger = (trigger or "").strip() or None
    found = [(*item, _concept(place.folder)) for place in _places(folder) for item in _pictures(place)]
    if not found:
        raise DataError(f"{folder}: no pictures in it{_hint(folder)}")
    broken: list[str] = []
    odd: list[str] = []
    silent: list[str] = []
    examples: list[Example] = []
    for path, words, mask, (repeats, concept) in found:
        name, captions = printable(path.relative_to(folder).as_posix()), ("",)
        try:
            if not (texts := words()):
                if caption is None and not concept and trigger is None:
                    silent.append(name)
                texts = wordings([concept if caption is None else caption], "the caption for all") or [""]
            captions = tuple(dict.fromkeys(with_trigger(text, trigger, path) for text in texts))
        except DataError as error:
            odd.append(str(error))
        try:
            mark, size, alpha = _look(path)
            marked = _look_at_mask(mask, size) if mask else ""
        except DataError as error:
            broken.append(f"{name} ({error})")
        else:
            examples.append(Example(path, captions, mark, *size, mask, alpha, repeats, concept, marked))
    faults = _faults(folder, len(found), broken, list(dict.fromkeys(odd)), silent)
    if faults:
        raise DataError("; and ".join(faults))
    return examples


def _faults(folder: Path, count: int, broken: Sequence[str], odd: Sequence[str], silent: Sequence[str]) -> list[str]:
    """What is wrong with the pictures, with captions that are there, and with those that are not."""
    said: list[str] = []
    if broken:
        named = first_few(broken, _NAMED)
        said.append(f"{folder}: {len(broken)} of {count} pictures cannot be read; mend or remove {named}")
    if odd:
        said.append(odd[0] if len(odd) == 1 else f"{len(odd)} captions cannot be used: {first_few(odd, _NAMED)}")
    if silent:
        said.append(
            f"{folder}: {len(silent)} of {count} pictures have no caption ({first_few(silent, _NAMED)}); write "
            f"{Path(silent[0]).stem}.txt beside each, or give one for all: --caption 'a drawing'"
        )
    return said


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 of all that decides what is trained, in order: pictures, captions, masks, repeats; no paths."""
    parts = [(e.digest, e.captions, e.mask_digest or None, e.repeats) for e in examples]
    return digest([json.dumps(part) for part in parts])


def digest(lines: Sequence[str]) -> str:
    """SHA-256 of lines of text."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# --- which pictures, with which words


def _places(folder: Path) -> list[Listing]:
    """The folders that hold the pictures: it, or kohya's in it."""
    top = Listing(folder)
    inner = [listing for d in top.folders if _CONCEPT.fullmatch(d.name) and (listing := Listing(d)).pictures]
    if not inner or any(top.find(name) for name in METADATA):
        return [top]
    if top.pictures:
        raise DataError(
            f"{folder}: {len(top.pictures)} pictures ({first_few([p.name for p in top.pictures])}) lie beside kohya's "
            f"folders ({first_few([x.folder.name for x in inner])}); move them into one of these, or elsewhere"
        )
    return inner


def has_words(folder: Path) -> bool:
    """Whether kohya's folder names are captions of the pictures there, for those that have none.

    Raises:
        DataError: there is no such folder.
    """
    return all(_concept(place.folder)[1] for place in _places(folder))


def _concept(folder: Path) -> tuple[int, str]:
    """Repeats and words that a folder's name says."""
    name = folder.absolute().name
    if not (parts := _CONCEPT.fullmatch(name)):
        return 1, ""
    if int(parts[1]) == 0:
        raise DataError(f"{folder}: its name says 0 repeats; name it 1_{parts[2]}, or move it away")
    return int(parts[1]), parts[2].strip()


def _hint(folder: Path) -> str:
    inner = [d.name for d in Listing(folder).folders if Listing(d).pictures]
    return f"; did you mean its folder {first_few(inner)}?" if inner else f"; wanted {', '.join(sorted(SUFFIXES))}"


def _pictures(top: Listing) -> list[tuple[Path, Callable[[], list[str]], Path | None]]:
    """The pictures of a folder, with what reads their own wordings, and masks. If it has metadata, this must name them
    all.
    """
    tables = [file for name in METADATA if (file := top.find(name))]
    if len(tables) > 1:
        raise DataError(f"{tables[0]} and {tables[1]} are both there; remove one of them")
    rows = {top.folder / name: said for name, said in table(tables[0]).items()} if tables else {}
    listings = {d: Listing(d) for d in dict.fromkeys(path.parent for path in rows) if is_folder(d)} or {top.folder: top}
    files = {path: listings[path.parent].find(path.name) if path.parent in listings else None for path in rows}
    said = {file: rows[path] for path, file in files.items() if file}
    paired = [pair for listing in listings.values() for pair in listing.paired(said)]
    pictures = {path for path, _ in paired}
    source = f"{tables[0]}'s row" if tables else ""
    _none([p for x in listings.values() for p in x.files if p.suffix.lower() in UNREAD], top.folder,
          "are in formats that are not read; save them as .png or .jpg")  # fmt: skip
    if tables:
        _none([path for path, file in files.items() if file not in pictures], tables[0],
              "that it names are not there; correct or remove their rows")  # fmt: skip
        _none([path for path in pictures if path not in said], tables[0],
              "beside it have no row in it; add rows, or move them away")  # fmt: skip
    return [
        (path, partial(beside, listings[path.parent].captions(path), said.get(path, []), source), mask)
        for path, mask in paired
    ]


def _none(paths: Sequence[Path], where: Path, fault: str) -> None:
    if paths:
        raise DataError(f"{where}: {len(paths)} pictures ({first_few([p.name[:255] for p in paths])}) {fault}")


# --- what is in a picture


def _look(path: Path) -> tuple[str, tuple[int, int], bool]:
    """Digest, upright (width, height), and whether some pixels are transparent, of a picture read to its end."""
    data = _bytes(path)
    image = decoding.decoded(data)
    size = decoding.upright_size(image)
    if min(size) < SMALLEST:
        raise DataError(f"{size[0]}x{size[1]} pixels, wanted {SMALLEST} a side or more")
    least, most = decoding.transparency(image)
    if most == 0:
        raise DataError("transparent all over")
    return hashlib.sha256(data).hexdigest(), size, least < 255


def _look_at_mask(path: Path, size: tuple[int, int]) -> str:
    """Digest of a mask.

    Raises:
        DataError: it does not fit a picture of (width, height), or leaves nothing of it.
    """
    try:
        data = _bytes(path)
        image = decoding.painted(decoding.decoded(data))
    except DataError as error:
        raise DataError(f"its mask {path.name}: {error}") from error
    (width, height), (across, down) = size, image.size
    if abs(across - down * width / height) > 1 and abs(down - across * height / width) > 1:
        raise DataError(f"its mask {path.name} is {across}x{down}, not the shape of {width}x{height}")
    if image.getextrema()[1] == 0:
        raise DataError(f"its mask {path.name} is black all over")
    return hashlib.sha256(data).hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        data = read(path, decoding.MOST_BYTES)
    except OSError as error:
        raise DataError(error.strerror or str(error)) from error
    if not data:
        raise DataError("an empty file")
    return data


def unchanged(path: Path, digest: str) -> bytes:
    """The bytes of a file that was scanned.

    Raises:
        DataError: it cannot be read, or is not the one that was scanned.
    """
    try:
        data = read(path, decoding.MOST_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); mend or remove it") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise DataError(f"{path}: the file has changed since it was scanned; start the run anew")
    return data
