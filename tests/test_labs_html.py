"""What Compare, Merge and Train show: numbers as they are, and all text as text."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from imgadapt_ui import axes, grid_html, lab_html, train_html
from PIL import Image

from imgadapt.playground.grids.analyser import BlockEffect
from imgadapt.playground.grids.grids import Cell, Grid, GridPlan, GridRequest
from imgadapt.playground.merges.lab import LabReport
from imgadapt.playground.pictures.album import Picture
from imgadapt.playground.pictures.comparing import Difference
from imgadapt.playground.requests import GenerateRequest
from imgadapt.playground.trainings.runs import Check, Run

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(1)>' {{value}} ${value}"
SAME, APART = Difference(0.0, 0, 0.0, None), Difference(3.25, 90, 0.5, 31.04)


class _Tags(HTMLParser):
    """All elements of a piece of HTML, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said = ""
        self.open = list[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data

    def all(self, tag: str, look: str = "") -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag and look in [*(attrs.get("class") or "").split(), ""]]


def read(html: str) -> _Tags:
    """Parsed; every element is closed, and nothing of what is hostile became one."""
    parsed = _Tags(html)
    assert parsed.open == []
    assert not parsed.all("script")
    assert not [attrs for _, attrs in parsed.tags if any(name.startswith("on") for name in attrs)]
    return parsed


def picture(number: int) -> Picture:
    return Picture(f"picture{number:04}", Path("nowhere.png"), 64, 48, 0.0)


def grid(labels: tuple[list[str], list[str], list[str]], drawn: int) -> Grid:
    """A grid with so many cells drawn; the first column is the base."""
    common = GenerateRequest(prompt=HOSTILE)
    places = [
        (x, y, z) for z in range(len(labels[2]) or 1) for y in range(len(labels[1]) or 1) for x in range(len(labels[0]))
    ]
    cells = [
        Cell(
            k,
            place,
            common,
            picture(k) if k < drawn else None,
            (SAME if place[0] == 0 else APART) if k < drawn else None,
            None if place[0] == 0 else places.index((0, *place[1:])),
        )
        for k, place in enumerate(places)
    ]
    request = GridRequest.of(
        {"common": {"prompt": "a fox"}, "x": {"kind": "weight", "values": "0, 1"}, "name": HOSTILE}
    )
    return Grid("grid0000", request, labels, cells)


def test_a_grid_has_a_cell_for_each_place_in_the_order_of_its_labels() -> None:
    parsed = read(grid_html.table(grid((["base", "0.5", "1"], ["seed 1", "seed 2"], []), 4), drawing=True))
    assert [attrs["data-cell"] for attrs in parsed.all("button", "lab-cell")] == ["0", "1", "2", "3"]
    assert len(parsed.all("div", "lab-busy")) == 2
    assert [attrs["scope"] for attrs in parsed.all("th")] == ["col"] * 3 + ["row"] * 2
    assert parsed.said.count("0 = base") == 2
    assert parsed.said.count("Δ 3.25") == 2
    assert parsed.all("img")[1]["src"] == "/pictures/picture0001?side=256"


def test_every_sheet_of_a_third_axis_is_a_table_of_its_own() -> None:
    parsed = read(grid_html.table(grid((["base", "1"], ["a", "b"], ["x", "y", "z"]), 12)))
    assert len(parsed.all("table")) == 3
    assert len(parsed.all("button", "lab-cell")) == 12


def test_hostile_labels_are_text_in_a_grid() -> None:
    parsed = read(grid_html.table(grid(([HOSTILE, "1"], [HOSTILE], [HOSTILE]), 2)))
    assert parsed.said.count(HOSTILE) == 3
    assert {attrs["src"] for attrs in parsed.all("img")} == {f"/pictures/picture{k:04}?side=256" for k in range(2)}


def test_a_grid_says_what_its_numbers_are_once_it_has_some() -> None:
    assert grid_html.LEGEND in read(grid_html.table(grid((["base", "1"], ["a"], []), 2))).said
    assert grid_html.LEGEND not in grid_html.table(grid((["base", "1"], ["a"], []), 1))


def test_a_cell_is_compared_with_the_base_of_its_own_row() -> None:
    found = grid((["base", "1"], ["a", "b"], []), 4)
    assert [getattr(grid_html.base_of(found, cell), "index", None) for cell in found.cells] == [None, 0, None, 2]
    assert grid_html.named(found, found.cells[3]) == "1 · b"


def test_a_pair_has_both_pictures_a_handle_and_a_map() -> None:
    found = grid((["base", HOSTILE], [], []), 2)
    html = grid_html.pair(
        found.cells[1], found.cells[0], Image.new("RGB", (64, 48)), grid_html.named(found, found.cells[1])
    )
    parsed = read(html)
    sources = [attrs["src"] or "" for attrs in parsed.all("img")]
    assert sources[:2] == ["/pictures/picture0000", "/pictures/picture0001"]
    assert sources[2].startswith("data:image/webp;base64,")
    assert parsed.all("input")[0]["type"] == "range"
    assert "mean difference 3.25 of 255 · largest 90 · changed pixels 50.0% · PSNR 31.0 dB" in parsed.said


