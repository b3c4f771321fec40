"""The report of a run: numbers as in the logs, sentences for what is missing, and pictures of every row."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import imgadapt
from imgadapt import AdapterFile, LoRA, demo, live
from imgadapt.errors import ConfigError, OutputError
from imgadapt.file import save
from imgadapt.training import flags
from imgadapt.training.config import InversionConfig, TrainConfig
from imgadapt.training.report import charts, gallery, norms, page, readings, scores
from imgadapt.training.report.scores import Score
from imgadapt.training.report.verdicts import verdicts

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=y>&amp;"


# --- a run's folder, written by hand


def log(folder: Path, steps: int, **changed: Any) -> list[dict[str, Any]]:
    """A log whose loss falls from 1 and whose two pictures a step have times over the whole range."""
    rows = [
        {"step": k, "loss": 1 / (k + 1), "raw": 2 / (k + 1), "lr": 1e-3 * (k + 1) / steps, "grad_norm": 0.5 + k % 2,
         "seconds": 0.5 * (k + 1), "t": [(137 * k) % 1000, (911 * k + 5) % 1000], "losses": [1 / (k + 1), 3 / (k + 1)],
         **changed}
        for k in range(steps)
    ]  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def evaluate(folder: Path, held_out: Sequence[float], seen: Sequence[float] = (), spread: float = 0.01) -> None:
    """Evaluations every 10 steps, of a base whose loss is 1."""
    lines: list[str] = []
    for k, loss in enumerate(held_out):
        row: dict[str, float] = {"step": 10 * (k + 1)}
        for name, value in (("held_out", loss), ("seen", seen[k] if seen else loss)):
            row |= {name: value, f"{name}_base": 1.0, f"{name}_gain": 1 - value}
            row |= {f"{name}_gain_low": 1 - value - spread, f"{name}_gain_high": 1 - value + spread}
        lines.append(json.dumps(row) + "\n")
    (folder / "evaluations.jsonl").write_text("".join(lines))


def said(folder: Path, layers: Sequence[norms.Norm] = (), count: int = 8, pieces: tuple[int, int] = (1, 1)) -> str:
    """All verdicts, a line each."""
    rows = verdicts(
        readings.read(folder), layers, pictures={"seen": 16, "held_out": count}, max_grad_norm=1.0, pieces=pieces
    )
    return "\n".join(f"{row.mark}: {row.text}" for row in rows)


# --- readings


def test_readings_are_the_columns_of_the_logs(tmp_path: Path) -> None:
    rows = log(tmp_path, 20, preservation=0.25)
    evaluate(tmp_path, [0.9, 0.8])
    read = readings.read(tmp_path)
    assert read.steps == list(range(1, 21))
    assert read.figures["loss"] == [row["loss"] for row in rows]
    assert read.further == {"preservation": [0.25] * 20}
    assert read.times == [t for row in rows for t in row["t"]]
    assert read.at == [row["step"] + 1 for row in rows for _ in range(2)]
    assert read.seconds == 10.0
    assert [row["held_out"] for row in read.followed("held_out")] == [0.9, 0.8]
    assert read.remarks == []


def test_seconds_of_a_resumed_run_are_those_of_both_parts(tmp_path: Path) -> None:
    rows = log(tmp_path, 4)
    for row, seconds in zip(rows, (3.0, 6.0, 2.0, 4.0), strict=True):
        row["seconds"] = seconds
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert readings.read(tmp_path).seconds == 6.0 + 4.0


def test_smoothing_is_the_mean_of_the_last_values() -> None:
    assert readings.smooth([1, 2, 3, 4, math.inf, 6], 3) == [1, 1.5, 2, 3, 3.5, 5]
    assert math.isnan(readings.smooth([math.nan], 3)[0])
    assert [readings.window(n) for n in (0, 9, 40, 10_000)] == [1, 1, 4, 50]


def test_bins_hold_each_loss_once_and_their_means_are_those_of_the_log(tmp_path: Path) -> None:
    rows = log(tmp_path, 40)
    found = readings.bins(readings.read(tmp_path), 1000)
    assert len(found) == 10
    assert sum(len(row.losses) for row in found) == 80
    pairs = [(r["step"], t, x) for r in rows for t, x in zip(r["t"], r["losses"], strict=True)]
    for k, row in enumerate(found):
        assert (row.low, row.high) == (100 * k, 100 * k + 100)
        assert row.losses == [x for _, t, x in pairs if 100 * k <= t < 100 * k + 100]
        early = [x for s, t, x in pairs if 100 * k <= t < 100 * k + 100 and s < 10]
        late = [x for s, t, x in pairs if 100 * k <= t < 100 * k + 100 and s >= 30]
        assert row.early == (pytest.approx(sum(early) / len(early)) if early else None)
        assert row.late == (pytest.approx(sum(late) / len(late)) if late else None)


def test_a_time_at_the_very_end_is_in_the_last_bin(tmp_path: Path) -> None:
    log(tmp_path, 3, t=[1000.0, 0.0])
    found = readings.bins(readings.read(tmp_path), 1000)
    assert [len(row.losses) for row in found] == [3, *[0] * 8, 3]


def test_what_is_missing_or_torn_is_said(tmp_path: Path) -> None:
    remarks = readings.read(tmp_path).remarks
    assert len(remarks) == 2
    assert "There is no log.jsonl" in remarks[0]
    log(tmp_path, 3)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    (tmp_path / "evaluations.jsonl").write_text("")
    read = readings.read(tmp_path)
    assert len(read.steps) == 3
    assert read.remarks == [
        "1 of 4 lines of log.jsonl are not whole and are left out.",
        "evaluations.jsonl is empty, so there is no curve of an evaluation to show.",
    ]


# --- verdicts


@pytest.mark.parametrize(
    ("losses", "spread", "mark", "words"),
    [
        ([0.8, 0.7], 0.05, "good", "beats the base on held-out pictures: its loss is lower by 0.3 "
         "(95 % interval of the gain: 0.25 to 0.35) on 8 pictures"),
        ([1.1, 1.2], 0.05, "bad", "worse than the base on held-out pictures: its loss is higher by 0.2"),
        ([0.99, 0.98], 0.05, "note", "cannot be told from the base on held-out pictures: its loss is lower by 0.02"),
    ],
)  # fmt: skip
def test_the_base_is_beaten_when_the_interval_is_above_zero(
    tmp_path: Path, losses: list[float], spread: float, mark: str, words: str
) -> None:
    log(tmp_path, 20)
    evaluate(tmp_path, losses, spread=spread)
    assert f"{mark}: It " in said(tmp_path)
    assert words in said(tmp_path)


@pytest.mark.parametrize(
    ("losses", "line"),
    [
        ([0.8, 0.6, 0.7], "bad: The held-out loss rises again, by 0.1, 25% of its best gain, since step 20: that is "
         "overfitting. Use best.safetensors, which is step 20."),
        ([0.8, 0.6, 0.612], "note: The held-out loss has levelled off: it rose by 0.012, 3% of its best gain"),
        ([0.8, 0.6, 0.599], "good: The held-out loss has levelled off: the last step, 30, is the best."),
        ([0.8, 0.6, 0.5], "note: The held-out loss was still falling when the run ended (by 0.1 since step 20)"),
        ([1.2, 1.1, 1.3], "bad: No checkpoint is better than the base on held-out pictures; step 20 is the nearest."),
    ],
)  # fmt: skip
def test_the_held_out_curve_tells_overfitting_from_more_to_learn(
    tmp_path: Path, losses: list[float], line: str
) -> None:
    log(tmp_path, 30)
    evaluate(tmp_path, losses)
    assert line in said(tmp_path)


def test_training_pictures_learnt_by_heart_are_seen(tmp_path: Path) -> None:
    log(tmp_path, 20)
    evaluate(tmp_path, [0.9, 0.9], [0.8, 0.5])
    assert "bad: Training loss is far below held-out loss: the gain is 0.5 on training pictures and 0.1 on" in said(
        tmp_path
    )
    evaluate(tmp_path, [0.9, 0.9], [0.8, 0.88])
    assert "good: What is learnt carries over: the gain is 0.12 on training pictures and 0.1 on" in said(tmp_path)


def test_without_held_out_pictures_the_way_to_get_them_is_said(tmp_path: Path) -> None:
    log(tmp_path, 20)
    assert "--held-out-count 3" in said(tmp_path)
    evaluate(tmp_path, [0.5, 0.4])
    assert "2 pictures held out: too few" in said(tmp_path, count=2)
    assert "note: It beats the base" in said(tmp_path, count=2)
    assert "too few" not in said(tmp_path)


def test_skipped_and_cut_steps_are_counted(tmp_path: Path) -> None:
    rows = log(tmp_path, 30)
    for row in rows[:2]:
        row["grad_norm"] = math.inf
    for row in rows[5:]:
        row["grad_norm"] = 3.0
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = said(tmp_path, pieces=(1, 4))
    assert "note: 2 of 30 steps were skipped" in text
    assert "note: 26 of 30 steps were cut to the gradient norm 1" in text  # the last 25, and the fourth at 1.5
    assert "cut into 4 pieces instead of 1" in text
    for row in rows[:6]:
        row["grad_norm"] = math.inf
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "bad: 6 of 30 steps were skipped" in said(tmp_path)


def test_layers_that_changed_too_much_or_not_at_all_are_named(tmp_path: Path) -> None:
    layers = [norms.Norm("unet.a", 0.6, 1.0), norms.Norm("unet.b", 0.0, 1.0), norms.Norm("unet.c", 0.5, 1.0)]
    text = said(tmp_path, layers)
    assert "bad: 1 of 3 layers is changed by more than 50% of the weight: unet.a (60%)" in text
    assert "bad: 1 of 3 layers is not changed at all: unet.b." in text


# --- charts


def test_ticks_are_round_and_inside() -> None:
    assert charts.ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert charts.ticks(-0.31, 0.01, 5) == pytest.approx([-0.3, -0.2, -0.1, 0])
    assert [charts.number(x) for x in (0.0, 0.01234, 1200, 2e-5, -0.5)] == ["0", "0.0123", "1,200", "2e-5", "-0.5"]


def test_a_chart_of_nothing_one_point_or_infinity_is_drawn() -> None:
    for line in (charts.Line("", [], []), charts.Line("", [3], [0.0]), charts.Line("", [1, 2], [math.inf, 1.0])):
        made = charts.svg(charts.Chart("x", [line]))
        assert made.startswith("<svg")
        assert not re.search("nan|inf", made)


def test_a_line_goes_through_its_points_to_scale() -> None:
    made = charts.svg(charts.Chart("x", [charts.Line("", [0, 1, 2], [0.0, 1.0, 0.5])]))
    corners = re.search(r'class="line s1" d="M([^"]*)"', made)
    assert corners
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, pair.split())) for pair in corners[1].split("L"))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y2 == pytest.approx((y0 - y1) / 2, abs=0.2)
    assert y1 < y0  # up is less


def test_a_long_run_is_thinned_and_keeps_its_end() -> None:
    thinned = charts._thinned(range(100_000), [float(k) for k in range(100_000)])
    assert len(thinned) <= charts.MOST + 1
    assert thinned[-1] == (99_999, 99_999.0)


def test_names_in_a_chart_are_escaped() -> None:
    line = charts.Line(HOSTILE, [0, 1], [0.0, 1.0], [0, 0], [1, 1])
    made = charts.svg(charts.Chart(HOSTILE, [line], levels=[(0.5, HOSTILE)], mark=(1, HOSTILE)))
    assert "<script" not in made
    assert "<img" not in made


# --- the page


class _Tags(HTMLParser):
    """Every tag of a page with its attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


