"""Whole files and folders or none: a temporary name beside them, fsync, rename. What a killed process left half written
goes when the same file or folder is written again.
"""

import errno
import os
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from imgadapt.errors import OutputError
from imgadapt.temporary import claimed

_NO_SYNC = {
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR
}  # fmt: skip
"""How file systems say that folders cannot be synced, or modes be set; Windows cannot open a folder."""
_LINKS = 40  # that lead to one another; as many as Linux follows


@contextmanager
def atomically(path: Path, *, mode: int | None = None) -> Generator[BinaryIO]:
    """A binary file to write, which becomes `path` when the block ends well and vanishes when it does not. Where `path`
    is a link, what it leads to is replaced, and the link stays. mode: permissions; None: those of the file that is
    replaced, or the user's usual ones.

    Raises:
        OutputError: it cannot be written (disk full, read-only, no permission, a folder or a device is there); what was
            at `path` is untouched, unless it says so.
    """
    replaced, names = False, {os.fspath(path)}
    try:
        target, usual = _end_of(path)
        if target == path:
            _make(target.parent)
        mode = usual if mode is None else mode
        with claimed(target, partial(_create, mode=mode)) as temporary:
            names |= {os.fspath(temporary), os.fspath(target)}
            with temporary.open("wb") as file:
                yield file
                file.flush()
                if mode is not None:
                    _set_mode(file, mode)
                os.fsync(file.fileno())
            os.replace(temporary, target)
            replaced = True
        sync(target.parent)
    except OSError as error:
        raise _cannot(path, error, names, replaced=replaced) from error


@contextmanager
def folder_atomically(path: Path) -> Generator[Path]:
    """An empty folder to write into, which becomes `path` when the block ends well and vanishes when it does not. Files
    in it are to be written by `atomically`.

    Raises:
        OutputError: it cannot be written, or there is something at `path` already.
    """
    replaced, names = False, {os.fspath(path)}
    try:
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise OutputError(f"{path} is there already; name a folder that is not, or remove it")
        _make(path.parent)
        with claimed(path, os.mkdir) as temporary:
            names.add(os.fspath(temporary))
            with told_of(path, temporary):
                yield temporary
            sync_tree(temporary)
            os.replace(temporary, path)
            replaced = True
        sync(path.parent)
    except OSError as error:
        raise _cannot(path, error, names, replaced=replaced) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file `path` by `data`, whole.

    Raises:
        OutputError: see `atomically`.
    """
    with atomically(path) as file:
        file.write(data)


def make_folder(path: Path) -> None:
    """A folder, and those that it lies in, where they are not there yet.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        _make(path)
    except OSError as error:
        at = f"{error.filename}: " if error.filename not in (None, os.fspath(path)) else ""
        raise OutputError(f"cannot make the folder {path}: {at}{error.strerror or error}") from error


@contextmanager
def told_of(path: Path, temporary: Path) -> Generator[None]:
    """Errors of what is written into a temporary folder name the one that it becomes."""
    try:
        yield
    except OutputError as error:
        raise OutputError(str(error).replace(os.fspath(temporary), os.fspath(path))) from error


def sync_tree(folder: Path) -> None:
    """Sync a folder and those in it. Raises OSError: the disk has failed."""
    for one in (*(inner for inner in folder.rglob("*") if inner.is_dir()), folder):
        sync(one)


def _end_of(path: Path) -> tuple[Path, int | None]:
    """The plain file that is to be replaced, with its permissions; or where there is none yet. Raises OSError."""
    target = path
    for _ in range(_LINKS):
        try:
            kind = os.lstat(target).st_mode
        except FileNotFoundError:
            if target != path and not target.parent.is_dir():
                raise OSError(errno.ENOENT, f"it is a link to {target}, whose folder is not there") from None
            return target, None
        if stat.S_ISREG(kind):
            return target, kind & 0o777
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, "it is a folder; name a file")
        if not stat.S_ISLNK(kind):
            raise OSError(errno.EINVAL, "it is no plain file, but a pipe or a device; name a file")
        target = target.parent / os.readlink(target)
    raise OSError(errno.ELOOP, "it is a link that leads to itself")


def _create(path: str, mode: int | None) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    descriptor = os.open(path, flags, 0o666 if mode is None else mode | 0o600)
    try:
        os.close(descriptor)
    except OSError:
        os.unlink(path)
        raise


def _set_mode(file: BinaryIO, mode: int) -> None:
    if os.chmod not in os.supports_fd:  # Windows
        return
    try:
        os.chmod(file.fileno(), mode)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _make(folder: Path) -> None:
    """See `make_folder`. Raises OSError."""
    if folder.is_dir():
        return
    missing = [one for one in (folder, *folder.parents) if not os.path.lexists(one)]
    for one in reversed(missing):
        with suppress(FileExistsError):  # another process was first
            os.mkdir(one)
        sync(one.parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", os.fspath(folder))


def sync(folder: Path) -> None:
    """Sync the names in a folder. Raises OSError: the disk has failed; not where folders cannot be synced."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _cannot(path: Path, error: OSError, names: set[str], *, replaced: bool) -> OutputError:
    """names: of which the error's own says nothing more."""
    of, why = error.filename, error.strerror or str(error)
    if isinstance(of, str | bytes) and os.fsdecode(of) not in names:
        why = f"{os.fsdecode(of)}: {why}"
    if replaced:
        return OutputError(
            f"{path} is written, but may be gone after a power cut, as its folder cannot be synced: {why}"
        )
    return OutputError(f"cannot write {path}: {why}; what was there is untouched")
