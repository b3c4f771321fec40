"""Compare, Merge and Train in a real browser: grids, merged files and trainings, from the first click to their use."""

import io
import re
import urllib.request
import zipfile
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.browser import Server, Watch, chromium, context, fits, fresh, screenshot, server, tab, visit, watch

__all__ = ["chromium", "context", "server", "watch"]  # fixtures
pytestmark = pytest.mark.flaky(reruns=1)  # a browser on a busy machine; what was run again is said at the end
LONG = 60_000
"""Milliseconds for what is drawn, merged or trained."""
CELLS = ".lab-cell"
STOP = """() => new Promise((stopped) => {
  const look = () => {
    if (!document.querySelector('.lab-cell')) return setTimeout(look, 20);
    document.getElementById('grid-stop').click();
    return stopped();
  };
  look();
})"""
"""Presses Stop as soon as there is a cell, from within the page: a busy machine would be late from without."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture
def page(context: BrowserContext, server: Server, watch: Watch) -> Iterator[Page]:
    """Someone who was never here: each test follows a link of its own, once."""
    with fresh(context, server, watch) as opened:
        opened.set_default_timeout(LONG)
        yield opened


def _got(server: Server, path: str) -> bytes:
    with _DIRECT.open(f"{server.url}{path}") as response:
        return response.read()


def _pixels(server: Server, src: str | None) -> np.ndarray:
    assert src is not None
    with Image.open(io.BytesIO(_got(server, src.partition("?")[0]))) as image:
        return np.asarray(image.convert("RGB"), dtype=int)


def _pick(page: Page, box: str, name: str) -> None:
    """Choose in a dropdown."""
    page.locator(f"{box} input").click()
    page.get_by_role("option", name=name, exact=True).click()


def _fill(page: Page, box: str, value: str) -> None:
    page.locator(f"{box} input, {box} textarea").first.fill(value)


def _cell(page: Page, row: int, column: int) -> str | None:
    """Where the picture of a grid's cell is."""
    cell = page.locator("#grid tbody tr").nth(row).locator("td").nth(column)
    return cell.locator("img").get_attribute("src", timeout=LONG)


def test_a_grid_is_stopped_in_its_middle_resumed_and_looked_at(page: Page, server: Server) -> None:
    visit(page, server, "?prompt=a%20fox&seed=3&steps=60&adapter=warm&tab=compare")
    _fill(page, "#axis-x-values", "0, 1")
    _fill(page, "#axis-y-values", "1..3")
    expect(page.locator("#grid-stop")).to_be_disabled()
    expect(page.locator("#grid-resume")).to_be_disabled()
    expect(page.locator("#grid-common")).to_contain_text("warm 1 · 60 steps")
    expect(page.locator("#grid-estimate")).to_contain_text("9 cells")
    page.click("#grid-start")
    page.evaluate(STOP)
    expect(page.locator("#grid-progress")).to_contain_text("of 9 cells are drawn; Resume", timeout=LONG)
    early = page.locator(CELLS).count()
    assert 1 <= early < 9
    kept = page.locator(f"{CELLS} img").first.get_attribute("src")

    page.click("#grid-resume")
    expect(page.locator(CELLS)).to_have_count(9, timeout=LONG)
    expect(page.locator("#grid thead th")).to_have_text(["base", "weight 0", "weight 1"])
    expect(page.locator("#grid tbody th")).to_have_text(["seed 1", "seed 2", "seed 3"])
    assert page.locator(f"{CELLS} img").first.get_attribute("src") == kept
    for row in range(3):
        line = page.locator("#grid tbody tr").nth(row).locator("small")
        expect(line.nth(1)).to_have_text("0 = base")
        expect(line.nth(2)).to_have_text(re.compile(r"^Δ \d+\.\d\d$"))
        assert not (_pixels(server, _cell(page, row, 0)) != _pixels(server, _cell(page, row, 1))).any()
        shift = np.abs(_pixels(server, _cell(page, row, 0)) - _pixels(server, _cell(page, row, 2))).mean()
        assert float(line.nth(2).inner_text().removeprefix("Δ ")) == pytest.approx(shift, abs=0.006)
    expect(page.locator("#grid-progress")).to_be_empty()

    page.locator("#grid tbody tr").nth(1).locator(CELLS).nth(2).click()
    expect(page.locator("#grid-pair .lab-over")).to_have_attribute("src", str(_cell(page, 1, 2)).partition("?")[0])
    expect(page.locator("#grid-pair")).to_contain_text(re.compile(r"mean difference \d+\.\d\d of 255"))
    page.locator("#grid-pair input").fill("20")
    assert page.locator(".lab-slide").evaluate("box => box.style.getPropertyValue('--cut')") == "20%"
    page.click("#grid-again")
    expect(page.locator("#grid-verdict")).to_contain_text("equal to the bit", timeout=LONG)
    link = page.locator("#grid-export a").get_attribute("href")
    names = zipfile.ZipFile(io.BytesIO(_got(server, str(link)))).namelist()
    assert "index.html" in names
    assert sum(name.endswith(".png") for name in names) == 9
    screenshot(page, "compare")
    page.click("#grid-use")
    expect(page.locator("#seed input")).to_have_value("2")


