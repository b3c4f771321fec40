"""Grids: axes as people write them, few swaps and encodings, the same noise, cancelling and resuming, export."""

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from imgadapt import attach, collect, demo, detach, live, save
from imgadapt.errors import ConfigError, ImgadaptError
from imgadapt.methods import DoRA, LoRA
from imgadapt.playground.desk import Busy, Done, Event, Failed, Made, Progress, Ticket
from imgadapt.playground.grids import axes, exporting, ordering
from imgadapt.playground.grids.axis import Axis, Value
from imgadapt.playground.grids.cells import board
from imgadapt.playground.grids.grids import Cell, Grid, GridRequest, Grids
from imgadapt.playground.grids.ranges import listed, plain
from imgadapt.playground.pictures.comparing import Difference, difference
from imgadapt.playground.requests import GenerateRequest
from imgadapt.playground.session import Playground
from imgadapt.playground.settings import Limits, Settings

SAME = Difference(0.0, 0, 0.0, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that change pictures visibly: on the unet, and on the text encoder as well; snapshots of a run."""
    made, pipe = tmp_path_factory.mktemp("adapters"), demo.pipeline()
    (made / "run").mkdir()
    names = ("stain", "a+b, c", "words", "run/step-10", "run/step-100", "run/step-20", "run/adapter")
    for k, name in enumerate(names):
        torch.manual_seed(k)
        attach(pipe, LoRA(rank=3, alpha=2.0), targets=["attention", *(["text"] if name == "words" else [])])
        for parameter in live.parameters(pipe):
            with torch.no_grad():
                parameter += 0.2 * torch.randn_like(parameter)
        save(collect(pipe), made / f"{name}.safetensors", format="kohya")
        detach(pipe)
    return made


@pytest.fixture(scope="module")
def playground(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playground]:
    made = Playground(Settings(tmp_path_factory.mktemp("home"), adapters=(folder,)))
    yield made
    made.close()


@pytest.fixture
def grids(playground: Playground) -> Grids:
    return Grids(playground)


def _id(playground: Playground, name: str) -> str:
    return playground.library.named(name).id


def _asked(
    playground: Playground, *axes: tuple[str, str], stack: Sequence[str] = ("stain",), **more: Any
) -> GridRequest:
    common = {"prompt": "a fox", "seed": 7, "steps": 2}
    common |= {name: more.pop(name) for name in list(more) if name in GenerateRequest.model_fields}
    adapters = [{"adapter": _id(playground, name)} for name in stack]
    rows = {name: {"kind": kind, "values": text} for name, (kind, text) in zip("xyz", axes, strict=False)}
    return GridRequest.of({"common": {**common, "adapters": adapters}, **rows, **more})


def _drawn(ticket: Ticket[Grid], watch: Callable[[Event], None] = lambda event: None) -> tuple[Grid, list[Event]]:
    events: list[Event] = []
    for event in ticket.events():
        watch(event)
        events.append(event)
    assert isinstance(events[-1], Done), events[-1]
    return events[-1].result, events


def _values(
    playground: Playground, kind: str, text: str, *, stack: Sequence[str] = ("stain",), **more: Any
) -> list[Value]:
    common = _asked(playground, ("seed", "1"), stack=stack).common
    return axes.values(Axis.of({"kind": kind, "values": text, **more}), common, playground.library, 50)


# Axes


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0, 0.5, 1", "0 0.5 1"),
        ("0:1:0.25", "0 0.25 0.5 0.75 1"),
        ("0:0.9:0.1", "0 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9"),
        ("1:0:-0.5", "1 0.5 0"),
        ("-1:1:1", "-1 0 1"),
        ("0:1:0.3", "0 0.3 0.6 0.9"),
        ("1..5", "1 2 3 4 5"),
        ("5..3\n9", "5 4 3 9"),
        ("1,2,..,6", "1 2 3 4 5 6"),
        ("0, .25, ..., 1", "0 0.25 0.5 0.75 1"),
        ("0-1 (+0.5)", "0 0.5 1"),
        ("0-1 [5]", "0 0.25 0.5 0.75 1"),
        ("-0.0;", "0"),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, wanted: str) -> None:
    assert " ".join(plain(value) for value in listed(text, 50)) == wanted


def test_steps_of_a_tenth_are_exact() -> None:
    assert [float(value) for value in listed("0:1:0.1", 50)] == [k / 10 for k in range(11)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no values"),
        (" , ;", "no values"),
        ("nan", "no number"),
        ("1e9", "no number"),
        ("٣", "no number"),
        ("0:1:0", "never gets there"),
        ("0:1:-0.1", "never gets there"),
        ("0:1", "no number and no range"),
        ("0:999999999999:0.000001", "999,999,999,999,000,001 values; 50 are the most"),
        ("1..51", "51 values"),
        ("1-9 [999999999]", "999,999,999 values"),
        ("..,3", "stands between"),
        ("1,..", "stands between"),
        ("9" * 30, "no number"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused_without_being_written_out(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        listed(text, 50)


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("weight", "11", "weight: weight 11: it is a number from -10 to 10"),
        ("steps", "2.5", "a whole number from 1 to 200"),
        ("steps", "0", "from 1 to 200"),
        ("seed", "-1", "seed"),
        ("seed", "random 51", "51 values"),
        ("guidance", "51", "from 0 to 50"),
        ("sampler", "Euler, Oiler", "no sampler 'Oiler'"),
        ("prompt", "dog -> cat", "'dog' is not in the prompt"),
        ("prompt", "\n \n", "no values"),
        ("adapter", "stainn", "no adapter 'stainn'"),
        ("adapter", "stain+stain", "twice"),
        ("adapter", "stain:11", "from -10 to 10"),
        ("rule", "tiez", "no rule 'tiez'"),
        ("rule", "ties density=2", "density is 2.0"),
        ("rule", "ties density", "no option"),
        ("checkpoint", "step-30", "no checkpoint 'step-30'"),
    ],
)
def test_an_axis_says_what_of_it_cannot_be_read(playground: Playground, kind: str, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _values(playground, kind, text)


def test_adapters_are_names_ids_stacks_and_weights(playground: Playground) -> None:
    stain, words, odd = (_id(playground, name) for name in ("stain", "words", "a+b, c"))
    made = _values(playground, "adapter", f"STAIN, words:0.5\na+b, c\n{words}+stain:-1\nnone")
    common = _asked(playground, ("seed", "1")).common
    stacks = [[(use.adapter, use.weight) for use in value.change(common).adapters] for value in made]
    assert stacks == [[(stain, 1.0)], [(words, 0.5)], [(odd, 1.0)], [(words, 1.0), (stain, -1.0)], []]
    assert [value.label for value in made] == ["stain", "words:0.5", "a+b, c", "words + stain:-1", "none"]


def test_one_adapter_of_a_stack_is_exchanged_with_its_settings(playground: Playground) -> None:
    stain, words = _id(playground, "stain"), _id(playground, "words")
    common = GenerateRequest.of({
        "adapters": [{"adapter": stain, "weight": 0.6, "blocks": "OUTALL"}, {"adapter": words, "weight": 0.3}]
    })  # fmt: skip
    axis = Axis.of({"kind": "adapter", "values": "a+b, c", "adapter": stain})
    (value,) = axes.values(axis, common, playground.library, 9)
    made = value.change(common).adapters
    assert [(use.adapter, use.weight, use.blocks) for use in made] == [
        (_id(playground, "a+b, c"), 0.6, "OUTALL"),
        (words, 0.3, ""),
    ]


def test_a_weight_is_that_of_text_encoders_too_in_their_proportion(playground: Playground) -> None:
    stain = _id(playground, "stain")
    common = GenerateRequest.of({"adapters": [{"adapter": stain, "weight": 0.8, "text": 0.4}]})
    made = axes.values(Axis.of({"kind": "weight", "values": "0,1"}), common, playground.library, 9)
    assert [[(u.weight, u.text) for u in value.change(common).adapters] for value in made] == [[(0, 0)], [(1, 0.5)]]


def test_blocks_are_presets_and_lists_with_names(playground: Playground) -> None:
    numbers = ",".join("1" * 17)
    made = _values(playground, "blocks", f"OUTALL; mine: {numbers}\n[{numbers}]")
    common = _asked(playground, ("seed", "1")).common
    assert [value.change(common).adapters[0].blocks for value in made] == ["OUTALL", numbers, numbers]
    assert [value.label for value in made] == ["OUTALL", "mine", numbers]


def test_checkpoints_of_a_run_come_by_step_and_the_trained_one_last(playground: Playground) -> None:
    made = _values(playground, "checkpoint", "all", stack=["step-10"])
    assert [value.label for value in made] == ["step-10", "step-20", "step-100", "adapter"]
    few = _values(playground, "checkpoint", "100, step-10", stack=["step-20"])
    common = _asked(playground, ("seed", "1"), stack=["step-20"]).common
    found = [value.change(common).adapters[0].adapter for value in few]
    assert found == [_id(playground, "step-100"), _id(playground, "step-10")]


def test_prompts_replace_words_and_bring_adapters(playground: Playground) -> None:
    made = _values(playground, "prompt", "fox -> red apple\na bus <lora:words:0.5>")
    common = _asked(playground, ("seed", "1")).common
    first, second = (value.change(common) for value in made)
    assert (first.prompt, first.adapters) == ("a red apple", common.adapters)
    assert second.prompt == "a bus"
    assert [use.weight for use in second.adapters] == [1.0, 0.5]


def test_prompts_may_lose_words(playground: Playground) -> None:
    made = _values(playground, "prompt", "a fox ->\n fox -> \na fox -> a bus")
    common = _asked(playground, ("seed", "1")).common
    assert [(value.label, value.change(common).prompt) for value in made] == [
        ("without a fox", ""), ("without fox", "a "), ("a bus", "a bus"),
    ]  # fmt: skip


def test_a_weight_of_an_adapter_is_that_of_its_checkpoints_and_what_else_is_put_in_its_place(
    playground: Playground,
) -> None:
    limits, one = playground.settings.limits, _id(playground, "step-10")
    for kind, text in (("checkpoint", "10, 100"), ("adapter", "step-10, step-100, words+adapter")):
        request = _asked(playground, (kind, text), ("weight", "0, 0.5"), stack=["stain", "step-10"], baseline=False)
        x, y = (axis.model_copy(update={"adapter": one}) for axis in (request.x, request.y or request.x))
        laid = board(request.model_copy(update={"x": x, "y": y}), playground.library, limits)
        half = len(laid.cells) // 2
        for cells, weight in ((laid.cells[:half], 0.0), (laid.cells[half:], 0.5)):
            for cell in cells:
                stain, *rest = cell.request.adapters
                assert (stain.adapter, stain.weight) == (_id(playground, "stain"), 1.0)
                assert [use.weight for use in rest] == [weight] * len(rest)
    both = _asked(playground, ("checkpoint", "10"), ("adapter", "words"), stack=["stain", "step-10"])
    x, y = (axis.model_copy(update={"adapter": one}) for axis in (both.x, both.y or both.x))
    with pytest.raises(ConfigError, match="two axes put others in the place of step-10"):
        board(both.model_copy(update={"x": x, "y": y}), playground.library, limits)


# Plans


def test_too_many_cells_are_refused_before_they_are_made(playground: Playground, grids: Grids) -> None:
    limits = playground.settings.limits
    with pytest.raises(ConfigError, match=f"1,000 values; {limits.cells} are the most"):
        grids.plan(_asked(playground, ("seed", "1..1000"), ("weight", "0:1:0.001")))
    with pytest.raises(ConfigError, match=r"21 x 21 are 441 cells; 400 are the most"):
        grids.plan(_asked(playground, ("weight", "1:2:0.05"), ("seed", "1..21"), baseline=False))


def test_too_much_work_is_refused(folder: Path, tmp_path: Path) -> None:
    playground = Playground(Settings(tmp_path, adapters=(folder,), limits=Limits(work=64 * 64 * 2 * 10)))
    try:
        assert Grids(playground).plan(_asked(playground, ("seed", "1..5"))).cells == 10
        with pytest.raises(ConfigError, match=r"12 pictures .* 1\.2 times too much"):
            Grids(playground).plan(_asked(playground, ("seed", "1..6")))
    finally:
        playground.close()


def test_axes_about_the_same_and_weights_of_nothing_are_refused(playground: Playground, grids: Grids) -> None:
    with pytest.raises(ConfigError, match="two axes are about seed"):
        grids.plan(_asked(playground, ("seed", "1"), ("seed", "2")))
    with pytest.raises(ConfigError, match="the stack has no adapter"):
        grids.plan(_asked(playground, ("weight", "0,1"), stack=[]))


def test_what_cannot_be_merged_is_refused_at_once(playground: Playground, grids: Grids) -> None:
    with pytest.raises(ConfigError, match="slerp merges 2 adapters, and there are 1"):
        grids.plan(_asked(playground, ("rule", "live, slerp")))


def test_equal_cells_are_drawn_once_and_weights_share_batches(playground: Playground, grids: Grids) -> None:
    plan = grids.plan(_asked(playground, ("weight", "0:1:0.25"), ("seed", "1..4")))
    assert (plan.cells, plan.swaps, plan.encodes) == (24, 1, 1)
    assert plan.batches == 4  # the base, 0, and two strengths at a time
    one = grids.plan(_asked(playground, ("weight", "0:1:0.125")))
    assert (one.cells, one.batches) == (10, 3)  # the base; 0, which has its sums; eight strengths at once
    several = grids.plan(_asked(playground, ("adapter", "stain, words, none"), ("weight", "0.5, 1")))
    assert (several.cells, several.swaps) == (8, 2)
    assert several.encodes == 3  # the base and stain; words at two strengths


def test_swaps_are_one_for_each_stack_whatever_the_axes_order(playground: Playground, grids: Grids) -> None:
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        rows = (("adapter", "stain, words, a+b, c"), ("seed", "1..3"), ("steps", "2, 3"))
        rows = (("adapter", "stain\nwords\na+b, c"), *rows[1:])
        assert grids.plan(_asked(playground, *(rows[k] for k in order))).swaps == 3


def test_batches_have_the_base_and_weight_zero_in_the_same_places(playground: Playground) -> None:
    stain = _id(playground, "stain")
    rows = [
        GenerateRequest.of({"seed": seed, "adapters": [] if w is None else [{"adapter": stain, "weight": w}]})
        for w in (None, 0.0, 0.5, 1.0)
        for seed in range(3)
    ]
    order = ordering.batches(rows, lambda request: 8)
    assert order == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert ordering.batches(rows, lambda request: 2)[:4] == [[0], [1, 2], [3], [4, 5]]
    assert sorted(k for batch in ordering.batches(rows, lambda request: 1) for k in batch) == list(range(12))


# Drawing


def test_a_grid_is_what_was_planned_and_weight_zero_is_the_base_to_the_bit(
    playground: Playground, grids: Grids
) -> None:
    request = _asked(playground, ("weight", "0, 0.5, 1"), ("seed", "1, 2"), ("adapter", "stain, words"), prompt="a hat")
    plan, counts = grids.plan(request), playground.studio.counts
    before = dict(counts)

    def begun(event: Event) -> None:
        if isinstance(event, Made) and isinstance(event.item, Grid):
            assert all(cell.picture is None for cell in event.item.cells)

    grid, events = _drawn(grids.start(request, owner="me"), begun)
    assert {name: counts[name] - before.get(name, 0) for name in ("calls", "encodes")} == {
        "calls": plan.batches,
        "encodes": plan.encodes,
    }
    assert isinstance(events[-1], Done)
    cells = [event.item for event in events if isinstance(event, Made)][1:]
    assert sorted(cell.index for cell in cells) == list(range(len(grid.cells))) == list(range(plan.cells))
    assert grid.labels == (("base", "weight 0", "weight 0.5", "weight 1"), ("seed 1", "seed 2"), ("stain", "words"))
    for cell in grid.cells:
        if cell.place[0] == 0:
            assert (cell.base, cell.difference, cell.request.adapters) == (None, None, ())
        elif cell.place[0] == 1:
            assert cell.request.adapters[0].weight == 0
            assert cell.difference == SAME
        else:
            assert cell.difference is not None
            assert cell.difference.mean > 0.05
            assert cell.difference == difference(_image(cell), _image(grid.cells[cell.base or 0]))
    assert len({cell.picture.id for cell in grid.cells if cell.picture and cell.place[0] == 0}) == 2  # z shares them
    assert len({cell.picture.id for cell in grid.cells if cell.picture}) == 14
    assert grids.get(grid.id, "me") == grid
    assert grids.plan(request).seconds is not None


def test_cells_are_the_pictures_that_their_requests_draw_alone(playground: Playground, grids: Grids) -> None:
    grid, _ = _drawn(grids.start(_asked(playground, ("weight", "0.4, 1"), ("prompt", "a fox\na bus"))))
    for cell in grid.cells:
        (alone,) = playground.generate(cell.request).result()
        with Image.open(alone.path) as image:
            assert difference(_image(cell), image).largest <= 2
        assert cell.picture is not None
        assert cell.picture.record is not None
        assert cell.picture.record["grid"]["id"] == grid.id
        assert cell.again.layout is not None  # the batch that it was drawn in
        assert cell.again == GenerateRequest.of(cell.picture.record["request"])
        with Image.open(playground.generate(cell.again).result()[0].path) as image:
            assert difference(_image(cell), image) == SAME


def test_a_base_is_on_the_axis_of_adapters_or_on_one_of_its_own(playground: Playground, grids: Grids) -> None:
    grid, _ = _drawn(grids.start(_asked(playground, ("seed", "1"), ("weight", "1"), seed=-1)))
    assert grid.labels == (("seed 1",), ("base", "weight 1"), ("",))
    assert grid.cells[1].base == 0
    grid, _ = _drawn(grids.start(_asked(playground, ("seed", "1"))))
    assert grid.labels == (("seed 1",), ("base", "with adapters"), ("",))
    assert grids.plan(_asked(playground, ("seed", "1, 2"), stack=[])).cells == 2
    assert grids.plan(_asked(playground, ("seed", "1, 2"), baseline=False)).cells == 2


def test_rules_merge_the_stack_into_adapters_that_stay(playground: Playground, grids: Grids) -> None:
    request = _asked(playground, ("rule", "live, weighted, ties density=0.5"), stack=["stain", "a+b, c"])
    plan = grids.plan(request)
    grid, _ = _drawn(grids.start(request))
    assert list(grid.labels[0]) == ["base", "live stack", "weighted", "ties density=0.5"]
    live_stack, weighted, ties = grid.cells[1:]
    assert difference(_image(live_stack), _image(weighted)).largest <= 2
    assert difference(_image(live_stack), _image(ties)).mean > 0.05
    merged = playground.library.get(weighted.request.adapters[0].adapter)
    assert merged.folder == "rules"
    assert (plan.cells, plan.swaps, plan.batches) == (4, 3, 4)
    files = {card.id for card in playground.library.cards(folder="rules")}
    _drawn(grids.start(request))
    assert {card.id for card in playground.library.cards(folder="rules")} == files


def test_a_grid_that_is_cancelled_keeps_its_cells_and_another_process_draws_the_rest(
    folder: Path, tmp_path: Path
) -> None:
    settings = Settings(tmp_path, adapters=(folder,))
    playground = Playground(settings)
    request = _asked(playground, ("weight", "0, 0.5, 1"), ("seed", "1..3"))
    whole, _ = _drawn(Grids(playground).start(request))
    grids, ids = Grids(playground), list[str]()
    ticket = grids.start(request)
    for event in ticket.events():
        if isinstance(event, Made) and isinstance(event.item, Grid):
            ids.append(event.item.id)
        elif isinstance(event, Made) and sum(c.picture is not None for c in grids.get(ids[0]).cells) > 5:
            ticket.cancel()
        if isinstance(event, Failed):
            assert event.cancelled
    done = [cell for cell in grids.get(ids[0]).cells if cell.picture is not None]
    assert 5 < len(done) < 12
    playground.close()

    playground = Playground(settings)
    try:
        grids = Grids(playground)
        assert [cell.index for cell in grids.get(ids[0]).cells if cell.picture] == [cell.index for cell in done]
        grid, events = _drawn(grids.resume(ids[0]))
        made = [event.item for event in events if isinstance(event, Made)][1:]
        assert {cell.index for cell in made} == set(range(12)) - {cell.index for cell in done}
        assert [cell.difference for cell in grid.cells] == [cell.difference for cell in whole.cells]
        assert all(difference(_image(a), _image(b)) == SAME for a, b in zip(grid.cells, whole.cells, strict=True))
        for cell in grid.cells:
            with Image.open(playground.generate(cell.again).result()[0].path) as image:
                assert difference(_image(cell), image) == SAME
        assert grids.recent()[0].id == grid.id
        assert [event for event in _drawn(grids.resume(grid.id))[1] if isinstance(event, Progress)] == []
    finally:
        playground.close()


def test_a_deleted_picture_is_drawn_again_to_the_bit(playground: Playground, grids: Grids) -> None:
    grid, _ = _drawn(grids.start(_asked(playground, ("weight", "0.5, 1"), ("seed", "1, 2"))))
    cell = grid.cells[2]
    assert cell.picture is not None
    before = np.asarray(_image(cell)).copy()
    playground.album.remove(cell.picture.id)
    other = Grids(playground)
    assert [one.index for one in other.get(grid.id).cells if one.picture is None] == [2]
    again, _ = _drawn(other.resume(grid.id))
    assert np.array_equal(before, np.asarray(_image(again.cells[2])))


def test_a_grid_is_not_resumed_with_another_adapter(folder: Path, tmp_path: Path) -> None:
    adapters = tmp_path / "own"
    adapters.mkdir()
    path = adapters / "mine.safetensors"
    path.write_bytes((folder / "stain.safetensors").read_bytes())
    playground = Playground(Settings(tmp_path / "home", adapters=(adapters,)))
    try:
        grids = Grids(playground)
        grid, _ = _drawn(grids.start(_asked(playground, ("weight", "1"), stack=["mine"])))
        path.write_bytes((folder / "words.safetensors").read_bytes())
        playground.library.scan()
        with pytest.raises(ConfigError, match="mine has changed since this grid was begun"):
            grids.resume(grid.id)
    finally:
        playground.close()


def test_a_grid_whose_adapter_changes_while_it_is_drawn_or_waits_is_ended(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = tmp_path / "own"
    adapters.mkdir()
    path, other = adapters / "mine.safetensors", (folder / "words.safetensors").read_bytes()
    path.write_bytes(first := (folder / "stain.safetensors").read_bytes())
    playground = Playground(Settings(tmp_path / "home", adapters=(adapters,), limits=Limits(drawn_together=64 * 64)))
    try:
        grids, ids = Grids(playground), list[str]()
        draw = playground.studio.draw

        def exchanged(*given: Any) -> Any:
            made = draw(*given)
            if given[0][0].adapters:
                path.write_bytes(other)
            return made

        monkeypatch.setattr(playground.studio, "draw", exchanged)
        ticket = grids.start(_asked(playground, ("seed", "1, 2"), stack=["mine"]))
        *events, end = ticket.events()
        assert isinstance(end, Failed)
        assert "mine has changed since this grid was begun" in end.message
        ids = [event.item.id for event in events if isinstance(event, Made) and isinstance(event.item, Grid)]
        assert [cell.picture is None for cell in grids.get(ids[0]).cells] == [False, False, False, True]
        monkeypatch.setattr(playground.studio, "draw", draw)
        path.write_bytes(first)
        held = playground.desk.submit(lambda ticket: _until_cancelled(ticket))
        waiting = grids.resume(ids[0])
        path.write_bytes(other)
        held.cancel()
        with pytest.raises(ImgadaptError, match="mine has changed"):
            waiting.result()
    finally:
        playground.close()


def test_a_grid_that_was_finished_since_it_was_looked_at_is_not_drawn_again(
    playground: Playground, grids: Grids, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, _ = _drawn(grids.start(_asked(playground, ("seed", "1, 2"))))
    get, old = grids.get, replace(grid, cells=[replace(cell, picture=None) for cell in grid.cells])
    seen = iter([old])
    monkeypatch.setattr(grids, "get", lambda id, owner="": next(seen, None) or get(id, owner))
    assert [cell.picture for cell in _drawn(grids.resume(grid.id))[0].cells] == [cell.picture for cell in grid.cells]


def test_steps_that_a_sampler_has_not_are_refused_before_anything_is_drawn(playground: Playground) -> None:
    grids, calls = Grids(playground), playground.studio.counts["calls"]
    with pytest.raises(ImgadaptError, match="LCM takes 50 steps at most, not 60"):
        grids.start(_asked(playground, ("steps", "2, 60"), sampler="LCM")).result()
    assert playground.studio.counts["calls"] == calls


def test_a_stack_is_merged_anew_on_another_base_where_its_change_depends_on_it(tmp_path: Path) -> None:
    pipe = demo.pipeline()
    pipe.save_pretrained(tmp_path / "models/other")
    weights = tmp_path / "models/other/unet/diffusion_pytorch_model.safetensors"
    save_file({key: tensor * 1.5 for key, tensor in load_file(weights).items()}, weights)
    (tmp_path / "home/adapters").mkdir(parents=True)
    torch.manual_seed(0)
    attach(pipe, DoRA(LoRA(rank=2, alpha=2.0)), targets=["attention"])
    for parameter in live.parameters(pipe):
        with torch.no_grad():
            parameter += 0.1 * torch.randn_like(parameter)
    save(collect(pipe), tmp_path / "home/adapters/turned.safetensors", format="imgadapt")
    playground = Playground(Settings(tmp_path / "home", models=(tmp_path / "models",)))
    try:
        merged: list[str] = []
        for base in ("demo", "other"):
            request = _asked(
                playground, ("rule", "live, weighted"), stack=["turned"], base=playground.bases.named(base).id
            )
            grid, _ = _drawn(Grids(playground).start(request))
            assert difference(_image(grid.cells[1]), _image(grid.cells[0])).mean > 0.5
            assert difference(_image(grid.cells[1]), _image(grid.cells[2])).largest <= 2
            merged.append(grid.cells[2].request.adapters[0].adapter)
        assert merged[0] != merged[1]
    finally:
        playground.close()


def test_two_cannot_draw_the_same_grid_and_one_out_of_the_queue_is_free_again(
    playground: Playground, grids: Grids
) -> None:
    grid, _ = _drawn(grids.start(_asked(playground, ("seed", "1"))))
    held = playground.desk.submit(lambda ticket: _until_cancelled(ticket))
    waiting = grids.resume(grid.id)
    with pytest.raises(Busy, match="already"):
        grids.resume(grid.id)
    waiting.cancel()
    again = grids.resume(grid.id)
    held.cancel()
    assert _drawn(again)[0].id == grid.id


def _until_cancelled(ticket: Ticket[None]) -> None:
    ticket._stop.wait()  # pyright: ignore[reportPrivateUsage] # the event itself


def test_grids_of_others_are_not_seen_where_the_playground_is_shared(folder: Path, tmp_path: Path) -> None:
    playground = Playground(Settings(tmp_path, adapters=(folder,), shared=True))
    try:
        grids = Grids(playground)
        grid, _ = _drawn(grids.start(_asked(playground, ("seed", "1")), owner="ann"))
        assert [one.id for one in grids.recent("ann")] == [grid.id]
        assert grids.recent("bob") == []
        for call in (grids.get, grids.export):
            with pytest.raises(ConfigError, match="no such grid"):
                call(grid.id, "bob")
        with pytest.raises(ConfigError, match="no such grid"):
            grids.resume(grid.id, owner="bob")
    finally:
        playground.close()


@pytest.mark.parametrize("id", ["", "..", "../../etc", "0" * 16, "A" * 16, "grid\x00", "0" * 15 + "\n"])
def test_an_id_that_was_not_handed_out_opens_nothing(grids: Grids, id: str) -> None:
    with pytest.raises(ConfigError, match="no such grid"):
        grids.get(id)


# Export


def test_an_export_has_a_page_that_works_alone_the_pictures_as_they_are_and_json(
    playground: Playground, grids: Grids
) -> None:
    nasty = "<script>alert(1)</script>\"'&"
    request = _asked(playground, ("prompt", f"a fox\n{nasty}"), ("weight", "0, 1"), name=f"{nasty} $title")
    grid, _ = _drawn(grids.start(request))
    path = grids.export(grid.id)
    assert path.is_relative_to(playground.settings.home)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        page, said = archive.read("index.html").decode(), json.loads(archive.read("grid.json"))
        pictures = {name: archive.read(name) for name in archive.namelist() if name.endswith(".png")}
    assert len(pictures) == 6
    for cell, row in zip(grid.cells, said["cells"], strict=True):
        assert cell.picture is not None
        assert pictures[row["file"]] == cell.picture.path.read_bytes()
        assert GenerateRequest.of(row["request"]) == cell.again
        assert f'src="{row["file"]}"' in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp; $title" in page
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    assert page.count('<span class="same">') == 2
    for text in (page, json.dumps(said)):
        assert str(playground.settings.home) not in text
        assert "owner" not in text
    assert [row["difference"] for row in said["cells"][2:4]] == [
        {"mean": 0.0, "largest": 0, "changed": 0.0, "psnr": None}
    ] * 2


def test_a_grid_of_which_nothing_is_drawn_has_no_export(playground: Playground, tmp_path: Path) -> None:
    request = _asked(playground, ("seed", "1"))
    empty = Grid("0" * 16, request, (["seed 1"], [""], [""]), [Cell(0, (0, 0, 0), request.common)])
    with pytest.raises(ConfigError, match="nothing of this grid is drawn"):
        exporting.write(empty, tmp_path / "grid.zip", {})
    assert list(tmp_path.iterdir()) == []


def _image(cell: Cell) -> Image.Image:
    assert cell.picture is not None
    with Image.open(cell.picture.path) as image:
        return image.convert("RGB")


# The program


def test_the_program_writes_the_same_grid_and_goes_on_with_one_that_was_begun(
    run: Callable[[str, Sequence[str]], None], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "grid.zip"
    arguments = ["a fox", "--adapter", str(folder / "stain.safetensors"), "--x", "weight=0, 1", "--y", "seed=1"]
    arguments += ["--steps", "2", "--output", str(output), "--home", str(tmp_path / "home")]
    run("grid", arguments)
    with zipfile.ZipFile(output) as archive:
        said = json.loads(archive.read("grid.json"))
        assert len([name for name in archive.namelist() if name.endswith(".png")]) == 3
    assert said["labels"] == [["base", "weight 0", "weight 1"], ["seed 1"], [""]]
    assert said["cells"][1]["difference"]["changed"] == 0 < said["cells"][2]["difference"]["changed"]
    assert "3 cells in 3 batches" in capsys.readouterr().out
    next((tmp_path / "home" / "outputs").rglob(f"*{said['cells'][2]['picture']}*")).unlink()
    run("grid", arguments)
    assert "going on with the grid that was begun: 1 cells" in capsys.readouterr().out


def test_the_program_says_what_is_no_axis(run: Callable[[str, Sequence[str]], None], tmp_path: Path) -> None:
    for text in ("strength=1", "weight", "=1"):
        with pytest.raises(ConfigError, match="is no axis"):
            run("grid", ["a fox", "--x", text, "--home", str(tmp_path)])


def test_a_folder_of_adapters_is_not_taken_for_one(
    run: Callable[[str, Sequence[str]], None], folder: Path, tmp_path: Path
) -> None:
    for name, more in (("grid", ["--x", "weight=1"]), ("generate", [])):
        with pytest.raises(ConfigError, match="is a folder, and not one of peft's: name one of its files"):
            run(name, ["a fox", *more, "--adapter", str(folder), "--output", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []
