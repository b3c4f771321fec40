"""The page in a real browser: drawing, stopping, restoring, remembering, and how it fits."""

import hashlib
import re
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from imgadapt.playground.pictures.infotext import ours
from tests.browser import (
    HOSTILE,
    SCREENSHOTS,
    Server,
    Watch,
    chromium,
    fits,
    page,
    screenshot,
    server,
    tab,
    visit,
    watch,
)

__all__ = ["chromium", "page", "server", "watch"]  # fixtures
TABS = ("Library", "Generate", "Compare", "Merge", "Train", "Inspect / Convert", "History")


def _say(page: Page, prompt: str, steps: int = 4, seed: int = 7) -> None:
    page.fill("#prompt textarea", prompt)
    page.fill("#steps input[type=number]", str(steps))
    page.fill("#seed input", str(seed))


def _drawn(page: Page, before: str = "") -> str:
    """The id of the picture that the page shows, once it is another than `before`."""
    shown = page.locator("#big figure img")
    expect(shown).to_have_attribute("src", re.compile(f"/pictures/(?!{before or 'none'})"))
    expect(page.locator("#stop")).to_be_disabled()
    return str(shown.get_attribute("src")).removeprefix("/pictures/")


def _picture(server: Server, id: str, folder: Path) -> Path:
    """The PNG that the server gives out for an id."""
    path = folder / f"{id}.png"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{server.url}/pictures/{id}") as response:
        path.write_bytes(response.read())
    return path


def _pixels(path: Path) -> str:
    with Image.open(path) as image:
        return hashlib.sha256(image.tobytes()).hexdigest()


def _add(page: Page, name: str) -> None:
    page.locator("#add-adapter input").click()
    page.get_by_role("option", name=name, exact=True).click()
    expect(page.locator(".ia-use-name", has_text=name)).to_be_visible()


def test_an_adapter_of_the_stack_is_in_the_picture_and_in_its_record(
    page: Page, server: Server, tmp_path: Path
) -> None:
    _say(page, "a fox")
    page.keyboard.press("Control+Enter")
    bare = _drawn(page)
    _add(page, "warm")
    page.click("#generate")
    adapted = _drawn(page, bare)
    first, second = _picture(server, bare, tmp_path), _picture(server, adapted, tmp_path)
    assert _pixels(first) != _pixels(second)
    with Image.open(second) as image:
        record = ours(image.info)
        assert "<lora:warm:1>" in image.info["parameters"]
    assert record is not None
    assert record["request"]["seed"] == 7
    assert record["request"]["steps"] == 4
    assert [row["name"] for row in record["adapters"].values()] == ["warm"]
    page.wait_for_timeout(300)
    screenshot(page, "generate")


def test_a_drawing_is_stopped_within_its_steps_and_the_next_one_works(page: Page) -> None:
    _say(page, "a rocket", steps=200)
    page.click("#generate")
    expect(page.locator("#progress")).to_contain_text(re.compile(r"\d+/200"))
    page.keyboard.press("Escape")
    expect(page.locator("#stop")).to_be_disabled(timeout=10_000)
    expect(page.locator("#big figure")).to_have_count(0)
    _say(page, "a rocket")
    page.click("#generate")
    assert _drawn(page)


def test_a_picture_that_is_dropped_in_restores_all_settings_and_is_drawn_again_to_the_bit(
    page: Page, server: Server, tmp_path: Path
) -> None:
    _say(page, "a cat, smiling", steps=5, seed=31)
    page.fill("#negative textarea", "a dog")
    page.fill("#guidance input, #guidance textarea", "3.5")
    _add(page, "cold")
    page.fill("#weight-0 input[type=number]", "0.6")
    page.click("#generate")
    before = _drawn(page)
    file = _picture(server, before, tmp_path)

    page.evaluate("localStorage.clear()")
    visit(page, server)
    expect(page.locator("#prompt textarea")).to_have_value("")
    page.locator("#restore-box > button").click()
    page.set_input_files("#restore input[type=file]", file)
    expect(page.locator("#restored")).to_contain_text("the same to the bit")
    expect(page.locator("#prompt textarea")).to_have_value("a cat, smiling")
    expect(page.locator("#negative textarea")).to_have_value("a dog")
    expect(page.locator("#seed input")).to_have_value("31")
    expect(page.locator("#steps input[type=number]")).to_have_value("5")
    expect(page.locator("#weight-0 input[type=number]")).to_have_value("0.6")
    page.click("#generate")
    again = _picture(server, _drawn(page, before), tmp_path)
    assert _pixels(again) == _pixels(file)


