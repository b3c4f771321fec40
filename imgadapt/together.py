"""Several files that mean something together only, put into a folder at one moment."""

import ctypes
import errno
import os
import shutil
import stat
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from imgadapt.atomic import folder_atomically, make_folder, sync, sync_tree, told_of
from imgadapt.errors import OutputError
from imgadapt.temporary import claimed

_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE, AT_FDCWD
_UNABLE = {errno.ENOSYS, errno.EINVAL, errno.EBUSY, errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


@contextmanager
def together(folder: Path, last: str) -> Generator[Path]:
    """A folder to write files into by `atomically`, which are all in `folder` when the block has ended well; whatever
    ends the process, either none of them or all are. Other files of `folder` stay.

    last: a file without which the others say nothing. Where two folders cannot be exchanged (outside Linux, on some
        file systems, where `folder` holds more than plain files), it goes first and comes last: a crash in between
        leaves a folder without it, but never new files with the old one.

    Raises:
        OutputError: it cannot be written; what was there is untouched, unless it says so.
    """
    if not os.path.lexists(folder):
        with folder_atomically(folder) as inside:
            yield inside
        return
    make_folder(folder)  # or say that it is a file
    place = Path(os.path.realpath(folder))
    try:
        beside = _exchangeable(place)
        with claimed(place if beside else place / place.name, os.mkdir) as inside:
            with told_of(folder, inside):
                yield inside
            new = sorted(path.name for path in inside.iterdir())
            if not (beside and _exchanged(place, inside)):
                _one_by_one(place, inside, sorted(new, key=lambda name: name == last))
        sync_tree(place)
        if beside:
            sync(place.parent)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}; look at what is there") from error


def _exchangeable(folder: Path) -> bool:
    """Whether another folder may take its place: it is like one that `together` has made."""
    parent, about = folder.parent, folder.stat()
    if sys.platform != "linux" or os.path.samefile(folder, os.curdir) or not os.access(parent, os.W_OK | os.X_OK):
        return False
    plain = all(stat.S_ISREG(path.lstat().st_mode) for path in folder.iterdir())
    return plain and about.st_dev == parent.stat().st_dev and about.st_uid == os.geteuid()


def _exchanged(folder: Path, inside: Path) -> bool:
    """Put one folder into the other's place, with the files that it lacks; False: these cannot be exchanged."""
    for path in folder.iterdir():
        if not (inside / path.name).exists():
            try:
                os.link(path, inside / path.name)
            except OSError as error:
                if error.errno not in _UNABLE:
                    raise
                return False
    shutil.copymode(folder, inside)
    sync_tree(inside)
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(inside), _HERE, os.fsencode(folder), ctypes.c_uint(_EXCHANGE)) == 0:
        return True
    if (code := ctypes.get_errno()) in _UNABLE:
        return False
    raise OSError(code, os.strerror(code))


def _one_by_one(folder: Path, inside: Path, names: Sequence[str]) -> None:
    """Move files out of a folder within this one; the last of them is away meanwhile, if it is another."""
    old, new, away = folder / names[-1], inside / names[-1], inside / f"{names[-1]}.old"
    if old.exists() and old.read_bytes() != new.read_bytes():
        os.replace(old, away)
    for k, name in enumerate(names):
        try:
            os.replace(inside / name, folder / name)
        except OSError:
            if k == 0 and away.exists():
                os.replace(away, old)
            raise
