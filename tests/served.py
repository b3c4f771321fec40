"""The whole server in this process, on a free port: whoever imports `served` has it as a fixture."""

import asyncio
import gc
import json
import os
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from imgadapt.playground.house import House
from imgadapt.playground.serving.guard import Guard, Rules
from imgadapt.playground.settings import Limits, Settings

DRAWN = {"prompt": "a fox", "seed": 5, "steps": 2}
"""A request that the embedded base answers at once."""


@dataclass
class Served:
    """guard: the application, of which `guard.app` is what stands behind it."""

    url: str
    house: House
    guard: Guard
    home: Path

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, verify=False)  # no certificates to read

    def works(self) -> dict[str, Any]:
        """A good request from a new client: its picture."""
        with self.http as http:
            made = called(http, "generate", DRAWN)[-1]
        return made["result"][0]

    def idle(self, seconds: float = 10.0) -> bool:
        """Whether nothing waits or is at work, at the latest after some time."""
        until = time.monotonic() + seconds
        while self.house.playground.desk.load and time.monotonic() < until:
            time.sleep(0.01)
        return not self.house.playground.desk.load


class Told(Exception):
    """What the API said was wrong."""


def begin(http: httpx.Client, name: str, settings: Any) -> str:
    """Ask an endpoint: the event's id."""
    answer = http.post(f"/gradio_api/call/{name}", json={"data": [settings]})
    if answer.status_code != 200:
        raise Told(f"{answer.status_code}: {answer.text}")
    return answer.json()["event_id"]


def called(http: httpx.Client, name: str, settings: Any) -> list[dict[str, Any]]:
    """Ask an endpoint: all tables that it gives.

    Raises:
        Told: its error.
    """
    tables: list[dict[str, Any]] = []
    with http.stream("GET", f"/gradio_api/call/{name}/{begin(http, name, settings)}") as stream:
        kind = ""
        for line in stream.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data = json.loads(line.removeprefix("data: "))
                if kind == "error":
                    raise Told(str((data or {}).get("error")))
                if kind in ("generating", "complete") and data and data[0] is not None:
                    tables.append(data[0])
    return tables


def serve(house: House, home: Path, rules: Rules | None = None, **more: Any) -> Iterator[Served]:
    """A server until the generator is closed."""
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str(house.playground.settings.folder("temporary"))
    )
    with warnings.catch_warnings():  # Gradio leaves an event loop behind, which nobody closes
        warnings.simplefilter("ignore", ResourceWarning)
        from imgadapt_ui import page, server

        guard = server.application(house, page.build(house), rules or Rules(), look=page.look(), **more)
        asyncio.set_event_loop(None)
        gc.collect()
    assert isinstance(guard, Guard)
    opened, ready = server.listen("127.0.0.1", 0), threading.Event()
    uvicorn = server.configured(guard, ready.set)
    thread = threading.Thread(target=uvicorn.run, args=([opened],), daemon=True)
    thread.start()
    assert ready.wait(30)
    yield Served(f"http://127.0.0.1:{opened.getsockname()[1]}", house, guard, home)
    uvicorn.should_exit = True
    thread.join(timeout=20)
    opened.close()
    house.close()


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("home")
    (home / "secret.txt").write_text("the secret of this machine")
    yield from serve(House(Settings(home=home, limits=Limits(waiting=8, per_owner=8, upload=2**20))), home)
