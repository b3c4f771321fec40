"""Visitors: what the server keeps of those who ask does not grow with what they ask."""

import asyncio
import gc
import time
from typing import Any

import pytest
from gradio.routes import App
from imgadapt_ui import visitors
from imgadapt_ui.following import News, follow
from imgadapt_ui.jobs import Job
from starlette.routing import Mount

from imgadapt.playground.desk import Desk, Done, Event, Ticket, Waiting
from tests.served import DRAWN, Served, Told, called, served

__all__ = ["served"]


def _app(served: Served) -> App:
    app: Any = served.guard.app
    (found,) = [one.app for one in app.routes if isinstance(one, Mount) and isinstance(one.app, App)]
    return found


def _kept(app: App) -> dict[str, int]:
    queue, holder = app.get_blocks()._queue, app.state_holder
    gc.collect()
    sizes = [
        holder.session_data,
        holder.time_last_used,
        queue.event_ids_to_events,
        app.iterators,
        app.iterators_to_reset,
    ]
    return {
        "sessions, events, iterators": sum(len(one) for one in sizes),
        "statistics": len(queue.event_analytics),
        "tickets": sum(type(one) is Ticket for one in gc.get_objects()),
    }


def _grown(app: App, before: dict[str, int]) -> dict[str, int]:
    """What is more than before, once the server has put away what it has answered."""
    until = time.monotonic() + 10
    while True:
        grown = {name: count for name, count in _kept(app).items() if count > before[name]}
        if not grown or time.monotonic() > until:
            return grown
        time.sleep(0.05)


def test_calls_of_the_api_leave_nothing_behind(served: Served) -> None:
    app = _app(served)
    with served.http as http:
        called(http, "generate", DRAWN)
        before = _kept(app)
        for _ in range(30):
            called(http, "formats", {})
        for _ in range(10):
            called(http, "generate", {**DRAWN, "steps": 1})
        for _ in range(10):
            try:
                called(http, "generate", {"steps": -1})
            except Told:
                continue
            raise AssertionError("steps of -1")
    assert served.idle()
    assert _grown(app, before) == {}
    assert before["statistics"] <= 1


def test_a_visitor_is_not_told_of_every_component_anew(served: Served) -> None:
    """Gradio describes all of them for each that comes, in a third of a second; an API's call is one that comes."""
    app = _app(served)
    assert len(app.get_blocks().blocks) > 200
    session = app.state_holder["somebody"]
    assert session.config_values == {}
    assert list(session.blocks_config.blocks) == list(app.get_blocks().blocks)
    assert app.state_holder.capacity <= 2000
    del app.state_holder.session_data["somebody"]


def test_events_of_visitors_that_are_known_no_more_are_forgotten(served: Served) -> None:
    """A visitor's row stays in it when its event has been told, by Gradio's own code."""
    queue = _app(served).get_blocks()._queue
    rows: dict[str, set[str]] = queue.pending_event_ids_session
    with served.http as http:
        called(http, "formats", {})
    known = set(queue.pending_messages_per_session)
    assert known & set(rows)
    most = 2 * visitors._VISITORS
    for number in range(3 * most):
        rows[f"gone-{number}"] = {"an event"}
        assert len(rows) <= most + 1
    assert known & set(rows)


def _desk() -> Desk:
    return Desk(40, 40, log=lambda said: None)


async def _read(ticket: Ticket[Any], **options: Any) -> list[Event]:
    return [event async for event in follow(ticket, **options)]


@pytest.mark.parametrize(("seconds", "least", "most"), [(0.0, 3, 12), (60.0, 1, 1)])
def test_places_are_told_now_and_then_and_the_end_at_once(seconds: float, least: int, most: int) -> None:
    """With 40 in the queue, each end of one would be 40 answers."""
    desk = _desk()
    tickets = [desk.submit(lambda ticket: time.sleep(0.01)) for _ in range(12)]

    async def everything() -> list[list[Event]]:
        return await asyncio.gather(*(_read(one, every=0.001, places=seconds) for one in tickets))

    heard = asyncio.run(asyncio.wait_for(everything(), 20))
    assert {type(events[-1]) for events in heard} == {Done}
    assert least <= max(sum(isinstance(event, Waiting) for event in events) for events in heard) <= most
    assert not any(ticket.listeners for ticket in tickets)
    desk.close()


def test_a_page_hears_of_each_part_as_it_is_made() -> None:
    assert asyncio.run(_job_of_parts()) == [1, 2, 3]


async def _job_of_parts() -> list[int]:
    desk, go, seen = _desk(), asyncio.Event(), list[int]()
    loop = asyncio.get_running_loop()

    def work(ticket: Ticket[None]) -> None:
        for part in range(3):
            asyncio.run_coroutine_threadsafe(go.wait(), loop).result(10)
            loop.call_soon_threadsafe(go.clear)
            ticket.made(part)

    job = Job(desk.submit(work))
    go.set()
    async for state in job.follow(every=0.01):
        if len(state.items) > len(seen):
            seen.append(len(state.items))
            go.set()
    assert not job.ticket.listeners
    desk.close()
    return seen


def test_who_waits_for_news_wakes_when_the_work_ends() -> None:
    desk = _desk()

    async def wait() -> bool:
        ready = asyncio.Event()
        loop = asyncio.get_running_loop()
        ticket = desk.submit(lambda ticket: asyncio.run_coroutine_threadsafe(ready.wait(), loop).result(10))
        with News(ticket) as news:
            ready.set()
            await asyncio.wait_for(news.wait(60), 10)
        return ticket.ended.is_set() or isinstance(ticket.next(), Done)

    assert asyncio.run(wait())
    desk.close()
