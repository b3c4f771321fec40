"""Shards: which files a folder's weights are in, and where in them each tensor is."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from imgadapt import reading
from imgadapt.errors import FormatError, StateError
from imgadapt.stored import Stored, stored

_LONGEST_INDEX = 16 * 2**20  # bytes
_MOST_SHARDS = 1000


def weight_files(folder: Path, variant: str = "") -> list[Path]:
    """The safetensors files that one set of a component's weights is in. variant: which one, of several ("fp16"); where
    it is not there, as for "", the plain one.

    Raises:
        FormatError: an index names a file that is not there, or that is elsewhere; or it cannot be read.
    """
    index = index_in(folder, variant)
    whole = min((_rank(one, variant) for one in folder.glob("*.safetensors")), default=None)
    if index is not None and (whole is None or not _rank(index, variant)[0] or whole[0]):
        names = shards(index)
        if lost := [name for name in names if not (folder / name).is_file()]:
            raise FormatError(f"{folder / lost[0]}: {index.name} names it, and it is not there; copy it there")
        return [folder / name for name in names]
    return [whole[-1]] if whole is not None else []


def _rank(file: Path, variant: str) -> tuple[bool, int, str, Path]:
    """What is less is meant, rather than what is more."""
    return f".{variant}" not in file.name, file.name.count("."), file.name, file


def shards(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        FormatError: one is elsewhere; or it cannot be read.
    """
    try:
        names = sorted({*json.loads(reading.read(index, _LONGEST_INDEX))["weight_map"].values()})
    except OSError as error:
        raise FormatError(f"{index}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{index}: not an index of shards ({error})") from error
    if wrong := [n for n in names if not isinstance(n, str) or not re.fullmatch(r"[^/\\\x00]+\.safetensors", n)]:
        raise FormatError(f"{index}: it names {wrong[0]!r}; wanted safetensors files beside it")
    if len(names) > _MOST_SHARDS:
        raise FormatError(f"{index}: it names {len(names):,} files; no model has more than {_MOST_SHARDS:,}")
    return names


def index_in(folder: Path, variant: str = "") -> Path | None:
    """The list of a folder's shards; of several variants, see `weight_files`."""
    found = [_rank(one, variant) for one in folder.glob("*.safetensors.index*.json")]
    return min(found)[-1] if found else None


def all_stored(files: Sequence[Path]) -> dict[str, Stored]:
    """Raises FormatError: a tensor is in two of the files, and which is meant nobody knows; see `_stored`."""
    found: dict[str, Stored] = {}
    for file in files:
        own = _stored(file)
        if twice := found.keys() & own.keys():
            one = min(twice)
            raise FormatError(f"{one} is in {found[one].file} and in {file}; wanted each tensor in one of them")
        found |= own
    return found


def _stored(path: Path) -> dict[str, Stored]:
    if not path.is_file():
        raise FormatError(f"{path}: no such file or folder")
    try:
        return stored(path)
    except StateError as error:
        raise FormatError(f"{path} is no file of weights: {error.__cause__ or error}") from error
