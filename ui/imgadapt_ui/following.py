"""Following: the events of a ticket for an async handler, which no thread waits for."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar

from imgadapt.playground.desk import Done, Event, Failed, Progress, Ticket, Waiting

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


class News:
    """Wakes an async reader of a ticket, in a `with` block: at once when a part is made or it ends."""

    def __init__(self, ticket: Ticket[Any]) -> None:
        self._ticket, self._loop, self._come = ticket, asyncio.get_running_loop(), asyncio.Event()

    def __enter__(self) -> Self:
        self._ticket.listeners.append(self._tell)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ticket.listeners.remove(self._tell)

    async def wait(self, seconds: float) -> None:
        """Until there is news, at most so long."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._come.wait(), seconds)
        self._come.clear()

    def _tell(self) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._come.set)


async def follow(ticket: Ticket[Any], *, every: float = 0.3, places: float = 1.0) -> AsyncGenerator[Event, None]:
    """What happens to a ticket, up to Done or Failed; the ticket is cancelled when the reader goes away before.

    Waiting comes when the place has changed, at most every `places` seconds. Progress comes at most every `every`
    seconds, as each yield of a handler is sent: of those between, the last one is told, with the last preview; nothing
    else is left out.
    (A reader that stops early on purpose does it in `contextlib.aclosing(follow(ticket))`, which cancels at once.)
    """
    place: Event | None = None
    late: Progress | None = None
    told = placed = -every - places
    try:
        with News(ticket) as news:
            while True:
                event = ticket.next()
                now = time.monotonic()
                if isinstance(event, Progress):
                    kept = late.preview if late is not None and event.preview is None else event.preview
                    late = replace(event, preview=kept)
                elif isinstance(event, Done | Failed):
                    yield event
                    return
                elif event is None or isinstance(event, Waiting):
                    if event is not None and event != place and now - placed >= places:
                        place, placed = event, now
                        yield event
                    elif late is not None and now - told >= every:
                        told = now
                        yield late
                        late = None
                    await news.wait(every)
                else:
                    if late is not None:
                        told = now
                        yield late
                        late = None
                    yield event
    finally:
        ticket.cancel()
