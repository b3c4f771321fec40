"""The playground as several use it at once: what is asked for while something else waits, goes away, or fails."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from imgadapt import demo
from imgadapt.errors import ConfigError, ImgadaptError
from imgadapt.playground.desk import Busy, Done, Event, Failed, Made, Progress, Ticket, Waiting
from imgadapt.playground.merges.lab import Lab, MergeRequest
from imgadapt.playground.pictures.album import Picture
from imgadapt.playground.requests import GenerateRequest, Use
from imgadapt.playground.session import Playground
from imgadapt.playground.settings import Limits, Settings
from tests import tiny

OWN = demo.FOLDER / "adapters"


@pytest.fixture
def playground(tmp_path: Path) -> Iterator[Playground]:
    """With the embedded base, another (`other`), one that is broken, and two adapters for the embedded one."""
    torch.manual_seed(0)
    tiny.sd1().save_pretrained(tmp_path / "models/other")
    shutil.copytree(tmp_path / "models/other", tmp_path / "models/broken")
    next((tmp_path / "models/broken/unet").glob("*.safetensors")).write_bytes(b"nothing")
    (tmp_path / "mine").mkdir()
    shutil.copy(OWN / "duotone.safetensors", tmp_path / "mine/first.safetensors")
    shutil.copy(OWN / "duotone.safetensors", tmp_path / "mine/second.safetensors")
    settings = Settings(
        home=tmp_path / "home",
        adapters=(tmp_path / "mine",),
        models=(tmp_path / "models",),
        limits=Limits(waiting=6, per_owner=5),
    )
    made = Playground(settings)
    yield made
    made.close()


def request(**more: object) -> GenerateRequest:
    return GenerateRequest.of({"prompt": "a fox", "steps": 2, "seed": 1, **more})


def begun(ticket: Ticket[list[Picture]]) -> Iterator[Event]:
    """Its events from the first step on."""
    events = ticket.events()
    assert any(isinstance(event, Progress) and event.what == "drawing" and event.done for event in events)
    return events


def test_what_waits_is_drawn_on_the_base_that_was_chosen_when_it_was_asked(playground: Playground) -> None:
    other = playground.bases.named("other")
    before = playground.generate(request())
    switch = playground.switch(other.id)
    after = playground.generate(request())
    named = playground.generate(request(base=playground.bases.first.id))
    last = playground.generate(request())
    sides = [ticket.result()[0].width for ticket in (before, after, named, last)]
    assert switch.result() == other
    assert sides == [64, 16, 64, 64]


def test_a_base_that_does_not_load_is_said_and_the_next_request_is_drawn_on_the_first(playground: Playground) -> None:
    broken = playground.switch(playground.bases.named("broken").id)
    waits = playground.generate(request())
    with pytest.raises(ImgadaptError, match="broken") as said:
        broken.result()
    assert str(playground.settings.models[0]) not in str(said.value)
    with pytest.raises(ImgadaptError, match="broken"):
        waits.result()
    assert playground.generate(request()).result()[0].width == 64


def test_an_adapter_that_goes_away_while_its_picture_waits_is_an_error_of_that_picture(playground: Playground) -> None:
    card = playground.library.named("second")
    first = playground.generate(request(steps=10))
    second = playground.generate(request(adapters=[{"adapter": card.id}]))
    third = playground.generate(request())
    card.path.unlink()
    with pytest.raises(ImgadaptError, match="second"):
        second.result()
    assert [one.result()[0].width for one in (first, third)] == [64, 64]
    playground.library.scan()
    with pytest.raises(ConfigError, match="adapter"):
        playground.generate(request(adapters=[{"adapter": card.id}]))


def test_an_adapter_that_acts_may_go_away_and_its_picture_is_drawn_to_the_end(playground: Playground) -> None:
    card = playground.library.named("first")
    ticket = playground.generate(request(steps=6, adapters=[{"adapter": card.id}]))
    events = begun(ticket)
    card.path.unlink()
    assert any(isinstance(event, Made) for event in events)


def test_a_merge_waits_for_the_picture_before_it_and_both_come(playground: Playground) -> None:
    cards = [playground.library.named(name) for name in ("first", "second")]
    drawn = playground.generate(request(steps=100))
    events = begun(drawn)
    merge = Lab(playground).save(MergeRequest(adapters=tuple(Use(adapter=card.id, weight=0.5) for card in cards)))
    assert merge.next() == Waiting(1, 1)
    assert merge.result().components
    assert drawn.ended.is_set()
    assert any(isinstance(event, Made) for event in events)


def test_one_owner_cannot_fill_the_queue_and_a_full_queue_says_so(playground: Playground) -> None:
    held = [playground.generate(request(steps=200), owner="a")]
    begun(held[0])
    held += [playground.generate(request(steps=200), owner="a") for _ in range(4)]
    with pytest.raises(Busy, match="5 of your requests"):
        playground.generate(request(), owner="a")
    held += [playground.generate(request(), owner="b") for _ in range(2)]
    with pytest.raises(Busy, match="the queue is full"):
        playground.generate(request(), owner="c")
    for ticket in reversed(held):
        ticket.cancel()
        ticket.cancel()
    ends = [[event for event in ticket.events() if isinstance(event, Done | Failed)] for ticket in held]
    assert ends == [[Failed("stopped", cancelled=True)]] * 7
    assert playground.generate(request(), owner="a").result()[0].width == 64
