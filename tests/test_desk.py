"""The desk: one piece of work at a time, in turn, stopped when asked, and never lost."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from imgadapt.errors import DataError, ImgadaptError
from imgadapt.playground.desk import Busy, Cancelled, Desk, Done, Event, Failed, Made, Progress, Ticket, Waiting, public

LONG = 20.0
"""Seconds after which a test gives up."""


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def desk(log: list[str]) -> Iterator[Desk]:
    made = Desk(waiting=3, per_owner=2, log=log.append)
    yield made
    made.close()


class Held:
    """Work that goes a step at a time, when it is let."""

    def __init__(self, steps: int = 1000) -> None:
        self.steps, self.begun, self.gate, self.done = steps, threading.Event(), threading.Semaphore(0), 0

    def __call__(self, ticket: Ticket[str]) -> str:
        self.begun.set()
        for step in range(self.steps):
            assert self.gate.acquire(timeout=LONG)
            self.done += 1
            ticket.progress("drawing", step, self.steps)
        return "whole"

    def let(self, steps: int) -> None:
        self.gate.release(steps)


def occupied(desk: Desk, owner: str = "") -> tuple[Held, Ticket[str]]:
    held = Held()
    ticket = desk.submit(held, owner=owner)
    assert held.begun.wait(LONG)
    return held, ticket


def free(held: Held, ticket: Ticket[str]) -> None:
    ticket.cancel()
    held.let(1)
    assert ticket.ended.wait(LONG)


def all_of(ticket: Ticket[Any]) -> list[Event]:
    return [event for event in ticket.events(0.01) if not isinstance(event, Waiting)]


def test_work_is_done_in_the_order_of_coming_by_one_thread(desk: Desk) -> None:
    order = list[tuple[int, int]]()
    held, first = occupied(desk)

    def work(k: int, _: Ticket[int]) -> int:
        order.append((k, threading.get_ident()))
        return 10 * k

    tickets = [desk.submit(lambda ticket, k=k: work(k, ticket)) for k in range(3)]
    assert desk.load == 4
    free(held, first)
    assert [ticket.result() for ticket in tickets] == [0, 10, 20]
    assert [k for k, _ in order] == [0, 1, 2]
    assert len({thread for _, thread in order}) == 1


def test_those_who_wait_are_told_their_place(desk: Desk) -> None:
    held, first = occupied(desk)
    tickets = [desk.submit(lambda _: 1) for _ in range(3)]
    assert [ticket.next() for ticket in tickets] == [Waiting(1, 3), Waiting(2, 3), Waiting(3, 3)]
    tickets[0].cancel()
    assert [ticket.next() for ticket in tickets[1:]] == [Waiting(1, 2), Waiting(2, 2)]
    assert first.next() is None
    free(held, first)


def test_the_queue_is_bounded_and_so_is_each_owner(desk: Desk) -> None:
    held, first = occupied(desk, "ann")
    desk.submit(lambda _: 1, owner="ann")
    with pytest.raises(Busy, match="2 of your requests wait already"):
        desk.submit(lambda _: 1, owner="ann")
    waiting = [desk.submit(lambda _: 1, owner=owner) for owner in ("bob", "cid")]
    with pytest.raises(Busy, match=r"the queue is full \(3 wait\)"):
        desk.submit(lambda _: 1, owner="dan")
    free(held, first)
    assert [ticket.result() for ticket in waiting] == [1, 1]
    assert desk.submit(lambda _: 2, owner="ann").result() == 2


def test_cancel_stops_work_at_its_next_step(desk: Desk) -> None:
    held, ticket = occupied(desk)
    held.let(3)
    steps = [event for _, event in zip(range(3), ticket.events(LONG), strict=False)]
    assert [event.done for event in steps if isinstance(event, Progress)] == [0, 1, 2]
    ticket.cancel()
    held.let(500)
    assert all_of(ticket) == [Failed("stopped", cancelled=True)]
    assert held.done == 4
    assert desk.submit(lambda _: "next").result() == "next"


def test_cancelling_what_waits_takes_it_out_and_it_never_runs(desk: Desk) -> None:
    held, first = occupied(desk)
    ran = list[int]()
    ticket = desk.submit(lambda _: ran.append(1))
    ticket.cancel()
    assert ticket.ended.is_set()
    assert all_of(ticket) == [Failed("stopped", cancelled=True)]
    assert desk.load == 1
    free(held, first)
    assert desk.submit(lambda _: 5).result() == 5
    assert ran == []


def test_cancelling_twice_by_many_or_after_the_end_changes_nothing(desk: Desk) -> None:
    done = desk.submit(lambda _: 7)
    assert done.result() == 7
    done.cancel()
    held, first = occupied(desk)
    ticket = desk.submit(lambda _: 1)
    threads = [threading.Thread(target=ticket.cancel) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all_of(ticket) == [Failed("stopped", cancelled=True)]
    assert ticket.next() is None
    free(held, first)
    assert done.result() == 7


def test_cancels_that_race_with_the_thread_end_every_ticket_once() -> None:
    desk = Desk(waiting=500, per_owner=500)
    ran = list[int]()
    for round in range(20):
        tickets = [desk.submit(lambda _, k=k: ran.append(k)) for k in range(20 * round, 20 * round + 20)]
        threads = [threading.Thread(target=ticket.cancel) for ticket in reversed(tickets)]
        for thread in threads:
            thread.start()
        ends = [all_of(ticket) for ticket in tickets]
        for thread in threads:
            thread.join()
        assert all(len(events) == 1 and isinstance(events[0], Done | Failed) for events in ends)
        done = [k for k, events in enumerate(ends, 20 * round) if isinstance(events[0], Done)]
        assert [k for k in ran if k >= 20 * round] == done
    assert desk.load == 0
    desk.close()


def test_parts_count_even_when_the_rest_is_cancelled(desk: Desk) -> None:
    def work(ticket: Ticket[int]) -> int:
        ticket.made("first")
        ticket.cancel()
        ticket.made("second")
        raise AssertionError("it goes on after it was cancelled")

    assert all_of(desk.submit(work)) == [Made("first"), Made("second"), Failed("stopped", cancelled=True)]


def test_progress_says_how_long_it_will_take(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 14.0, 20.0])
    own = SimpleNamespace(monotonic=lambda: next(clock))  # not everybody's: other threads look at the time, too
    monkeypatch.setattr("imgadapt.playground.desk.time", own)
    ticket: Ticket[None] = Ticket(lambda _: None, "", desk)
    for done in (0, 1, 2):
        ticket.progress("drawing", done, 5)
    ticket.progress("decoding", 0, 1)
    assert [event.eta for _ in range(4) if isinstance(event := ticket.next(), Progress)] == [None, 8.0, 6.0, None]


def test_previews_that_nobody_reads_are_not_kept(desk: Desk) -> None:
    def work(ticket: Ticket[None]) -> None:
        for step in range(50):
            ticket.progress("drawing", step, 50, preview=bytes(1000))

    ticket = desk.submit(work)
    assert ticket.ended.wait(LONG)
    steps = [event for event in all_of(ticket) if isinstance(event, Progress)]
    assert [event.done for event in steps] == list(range(50))
    assert sum(len(event.preview or b"") for event in steps) == 0


def test_an_error_is_told_without_folders_and_the_desk_goes_on(desk: Desk) -> None:
    def work(_: Ticket[None]) -> None:
        raise DataError("/srv/private stuff/models/x.safetensors: not whole")

    with pytest.raises(ImgadaptError, match=r"^x\.safetensors: not whole$"):
        desk.submit(work).result()
    assert desk.submit(lambda _: 1).result() == 1


@pytest.mark.parametrize(
    "error", [KeyError("secret"), SystemExit(3), KeyboardInterrupt(), RecursionError(), MemoryError()]
)
def test_an_unforeseen_error_is_a_number_whose_traceback_is_in_the_log(
    desk: Desk, log: list[str], error: BaseException
) -> None:
    def work(_: Ticket[None]) -> None:
        raise error

    (end,) = all_of(desk.submit(work))
    assert isinstance(end, Failed)
    if isinstance(error, MemoryError):
        assert end.message.startswith("out of memory: ask for a smaller picture")
    else:
        number = end.message.rsplit(" ", 1)[-1]
        assert end.message == f"something went wrong inside; the server's log has it as error {number}"
        assert log[0].startswith(f"error {number}\nTraceback")
        assert type(error).__name__ in log[0]
    assert desk.submit(lambda _: 1).result() == 1


def test_a_log_that_fails_stops_nothing() -> None:
    def full(_: str) -> None:
        raise OSError("disk full")

    desk = Desk(waiting=2, per_owner=2, log=full)
    ticket = desk.submit(lambda _: 1 // 0)
    assert all_of(ticket) == [Failed("something went wrong inside")]
    assert desk.submit(lambda _: 1).result() == 1
    assert desk.load == 0
    desk.close()


def test_whoever_comes_late_still_gets_the_end(desk: Desk) -> None:
    ticket = desk.submit(lambda _: "done")
    assert all_of(ticket) == [Done("done")]
    assert all_of(ticket) == [Done("done")]
    assert ticket.result() == "done"


def test_two_readers_both_come_to_the_end(desk: Desk) -> None:
    held = Held(steps=20)
    ticket = desk.submit(held)
    heard: list[list[Event]] = [[], []]
    readers = [threading.Thread(target=lambda k=k: heard[k].extend(all_of(ticket))) for k in range(2)]
    for reader in readers:
        reader.start()
    held.let(20)
    for reader in readers:
        reader.join(LONG)
    assert [events[-1] for events in heard] == [Done("whole")] * 2
    steps = [event.done for events in heard for event in events if isinstance(event, Progress)]
    assert sorted(steps) == list(range(20))


def test_closing_stops_what_runs_and_what_waits_and_takes_nothing_new() -> None:
    desk = Desk(waiting=5, per_owner=5)
    held, first = occupied(desk)
    waiting = [desk.submit(lambda _: 1) for _ in range(3)]
    closing = threading.Thread(target=desk.close)
    closing.start()
    for ticket in waiting:
        assert all_of(ticket) == [Failed("stopped", cancelled=True)]
    held.let(5)
    closing.join(LONG)
    assert not closing.is_alive()
    assert isinstance(all_of(first)[-1], Failed)
    with pytest.raises(Busy, match="closing"):
        desk.submit(lambda _: 1)


def test_cancelled_is_seen_between_steps(desk: Desk) -> None:
    ticket: Ticket[None] = Ticket(lambda _: None, "", desk)
    ticket.check()
    ticket.cancel()
    assert ticket.cancelled
    with pytest.raises(Cancelled):
        ticket.check()


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("cannot write /home/My User/x y/b.png: no space", "cannot write b.png: no space"),
        ("C:\\Users\\Jo Doe\\x.safetensors: bad", "x.safetensors: bad"),
        ("'/srv/a/b.bin' and (/srv/c)", "'b.bin' and (c)"),
        ("unet/down: (16/640) and/or", "unet/down: (16/640) and/or"),
        ("anime/x.safetensors is gone", "anime/x.safetensors is gone"),
        ("/tmp/a.safetensors is not and/or this", "a.safetensors is not and/or this"),
        ("see https://a.example/b/c", "see https://a.example/b/c"),
        ("at=/etc/passwd,/etc/shadow", "at=passwd,shadow"),
    ],
)  # fmt: skip
def test_messages_have_no_folders_of_the_machine(message: str, told: str) -> None:
    assert public(message) == told


def test_a_message_of_any_length_is_made_fit_at_once() -> None:
    for text in ("/a b c " * 30_000, "/" * 200_000, "/a" * 100_000, " a" * 100_000, "/a.b c" * 30_000):
        assert len(public(text)) <= 2000


def test_what_comes_while_a_reader_gives_up_waiting_is_read_before_the_end(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def work(ticket: Ticket[str]) -> str:
        assert gate.wait(LONG)
        ticket.made(1)
        ticket.made(2)
        return "whole"

    ticket, place = desk.submit(work), desk.place

    def late(asked: Ticket[Any]) -> Waiting | None:
        """Where a reader is when nothing has come in time."""
        gate.set()
        assert ticket.ended.wait(LONG)
        return place(asked)

    monkeypatch.setattr(desk, "place", late)
    assert [event for event in ticket.events(0.01) if not isinstance(event, Waiting)] == [
        Made(1), Made(2), Done("whole"),
    ]  # fmt: skip
