"""The page in a real browser: drawing, stopping, restoring, remembering, and how it fits."""

import hashlib
import re
import urllib.request
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from safetensors.torch import save_file

from imgadapt.playground.pictures.infotext import ours
from tests.browser import (
    HOSTILE,
    Server,
    Watch,
    chromium,
    context,
    fits,
    page,
    screenshot,
    server,
    tab,
    visit,
    watch,
)

__all__ = ["chromium", "context", "page", "server", "watch"]  # fixtures
pytestmark = pytest.mark.flaky(reruns=1)  # a browser on a busy machine; what was run again is said at the end
SDXL = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"
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
    screenshot(page, "generate")


def test_a_drawing_is_stopped_within_its_steps_and_the_next_one_works(page: Page) -> None:
    _say(page, "a rocket", steps=200)
    page.click("#generate")
    expect(page.locator("#progress")).to_contain_text(re.compile(r"\d+/200"))
    expect(page.locator("#progress .ia-progress")).to_be_visible()
    expect(page.locator("#big .ia-preview img")).to_be_visible()
    expect(page.locator("#big")).not_to_contain_text("Nothing drawn yet")
    page.keyboard.press("Escape")
    expect(page.locator("#stop")).to_be_disabled(timeout=10_000)
    expect(page.locator("#big figure")).to_have_count(0)
    expect(page.locator("#big")).to_contain_text("a house on a purple background")
    _say(page, "a rocket")
    page.click("#generate")
    assert _drawn(page)


def test_the_picture_drawn_last_is_there_again_after_a_stop_and_after_a_reload(page: Page, server: Server) -> None:
    _say(page, "a fox")
    page.click("#generate")
    first = _drawn(page)
    _say(page, "a red apple")
    page.click("#generate")
    second = _drawn(page, first)
    _say(page, "a red apple", steps=200)
    page.click("#generate")
    expect(page.locator("#big .ia-preview img")).to_be_visible()
    page.click("#stop")
    assert _drawn(page) == second
    visit(page, server)
    assert _drawn(page) == second
    expect(page.locator("#big")).to_contain_text("a red apple")
    tiles = page.locator("#strip button")
    assert tiles.evaluate_all("all => all.map(one => one.dataset.id)") == [second, first]
    tiles.nth(1).click()
    assert _drawn(page, second) == first
    page.fill("#seed input", "-1")
    page.click("#last-seed")
    expect(page.locator("#seed input")).to_have_value("7")


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


def test_a_drawing_that_went_with_its_server_is_told_once(page: Page, server: Server) -> None:
    _say(page, "a bee", steps=200)
    page.click("#generate")
    expect(page.locator("#big .ia-preview img")).to_be_visible()
    kept = page.evaluate("sessionStorage.getItem('imgadapt-drawing')")
    assert re.fullmatch("[0-9a-f]{16}", kept)
    page.click("#stop")
    expect(page.locator("#stop")).to_be_disabled(timeout=10_000)
    page.wait_for_function("sessionStorage.getItem('imgadapt-drawing') === ''")
    for of, said in ((kept, False), ("0" * 16, True)):  # one of this server's, and one of a server's before it
        page.evaluate(f"sessionStorage.setItem('imgadapt-drawing', '{of}')")
        visit(page, server)
        expect(page.locator("#big")).to_contain_text("Nothing drawn yet")
        if said:
            expect(page.locator("#progress .ia-error")).to_contain_text("that drawing is lost")
        else:
            expect(page.locator("#progress")).to_be_empty()
    visit(page, server)
    expect(page.locator("#progress")).to_be_empty()


def test_a_link_brings_an_adapter_and_a_prompt_and_says_what_is_not_here(page: Page, server: Server) -> None:
    visit(page, server, "?adapter=warm:0.5&adapter=nobody&prompt=a%20fox&steps=wrong")
    expect(page.locator("#prompt textarea")).to_have_value("a fox")
    expect(page.locator("#weight-0 input[type=number]")).to_have_value("0.5")
    expect(page.locator(".toast-body")).to_contain_text("nobody")
    expect(page.locator(".toast-body")).to_contain_text("steps:")
    page.fill("#prompt textarea", "a hen")
    tab(page, "History")
    page.wait_for_function("localStorage.getItem('imgadapt-tab').length")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    expect(page.get_by_role("tab", name="History", exact=True)).to_have_attribute("aria-selected", "true")
    tab(page, "Generate")
    expect(page.locator("#prompt textarea")).to_have_value("a hen")


