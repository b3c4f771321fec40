"""Guard: the outermost layer of the server. Whose pages may ask, for what, how much, and who it is; all before anything
else sees the request.
"""

import asyncio
import os
import re
import secrets
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from imgadapt.playground.serving import policy
from imgadapt.playground.serving.entrance import Entrance, Refused, cookie
from imgadapt.playground.serving.sessions import COOKIE, OWNER, Guests

_SLOWEST = 30.0
"""Seconds that may pass between two pieces of a request's body."""
_LOGIN = 4096
"""Bytes of what the login page sends."""


@dataclass(frozen=True)
class Rules:
    """hosts: names by which the server may be called, besides this machine's own and the address itself. body: bytes of
    a request; upload: of one that brings files, of which `uploads` may be on their way at once, and which are refused
    while `stores`, the folders that they go to, hold `stored` bytes or more.
    """

    hosts: Collection[str] = ()
    body: int = 8 * 2**20
    upload: int = 512 * 2**20
    uploads: int = 4
    stores: tuple[Path, ...] = ()
    stored: int = 8 * 2**30
    guests: Guests = field(default_factory=lambda: Guests(secrets.token_bytes(32)))


class Guard:
    """ASGI. entrance: who may come in; None: everyone who reaches the address, as a guest."""

    def __init__(self, app: ASGIApp, rules: Rules, entrance: Entrance | None = None) -> None:
        self.app, self.rules, self.entrance = app, rules, entrance
        self._hosts = {"localhost", "127.0.0.1", "[::1]", *(name.lower() for name in rules.hosts)}
        self._uploading = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        out = _Out(send, scope)
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, out)
            return
        upload = policy.brings_files(scope["path"])
        body = _Body(receive, self.rules.upload if upload else self.rules.body)
        out.body = body
        if body.too_large(Headers(scope=scope)):
            await out.instead(scope, body)
            return
        if not upload:
            await self._known(scope, body, out)
        elif self._uploading >= self.rules.uploads:
            await PlainTextResponse("too many uploads at once; try again", 503, {"retry-after": "5"})(scope, body, out)
        else:
            self._uploading += 1
            try:
                if await asyncio.to_thread(_bytes_in, self.rules.stores) >= self.rules.stored:
                    await PlainTextResponse("there is no room for uploads; try later", 507)(scope, body, out)
                else:
                    await self._known(scope, body, out)
            finally:
                self._uploading -= 1

    def _refusal(self, scope: Scope) -> Response | None:
        """What is refused before anyone asks who it is."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_own(hosts[0], scope):
            return PlainTextResponse("this server is not called that; see `imgadapt ui --allow-host`", 421)
        if policy.is_foreign(headers, scope["method"]):
            return PlainTextResponse("another site's page may not ask this server", 403)
        if not policy.is_open(scope["method"], scope["path"]):
            return PlainTextResponse("there is nothing here", 404)
        return None

    def _is_own(self, host: str, scope: Scope) -> bool:
        """Whether a Host is one of ours, or the very address that was connected to, which no foreign name can be."""
        found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+?)\.?(?::(\d{1,5}))?", host)
        if found is None:
            return False
        name, server = found[1].lower(), scope.get("server")
        reached = str(server[0]).lower() if server else ""
        return name in self._hosts or (
            name == (f"[{reached}]" if ":" in reached else reached) and policy.is_address(name)
        )

    async def _known(self, scope: Scope, body: "_Body", out: "_Out") -> None:
        """The request with its owner in it, or what keeps it out."""
        path, method = scope["path"], scope["method"]
        if path == "/health":
            await self._answer(scope, body, out, "")
            return
        entrance = self.entrance
        if entrance is None:
            if path in ("/login", "/logout"):
                await PlainTextResponse("there is nothing here", 404)(scope, body, out)
                return
            given = cookie(Headers(scope=scope), COOKIE)
            guest = self.rules.guests.owner(given)
            if guest is None:
                given = self.rules.guests.new()
                guest = self.rules.guests.owner(given) or ""
                if method == "GET" and path == "/":  # once, before all that the page asks for
                    secure = "; Secure" if scope["scheme"] == "https" else ""
                    out.cookie = f"{COOKIE}={given}; Path=/; Max-Age=31536000; HttpOnly; SameSite=Strict{secure}"
            await self._answer(scope, body, out, guest)
        elif path == "/login":
            out.body = None  # no application has a say here
            response = entrance.page() if method == "GET" else await self._login(entrance, scope, body)
            await response(scope, body, out)
        elif path == "/logout":
            await entrance.logout(scope)(scope, body, out)
        else:
            try:
                name = await entrance.name(scope)
            except Refused as refused:
                await refused.response(scope, body, out)
            else:
                await self._answer(scope, body, out, f"user-{name}")

    async def _login(self, entrance: Entrance, scope: Scope, body: "_Body") -> Response:
        """Read what the login page sent, and see."""
        body.most = _LOGIN
        sent = b""
        try:
            while not body.over:
                message = await body()
                sent += message.get("body", b"")
        except _Refusal:
            return body.said
        return await entrance.login(scope, sent)

    async def _answer(self, scope: Scope, body: "_Body", out: "_Out", owner: str) -> None:
        """Hand the request on. (The page comes uncompressed, as the policy names what its scripts are.)"""
        dropped = {OWNER.encode(), *([b"accept-encoding"] if scope["path"] == "/" else [])}
        headers = [(key, value) for key, value in scope["headers"] if key.lower() not in dropped]
        scope = {**scope, "headers": [*headers, (OWNER.encode(), owner.encode())]}
        try:
            await self.app(scope, body, out)
        except _Refusal:
            pass
        except Exception as error:
            if isinstance(error.__cause__, HTTPException) and out.started:  # a session that it does not know, mostly
                await out({"type": "http.response.body", "body": b"", "more_body": False})
                return
            if not out.started:
                await PlainTextResponse("something went wrong inside; the server's log has it", 500)(scope, body, out)
            raise
        await out.instead(scope, body)


class _Refusal(Exception):
    """Ends the reading of a body that is too large or too slow."""


class _Body:
    """A request's body, read as far as is allowed."""

    def __init__(self, receive: Receive, most: int) -> None:
        self.most, self.over, self.refused = most, False, False
        self.said = _too_large(most)
        self._receive, self._read = receive, 0

    def too_large(self, headers: Headers) -> bool:
        """Whether it says so itself."""
        said = headers.get("content-length", "0")
        self.refused = not said.isascii() or not said.isdigit() or len(said) > 18 or int(said) > self.most
        return self.refused

    async def __call__(self) -> Message:
        if self.over:  # what comes now is that the client has gone
            return await self._receive()
        if self.refused:
            raise _Refusal
        try:
            message = await asyncio.wait_for(self._receive(), _SLOWEST)
        except TimeoutError:
            self._refuse(PlainTextResponse("the request came too slowly", 408, {"connection": "close"}))
        self._read += len(message.get("body", b""))
        if self._read > self.most:
            self._refuse(_too_large(self.most))
        self.over = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    def _refuse(self, said: Response) -> NoReturn:
        self.said, self.refused = said, True
        raise _Refusal


