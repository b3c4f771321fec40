"""Scanning: what lies in a folder that anyone may have filled: plain files, in order, within bounds."""

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

DEPTH = 8
MOST = 20_000


@dataclass(frozen=True)
class Found:
    """A file, or a folder that is one thing (peft's, diffusers'). beside: lower-case name -> name of what lies around
    it. fault: why it is not to be opened; "" for most.
    """

    path: Path
    relative: str
    size: int
    modified: int  # ns
    beside: dict[str, str] = field(repr=False, default_factory=dict[str, str])
    fault: str = ""
    is_folder: bool = False


@dataclass
class Scan:
    """All files under `root` that end as `endings` do (lower case), and folders that have a file called `marker`. The
    root may be such a file or folder itself.

    within: roots that a link may lead to. Links to folders are not followed, hidden names are passed by. left_out: what
    there was too much of, in words.
    """

    root: Path
    endings: tuple[str, ...]
    marker: str
    within: tuple[Path, ...]
    depth: int = DEPTH
    most: int = MOST
    passed: Callable[[str], bool] = lambda _: False
    left_out: list[str] = field(default_factory=list[str])

    def __iter__(self) -> Iterator[Found]:
        left = self.most
        for found in self._single() or self._walk(self.root, 0):
            if not left:
                self.left_out.append(f"{self.root.name}: more than {self.most:,} files; the rest is left out")
                return
            left -= 1
            yield found

    def _single(self) -> list[Found]:
        """The root itself, where it is a file, or one thing."""
        file = self.root if self.root.is_file() else self.root / self.marker
        if not file.is_file():
            return []
        status = file.stat()
        return [Found(self.root, self.root.name, status.st_size, status.st_mtime_ns, is_folder=file != self.root)]

    def _walk(self, folder: Path, depth: int) -> Iterator[Found]:
        try:
            with os.scandir(folder) as rows:
                entries = sorted(rows, key=lambda row: row.name)
        except OSError as error:
            if depth or not isinstance(error, FileNotFoundError):
                self.left_out.append(f"{folder.name}: {error.strerror or 'cannot be read'}")
            return
        names = {entry.name.lower(): entry.name for entry in entries}
        if depth and self.marker in names:
            marked = next(entry for entry in entries if entry.name.lower() == self.marker)
            found = self._found(marked, {})
            beside = self._beside(folder)
            yield Found(folder, self._relative(folder), found.size, found.modified, beside, found.fault, True)
            return
        deeper: list[Path] = []
        for entry in entries:
            if entry.name.startswith(".") or self.passed(entry.name):
                continue
            try:
                is_folder = entry.is_dir(follow_symlinks=False)
            except OSError:
                continue
            if is_folder:
                deeper.append(Path(entry.path))
            elif entry.name.lower().endswith(self.endings):
                yield self._found(entry, names)
        if deeper and depth >= self.depth:
            self.left_out.append(f"{folder.name}: folders more than {self.depth} deep are left out")
            return
        for path in deeper:
            yield from self._walk(path, depth + 1)

    def _found(self, entry: os.DirEntry[str], names: dict[str, str]) -> Found:
        path = Path(entry.path)
        try:
            fault = self._outside(path) if entry.is_symlink() else ""
            status = entry.stat(follow_symlinks=not fault)
        except OSError as error:
            return Found(path, self._relative(path), 0, 0, names, f"cannot be read ({error.strerror})")
        if not fault and not stat.S_ISREG(status.st_mode):
            fault = "not a plain file"
        return Found(path, self._relative(path), status.st_size, status.st_mtime_ns, names, fault)

    def _outside(self, path: Path) -> str:
        return "" if is_inside(path, self.within) else "a link that leads out of the library; name its folder instead"

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    @staticmethod
    def _beside(folder: Path) -> dict[str, str]:
        """What lies around a folder."""
        try:
            return {name.lower(): name for name in os.listdir(folder.parent)}
        except OSError:
            return {}


def is_inside(path: Path, roots: tuple[Path, ...]) -> bool:
    """Whether a path is in one of these folders (whose own links are resolved), its links followed."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # a loop
        return False
    return any(real.is_relative_to(root) for root in roots)
