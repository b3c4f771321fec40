"""Desk: one thread that does all heavy work in turn, and tickets, by which those who wait follow it."""

import re
import secrets
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from imgadapt.errors import ImgadaptError
from imgadapt.shortage import out_of_memory

T = TypeVar("T")


class Busy(ImgadaptError):
    """The queue is full."""


class Cancelled(Exception):  # no error: it was asked for
    """Raised inside work whose ticket was cancelled."""


@dataclass(frozen=True)
class Waiting:
    """place: 1 is next; of: how many wait."""

    place: int
    of: int


@dataclass(frozen=True)
class Progress:
    """done of total (steps, layers, ...); eta: seconds, None: not known yet; preview: a small WebP."""

    what: str
    done: int
    total: int
    eta: float | None = None
    preview: bytes | None = None


@dataclass(frozen=True)
class Made:
    """A part of the result that is ready: a picture, a cell."""

    item: Any


@dataclass(frozen=True)
class Done:
    """The end: the result."""

    result: Any


@dataclass(frozen=True)
class Failed:
    """The end: why, in a line that is fit for anyone. cancelled: by whoever asked."""

    message: str
    cancelled: bool = False


Event = Waiting | Progress | Made | Done | Failed


class Ticket(Generic[T]):
    """One request at the desk.

    Those who asked read `events` and may `cancel`; the work itself says where it is by `progress` and `made`, which
    raise Cancelled when it shall stop. listeners: called, by the thread that works, when there is an event other than
    Progress.
    """

    def __init__(self, work: "Callable[[Ticket[T]], T]", owner: str, desk: "Desk") -> None:
        self.id, self.owner, self.work, self._desk = secrets.token_hex(8), owner, work, desk
        self._news: deque[Event] = deque()
        self._told = threading.Condition()
        self.listeners: list[Callable[[], None]] = []
        self._end: Done | Failed | None = None
        self._stop = threading.Event()
        self._began: float | None = None
        self.ended = threading.Event()

    def cancel(self) -> None:
        """Stop it within a step, or take it out of the queue. Any number of times, at any time."""
        self._stop.set()
        self._desk.forget(self)

    @property
    def cancelled(self) -> bool:
        return self._stop.is_set()

    def check(self) -> None:
        """Raises Cancelled when the work shall stop; to be called often."""
        if self._stop.is_set():
            raise Cancelled

    def progress(self, what: str, done: int, total: int, preview: bytes | None = None) -> None:
        """Say where the work is; `done` counts from 0 over the whole of it."""
        self.check()
        now = time.monotonic()
        if self._began is None or done == 0:
            self._began = now
        eta = (now - self._began) / done * (total - done) if done else None
        self._tell(Progress(what, done, total, eta, preview))

    def made(self, item: Any) -> None:
        """Hand over a part of the result; it counts even when the rest is cancelled."""
        self._tell(Made(item))
        self.check()

    def events(self, timeout: float = 0.5) -> Iterator[Event]:
        """All that happens, up to Done or Failed; while it waits, its place, anew every `timeout` seconds. Who reads
        it again, or along with another reader, gets what is left, and the end.
        """
        while True:
            event = self.next(timeout) or self._late()
            if event is not None:
                yield event
                if isinstance(event, Done | Failed):
                    return

    def _late(self) -> Event | None:
        """What came after `next` had given up: all of it before the end."""
        with self._told:
            return self._news.popleft() if self._news else self._end

    def next(self, timeout: float = 0.0) -> Event | None:
        """The next event; while it waits in the queue and nothing is new, its place; else None."""
        with self._told:
            if timeout:
                self._told.wait_for(lambda: self._news or self._end is not None, timeout)
            if self._news:
                return self._news.popleft()
        return self._desk.place(self)

    def result(self) -> T:
        """Wait for the end: the result.

        Raises:
            ImgadaptError: it failed or was cancelled; its message is that of Failed.
        """
        for event in self.events():
            if isinstance(event, Done):
                return event.result
            if isinstance(event, Failed):
                raise ImgadaptError(event.message)
        raise AssertionError("events end with Done or Failed")

    def run(self) -> None:
        """The work, and how it ended; the desk's thread calls it."""
        end: Done | Failed = Failed("something went wrong inside")
        try:
            self.check()
            end = Done(self.work(self))
        except Cancelled:
            end = Failed("stopped", cancelled=True)
        except ImgadaptError as error:
            end = Failed(public(str(error)))
        except BaseException as error:  # the desk goes on, whatever it was
            with suppress(Exception):  # a full disk under the log, ...
                end = Failed(self._desk.unexpected(error))
        finally:
            self._tell(end)
            self.ended.set()

    def _tell(self, event: Event) -> None:
        with self._told:
            if isinstance(event, Done | Failed):
                self._end = event
            if self._news and isinstance(last := self._news[-1], Progress):
                self._news[-1] = replace(last, preview=None)  # it is old, and nobody may ever read it
            self._news.append(event)
            self._told.notify_all()
        if not isinstance(event, Progress):
            for listener in tuple(self.listeners):
                listener()


