"""The API: every endpoint by its name, as `gradio_client` calls it, and what a reader that goes away leaves behind."""

import asyncio
import io
import math
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client
from imgadapt_ui.following import ask, follow
from imgadapt_ui.plain import plain
from PIL import Image

from imgadapt.playground.desk import Busy, Desk, Done, Event, Failed, Made, Progress, Ticket
from imgadapt.playground.pictures.album import Picture
from tests.served import DRAWN, Served, Told, called, served

__all__ = ["served"]
ENDPOINTS = {
    "generate", "grid", "resume_grid", "grid_plan", "grid_cells", "merge", "merge_report", "merge_rules", "convert",
    "convert_plan", "formats", "analyse", "switch_base", "bases", "list_adapters", "inspect", "restore", "datasets",
    "check_training", "train", "training", "trainings", "stop_training", "resume_training",
}  # fmt: skip


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Client]:
    with served.http as http:
        assert http.get("/health").json() == {"ok": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # Gradio's client asks the hub about itself
        made = Client(served.url, verbose=False)
        yield made
        made.close()


def test_names_are_the_documented_ones(client: Client) -> None:
    named: Any = client.view_api(return_format="dict", print_info=False)
    assert {name.removeprefix("/") for name in named["named_endpoints"]} == ENDPOINTS
    documented = (Path(__file__).parents[1] / "docs" / "playground.md").read_text(encoding="utf-8")
    assert {name for name in ENDPOINTS if f"`/{name}`" in documented} == ENDPOINTS


def test_a_client_hears_where_it_is_and_gets_its_picture(served: Served, client: Client) -> None:
    job = client.submit({**DRAWN, "count": 2}, api_name="/generate")
    last: Any = job.result(timeout=60)
    tables: Any = job.outputs()
    states = [one["state"] for one in tables]
    assert states[-3:] == ["made", "made", "done"]
    assert "working" in states
    assert [one["record"]["request"]["seed"] for one in last["result"]] == [5, 6]
    with served.http as http:
        image = Image.open(io.BytesIO(http.get(last["result"][0]["url"]).content))
    assert image.size == (64, 64)
    assert "path" not in str(last)
    assert str(served.home) not in str(last)


def test_a_picture_is_restored_and_drawn_again_to_the_bit(served: Served) -> None:
    with served.http as http:
        first = called(http, "generate", {**DRAWN, "seed": 77})[-1]["result"][0]
        found = called(http, "restore", {"id": first["id"]})[-1]
        assert (found["exact"], found["lacks"]) == (True, [])
        again = called(http, "generate", found["request"])[-1]["result"][0]
        pixels = [Image.open(io.BytesIO(http.get(one["url"]).content)).tobytes() for one in (first, again)]
    assert pixels[0] == pixels[1]


def test_a_grid_streams_its_cells_and_is_exported(served: Served) -> None:
    request = {"common": DRAWN, "x": {"kind": "seed", "values": "1..3"}}
    with served.http as http:
        assert called(http, "grid_plan", request)[-1]["cells"] == 3
        tables = called(http, "grid", request)
        grid = tables[-1]["result"]
        assert [one["kind"] for one in tables if one["state"] == "made"] == ["grid", *["cell"] * 3]
        assert len(called(http, "grid_cells", {"id": grid["id"]})[-1]["cells"]) == 3
        with zipfile.ZipFile(io.BytesIO(http.get(grid["url"]).content)) as packed:
            assert "index.html" in {Path(name).name for name in packed.namelist()}


def test_lists_are_there(served: Served) -> None:
    with served.http as http:
        assert called(http, "bases", {})[-1]["bases"][0]["name"] == "demo"
        assert {"name", "says", "options"} == set(called(http, "merge_rules", {})[-1]["rules"][0])
        assert "kohya" in [one[0] for one in called(http, "formats", {})[-1]["formats"]]
        assert called(http, "datasets", {})[-1]["datasets"][0]["pictures"] == 40
        assert called(http, "trainings", {})[-1] == {"trainings": []}
        assert isinstance(called(http, "list_adapters", {})[-1]["adapters"], list)
        assert (
            called(http, "switch_base", {"id": called(http, "bases", {})[-1]["bases"][0]["id"]})[-1]["state"] == "done"
        )


WRONG = [
    ("generate", {"steps": 10**6}, "steps"),
    ("generate", {"stepz": 3}, "stepz"),
    ("generate", {"prompt": ["x"]}, "prompt"),
    ("generate", {"seed": True}, "seed"),
    ("generate", {"width": 7}, "width"),
    ("generate", {"base": "../../etc"}, "base"),
    ("generate", {"base": "0123456789"}, ""),
    ("generate", {"init": "0123456789"}, ""),
    ("generate", [1], "a table of settings"),
    ("generate", None, "a table of settings"),
    ("generate", "x", "a table of settings"),
    ("generate", {"count": 1e4}, "count"),
    ("generate", {"prompt": "\0"}, "prompt"),
    ("generate", {"prompt": "x" * 10**6}, "prompt"),
    ("inspect", {"id": "/etc/passwd"}, "id"),
    ("generate", {"adapters": [{"adapter": "0123456789"}]}, ""),
    ("inspect", {"id": "0123456789"}, ""),
    ("inspect", {}, "id"),
    ("training", {"id": "0123456789"}, ""),
    ("grid_cells", {"id": "0123456789"}, ""),
    ("resume_grid", {"id": "0123456789"}, ""),
    ("grid", {"common": {}, "x": {"kind": "seed", "values": "1..1000000"}}, ""),
    ("grid", {"common": {}}, "x"),
    ("merge", {"adapters": []}, "adapters"),
    ("merge", {"adapters": [{"adapter": "0123456789"}]}, ""),
    ("bases", {"x": 1}, "x"),
    ("convert", {"adapter": "0123456789", "format": "../x"}, ""),
    ("train", {"data": "0123456789"}, ""),
    ("restore", {"id": "x"}, "id"),
]


@pytest.mark.parametrize(("name", "settings", "word"), WRONG)
def test_what_is_wrong_is_said_in_a_line(served: Served, name: str, settings: Any, word: str) -> None:
    with served.http as http, pytest.raises(Told) as told:
        called(http, name, settings)
    said = str(told.value)
    assert word in said
    assert said != "None"
    assert "\n" not in said
    assert len(said) < 300
    assert str(served.home) not in said
    assert served.idle()


def test_clients_get_their_own_pictures(served: Served) -> None:
    """The short form of benchmarks/clients.py: many at once, each with its own seed, as often as they can."""
    seeds, drawn, counts = range(50), dict[int, set[bytes]](), Counter[str]()
    with served.http as http:
        for seed in (0, 17, 49):
            drawn[seed] = {_pixels(http, called(http, "generate", {**DRAWN, "seed": seed})[-1])}
    lock, most, until = threading.Lock(), 0, time.monotonic() + 3

    def click(seed: int) -> None:
        nonlocal most
        with served.http as http:
            while time.monotonic() < until:
                most = max(most, served.house.playground.desk.load)
                try:
                    made = called(http, "generate", {**DRAWN, "seed": seed})[-1]
                except Told as told:
                    with lock:
                        counts[str(told).partition(" (")[0]] += 1
                    time.sleep(0.05)
                    continue
                assert made["result"][0]["record"]["request"]["seed"] == seed
                pixels = _pixels(http, made)
                with lock:
                    drawn.setdefault(seed, set()).add(pixels)
                    counts["made"] += 1

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(click, seeds))
    assert counts["made"] >= 9
    assert counts["the queue is full"] > 0
    assert set(counts) == {"made", "the queue is full"}
    assert {len(pictures) for pictures in drawn.values()} == {1}
    assert len(set.union(*drawn.values())) == len(drawn)
    assert most <= 9  # eight wait, one is at work
    assert served.idle()


