"""What is odd about the pictures and captions of a training, and what to do about it: nothing here stops a run."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imgadapt.errors import DataError, first_few, printable
from imgadapt.reading import read
from imgadapt.training import decoding
from imgadapt.training.captions import says
from imgadapt.training.data import CAPTIONS, METADATA, SUFFIXES, UNREAD, Example, Listing, key

Level = Literal["error", "warning", "note"]
ALIKE = 6  # bits of 64
SHAPE = 2.0  # sides' ratio of the longest bucket
UNEVEN = 1.5  # between concepts, in pictures an epoch
BLURRED = 1.25  # times enlarged
MOST_FILES = 200_000  # that are looked through
_SIDE = 32  # pixels that hashes are made of
_SYSTEM = frozenset({"thumbs.db", "desktop.ini"})
_KINDS = {"JPEG": (".jpg", ".jpeg", ".jfif"), "MPO": (".jpg", ".jpeg", ".jfif"), "TIFF": (".tif", ".tiff")}


@dataclass(frozen=True)
class Finding:
    """One thing that is odd. text: what, and what to do. paths: of what."""

    level: Level
    text: str
    paths: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Looks:
    """What of a picture only its file says.

    kind, mode: Pillow's names. deep: more than 8 bits a channel. moves: it is animated. turned: by EXIF. hashes: of it
    and of its mirror image; None when it has one colour.
    """

    kind: str
    mode: str
    deep: bool
    moves: bool
    turned: bool
    hashes: tuple[int, int] | None


def examine(
    examples: Sequence[Example],
    folder: Path,
    *,
    tokens: Callable[[str], int] | None = None,
    limit: int | None = None,
    resolution: int,
    trigger: str | None = None,
    alpha_counts: bool = False,
    elsewhere: Sequence[Path] = (),
) -> list[Finding]:
    """All that is odd about the pictures of a folder, errors first.

    tokens: the number of tokens of a text, with those at its ends. limit: how many of them the model reads.
    resolution: side in pixels of the square that a picture's area should have at least. alpha_counts: transparent
    pixels are a mask. elsewhere: folders below that serve another end (held out pictures, pictures of the class).

    Raises:
        DataError: a picture cannot be opened any more.
    """
    looks = [look(example.path) for example in examples]
    found = [
        *(_length(examples, tokens, limit, trigger) if tokens and limit else ()),
        *_words(examples, trigger),
        *_same(examples, looks),
        *_size(examples, resolution),
        *_kind(examples, looks, alpha_counts=alpha_counts),
        *_balance(examples),
        *_unused(examples, folder, elsewhere),
    ]
    order: list[Level] = ["error", "warning", "note"]
    told = [replace(finding, text=printable(finding.text)) for finding in found]
    return sorted(told, key=lambda finding: order.index(finding.level))


# --- captions


def _length(
    examples: Sequence[Example], tokens: Callable[[str], int], limit: int, trigger: str | None
) -> Iterator[Finding]:
    long = [(e, text, tokens(text)) for e in examples for text in e.captions]
    long = [(e, text, count) for e, text, count in long if count > limit]
    if long:
        example, text, count = max(long, key=lambda row: row[2])
        lost = " ".join(text.split(" ")[_kept(text, tokens, limit) :])
        yield Finding(
            "warning",
            f"{len(long)} captions are longer than the {limit} tokens that the model reads; of {example.path.name} the "
            f"last {count - limit} are cut, from {_short(lost)!r}; shorten them, or put what matters first",
            _paths(e for e, _, _ in long),
        )
    without = [e for e, text, _ in long if trigger and not says(_start(text, tokens, limit), trigger)]
    if without:
        yield Finding(
            "error",
            f"in {len(without)} captions the trigger {trigger!r} is among what is cut; put it first",
            _paths(without),
        )


def _start(text: str, tokens: Callable[[str], int], limit: int) -> str:
    return " ".join(text.split(" ")[: _kept(text, tokens, limit)])


def _kept(text: str, tokens: Callable[[str], int], limit: int) -> int:
    """How many words of a text fit."""
    words = text.split(" ")
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens(" ".join(words[:middle])) <= limit else (low, middle - 1)
    return low


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[:most].rstrip() + "…"


def _words(examples: Sequence[Example], trigger: str | None) -> Iterator[Finding]:
    texts = {e.captions for e in examples}
    if len(examples) > 1 and len(texts) == 1 and trigger is None and len(next(iter(texts))) == 1:
        (text,) = next(iter(texts))
        said = f"all captions are {_short(text)!r}" if text else "no picture has a caption"
        yield Finding(
            "note",
            f"{said}: all that the pictures share is bound to it; describe what differs between them in captions, "
            "or give a trigger",
        )
    if (empty := [e for e in examples if "" in e.captions]) and len(empty) < len(examples):
        yield Finding("warning", f"{len(empty)} pictures have no words; write captions beside them", _paths(empty))


# --- pictures


def look(path: Path) -> Looks:
    """Read what only a picture's file says; of a JPEG as little as suffices.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        data = read(path, decoding.MOST_BYTES)
        image = decoding.opened(data)
        kind, mode = image.format or "", image.mode
        # of colours with 16 bits Pillow tells only in how it will decode them
        deep = any("16" in str(tile[3]) for tile in getattr(image, "tile", ()))
        small = decoding.decoded(data, about=2 * _SIDE)
        grey, turned = _grey(decoding.plain(small)), decoding.turn(small) is not None
        moves = kind != "MPO" and _moves(image)  # a camera's MPO holds previews and depths
    except (OSError, DataError) as error:
        raise DataError(f"{path}: cannot be read ({error}); was it changed since it was scanned?") from error
    return Looks(kind, mode, deep, moves, turned, phash(grey) if grey.std() > 1 else None)