def _too_large(most: int) -> Response:
    return PlainTextResponse(f"the request is too large; {most:,} bytes are allowed", 413, {"connection": "close"})


def _bytes_in(folders: Collection[Path]) -> int:
    """How much lies in folders; what goes while it is counted does not count."""
    total = 0
    for folder in folders:
        for where, _, names in os.walk(folder):
            for name in names:
                with suppress(OSError):
                    total += os.lstat(os.path.join(where, name)).st_size
    return total


class _Out:
    """A response on its way out: with the headers that all have, without any that let other sites read it."""

    def __init__(self, send: Send, scope: Scope) -> None:
        self._send, self._scope = send, scope
        self._held: Message | None = None
        self._page = bytearray()
        self.started, self.cookie = False, ""
        self.body: _Body | None = None

    async def __call__(self, message: Message) -> None:
        if self.body is not None and self.body.refused and not self.started:
            return  # what the application says of a body that was cut off: `instead` says why
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message["headers"]))
            policy.seal(headers, self._scope["path"])
            if self.cookie:
                headers.append("set-cookie", self.cookie)
            self._held = {**message, "headers": headers.raw}
            if not self._is_page(headers):
                await self._start({})
        elif message["type"] == "http.response.body":
            if self._held is not None:
                self._page += message.get("body", b"")
                if message.get("more_body", False):
                    return
                await self._start(policy.for_scripts(bytes(self._page)))
                message = {**message, "body": bytes(self._page)}
            await self._send(message)
        else:
            await self._send(message)

    def _is_page(self, headers: MutableHeaders) -> bool:
        """Whether it is Gradio's page, which has scripts in it."""
        return self._scope["path"] == "/" and headers.get("content-type", "").startswith("text/html")

    async def _start(self, more: Mapping[str, str]) -> None:
        assert self._held is not None
        headers = MutableHeaders(raw=self._held["headers"])
        headers.update(more)
        message, self._held, self.started = {**self._held, "headers": headers.raw}, None, True
        await self._send(message)

    async def instead(self, scope: Scope, body: _Body) -> None:
        """Say why the body was not read, where nothing has been said yet."""
        if body.refused and not self.started:
            self.body = None
            await body.said(scope, body, self)
