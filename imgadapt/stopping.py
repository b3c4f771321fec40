"""Stopping: what a signal that asks a program to end does: the first one unwinds it, the second ends it at once, and
what is half written goes in both cases.
"""

import _thread
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from imgadapt.errors import OutputError

SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__)
"""Those that ask a program to end."""
_PASSING = ("__enter__", "__exit__", "_acquire_restore", "_release_save", "_is_owned", "notify", "notify_all")
_going: dict[Path, os.stat_result | None] = {}  # of the process, as its signals are
_unbroken: list[int | None] = []  # None: a block is at work; numbers: what came meanwhile
_again: list[int] = []  # signals that are sent again in a moment


class Stopped(KeyboardInterrupt):
    """A signal came; raised wherever the program is, and passed on like Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def goes(path: Path, about: os.stat_result | None = None) -> None:
    """A file or a folder that is removed when the program ends, in whatever way but by a kill; until `stays`. about: of
    it, where the name may be another's by then.
    """
    _going[path] = about


def stays(path: Path) -> None:
    """It is whole, or gone already."""
    _going.pop(path, None)


@contextmanager
def unbroken() -> Generator[None]:
    """What signals do, they do after the block; for a few lines that must not be cut in two."""
    if threading.current_thread() is not threading.main_thread():  # to which signals do not come
        yield
        return
    _unbroken.append(None)
    try:
        yield
    finally:
        late = [number for number in _unbroken if number is not None]
        _unbroken.clear()
        if late:
            signal.raise_signal(late[0])


@contextmanager
def scratch() -> Generator[Path]:
    """A folder for what is gone after the block.

    Raises:
        OutputError: there is no place for it.
    """
    try:
        path = Path(tempfile.gettempdir()) / f"imgadapt-{secrets.token_hex(8)}"
        goes(path)  # before it is there: no other has its name
        path.mkdir(mode=0o700)
    except OSError as error:
        raise OutputError(f"no folder for temporary files can be made: {error.strerror}; set TMPDIR to one") from error
    try:
        yield path
    finally:
        _remove(path)
        stays(path)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # a folder
        shutil.rmtree(path, ignore_errors=True)


def clear() -> None:
    """Remove what `goes`, of the whole process: it ends."""
    for path, about in tuple(_going.items()):
        with suppress(OSError):
            if about is None or os.path.samestat(os.lstat(path), about):
                _remove(path)


def at_once() -> None:
    """From now on signals end this process at once, with a line: before a program begins, and after it is over."""
    for number in listened():
        signal.signal(number, _end)


def listened() -> list[signal.Signals]:
    """The signals that this process was not told to leave alone, as `nohup` and shells do, and that this thread may
    listen to.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def _end(number: int, frame: FrameType | None) -> None:
    if _unbroken:
        _unbroken.append(number)
        return
    clear()
    say(f"imgadapt: stopped by {signal.Signals(number).name}")
    os._exit(128 + number)


def say(text: str) -> None:
    """On stderr, from within a signal's handler: what it came into may be writing there itself."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


class Stopping:
    """A context in which the first signal raises Stopped; `number` is the signal, once it came."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._over = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        for number in listened():
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        late = time.monotonic() + 1  # a fork has the list, and not the thread
        while _again and time.monotonic() < late:  # what came before the end
            time.sleep(0.001)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._hook

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            _end(number, frame)
            return
        if put_off(number, frame):
            return
        self.number = number
        if not self._over:
            raise Stopped(number)

    def _unraisable(self, found: Any) -> None:
        """A signal that came while a destructor ran, which Python ends the destructor with, and goes on: it is sent
        again.
        """
        if not isinstance(found.exc_value, Stopped):
            self._hook(found)
            return
        self.number = None
        _send_again(found.exc_value.number)


def put_off(number: int, frame: FrameType | None) -> bool:
    """Whether a signal came into the middle of what must not be cut in two; it comes again in a moment."""
    if _unbroken:
        _unbroken.append(number)
        return True
    if _passing(frame):
        _send_again(number)
        return True
    return False


def _passing(frame: FrameType | None) -> bool:
    """Whether a lock is changing hands: cut in two there, it stays taken, and its next user waits for ever."""
    for _ in range(4):  # a lock's own functions call few others
        if frame is None:
            return False
        if frame.f_code.co_filename == threading.__file__ and frame.f_code.co_name in _PASSING:
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    """In a moment; without what the signal may have come into the middle of."""

    def send() -> None:
        time.sleep(0.01)
        try:
            if os.name == "posix":
                os.kill(os.getpid(), number)
            else:
                signal.raise_signal(number)
        finally:
            _again.remove(number)

    _again.append(number)
    try:
        _thread.start_new_thread(send, ())
    except RuntimeError:  # no more threads: there is nothing left to wait for
        _again.remove(number)
        raise