class _Family:
    """A base whose samples are of one colour, which says the seed."""

    device = torch.device("cpu")

    def __init__(self, pipeline: Any) -> None:
        self.pipeline, self.calls = pipeline, 0

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], *, side: int) -> list[Image.Image]:
        self.calls += 1
        return [Image.new("RGB", (side, side), (seed, 0, 0)) for seed in seeds]


class _Drawing(_Family):
    """The embedded base; its samples take two steps, so that they are quick."""

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], *, side: int) -> list[Image.Image]:
        self.pipeline.set_progress_bar_config(disable=True)
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]
        return self.pipeline(list(prompts), num_inference_steps=2, generator=sources, height=side, width=side).images


_PICTURES = ("accordion.png", "axe.png")


@dataclass(frozen=True)
class _Example:
    path: Path


@dataclass(frozen=True)
class _Made:
    """A run's folder with all that a report needs, and the report of it."""

    config: TrainConfig
    family: Any
    prompts: list[str]
    held_out: int = 8
    pictures: tuple[str, ...] = _PICTURES
    pieces: int = 1

    @property
    def adapter(self) -> Path:
        return self.config.output / "adapter.safetensors"

    def page(self) -> str:
        views = [
            SimpleNamespace(example=_Example(demo.STYLE / "train" / name), size=(64, 64)) for name in self.pictures
        ]
        materials = {"seen": SimpleNamespace(views=views)}
        if self.held_out:
            materials["held_out"] = SimpleNamespace(views=views * self.held_out)
        evidence: Any = SimpleNamespace(
            wanted=lambda: self.prompts, side=64, materials=materials, snapshots=self.config.output / "snapshots",
            objective=SimpleNamespace(schedule=SimpleNamespace(total=1000)),
        )  # fmt: skip
        material: Any = SimpleNamespace(views=views)
        outcome = page.Outcome([self.adapter], material, 1e-7, self.pieces)
        return page.write(self.config, self.family, evidence, outcome).read_text("utf-8")


def adapter(pipe: Any, strength: float) -> AdapterFile:
    """A LoRA on the middle block that is not a fresh one."""
    imgadapt.attach(pipe, LoRA(rank=2, alpha=1), targets=["unet.mid_block.*to_[qv]"])
    for k, parameter in enumerate(live.parameters(pipe)):
        source = torch.Generator().manual_seed(k)
        parameter.data = strength * torch.randn(parameter.shape, generator=source)
    made = live.collect(pipe)
    imgadapt.detach(pipe)
    return made


@pytest.fixture
def made(pipe: Any, tmp_path: Path) -> _Made:
    log(tmp_path, 60)
    evaluate(tmp_path, [0.9, 0.8, 0.85, 0.7, 0.75, 0.76])
    for k in range(1, 7):
        save(adapter(pipe, 0.05 * k), tmp_path / "snapshots" / f"step-{10 * k:07d}.safetensors")
    save(adapter(pipe, 0.3), tmp_path / "adapter.safetensors")
    config = TrainConfig.of({"folder": "photos", "output": tmp_path, "steps": 60, "rank": 2, "title": "a style"})
    return _Made(config, _Family(pipe), ["a fox", "two keys", "an apple"])


def test_the_grid_has_the_base_and_four_snapshots_at_each_strength(made: _Made) -> None:
    page = _Tags(made.page())
    cells = page.all("img")
    labels = ["base", *(f"step {k} at {s}" for k in (10, 40, 60) for s in ("0.5", "1"))]  # the middle is the best
    assert [cell["alt"] for cell in cells] == [f"{label}: {p}" for label in labels for p in made.prompts]
    assert all(str(cell["src"]).startswith("data:image/png;base64,") for cell in cells)
    assert "best" in page.text
    evaluate(made.config.output, [0.9, 0.7, 0.85, 0.8, 0.75, 0.76])
    labels = ["base", *(f"step {k} at {s}" for k in (10, 20, 40, 60) for s in ("0.5", "1"))]
    assert len(_Tags(made.page()).all("img")) == len(labels) * 3