def _moves(image: Image.Image) -> bool:
    """Whether pictures follow the first in time. They are not counted, for that takes long where there are millions."""
    try:
        image.seek(1)
    except EOFError:
        return False
    except Exception:  # the first is whole, those after it are not: there are some
        return True
    return True


def _grey(image: Image.Image) -> NDArray[np.float64]:
    """(32, 32) brightness of RGB or RGBA, over white."""
    small = image.resize((_SIDE, _SIDE), Image.Resampling.BOX)
    if small.mode == "RGBA":
        small = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small)
    return np.asarray(small.convert("L"), np.float64)


def phash(grey: NDArray[np.float64]) -> tuple[int, int]:
    """64 bits of (n, n) brightness, and those of its mirror image: which of the 8 x 8 lowest DCT terms are above their
    median (phash.org). A mirror image has the same terms, the odd ones across with the other sign.
    """
    at = np.arange(len(grey)) + 0.5
    cosines = np.cos(np.pi / len(grey) * np.arange(8)[:, None] * at)
    terms = cosines @ grey @ cosines.T
    pair = (terms, terms * np.where(np.arange(8) % 2, -1, 1))
    first, second = (int.from_bytes(np.packbits(x > np.median(x)).tobytes(), "big") for x in pair)
    return first, second


def _same(examples: Sequence[Example], looks: Sequence[Looks]) -> Iterator[Finding]:
    by_bytes: dict[str, list[int]] = defaultdict(list)
    for k, example in enumerate(examples):
        by_bytes[example.digest].append(k)
    copies = [group for group in by_bytes.values() if len(group) > 1]
    # one of each, so that a copy is not told as looking alike too
    once = [group[0] for group in by_bytes.values() if looks[group[0]].hashes]
    plain, mirrored = (_bits([hashes[side] for k in once if (hashes := looks[k].hashes)]) for side in (0, 1))
    near = _groups(plain, plain)
    turned = _groups(plain, mirrored, apart=near)
    for groups, text in (
        (copies, "are the same file; each copy counts as a picture: remove all but one"),
        (_sorted(near, once), "look alike; keep the best, so that training does not see them more often than others"),
        (_sorted(turned, once), "are mirror images; keep one of each, and let flip do the rest if sides do not matter"),
    ):
        if groups:
            named = [" = ".join(examples[k].path.name for k in group[:4]) for group in groups]
            paths = _paths(examples[k] for group in groups for k in group)
            yield Finding("warning", f"{len(paths)} pictures {text}: {first_few(named)}", paths)


