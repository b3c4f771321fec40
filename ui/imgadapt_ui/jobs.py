"""Jobs: what a page has running, which outlives the page: after a reload it is found again and followed further."""

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from typing import Any

from imgadapt.playground.desk import Done, Failed, Made, Progress, Ticket, Waiting
from imgadapt_ui.following import News


class Job:
    """A ticket whose events any number of pages may follow, from the start or later.

    items: what it has made so far; now: where it is, with the last preview; ended: Done, Failed or None.
    """

    def __init__(self, ticket: Ticket[Any]) -> None:
        self.id, self.owner, self.ticket = ticket.id, ticket.owner, ticket
        self.items: list[Any] = []
        self.now: Waiting | Progress | None = None
        self.ended: Done | Failed | None = None
        self.version = 0
        self._lock = threading.Lock()

    def look(self) -> None:
        """Take in what is new."""
        with self._lock:
            while self.ended is None:
                event = self.ticket.next()
                if event is None or event == self.now:
                    return
                self.version += 1
                if isinstance(event, Made):
                    self.items.append(event.item)
                elif isinstance(event, Done | Failed):
                    self.ended = event
                elif isinstance(event, Waiting):
                    self.now = event
                    return
                else:
                    kept = self.now.preview if isinstance(self.now, Progress) else None
                    self.now = Progress(event.what, event.done, event.total, event.eta, event.preview or kept)

    async def follow(self, every: float = 0.25) -> AsyncGenerator["Job", None]:
        """Itself, whenever something is new, at most each `every` seconds; the last time when it has ended.

        Nothing is cancelled when the reader goes away; `ticket.cancel` does that.
        """
        seen, told = -1, 0.0
        with News(self.ticket) as news:
            while True:
                self.look()
                ended = self.ended is not None
                left = told + every - time.monotonic()
                if ended or (self.version != seen and left <= 0):
                    seen, told = self.version, time.monotonic()
                    yield self
                if ended:
                    return
                await (asyncio.sleep(left) if self.version != seen else news.wait(every))


class Jobs:
    """The newest job of each owner; owners that were not here for long are forgotten."""

    def __init__(self, most: int = 512) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._most, self._lock = most, threading.Lock()

    def add(self, ticket: Ticket[Any]) -> Job:
        job = Job(ticket)
        with self._lock:
            self._jobs[job.owner] = job
            self._jobs.move_to_end(job.owner)
            while len(self._jobs) > self._most:
                self._jobs.popitem(last=False)
        return job

    def running(self, owner: str) -> Job | None:
        """The owner's newest job, where it has not ended."""
        with self._lock:
            job = self._jobs.get(owner)
        return job if job is not None and not job.ticket.ended.is_set() else None

    def knows(self, id: str) -> bool:
        """Whether a job was one of this process, and somebody's newest."""
        with self._lock:
            return any(job.id == id for job in self._jobs.values())

    def cancel(self, owner: str) -> bool:
        """Stop the owner's newest job; whether one ran."""
        job = self.running(owner)
        if job is not None:
            job.ticket.cancel()
        return job is not None