def test_each_row_is_what_its_snapshot_draws_and_the_base_is_bare_again(made: _Made, pipe: Any) -> None:
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    family: Any = _Drawing(pipe)
    strong = save(adapter(pipe, 3.0), made.config.output / "strong.safetensors")
    rows, unseen = gallery.draw(family, [gallery.Snapshot("strong", strong)], [0.5, 1.0], made.prompts, 64)
    assert unseen == []
    assert not imgadapt.adapters(pipe)
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())
    drawn = [[image.tobytes() for image in row.images] for row in rows]
    assert drawn[0] == [image.tobytes() for image in family.draw(made.prompts, [0, 1, 2], side=64)]
    imgadapt.attach(pipe, imgadapt.load(strong), weight=0.5)
    assert drawn[1] == [image.tobytes() for image in family.draw(made.prompts, [0, 1, 2], side=64)]
    assert len({tuple(row) for row in drawn}) == 3


def test_large_pictures_are_drawn_one_at_a_time() -> None:
    family: Any = _Family(None)
    (row,), _ = gallery.draw(family, [], [1.0], ["a", "b", "c"], 1024)
    assert family.calls == 3
    assert [image.getpixel((0, 0)) for image in row.images] == [(k, 0, 0) for k in range(3)]
    assert gallery.embedded(Image.new("RGB", (1024, 512))).startswith("data:image/jpeg;base64,")