def _bits(hashes: Sequence[int]) -> NDArray[np.float32]:
    """(n, 64) of -1 and 1."""
    each = np.frombuffer(b"".join(x.to_bytes(8, "big") for x in hashes), np.uint8)
    return np.unpackbits(each).reshape(-1, 64).astype(np.float32) * 2 - 1


def _groups(
    these: NDArray[np.float32], those: NDArray[np.float32], apart: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """The group of each place (its first place), where places a < b that differ in few bits are of one group.

    apart: groups within which pairs do not count. Thousands of places may be all alike: pairs are not listed.
    """
    group = np.arange(len(these))
    for a in range(len(these)):
        close = these[a] @ those[a + 1 :].T >= 64 - 2 * ALIKE
        if apart is not None:
            close &= apart[a + 1 :] != apart[a]
        if (others := group[a + 1 :][close])[others != group[a]].size:
            joined = np.unique(np.append(others, group[a]))
            group[np.isin(group, joined)] = joined[0]
    return group


def _sorted(group: NDArray[np.int64], names: Sequence[int]) -> list[list[int]]:
    """The names of each group of two or more."""
    members: dict[int, list[int]] = defaultdict(list)
    for name, which in zip(names, group.tolist(), strict=True):
        members[which].append(name)
    return [some for some in members.values() if len(some) > 1]


def _size(examples: Sequence[Example], resolution: int) -> Iterator[Finding]:
    small = {e: factor for e in examples if (factor := resolution / math.sqrt(e.width * e.height)) > 1}
    if small:
        worst = max(small, key=lambda e: small[e])
        side = int(resolution / small[worst])
        yield Finding(
            "warning" if small[worst] > BLURRED else "note",
            f"{len(small)} pictures are below {resolution}x{resolution} and would be enlarged, {worst.path.name} "
            f"({worst.width}x{worst.height}) {small[worst]:.2f} times; use larger ones, or a resolution of {side}",
            _paths(small),
        )
    long = {e: sides for e in examples if (sides := max(e.width, e.height) / min(e.width, e.height)) > SHAPE}
    if long:
        worst = max(long, key=lambda e: long[e])
        yield Finding(
            "warning",
            f"{len(long)} pictures are longer than {SHAPE:g}:1; of {worst.path.name} ({worst.width}x{worst.height}) "
            f"{1 - SHAPE / long[worst]:.0%} would be cut away; crop them yourself",
            _paths(long),
        )


def _kind(examples: Sequence[Example], looks: Sequence[Looks], *, alpha_counts: bool) -> Iterator[Finding]:
    odd: tuple[tuple[Level, str, Callable[[Example, Looks], bool]], ...] = (
        (
            "warning",
            "are animated; only the first frame is trained: save the frames you want",
            lambda _, x: x.moves,
        ),
        ("warning", "are CMYK; their colours are guessed: save them as RGB", lambda _, x: x.mode == "CMYK"),
        ("note", "have 16 bits a channel; the 8 upper ones are used", lambda _, x: x.deep),
        (
            "note",
            "are turned as their EXIF says; see that they are upright on the contact sheet",
            lambda _, x: x.turned,
        ),
        ("note", "are of another kind than their names say; they are read as what they are", _misnamed),
        (
            "note",
            "have transparent pixels, which are laid over white; let transparency be the mask if they should not count",
            lambda e, _: e.alpha and not alpha_counts,
        ),
    )
    for level, text, is_so in odd:
        if some := [e for e, x in zip(examples, looks, strict=True) if is_so(e, x)]:
            yield Finding(level, f"{_count(some)} {text}", _paths(some))
    if (bare := [e for e in examples if not e.mask]) and len(bare) < len(examples):
        yield Finding("note", f"{_count(bare)} have no mask, unlike the others; all of them counts", _paths(bare))


def _misnamed(example: Example, looks: Looks) -> bool:
    return example.path.suffix.lower() not in _KINDS.get(looks.kind, (f".{looks.kind.lower()}",))


# --- folders


def _balance(examples: Sequence[Example]) -> Iterator[Finding]:
    pictures = Counter(e.path.parent.name for e in examples if e.concept)
    seen = Counter(e.path.parent.name for e in examples if e.concept for _ in range(e.repeats))
    if len(seen) > 1:
        (most, many), (least, few) = seen.most_common()[0], seen.most_common()[-1]
        if many > UNEVEN * few:
            better = max(1, round(many / pictures[least]))
            yield Finding(
                "warning",
                f"an epoch has {many} pictures of {most} and {few} of {least} (repeats included); to balance them, "
                f"begin the name of {least} with {better}_",
            )


def _unused(examples: Sequence[Example], folder: Path, elsewhere: Sequence[Path]) -> Iterator[Finding]:
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for example in examples:
        by_folder[example.path.parent].append(example.path)
    used = {e.path for e in examples} | {e.mask for e in examples if e.mask}
    left: dict[str, list[Path]] = defaultdict(list)
    skipped = {None, *map(_identity, elsewhere)}
    for listing in _walk(folder, skipped, by_folder):
        here = by_folder[listing.folder]
        known = used | {file for path in here for file in listing.captions(path)}
        if here or listing.folder == folder:
            known |= {file for name in METADATA if (file := listing.find(name))}
        for path in listing.files:
            if path not in known and path.name.lower() not in _SYSTEM:
                left[path.suffix.lower()].append(path)
        for stem, count in Counter(key(path.stem) for path in here).items():
            if count > 1 and (files := listing.captions(next(p for p in here if key(p.stem) == stem))):
                yield Finding(
                    "warning", f"{count} pictures share {files[0].name}; give each a name of its own", (*files,)
                )
    leavings: tuple[tuple[Level, Collection[str], str], ...] = (
        ("warning", SUFFIXES | UNREAD, "pictures are not part of it; move those to train beside the others"),
        (
            "warning",
            set(CAPTIONS),
            "caption files belong to no picture; a caption is called as its picture, fox.txt of fox.png",
        ),
        ("note", set(left) - SUFFIXES - UNREAD - set(CAPTIONS), "files are not used"),
    )
    for level, suffixes, text in leavings:
        if paths := sorted(path for suffix in suffixes for path in left.get(suffix, [])):
            names = [path.relative_to(folder).as_posix() for path in paths]
            yield Finding(level, f"{len(paths)} {text}: {first_few(names)}", tuple(paths))


def _walk(folder: Path, seen: set[tuple[int, int] | None], used: Collection[Path]) -> Iterator[Listing]:
    """A folder and those below, links too where they stay in it or lead to what is `used`; none that was seen.

    Raises:
        DataError: there is more than anyone would look through.
    """
    whole, waiting, count = folder.resolve(), [folder], 0
    while waiting:
        place = waiting.pop()
        if place.is_symlink() and place not in used and not place.resolve().is_relative_to(whole):
            continue
        if (identity := _identity(place)) in seen:
            continue
        seen.add(identity)
        listing = Listing(place)
        count += len(listing.files) + len(listing.folders)
        if count > MOST_FILES:
            raise DataError(f"{folder}: more than {MOST_FILES:,} files and folders in it; give one with pictures only")
        yield listing
        waiting += reversed(listing.folders)


def _identity(folder: Path) -> tuple[int, int] | None:
    """What a folder is, whatever the way to it; None: there is none that one can get to."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _paths(examples: Iterable[Example]) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(example.path for example in examples))


def _count(examples: Sequence[Example]) -> str:
    return f"{len(examples)} pictures ({first_few([e.path.name for e in examples])})"
