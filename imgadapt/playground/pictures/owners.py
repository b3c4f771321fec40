"""Owners: whose pictures are, in a file of lines `id owner` beside them; a picture itself does not say it, as pictures
are passed on.
"""

import errno
import os
from collections.abc import Collection
from pathlib import Path

from imgadapt import locking
from imgadapt.atomic import atomically, make_folder
from imgadapt.errors import OutputError

_PRIVATE = 0o600
_RECENT = 1000
_LOCK = ".owners.lock"


def read(file: Path, known: Collection[str]) -> dict[str, str]:
    """Owners by ids, of those that are in `known`; the file is written anew when most of its lines are of others.

    Raises:
        OutputError: it cannot be read, or written.
    """
    try:
        lines = file.read_text("utf-8", "replace").splitlines()
    except FileNotFoundError:  # none yet
        return {}
    except OSError as error:
        raise OutputError(f"cannot read {file}, which says whose the pictures are: {error.strerror}") from error
    rows = [row for line in lines if len(row := line.split(" ", 1)) == 2]
    owners = {id: owner for id, owner in rows if id in known}
    if len(rows) > 2 * len(owners) + _RECENT:
        _shorten(file, known)
    return owners


def _shorten(file: Path, known: Collection[str]) -> None:
    """Leave out lines of pictures that are gone; not the last ones, whose pictures others may be about to write."""
    with locking.alone(file.with_name(_LOCK)):
        lines = [line for line in file.read_text("utf-8", "replace").splitlines() if line]
        kept = [line for line in lines[:-_RECENT] if line.partition(" ")[0] in known]
        with atomically(file, mode=_PRIVATE) as out:
            out.write("".join(f"{line}\n" for line in (*kept, *lines[-_RECENT:])).encode())


def add(file: Path, id: str, owner: str) -> None:
    """Write down whose a picture is, before it is there.

    Raises:
        OutputError: the disk is full, ...
    """
    line = f"\n{id} {owner.splitlines()[0]}\n".encode()  # on its own, whatever was torn before it
    try:
        make_folder(file.parent)
        with locking.alone(file.with_name(_LOCK)):
            descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, _PRIVATE)
            try:
                if os.write(descriptor, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror or error}") from error