def test_equal_pictures_are_called_equal_to_the_bit() -> None:
    assert read(grid_html.numbers(SAME)).said == "Equal to the base to the bit."


def test_an_estimate_counts() -> None:
    said = grid_html.estimate(GridPlan(1200, 1, 3, 75, None))
    assert said == "1,200 cells · 1 adapter change · 3 prompts encoded · 75 batches · time not known yet"
    assert grid_html.estimate(GridPlan(1, 2, 1, 1, 65.0)).endswith("1 prompt encoded · 1 batch · about 1:05")


def test_bars_of_blocks_are_as_long_as_their_effects() -> None:
    parsed = read(grid_html.effects([BlockEffect(HOSTILE, 0.8, 0.2, 0.5), BlockEffect("mid", 0.0, 0.4, 0.5)]))
    widths = [(attrs["style"] or "").removeprefix("width: ") for attrs in parsed.all("i")]
    assert widths == ["100.0%", "25.0%", "50.0%", "0.0%", "50.0%", "50.0%"]
    assert HOSTILE in parsed.said


def test_a_matrix_of_cosines_has_their_signs_and_strengths() -> None:
    parsed = read(lab_html.cosines(["a", HOSTILE], [[1.0, -0.25], [-0.25, 1.0]]))
    assert [attrs["style"] for attrs in parsed.all("td") if "style" in attrs] == [
        "--much: 1.000",
        "--much: 0.250",
        "--much: 0.250",
        "--much: 1.000",
    ]
    assert len(parsed.all("td", "lab-c2")) == 2
    assert "-0.250" in parsed.said


def test_a_report_says_whether_the_live_stack_is_the_merge() -> None:
    found = LabReport(["a", "b"], [[1.0, 0.0], [0.0, 1.0]], [(1, 0.9), (4, 0.125), (8, 0.0)], True, [HOSTILE])
    parsed = read(lab_html.report(found))
    assert "draws what the merged file will" in parsed.said
    assert "rank 4: 12.5%" in parsed.said
    assert len(parsed.all("svg")) == 1
    assert HOSTILE in parsed.said


def run(state: str = "training") -> Run:
    loss = [(step, 1.0 / (1 + step), 1e-3) for step in range(40)]
    evaluations = [{"step": 20.0, "held_out": 0.5, "seen": 0.4}, {"step": 40.0, "held_out": 0.25, "seen": 0.2}]
    samples = [(20, picture(1)), (40, picture(2))]
    return Run("run00000", HOSTILE, state, 40, 80, 65.0, loss, evaluations, samples, [], HOSTILE, 0.0)


def test_a_run_shows_how_far_it_is_its_charts_and_samples() -> None:
    parsed = read(train_html.run(run()))
    bar = parsed.all("div", "lab-progress")[0]
    assert (bar["aria-valuenow"], bar["aria-valuemax"]) == ("40", "80")
    assert parsed.all("i")[0]["style"] == "width: 50.0%"
    assert "1:05 left" in parsed.said
    assert len(parsed.all("svg")) == 3
    assert [attrs["src"] for attrs in parsed.all("img")] == [f"/pictures/picture000{k}?side=256" for k in (2, 1)]
    assert "0.25" in parsed.said
    assert parsed.said.count(HOSTILE) == 2


def test_a_run_of_one_step_says_its_numbers_and_draws_no_axes() -> None:
    one = replace(run(), loss=[(1, 0.5, 1e-3)], evaluations=[{"step": 1.0, "held_out": 0.25, "seen": 0.125}])
    parsed = read(train_html.charts(one))
    assert not parsed.all("svg")
    for said in ("0.5 at step 1", "held-out loss 0.25 at step 1", "training loss 0.125 at step 1", "0.001 at step 1"):
        assert said in parsed.said


def test_a_run_that_has_ended_has_no_time_left() -> None:
    assert "left" not in read(train_html.head(run("done"))).said


def test_a_check_shows_findings_plan_and_sheet() -> None:
    plan = [("batch_size", "16", HOSTILE), ("steps", HOSTILE, "40 pictures, each seen 50 times")]
    parsed = read(train_html.check(Check([("error", HOSTILE), ("warning", "blurry")], [HOSTILE], plan, picture(7))))
    assert len(parsed.all("tr")) == 3
    assert "batch size" in parsed.said
    assert parsed.said.count(HOSTILE) == 4
    assert [len(parsed.all("p", look)) for look in ("lab-bad", "lab-warn")] == [1, 1]
    assert parsed.all("img")[0]["src"] == "/pictures/picture0007?side=1024"


def test_an_axis_of_nothing_is_none_and_others_say_what_they_are_about() -> None:
    assert axes.asked(["", "1, 2", None]) is None
    assert axes.asked(["seed", "1, 2", "adapter0"]) == {"kind": "seed", "values": "1, 2"}
    assert axes.asked(["weight", "0:1:0.5", "adapter0"]) == {
        "kind": "weight",
        "values": "0:1:0.5",
        "adapter": "adapter0",
    }