def test_a_saved_merge_is_in_the_library_and_draws_what_the_live_stack_draws(page: Page, server: Server) -> None:
    visit(page, server, "?prompt=a%20cat&seed=5&steps=8&adapter=warm:0.6&adapter=cold:-0.5&tab=merge")
    page.click("#merge-take")
    expect(page.locator("#merge-weight-1 input")).to_have_value("-0.5")
    page.click("#merge-look")
    expect(page.locator("#merge-report")).to_contain_text("draws what the merged file will", timeout=LONG)
    numbers = [float(text) for text in page.locator(".lab-matrix td:not(:empty)").all_inner_texts()]
    assert numbers[0] == numbers[3] == 1.0
    assert numbers[1] == numbers[2]
    expect(page.locator("#merge-report svg")).to_have_count(1)
    screenshot(page, "merge")
    page.click("#merge-live")
    live = _drawn(page, server)

    tab(page, "Merge")
    _fill(page, "#merge-name", "warm and cold")
    page.click("#merge-save")
    expect(page.locator("#merge-saved")).to_contain_text("Saved as", timeout=LONG)
    link = page.locator("#merge-saved a").get_attribute("href")
    assert b"warm" in _got(server, str(link))[:200_000]
    page.click("#merge-add")
    expect(page.locator(".ia-use-name:visible")).to_have_text(["warm", "cold", "warm and cold"])
    tab(page, "Merge")
    page.click("#merge-use")
    expect(page.locator(".ia-use-name:visible")).to_have_text(["warm and cold"])
    merged = _drawn(page, server, live)
    apart = np.abs(_pixels(server, merged) - _pixels(server, live))
    assert apart.max() <= 1  # sums in another order

    tab(page, "Merge")
    name = re.findall(r"Saved as (.+?):", page.locator("#merge-saved").inner_text())[0]
    page.get_by_text("Replay a merged file's recipe").click()
    page.locator("#merge-weight-0 input").fill("2")
    _pick(page, "#merge-replay-of", name)
    page.click("#merge-replay")
    expect(page.locator("#merge-weight-0 input")).not_to_have_value("2")
    weights = [page.locator(f"#merge-weight-{row} input").input_value() for row in range(2)]
    assert sorted(weights) == ["-0.5", "0.6"]


def _drawn(page: Page, server: Server, before: str = "") -> str:
    """Where the picture is that Generate draws now, once it is another than `before`."""
    expect(page.get_by_role("tab", name="Generate", exact=True)).to_have_attribute("aria-selected", "true")
    page.click("#generate")
    shown = page.locator("#big figure img")
    expect(shown).to_have_attribute("src", re.compile(f"^(?!{before or 'none'}$)/pictures/"), timeout=LONG)
    return str(shown.get_attribute("src"))


