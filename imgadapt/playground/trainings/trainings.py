"""Trainings: what is kept of one besides what it writes itself, its process, and how it stands."""

import json
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from imgadapt import locking
from imgadapt.atomic import write_bytes
from imgadapt.errors import OutputError
from imgadapt.playground.desk import public
from imgadapt.playground.trainings import launching
from imgadapt.playground.trainings.watching import Watch

RECORD = "run.json"
_STOPPED = (129, 130, 143, -1, -2, -15)  # exit statuses after a signal that asked it to end


@dataclass(frozen=True)
class Record:
    """request: with its base. ended: the exit status of its last process; None: it runs, or nobody saw its end.
    stopping: it was asked to end.
    """

    id: str
    name: str
    owner: str
    began: float
    request: Mapping[str, Any]
    steps: int
    pid: int | None = None
    ended: int | None = None
    stopping: bool = False

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """None where it is another program's, or of another version."""
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes(), strict=True)
        except (OSError, ValidationError):
            return None


class Training:
    """A run with its folder, and its process where this playground started it. ended: told of the process's end, in a
    thread of its own.
    """

    def __init__(self, record: Record, watch: Watch, ended: "Callable[[Training], None]") -> None:
        self.record, self.watch, self.seen = record, watch, list[tuple[str, float]]()
        self._ended, self._lock = ended, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: threading.Thread | None = None

    @property
    def folder(self) -> Path:
        return self.watch.folder

    @property
    def alive(self) -> bool:
        if self._process is not None:
            return self._process.poll() is None
        return self.record.ended is None and launching.running(self.record.pid, self.folder)

    @property
    def status(self) -> int | None:
        """The exit status of its last process, where it is known."""
        return self.record.ended if self._process is None else self._process.poll()

    def keep(self, **changes: Any) -> None:
        """Change its record.

        Raises:
            OutputError: the disk is full.
        """
        with self._lock:
            self.record = replace(self.record, **changes)
            write_bytes(self.folder / RECORD, json.dumps(asdict(self.record), indent=1).encode())

    def launch(self, arguments: Sequence[str], device: str) -> None:
        """Start its process, for the first time or again.

        Raises:
            OutputError: see `launching.start`; or another process trains into its folder: nothing is touched then.
        """
        if self._waiting is not None:
            self._waiting.join()
        if (who := locking.holder(self.folder)) is not None:
            raise OutputError(f"{self.record.name} is being trained by {who}, which this playground did not start")
        try:
            (self.folder / "status.json").unlink(missing_ok=True)  # of the process before
        except OSError as error:
            raise OutputError(f"cannot remove {error.filename}: {error.strerror}") from error
        self.keep(pid=None, ended=None, stopping=False)
        process = launching.start(arguments, self.folder, device)
        self._process = process
        self._waiting = threading.Thread(target=self._wait, args=(process,), name="training", daemon=True)
        self._waiting.start()
        try:
            self.keep(pid=process.pid)
        except BaseException:  # a full disk: nobody would find it again
            process.kill()
            self._waiting.join()
            raise

    def _wait(self, process: "subprocess.Popen[bytes]") -> None:
        process.wait()
        self._ended(self)

    def stop(self) -> None:
        """Ask it to save and end; asked again, nothing happens."""
        if self.alive and not self.record.stopping and self.record.pid is not None:
            self.keep(stopping=True)
            launching.interrupt(self.record.pid)

    def end(self, patience: float) -> None:
        """Wait for its end; after so many seconds it is killed."""
        if self.record.pid is not None:
            launching.end(self.record.pid, patience)
        if self._waiting is not None:
            self._waiting.join()

    def state(self, status: Mapping[str, Any]) -> str:
        """See `Run`. status: what it says itself."""
        said, ended = status.get("state"), self.status
        if self.alive:
            return {None: "starting", "done": "finishing"}.get(said, "training")
        if ended == 0 or (ended is None and said == "done" and self._finished()):
            return "done"
        asked = self.record.stopping and said != "failed" and ended in (None, *_STOPPED)
        return "stopped" if said == "stopped" or asked else "failed"

    def _finished(self) -> bool:
        """Whether a process whose end nobody saw wrote its files, after its last step."""
        adapter, status = self.folder / "adapter.safetensors", self.folder / "status.json"
        return adapter.is_file() and adapter.stat().st_mtime >= status.stat().st_mtime

    def message(self, state: str, status: Mapping[str, Any]) -> str:
        """See `Run`."""
        if state == "failed":
            told = self.watch.fault() or str(status.get("reason", ""))
            return public(told) or "its process ended without a word: it was killed, perhaps for want of memory"
        if state == "stopped":
            return "stopped; it can be resumed"
        if self.record.stopping and state != "done":
            return "stopping: the step, or the evaluation, in progress is finished and saved first"
        return public(self.watch.said())