def test_settings_and_the_tab_survive_a_reload(page: Page, server: Server) -> None:
    _say(page, "a whale under the moon", steps=9, seed=5)
    _add(page, "warm")
    tab(page, "History")
    page.wait_for_function("localStorage.getItem('imgadapt-tab')")
    visit(page, server)
    expect(page.get_by_role("tab", name="History", exact=True)).to_have_attribute("aria-selected", "true")
    tab(page, "Generate")
    expect(page.locator("#prompt textarea")).to_have_value("a whale under the moon")
    expect(page.locator("#steps input[type=number]")).to_have_value("9")
    expect(page.locator("#seed input")).to_have_value("5")
    expect(page.locator(".ia-use-name", has_text="warm")).to_be_visible()


def test_a_drawing_that_runs_is_found_again_after_a_reload(page: Page, server: Server) -> None:
    _say(page, "a bee", steps=200)
    page.fill("#count input", "32")
    page.click("#generate")
    expect(page.locator("#progress")).to_contain_text(re.compile(r"\d+/\d+"))
    visit(page, server)
    expect(page.locator("#progress")).to_contain_text(re.compile(r"\d+/\d+"))
    page.click("#stop")
    expect(page.locator("#stop")).to_be_disabled(timeout=10_000)


def test_a_link_brings_an_adapter_and_a_prompt_and_says_what_is_not_here(page: Page, server: Server) -> None:
    visit(page, server, "?adapter=warm:0.5&adapter=nobody&prompt=a%20fox&steps=wrong")
    expect(page.locator("#prompt textarea")).to_have_value("a fox")
    expect(page.locator("#weight-0 input[type=number]")).to_have_value("0.5")
    expect(page.locator(".toast-body")).to_contain_text("nobody")
    expect(page.locator(".toast-body")).to_contain_text("steps:")


def test_a_hostile_files_metadata_is_shown_as_text(page: Page) -> None:
    tab(page, "Library")
    page.locator(".ia-card", has_text="hostile").click()
    expect(page.locator("#details .ia-title")).to_have_text("hostile")
    page.locator("#details summary", has_text="Metadata").click()
    expect(page.locator("#details dd", has_text=HOSTILE).first).to_be_visible()
    assert page.locator("#details script, #details img").count() == 0
    assert page.title() != "broken into"


def test_a_card_says_what_it_is_and_goes_into_the_stack(page: Page) -> None:
    tab(page, "Library")
    page.fill("#search input, #search textarea", "warm")
    expect(page.locator(".ia-card")).to_have_count(1)
    page.locator(".ia-card").click()
    expect(page.locator("#details")).to_contain_text("rank 4")
    screenshot(page, "library")
    page.click("#add-to-stack")
    expect(page.locator(".ia-use-name", has_text="warm")).to_be_visible()


def test_a_picture_of_the_history_gives_its_settings_and_goes_when_it_shall(page: Page) -> None:
    _say(page, "a green frog", seed=99)
    page.click("#generate")
    drawn = _drawn(page)
    page.fill("#prompt textarea", "")
    tab(page, "History")
    page.locator(f"#history button[data-id='{drawn}']").click()
    page.click("#history-use")
    expect(page.locator("#prompt textarea")).to_have_value("a green frog")
    tab(page, "History")
    page.click("#history-delete")
    expect(page.locator(f"#history button[data-id='{drawn}']")).to_have_count(0)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_tab_is_wider_than_a_phone(theme: str, chromium: Browser, server: Server, watch: Watch) -> None:
    context = chromium.new_context(viewport={"width": 390, "height": 844}, device_scale_factor=2)
    phone = context.new_page()
    watch.on(phone)
    visit(phone, server, f"?__theme={theme}")
    assert phone.evaluate("document.body.classList.contains('dark')") is (theme == "dark")
    for name in TABS:
        tab(phone, name)
        phone.wait_for_timeout(150)
        assert fits(phone), name
        screenshot(phone, f"phone-{theme}-{name.split()[0].lower()}")
    context.close()
    watch.check()


def test_each_tab_shows_itself_in_both_colours(page: Page) -> None:
    for name in TABS:
        tab(page, name)
        page.wait_for_timeout(150)
        assert fits(page), name
        if name not in ("Generate", "Library"):
            screenshot(page, name.split()[0].lower())
    page.click("#dark")
    assert page.evaluate("document.body.classList.contains('dark')")
    if SCREENSHOTS:
        tab(page, "Generate")
        screenshot(page, "generate-dark")