def test_the_numbers_in_the_page_are_those_of_the_logs(made: _Made) -> None:
    text = _Tags(made.page()).text
    for row in readings.bins(readings.read(made.config.output), 1000):
        early, late = ("\u2013" if x is None else f"{x:.4f}" for x in (row.early, row.late))
        name = f"t {charts.number(row.low)} to {charts.number(row.high)}"
        assert f"{name}: {early} → {late} ({len(row.losses)})" in text
    for k, loss in enumerate([0.9, 0.8, 0.85, 0.7, 0.75, 0.76]):
        best = " (best)" if k == 3 else ""
        assert f"{10 * (k + 1)}{best} {loss:.5f} 1.00000 {1 - loss:.5f}" in text
    loss = [1 / k for k in range(1, 61)]
    assert f"to {sum(loss[-6:]) / 6:.3g}".rstrip("0") in str(_Tags(made.page()).all("svg")[1]["aria-label"])
    assert "60 of 4 pictures" in text
    assert "time 30 s, 8 pictures a second" in text


def test_a_bin_that_is_empty_at_one_end_of_the_run_says_so(made: _Made) -> None:
    rows = log(made.config.output, 40)
    for k, row in enumerate(rows):
        row["t"] = [50.0, 50.0] if k < 10 else [150.0, 150.0]
    (made.config.output / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = _Tags(made.page()).text
    early = sum(4 / (k + 1) for k in range(10)) / 20
    late = sum(4 / (k + 1) for k in range(30, 40)) / 20
    assert f"t 0 to 100: {early:.4f} → \u2013 (20)" in text
    assert f"t 100 to 200: \u2013 → {late:.4f} (60)" in text
    assert "t 200 to 300: \u2013 → \u2013 (0)" in text
    assert "a fox seed 0 two keys seed 1 an apple seed 2" in text


def test_the_watched_losses_are_drawn_minus_the_bases_with_their_intervals(made: _Made) -> None:
    evaluate(made.config.output, [0.9, 0.7, 0.8], [0.8, 0.6, 0.5])
    page = made.page()
    points = re.findall(r"<title>(held-out|training) pictures, step (.*?)</title>", page)
    assert points == [
        ("held-out", "0: 0 (0 to 0)"), ("held-out", "10: -0.1 (-0.11 to -0.09)"),
        ("held-out", "20: -0.3 (-0.31 to -0.29)"), ("held-out", "30: -0.2 (-0.21 to -0.19)"),
        ("training", "0: 0 (0 to 0)"), ("training", "10: -0.2 (-0.21 to -0.19)"),
        ("training", "20: -0.4 (-0.41 to -0.39)"), ("training", "30: -0.5 (-0.51 to -0.49)"),
    ]  # fmt: skip
    assert "best: step 20</text>" in page
    assert "the base</text>" in page


def test_the_page_stands_alone_and_speaks_to_those_who_do_not_see(made: _Made) -> None:
    page = made.page()
    tags = _Tags(page)
    assert not tags.all("script")
    assert not tags.all("link")
    assert not re.findall(r"https?://|@import|url\(", page)
    assert all(attributes.get("aria-label") for attributes in tags.all("svg"))
    assert all(attributes.get("alt") for attributes in tags.all("img"))
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_the_same_run_gives_the_same_page(made: _Made) -> None:
    assert made.page() == made.page()


def test_hostile_prompts_titles_and_names_are_text(made: _Made) -> None:
    config = made.config.model_copy(update={"title": HOSTILE, "caption": HOSTILE, "method": HOSTILE})
    log(made.config.output, 60, **{HOSTILE: 1.0})
    page = replace(made, config=config, prompts=[HOSTILE]).page()
    tags = _Tags(page)
    assert not tags.all("script")
    assert all(str(attributes["src"]).startswith("data:") for attributes in tags.all("img"))
    assert not [key for _, attributes in tags.tags for key in attributes if key.startswith("on")]
    assert tags.text.count(HOSTILE) > 4
    assert tags.all("img")[0]["alt"] == f"base: {HOSTILE}"


def test_private_leaves_out_words_names_and_paths(made: _Made) -> None:
    secret = {"title": "secret", "folder": Path("secret"), "trigger": "secret", "base": "secret", "caption": "secret",
              "held_out": Path("secret"), "score_with": []}  # fmt: skip
    config = made.config.model_copy(update=secret)
    (config.output / "snapshots" / "step-0000060.safetensors").write_bytes(b"torn")
    open_page = replace(made, config=config, prompts=["a secret"]).page()
    page = replace(made, config=config.model_copy(update={"private": True}), prompts=["a secret"]).page()
    assert open_page.count("secret") > 10
    assert "secret" not in page
    assert str(config.output) not in page
    assert "step 60 is not shown: its file cannot be read." in page
    assert "prompt 1" in page


def test_a_folder_without_logs_snapshots_or_prompts_gives_sentences(made: _Made) -> None:
    out = made.config.output
    for path in [out / "log.jsonl", out / "evaluations.jsonl", *(out / "snapshots").iterdir()]:
        path.unlink()
    text = _Tags(replace(made, prompts=[], held_out=0).page()).text
    assert "There is no log.jsonl, so there is no loss" in text
    assert "There is no evaluations.jsonl" in text
    assert text.count("There is nothing to draw.") == 2
    assert "give --sample-prompts" in text
    assert "Add --held-out-count 3" in text
    cells = _Tags(made.page()).all("img")
    assert [cell["alt"] for cell in cells[3:6]] == [f"the adapter at 0.5: {prompt}" for prompt in made.prompts]
    assert made.family.calls == 3  # none for the page without prompts


def test_a_torn_snapshot_is_named_and_the_others_are_shown(made: _Made) -> None:
    (made.config.output / "snapshots" / "step-0000060.safetensors").write_bytes(b"torn")
    page = _Tags(made.page())
    assert "step 60 is not shown: " in page.text
    assert len(page.all("img")) == 3 * (1 + 2 * 2)


def test_a_short_run_of_one_step_is_drawn(made: _Made) -> None:
    log(made.config.output, 1)
    evaluate(made.config.output, [0.5])
    page = made.page()
    assert not re.search(r"\bnan\b|\binf\b", page)
    assert "No step was skipped, of 1." in page


def test_no_more_than_six_prompts_are_drawn(made: _Made) -> None:
    page = _Tags(replace(made, prompts=[f"fox {k}" for k in range(8)]).page())
    assert len(page.all("img")) == 6 * 7
    assert "2 more are in prompts.txt only" in page.text


def test_scores_stand_beside_the_row_that_they_are_of(made: _Made, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def score(folders: Any, rows: Any, prompts: Any, trained: Any, device: Any) -> list[list[Score]]:
        asked.append((folders, len(rows), prompts, [image.size for image in trained]))
        return [[Score("CLIP (tiny)", 0.1 + k, 0.2 + k, 0.3 + k, 0.4 + k if k else None)] for k in range(len(rows) + 1)]

    monkeypatch.setattr(scores, "score", score)
    config = made.config.model_copy(update={"score_with": [Path("secret/tiny")]})
    text = _Tags(replace(made, config=config).page()).text
    assert asked == [([Path("secret/tiny")], 7, made.prompts, [(64, 64)] * 2)]
    assert "base CLIP (tiny) 0.100 0.200 0.300 \u2013" in text
    assert "step 10 at 0.5 CLIP (tiny) 1.100 1.200 1.300 1.400" in text
    assert "training pictures among themselves CLIP (tiny) 7.100" in text

    gone = replace(made, config=config, pictures=("gone.png",)).page()
    assert "There are none: [Errno 2] No such file or directory" in gone

    def torn(*_: Any) -> list[list[Score]]:
        raise ConfigError("secret/tiny cannot be read")

    monkeypatch.setattr(scores, "score", torn)
    assert "Scores There are none: secret/tiny cannot be read" in _Tags(replace(made, config=config).page()).text
    private = replace(made, config=config.model_copy(update={"private": True})).page()
    assert "There are none: a model cannot be read." in private
    assert "secret" not in private
    assert "there are no pictures to score" in replace(made, config=config, prompts=[]).page()


def test_the_settings_in_the_page_give_the_same_run(made: _Made) -> None:
    page = made.page()
    pres = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
    assert pres[0] == "imgadapt style --config run.toml"
    for text in pres[1:]:
        (made.config.output / "run.toml").write_text(unescape(text))
        values = flags.read_toml(made.config.output / "run.toml")
        assert TrainConfig.of(values) == made.config.model_copy(update={"folder": Path("photos").absolute()})
    assert len(pres[1].splitlines()) < 10
    word = InversionConfig.of({"folder": "x", "word": "<w>", "output": made.config.output})
    assert "imgadapt textual_inversion --config run.toml" in replace(made, config=word).page()


def test_a_page_that_cannot_be_written_is_an_error(made: _Made) -> None:
    (made.config.output / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"report\.html"):
        made.page()


# --- norms


@pytest.mark.parametrize("method", [LoRA(rank=2, alpha=1), imgadapt.OFT(), imgadapt.DoRA(LoRA(rank=2))])
def test_norms_are_those_of_the_change_that_merging_makes(pipe: Any, method: Any) -> None:
    imgadapt.attach(pipe, method, targets=["unet.mid_block.*to_[qv]"])
    for parameter in live.parameters(pipe):
        parameter.data += 0.05 * torch.randn(parameter.shape)
    file = live.collect(pipe)
    imgadapt.detach(pipe)
    rows = norms.measure(pipe, file)
    assert not imgadapt.adapters(pipe)
    weights = {name: pipe.unet.get_submodule(name.removeprefix("unet.")).weight.detach().clone() for name in file.parts}
    imgadapt.attach(pipe, file)
    imgadapt.merge(pipe)
    assert [row.name for row in rows] == list(file.parts)
    for row in rows:
        merged = pipe.unet.state_dict()[f"{row.name.removeprefix('unet.')}.weight"]
        assert row.delta == pytest.approx(float((merged - weights[row.name]).norm()), rel=1e-4)
        assert row.weight == pytest.approx(float(weights[row.name].norm()), rel=1e-5)
    (block,) = norms.blocks(rows)
    assert block.layers == len(rows)
    assert block.delta == pytest.approx(math.sqrt(sum(row.delta**2 for row in rows)))
    assert block.weight == pytest.approx(math.sqrt(sum(row.weight**2 for row in rows)))


def test_the_largest_shares_come_first_and_a_weight_of_zero_has_none() -> None:
    rows = [norms.Norm(f"l{k}", k, 10.0) for k in range(12)] + [norms.Norm("zero", 1.0, 0.0)]
    assert [row.name for row in norms.largest(rows)] == ["zero", *(f"l{k}" for k in range(11, 2, -1))]
    large, still = norms.suspicious(rows)
    assert [row.name for row in large] == ["l6", "l7", "l8", "l9", "l10", "l11", "zero"]
    assert [row.name for row in still] == ["l0"]