def test_a_training_is_checked_watched_stopped_resumed_and_its_result_used(page: Page, server: Server) -> None:
    visit(page, server, "?tab=train")
    expect(page.locator("#train-data input")).to_have_value(re.compile("40 pictures"))
    _fill(page, "#train-steps", "20")
    _fill(page, "#train-name", "emoji")
    page.get_by_text("More", exact=True).click()
    _fill(page, "#train-sample-every", "5")
    page.click("#train-check")
    expect(page.locator("#train-found")).to_contain_text("20 steps", timeout=LONG)
    plan = page.locator("#train-found .lab-scroll")
    assert plan.evaluate("box => box.scrollWidth <= box.clientWidth")
    sheet = page.locator("#train-found .lab-sheet img")
    expect(sheet).to_have_count(1)
    assert _pixels(server, sheet.get_attribute("src")).shape[0] > 100

    page.click("#train-start")
    learning = page.locator("#train-run .lab-run[data-state='training']")
    expect(learning.locator("svg").first).to_be_visible(timeout=LONG)
    expect(learning.locator(".lab-strip img").first).to_be_visible(timeout=LONG)
    page.click("#train-stop")
    run = page.locator("#train-run .lab-run")
    expect(run).to_have_attribute("data-state", "stopped", timeout=LONG)
    reached = int(str(run.get_attribute("data-step")))
    assert 1 <= reached < 20

    visit(page, server, "?tab=train")
    expect(run).to_have_attribute("data-step", str(reached))
    page.click("#train-resume")
    expect(run).to_have_attribute("data-state", "done", timeout=2 * LONG)
    expect(run).to_have_attribute("data-step", "20")
    screenshot(page, "train")
    expect(page.locator("#train-cards input")).to_have_value(re.compile("emoji"))
    page.click("#train-compare")
    expect(page.get_by_role("tab", name="Compare", exact=True)).to_have_attribute("aria-selected", "true")
    expect(page.locator("#axis-x-values textarea, #axis-x-values input")).to_have_value("all")
    tab(page, "Train")
    page.click("#train-use")
    expect(page.locator(".ia-use-name", has_text="emoji")).to_be_visible()


def test_what_is_wrong_is_said_and_the_next_request_works(page: Page, server: Server) -> None:
    visit(page, server, "?tab=compare&adapter=warm&prompt=a%20fox%20%3Clora:ink:0.8%3E&steps=2")
    _fill(page, "#axis-x-values", "0:1000:0.001")
    expect(page.locator("#grid-estimate .lab-bad")).to_be_visible()
    page.click("#grid-start")
    expect(page.locator(".toast-wrap")).to_contain_text("weight")
    _fill(page, "#axis-x-values", "1")
    _fill(page, "#axis-y-values", "1")
    expect(page.locator("#grid-estimate")).to_contain_text("2 cells")
    expect(page.locator("#grid-common")).to_contain_text("“a fox” · warm 1, ink 0.8 · 2 steps")
    page.click("#grid-start")
    expect(page.locator(CELLS)).to_have_count(2, timeout=LONG)
    tab(page, "Merge")
    page.click("#merge-look")
    expect(page.locator(".toast-wrap")).to_contain_text("choose two adapters or more")


def test_a_phone_never_scrolls_sideways(server: Server, chromium: Browser, watch: Watch) -> None:
    context = chromium.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page = context.new_page()
    watch.on(page)
    visit(page, server, "?tab=compare&adapter=warm&prompt=a%20fox&steps=1")
    _fill(page, "#axis-x-values", "0:1:0.1")
    _fill(page, "#axis-y-values", "1")
    page.click("#grid-start")
    expect(page.locator(CELLS)).to_have_count(12, timeout=LONG)
    assert fits(page)
    box = page.locator("#grid .lab-scroll")
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    box.evaluate("box => box.scrollLeft = 400")
    label = page.locator("#grid tbody th").first.bounding_box()
    assert label is not None
    assert 0 <= label["x"] < 40  # it sticks
    for name in ("Merge", "Train"):
        tab(page, name)
        assert fits(page)
    context.close()
    watch.check()
