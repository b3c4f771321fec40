"""What lies in a folder: pictures, with their captions and masks, by name."""

import os
import unicodedata
from collections.abc import Collection
from pathlib import Path

from imgadapt.errors import DataError, first_few

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
UNREAD = frozenset({".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw"})
CAPTIONS = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv")  # of Hugging Face's imagefolder
MASKS = ("-mask", "-masklabel")  # ends of names; the second is OneTrainer's


class Listing:
    """The files of one folder, by name, found whatever their case and unicode form (macOS takes names apart).

    Raises:
        DataError: the folder cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        try:
            with os.scandir(folder) as entries:
                rows = sorted((e.name, is_folder(e)) for e in entries if not e.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{folder}: no such folder") from error
        except (OSError, ValueError) as error:  # the latter of NUL in a name
            raise DataError(f"{folder}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
        self.folder = folder
        self.folders = [folder / name for name, inner in rows if inner]
        self.files = [folder / name for name, inner in rows if not inner]
        self.pictures = [p for p in self.files if p.suffix.lower() in SUFFIXES]
        self._named: dict[str, list[Path]] = {}
        for path in self.files:
            self._named.setdefault(key(path.name), []).append(path)

    def find(self, name: str) -> Path | None:
        """The file of a name; that of the same spelling first."""
        found = self._named.get(key(name), [])
        return next((p for p in found if p.name == name), found[0] if found else None)

    def captions(self, picture: Path) -> list[Path]:
        """The caption files of a picture."""
        return [file for suffix in CAPTIONS if (file := self.find(picture.stem + suffix))]

    def paired(self, known: Collection[Path] = ()) -> list[tuple[Path, Path | None]]:
        """The pictures to train, with their masks: `fox-mask.png`, `fox-masklabel.png` or `masks/fox.png`.

        known: pictures for certain, whatever they are called.

        Raises:
            DataError: a picture has two masks, or a mask no picture.
        """
        stems = {key(p.stem) for p in self.pictures}
        inner = next((d for d in self.folders if key(d.name) == "masks"), None)
        masks: dict[str, list[Path]] = {}
        for path in Listing(inner).pictures if inner else []:
            masks.setdefault(key(path.stem), []).append(path)
        plain: list[Path] = []
        lost: list[str] = []
        for path in self.pictures:
            stem = key(path.stem)
            of = next((stem.removesuffix(end) for end in MASKS if stem.endswith(end)), None)
            if of is None or path in known:
                plain.append(path)
            elif of in stems:
                masks.setdefault(of, []).append(path)
            elif self.captions(path):
                plain.append(path)
            else:
                lost.append(path.name)
        if lost:
            raise DataError(
                f"{self.folder}: {len(lost)} masks have no picture ({first_few(lost)}); name them as their pictures, "
                "or write captions beside them if they are pictures to train"
            )
        for path in plain:
            if len(two := masks.get(key(path.stem), [])) > 1:
                raise DataError(f"{two[0]} and {two[1]} are both masks of {path.name}; remove one of them")
        return [(path, next(iter(masks.get(key(path.stem), [])), None)) for path in plain]


def is_folder(entry: os.DirEntry[str] | Path) -> bool:
    """Whether it is a folder, or leads to one."""
    try:
        return entry.is_dir()
    except OSError:  # links in a circle, a disk at its end, a name of thousands of letters: reading it will tell
        return False


def key(name: str) -> str:
    """A name as it is compared."""
    return unicodedata.normalize("NFC", name).casefold()
