"""What of a folder is not trained, and why that may be a mistake."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from imgadapt.errors import DataError, first_few
from imgadapt.training.data import Example
from imgadapt.training.finding import Finding, Level
from imgadapt.training.listing import CAPTIONS, METADATA, SUFFIXES, UNREAD, Listing, key

MOST_FILES = 200_000  # that are looked through
_SYSTEM = frozenset({"thumbs.db", "desktop.ini"})


def unused(examples: Sequence[Example], folder: Path, elsewhere: Sequence[Path]) -> Iterator[Finding]:
    """Files, and folders, of a folder that are no part of these examples. elsewhere: folders that serve another end."""
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for example in examples:
        by_folder[example.path.parent].append(example.path)
    used = {e.path for e in examples} | {e.mask for e in examples if e.mask}
    left: dict[str, list[Path]] = defaultdict(list)
    skipped = set(map(_identity, elsewhere))
    closed: list[Path] = []
    for listing in _walk(folder, skipped, by_folder, closed):
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
    if closed:
        said = first_few([path.relative_to(folder).as_posix() for path in closed])
        yield Finding("note", f"{len(closed)} folders cannot be looked into: {said}", tuple(closed))
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


def _walk(
    folder: Path, seen: set[tuple[int, int] | None], used: Collection[Path], closed: list[Path]
) -> Iterator[Listing]:
    """A folder and those below, links too where they stay in it or lead to what is `used`; none that was seen.

    closed: gets those that cannot be read, such as a disk's lost+found.

    Raises:
        DataError: there is more than anyone would look through.
    """
    whole, waiting, count = folder.resolve(), [folder], 0
    while waiting:
        place = waiting.pop()
        if place.is_symlink() and place not in used and not place.resolve().is_relative_to(whole):
            continue
        if (identity := _identity(place)) is not None and identity in seen:
            continue
        seen.add(identity)
        try:
            listing = Listing(place)
        except DataError:
            closed.append(place)
            continue
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
