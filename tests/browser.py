"""A real server, and a real browser that looks at it; whoever imports `server` and `page` has them as fixtures.

The browser is Debian's Chromium (`apt-get install chromium`); without it, tests that need it say so and are skipped.
A page fails its test where its console has an error, a request fails, or one goes anywhere but to the server.
"""

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Request,
    Response,
    expect,
    sync_playwright,
)

import imgadapt
from imgadapt import demo

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
SCREENSHOTS = os.environ.get("IMGADAPT_SCREENSHOTS")
"""A folder for pictures of the page, as the README shows it; not set: none are kept."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
PATIENCE = 30_000
"""Milliseconds that anything may take to appear."""
LEAVING = ("AbortError: BodyStreamBuffer", "AbortError: signal is aborted", "Unexpected error Connection errored out")
"""What Gradio says of its own stream of events when a page is left."""
FORGOTTEN = "Unexpected error 404: Not Found"
"""What it says when the server has forgotten a page that is just being left; anywhere else it is a fault."""
NEAR = 5.0
"""Seconds between that and the leaving, at most."""
expect.set_options(timeout=PATIENCE)


@dataclass
class Server:
    """`imgadapt ui` in a process of its own. said: what it has printed so far."""

    url: str
    home: Path
    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.said.append(line)

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=20)
        self.reader.join(timeout=20)


HOSTILE = "<img src=x onerror=\"document.title='broken into'\"><script>document.title='broken into'</script>"


def furnish(home: Path) -> None:
    """Adapters for the embedded base that change its pictures: `warm`, `cold`; `hostile`, whose metadata is HTML."""
    folder = home / "adapters"
    folder.mkdir(parents=True, exist_ok=True)
    hostile = {"ss_output_name": HOSTILE, "modelspec.trigger_phrase": HOSTILE, HOSTILE: HOSTILE}
    pipe = demo.pipeline()
    for seed, (name, said) in enumerate({"warm": {}, "cold": {}, "hostile": hostile}.items()):
        torch.manual_seed(seed)
        imgadapt.attach(pipe, imgadapt.LoRA(rank=4, alpha=4), targets="attn2.to_*")
        with torch.no_grad():
            for weight in pipe.unet.parameters():
                if weight.requires_grad and not weight.any():
                    weight.normal_(std=0.3)
        file = replace(imgadapt.collect(pipe), metadata=said)
        imgadapt.save(file, folder / f"{name}.safetensors", format="kohya")
        imgadapt.detach(pipe)


def start(home: Path, *more: str) -> Server:
    """A server on a free port, ready to be asked; on the embedded base where `more` says nothing else."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "imgadapt", "ui", "--home", str(home), "--port", str(port), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )
    server = Server(f"http://127.0.0.1:{port}", home, process)
    _until(lambda: _answers(server), 60, lambda: f"the server did not start:\n{''.join(server.said)}")
    return server


def _answers(server: Server) -> bool:
    assert server.process.poll() is None, f"the server ended:\n{''.join(server.said)}"
    try:
        with _DIRECT.open(f"{server.url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _until(true: Callable[[], bool], seconds: float, otherwise: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, otherwise()
        time.sleep(0.1)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all browser tests, with the adapters of `furnish`."""
    home = tmp_path_factory.mktemp("playground")
    furnish(home)
    started = start(home)
    yield started
    started.end()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """(Of a module, no longer: Playwright's event loop would be in the way of other tests' own.)"""
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no browser: {CHROMIUM} is not there (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(chromium: Browser) -> Iterator[BrowserContext]:
    """One for the pages of a module, which then load what is the page's only once; see `fresh`."""
    made = chromium.new_context(viewport={"width": 1280, "height": 900}, locale="en-GB")
    yield made
    made.close()


@contextmanager
def fresh(context: BrowserContext, server: Server, watch: "Watch") -> Generator[Page]:
    """A page of someone who was never here: no cookies, nothing in the browser's storage."""
    context.clear_cookies()
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE)
    opened.goto(f"{server.url}/health")
    opened.evaluate("localStorage.clear()")
    watch.on(opened)
    yield opened
    opened.close()
    watch.check()


@dataclass
class Watch:
    """What went wrong on a page. allowed: parts of messages that a test brings about on purpose."""

    url: str
    wrong: list[str] = field(default_factory=list[str])
    allowed: list[str] = field(default_factory=list[str])
    forgotten: list[float] = field(default_factory=list[float])
    left: list[float] = field(default_factory=list[float])

    def on(self, page: Page) -> None:
        page.on("framenavigated", lambda _: self.left.append(time.monotonic()))
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.wrong.append(f"error on the page: {error}"))
        page.on("request", self._request)
        page.on("response", self._response)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error" and FORGOTTEN in message.text:
            self.forgotten.append(time.monotonic())
        elif message.type == "error" and not any(part in message.text for part in LEAVING):
            self.wrong.append(f"console: {message.text} ({message.location.get('url', '')})")

    def _request(self, request: Request) -> None:
        if not request.url.startswith((f"{self.url}/", "data:", "blob:")):
            self.wrong.append(f"a request left the machine: {request.url}")

    def _response(self, response: Response) -> None:
        if response.status >= 400:
            self.wrong.append(f"{response.status}: {response.url}")

    def check(self) -> None:
        bad = [one for one in self.wrong if not any(part in one for part in self.allowed)]
        bad += [FORGOTTEN for then in self.forgotten if not any(abs(then - left) < NEAR for left in self.left)]
        assert not bad, "\n".join(bad)


@pytest.fixture
def watch(server: Server) -> Watch:
    """What went wrong on the page of a test; the test may allow some of it."""
    return Watch(server.url)


@pytest.fixture
def page(server: Server, context: BrowserContext, watch: Watch) -> Iterator[Page]:
    """The playground, ready to be used, for someone who was never here."""
    with fresh(context, server, watch) as opened:
        visit(opened, server)
        yield opened


def visit(page: Page, server: Server, query: str = "") -> None:
    """Open the playground and wait until its settings are back."""
    page.goto(f"{server.url}/{query}")
    page.wait_for_selector("body[data-ready]")


def tab(page: Page, name: str) -> None:
    """Go to a tab, also where it is in the menu of those that have no room."""
    found = page.get_by_role("tab", name=name, exact=True)
    if not found.is_visible():
        page.locator(".overflow-menu > button").first.click()
        page.locator(".overflow-dropdown button").get_by_text(name, exact=True).click()
    else:
        found.click()


def screenshot(page: Page, name: str) -> None:
    """A picture of the page for the docs, where they are asked for: of 256 colours, which is a third of the bytes."""
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        page.evaluate("window.scrollTo(0, 0)")
        page.wait_for_timeout(600)  # what fades in has done so
        with Image.open(io.BytesIO(page.screenshot())) as taken:
            taken.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
                Path(SCREENSHOTS) / f"{name}.png", optimize=True
            )


def fits(page: Page) -> bool:
    """Whether the page is no wider than its window."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


__all__ = [
    "HOSTILE",
    "Server",
    "Watch",
    "chromium",
    "context",
    "fits",
    "fresh",
    "furnish",
    "page",
    "screenshot",
    "server",
    "start",
    "tab",
    "visit",
    "watch",
]