def _pixels(http: Any, made: dict[str, Any]) -> bytes:
    return Image.open(io.BytesIO(http.get(made["result"][0]["url"]).content)).tobytes()


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk(4, 4, log=lambda said: None)
    yield made
    made.close()


def _followed(ticket: Ticket[Any], **options: Any) -> list[Event]:
    async def all() -> list[Event]:
        return [event async for event in follow(ticket, **options)]

    return asyncio.run(all())


def test_following_leaves_out_progress_and_nothing_else(desk: Desk) -> None:
    def work(ticket: Ticket[int]) -> int:
        for step in range(1000):
            ticket.progress("drawing", step, 1000)
            if step % 250 == 0:
                ticket.made(step)
        return 7

    events = _followed(desk.submit(work), every=60.0)
    assert [event.item for event in events if isinstance(event, Made)] == [0, 250, 500, 750]
    assert events[-1] == Done(7)
    told = [event for event in events if isinstance(event, Progress)]
    assert len(told) < 10
    assert told[-1].done == 750


def test_a_reader_that_goes_away_cancels(desk: Desk) -> None:
    began = threading.Event()

    def work(ticket: Ticket[None]) -> None:
        began.set()
        while True:
            ticket.check()
            time.sleep(0.001)

    def short(ticket: Ticket[None]) -> None:
        ticket.check()

    ticket, other = desk.submit(work), desk.submit(short)
    assert began.wait(5)

    async def gone() -> None:
        reader = asyncio.create_task(_read(ticket))
        await asyncio.sleep(0.1)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)

    asyncio.run(gone())
    assert ticket.ended.wait(5)
    assert ticket.cancelled
    assert isinstance(_followed(other)[-1], Done)


