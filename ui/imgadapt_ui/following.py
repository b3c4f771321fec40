"""Following: the events of a ticket for an async handler, which no thread waits for."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any, TypeVar

from imgadapt.playground.desk import Done, Event, Failed, Progress, Ticket, Waiting

PAUSE = 0.03
"""Seconds between two looks at a ticket."""

T = TypeVar("T")


async def ask(start: Callable[[], Ticket[T]]) -> Ticket[T]:
    """The ticket that `start` gets at the desk, in a thread, as it may look at files; it is cancelled when who asked
    has gone meanwhile.
    """

    def gone(asked: asyncio.Future[Ticket[T]]) -> None:
        if not asked.cancelled() and asked.exception() is None:
            asked.result().cancel()

    asked = asyncio.ensure_future(asyncio.to_thread(start))
    try:
        return await asyncio.shield(asked)
    except asyncio.CancelledError:
        asked.add_done_callback(gone)
        raise


async def follow(ticket: Ticket[Any], *, every: float = 0.3) -> AsyncGenerator[Event, None]:
    """What happens to a ticket, up to Done or Failed; the ticket is cancelled when the reader goes away before.

    Waiting comes when the place has changed. Progress comes at most every `every` seconds, as each yield of a handler
    is sent: of those between, the last one is told, with the last preview; nothing else is left out.
    (A reader that stops early on purpose does it in `contextlib.aclosing(follow(ticket))`, which cancels at once.)
    """
    place: Event | None = None
    late: Progress | None = None
    told = -every
    try:
        while True:
            event = ticket.next()
            if isinstance(event, Progress):
                kept = late.preview if late is not None and event.preview is None else event.preview
                late = replace(event, preview=kept)
            elif isinstance(event, Done | Failed):
                yield event
                return
            elif event is not None and not (isinstance(event, Waiting) and event == place):
                place = event if isinstance(event, Waiting) else place
                if late is not None:
                    yield late
                    late, told = None, time.monotonic()
                yield event
            else:
                if late is not None and time.monotonic() - told >= every:
                    yield late
                    late, told = None, time.monotonic()
                await asyncio.sleep(PAUSE)
    finally:
        ticket.cancel()