def test_a_hostile_files_metadata_is_shown_as_text(page: Page) -> None:
    tab(page, "Library")
    page.locator(".ia-card", has_text="hostile").click()
    expect(page.locator("#details .ia-title")).to_have_text("hostile")
    page.locator("#details summary", has_text="Metadata").click()
    expect(page.locator("#details dd", has_text=HOSTILE).first).to_be_visible()
    assert page.locator("#details script, #details img").count() == 0
    assert page.title() != "broken into"


def test_what_a_link_asks_for_is_told_as_text(page: Page, server: Server) -> None:
    visit(page, server, f"?adapter={quote(HOSTILE)}&seed={quote(HOSTILE)}")
    told = page.get_by_test_id("toast-text").first
    expect(told).to_contain_text(HOSTILE[:60])
    assert page.get_by_test_id("toast-text").locator("img, script, a").count() == 0
    assert page.title() != "broken into"


def test_what_cannot_be_used_on_the_base_is_not_offered_to_the_stack(page: Page, server: Server) -> None:
    folder = server.home / "adapters"
    (folder / "pickled.safetensors").write_bytes(b"\x80\x04 no safetensors")
    other = {f"{SDXL}.lora_down.weight": torch.ones(2, 640), f"{SDXL}.lora_up.weight": torch.ones(640, 2)}
    save_file(other, folder / "elsewhere.safetensors")
    _say(page, "a fox")
    page.click("#generate")
    _drawn(page)  # a base is loaded
    tab(page, "Library")
    page.click("#rescan")
    for name, offered in (("warm", True), ("pickled", False), ("cold", True), ("elsewhere", False)):
        page.locator(".ia-card", has_text=name).click()
        expect(page.locator("#details .ia-title")).to_have_text(name)
        expect(page.locator("#add-to-stack")).to_be_visible(visible=offered)
    expect(page.locator("#details .ia-error")).to_contain_text("Nothing of it goes on demo")
    for name in ("pickled", "elsewhere"):
        (folder / f"{name}.safetensors").unlink()
    page.click("#rescan")
    expect(page.locator(".ia-card", has_text="pickled")).to_have_count(0)


def test_a_card_says_what_it_is_and_goes_into_the_stack(page: Page) -> None:
    tab(page, "Library")
    page.fill("#search input, #search textarea", "duotone")
    expect(page.locator(".ia-card")).to_have_count(1)
    page.locator(".ia-card").click()
    expect(page.locator("#details")).to_contain_text("rank 2")
    page.fill("#search input, #search textarea", "")
    expect(page.locator(".ia-card", has_text="hostile")).to_be_visible()
    screenshot(page, "library")
    page.click("#add-to-stack")
    expect(page.locator(".ia-use-name", has_text="duotone")).to_be_visible()


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


def test_a_part_that_is_painted_over_is_redrawn_and_no_other(page: Page, server: Server, tmp_path: Path) -> None:
    _say(page, "a fox", steps=6)
    page.click("#generate")
    first = _drawn(page)
    page.click("#start-from")
    page.click("#paint")
    canvas = page.locator("#mask canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    for share in (0.7, 0.9):  # over the right of the lower half
        page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + share * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.95 * box["width"], box["y"] + share * box["height"], steps=4)
        page.mouse.up()
    expect(page.locator("#mask [role=status]")).to_contain_text(re.compile(r"^1\d % of the picture is redrawn"))
    page.fill("#prompt textarea", "a robot")
    page.fill("#denoise input[type=number]", "1")
    page.click("#generate")
    second = _drawn(page, first)
    expect(page.locator("#big")).to_contain_text("from a picture, a part redrawn by 100%")
    with Image.open(_picture(server, first, tmp_path)) as one, Image.open(_picture(server, second, tmp_path)) as other:
        apart = np.abs(np.asarray(one.convert("RGB"), float) - np.asarray(other.convert("RGB"), float)).mean(2)
    assert apart[40:62, 40:60].mean() > 10 * apart[:24, :].mean()
    visit(page, server)
    expect(page.locator("#mask [role=status]")).to_contain_text(re.compile(r"^1\d % of the picture is redrawn"))
    page.click("#mask [data-do=clear]")
    expect(page.locator("#mask [role=status]")).to_contain_text("the whole picture is redrawn")