async def _read(ticket: Ticket[Any]) -> None:
    async for _ in follow(ticket):
        pass


def test_who_leaves_while_the_desk_is_asked_leaves_no_work(desk: Desk) -> None:
    go, tickets = threading.Event(), list[Ticket[None]]()

    def start() -> Ticket[None]:
        go.wait(5)
        tickets.append(desk.submit(lambda ticket: ticket.check()))
        return tickets[0]

    async def leave() -> None:
        asked = asyncio.create_task(ask(start))
        await asyncio.sleep(0.05)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        go.set()
        while not tickets or not tickets[0].ended.is_set():
            await asyncio.sleep(0.01)

    asyncio.run(leave())
    assert tickets[0].cancelled


def test_a_full_desk_is_an_error_of_the_asking(desk: Desk) -> None:
    stop, began = threading.Event(), threading.Event()

    def work(ticket: Ticket[None]) -> None:
        began.set()
        stop.wait(5)

    desk.submit(work)
    assert began.wait(5)
    for _ in range(4):
        desk.submit(work)

    async def sixth() -> None:
        while True:
            await ask(lambda: desk.submit(lambda ticket: None))

    with pytest.raises(Busy, match="queue is full"):
        asyncio.run(sixth())
    stop.set()


def test_failures_are_told_as_they_are(desk: Desk) -> None:
    def breaks(ticket: Ticket[None]) -> None:
        raise ValueError("/secret/place")

    (failed,) = [event for event in _followed(desk.submit(breaks)) if isinstance(event, Failed)]
    assert "secret" not in failed.message
    assert not failed.cancelled


def test_results_are_plain_and_tell_no_place() -> None:
    @dataclass
    class Odd:
        number: float
        place: Path
        hidden: int = field(repr=False, default=3)
        many: tuple[Any, ...] = (1, {"a": math.inf})

    assert plain(Odd(math.nan, Path("/x"))) == {"number": None, "many": [1, {"a": None}]}
    told = plain(Picture("0123456789", Path("/secret"), 8, 8, 1.0, owner="user-ada", record={"a": 1}))
    assert (told["url"], told["record"]) == ("/pictures/0123456789", {"a": 1})
    assert "secret" not in str(told)
    assert "ada" not in str(told)
    with pytest.raises(TypeError):
        plain(object())