class Desk:
    """A queue and the thread that works it off; one piece of work at a time, in the order of coming.

    waiting: how many may wait; per_owner: how many of one owner, the one at work counted.
    """

    def __init__(self, waiting: int, per_owner: int, log: Callable[[str], None] = print) -> None:
        self.most, self.per_owner, self.log = waiting, per_owner, log
        self._waiting: list[Ticket[Any]] = []
        self._current: Ticket[Any] | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="desk", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[Ticket[T]], T], *, owner: str = "") -> Ticket[T]:
        """Queue work.

        Raises:
            Busy: too many wait, of all or of this owner.
        """
        ticket = Ticket(work, owner, self)
        with self._changed:
            if self._closed:
                raise Busy("the playground is closing")
            if len(self._waiting) >= self.most:
                raise Busy(f"the queue is full ({self.most} wait); try again in a while")
            own = sum(one.owner == owner for one in self._waiting) + (
                self._current is not None and self._current.owner == owner
            )
            if owner and own >= self.per_owner:
                raise Busy(f"{own} of your requests wait already; stop one, or let it end")
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def place(self, ticket: Ticket[Any]) -> Waiting | None:
        """Where a ticket is in the queue; None when it is not in it."""
        with self._changed:
            if ticket not in self._waiting:
                return None
            return Waiting(self._waiting.index(ticket) + 1, len(self._waiting))

    def forget(self, ticket: Ticket[Any]) -> None:
        """Take a ticket that waits out of the queue, which ends it."""
        with self._changed:
            waited = ticket in self._waiting
            if waited:
                self._waiting.remove(ticket)
        if waited:
            ticket.run()  # it is cancelled: says so, and ends

    @property
    def load(self) -> int:
        """How many tickets wait or are at work."""
        with self._changed:
            return len(self._waiting) + (self._current is not None)

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._changed:
            self._closed = True
            everything = [*self._waiting, *([self._current] if self._current else [])]
            self._changed.notify_all()
        for ticket in everything:
            ticket.cancel()
        self._thread.join(timeout=30)

    def unexpected(self, error: BaseException) -> str:
        """What a user is told of an error that nobody foresaw; the log has its traceback under the same number."""
        if out_of_memory(error):
            return "out of memory: ask for a smaller picture or fewer at once, or take adapters off; nothing is lost"
        number = secrets.token_hex(4)
        self.log(f"error {number}\n{''.join(traceback.format_exception(error))}")
        return f"something went wrong inside; the server's log has it as error {number}"

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                self._current = self._waiting.pop(0)
            try:
                self._current.run()
            finally:
                with self._changed:
                    self._current = None


_NAME = r"[^\s:'\"<>|,;()\[\]/\\]+"
_WORD = _NAME.replace("[^", "[^.")
_PATH = re.compile(
    rf"(?<![\w.~/\\-])(?:[A-Za-z]:)?(?:[/\\](?:{_NAME}|{_WORD}(?: {_WORD}){{1,3}})(?=[/\\]))*[/\\]{_NAME}[/\\]?"
)
"""An absolute path; its folders, not its last part, may have blanks in their names."""


def public(message: str) -> str:
    """A message without the folders of this machine: of each absolute path only its last name. 2,000 characters."""
    for folder in {str(Path.home()), str(Path.cwd()), tempfile.gettempdir()} - {"/"}:
        message = message.replace(f"{folder}/", "/").replace(f"{folder}\\", "/")
    return _PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], message)[:2000]
