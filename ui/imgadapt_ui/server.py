"""Server: the page and the API behind the guard, on an address."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from imgadapt.errors import ConfigError
from imgadapt.playground.house import House
from imgadapt.playground.serving.entrance import Entrance
from imgadapt.playground.serving.guard import Guard, Rules
from imgadapt.playground.serving.routes import routes
from imgadapt.stopping import listened
from imgadapt_ui import visitors
from imgadapt_ui.api import endpoints

_EVENTS, _AT_ONCE = 256, 64
"""Events of all pages and programs that wait; of one kind that are at work, which mostly wait at the desk."""


def application(
    house: House,
    blocks: gr.Blocks,
    rules: Rules,
    entrance: Entrance | None = None,
    look: Mapping[str, Any] | None = None,
) -> ASGIApp:
    """The whole server. look: further arguments of `gr.mount_gradio_app`."""
    for number, event in blocks.fns.items():
        event.api_name = f"page_{number}"  # or they would take the names of the API's
    with blocks:
        endpoints(house)
    visitors.limit(blocks)
    blocks.enable_queue = True
    blocks.queue(max_size=_EVENTS, default_concurrency_limit=_AT_ONCE, api_open=False)
    blocks.delete_cache = (3600, 86400)
    blocks.analytics_enabled = False
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, routes=list(routes(house)))
    gr.mount_gradio_app(
        app,
        blocks,
        "/",
        server_name="127.0.0.1",
        show_error=False,
        max_file_size=house.playground.settings.limits.upload,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        **(look or {}),
    )
    visitors.lighten(blocks)
    return Guard(app, rules, entrance)


def listen(host: str, port: int) -> socket.socket:
    """An open socket.

    Raises:
        ConfigError: the port is taken, the address is not this machine's, ...
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio leaves TCP_NODELAY out
    if os.name == "posix":
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
        opened.listen(256)
    except (OSError, OverflowError) as error:
        opened.close()
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{host}, port {port}: {why}; choose another with --port (0: any that is free)") from None
    return opened


class _Server(uvicorn.Server):
    """Says when it is ready."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """SIGHUP, too, ends it as the others do."""
        with super().capture_signals():
            main = threading.current_thread() is threading.main_thread()  # they come to it only
            further = [number for number in listened() if number not in (signal.SIGINT, signal.SIGTERM)] if main else []
            before = {number: signal.signal(number, self.handle_exit) for number in further}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


def configured(app: ASGIApp, ready: Callable[[], None]) -> uvicorn.Server:
    """A server of an application, for `run([socket])`. ready: called when it answers."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
        limit_concurrency=1000,
        h11_max_incomplete_event_size=64 * 2**10,
    )
    logging.getLogger("uvicorn.error").addFilter(_Parting())
    return _Server(config, ready)


class _Parting(logging.Filter):
    """Leaves out what uvicorn says of pages that are open when the server ends: each would be a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        cut = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
        return not cut and not str(record.msg).startswith("Cancel %s running task")


def serve(app: ASGIApp, opened: socket.socket, ready: Callable[[], None]) -> None:
    """Answer until Ctrl-C or SIGTERM, which end it as they end other programs."""
    with contextlib.closing(opened):
        configured(app, ready).run([opened])