def test_what_is_wrong_is_said_where_it_is(page: Page, server: Server, tmp_path: Path) -> None:
    _say(page, "a fox <lora:nobody:1>")
    page.click("#generate")
    said = page.locator("#progress .ia-error")
    expect(said).to_be_visible()
    expect(said).to_have_text("there is no adapter 'nobody' in the library")
    page.fill("#prompt textarea", "a fox")
    page.fill("#guidance input, #guidance textarea", "much")
    page.click("#generate")
    expect(said).to_have_text("guidance: must be a number (it is 'much')")
    page.fill("#guidance input, #guidance textarea", "")
    page.fill("#count input", "1000")
    page.click("#generate")
    expect(said).to_have_text("count: must be 32 or less (it is 1000)")
    button, box = page.locator("#generate").bounding_box(), said.bounding_box()
    assert button is not None
    assert box is not None
    assert abs(button["y"] - box["y"]) < 400
    expect(page.locator("#use-settings")).to_be_hidden()
    expect(page.locator("#last-seed")).to_be_disabled()
    bad = tmp_path / "bad.png"
    bad.write_text("<svg onload=alert(1)>")
    for box, file, place in (("start-box", "start-file", "start-said"), ("restore-box", "restore", "restored")):
        page.locator(f"#{box} > button").click()
        page.set_input_files(f"#{file} input[type=file]", bad)
        expect(page.locator(f"#{place} .ia-error")).to_contain_text("no picture that can be read")
        expect(page.locator(f"#{place} .ia-error")).to_be_visible()
        expect(page.locator(f"#{file}")).not_to_contain_text("bad.png")
    tab(page, "Inspect / Convert")
    page.click("#convert")
    expect(page.locator("#converted .ia-error")).to_be_visible()
    page.locator("#convert-adapter input").click()
    page.get_by_role("option", name="ink", exact=True).click()
    expect(page.locator("#convert-format input")).to_have_value(re.compile("^lycoris"))
    page.locator("#convert-format input").click()
    page.get_by_role("option", name=re.compile("^kohya: ")).click()
    expect(page.locator("#convert-plan .ia-error")).to_contain_text("no word for lokr")
    expect(page.locator("#convert-plan .ia-error")).to_be_visible()
    page.click("#convert")
    expect(page.locator("#converted .ia-error")).to_contain_text("ink cannot be written as kohya")
    expect(page.locator("#converted .ia-error")).to_be_visible()
    wrong = tmp_path / "bad.safetensors"
    wrong.write_bytes(b"nothing of this kind")
    page.set_input_files("#bring input[type=file]", wrong)
    expect(page.locator("#brought .ia-error")).to_contain_text("bad.safetensors: not a safetensors file")


def test_a_phone_sees_every_tab_whole_and_the_picture_below_its_button(
    chromium: Browser, server: Server, watch: Watch
) -> None:
    context = chromium.new_context(viewport={"width": 390, "height": 844}, device_scale_factor=1.5)
    phone = context.new_page()
    watch.on(phone)
    visit(phone, server, "?__theme=dark&prompt=a%20fox&steps=12&seed=7&tab=generate&adapter=duotone")
    assert phone.evaluate("document.body.classList.contains('dark')")
    phone.click("#generate")
    _drawn(phone)
    places = [phone.locator(f"#{id}").bounding_box() for id in ("generate", "big", "steps")]
    heights = [place["y"] for place in places if place is not None]
    assert len(heights) == 3
    assert heights == sorted(heights)
    for name in TABS:
        tab(phone, name)
        expect(phone.get_by_role("tabpanel").locator("visible=true").first).to_be_visible()
        assert fits(phone), name
    tab(phone, "Generate")
    screenshot(phone, "phone-dark")
    context.close()
    watch.check()


def test_colours_are_changed_and_remembered(page: Page, server: Server) -> None:
    assert page.evaluate("document.body.classList.contains('dark')") is False
    page.click("#dark")
    assert page.evaluate("document.body.classList.contains('dark')") is True
    visit(page, server)
    assert page.evaluate("document.body.classList.contains('dark')") is True
