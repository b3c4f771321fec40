"""Entrance: who a request is from, where names are asked for: login page, its cookie, and HTTP Basic for programs."""

import asyncio
import hashlib
import hmac
import ipaddress
import secrets
import time
from base64 import b64decode
from collections import OrderedDict
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import Scope

from imgadapt.playground.serving.accounts import Accounts, Throttle, Tokens

COOKIE = "imgadapt_login"
"""Of a browser that somebody has logged in from."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>imgadapt</title><style>
:root { color-scheme: light dark; font-family: system-ui, sans-serif; }
body { min-height: 100vh; margin: 0; display: grid; place-items: center; }
form { width: min(20rem, 86vw); display: grid; gap: .75rem; }
h1 { font-size: 1.4rem; margin: 0; }
label { display: grid; gap: .25rem; }
input, button { font: inherit; padding: .6rem; border-radius: .5rem; border: 1px solid #8888; }
button { background: #2f6f5e; color: #fff; border: 0; cursor: pointer; }
p { margin: 0; color: #c0392b; }
</style></head><body><form method="post" action="/login">
<h1>imgadapt</h1>SAID
<label>Name<input name="name" autocomplete="username" required autofocus></label>
<label>Password<input name="password" type="password" autocomplete="current-password" required></label>
<button>Log in</button></form></body></html>
"""
_REMEMBERED = 300.0
"""Seconds for which a right password of HTTP Basic is not computed anew."""


class Refused(Exception):
    """Not let in; `response` says why."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status_code)
        self.response = response


class Entrance:
    """Lets those in who are in `accounts`. Wrong passwords slow down whoever sends them, by address and by name."""

    def __init__(self, accounts: Accounts) -> None:
        self.accounts, self.tokens = accounts, Tokens(accounts)
        self._addresses, self._names = (
            Throttle(900.0),
            Throttle(60.0),
        )  # a name only shortly, or anyone could shut it out
        self._right: OrderedDict[str, tuple[str, str | None, float]] = OrderedDict()
        self._asked: dict[str, asyncio.Lock] = {}
        self._salt = secrets.token_bytes(32)
        self._computing = asyncio.Semaphore(2)  # of scrypt, which takes 16 MiB each

    async def name(self, scope: Scope) -> str:
        """Who a request is from.

        Raises:
            Refused: nobody who may come in.
        """
        headers = Headers(scope=scope)
        if name := self.tokens.name(cookie(headers, COOKIE)):
            return name
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            return await self._basic(scope, given)
        browser = "sec-fetch-mode" in headers
        if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            raise Refused(RedirectResponse("/login", status_code=303))
        ask = {} if browser else {"www-authenticate": 'Basic realm="imgadapt", charset="UTF-8"'}
        raise Refused(PlainTextResponse("log in first", status_code=401, headers=ask))

    def page(self, said: str = "", status: int = 200, headers: dict[str, str] | None = None) -> Response:
        """The login page. said: fixed text, no user's."""
        line = f'<p role="alert">{said}</p>' if said else ""
        return HTMLResponse(_PAGE.replace("SAID", line), status_code=status, headers=headers)

    async def login(self, scope: Scope, body: bytes) -> Response:
        """What the login page has sent."""
        try:
            fields = parse_qs(body.decode(), max_num_fields=4, keep_blank_values=True)
        except ValueError:
            return self.page("That could not be read.", 400)
        name, password = fields.get("name", [""])[0], fields.get("password", [""])[0]
        try:
            right = await self._check(scope, name, password)
        except Refused as refused:
            wait = refused.response.headers["retry-after"]
            return self.page(f"Too many wrong passwords; wait {wait} s.", 429, {"retry-after": wait})
        if not right:
            return self.page("Name or password is wrong.", 401)
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(
            COOKIE, self.tokens.new(name), httponly=True, samesite="strict", secure=scope["scheme"] == "https"
        )
        return response

    def logout(self, scope: Scope) -> Response:
        """Ends what the cookie stands for."""
        self.tokens.end(cookie(Headers(scope=scope), COOKIE) or "")
        response = RedirectResponse("/login", status_code=303)
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return response

    async def _basic(self, scope: Scope, given: str) -> str:
        wrong = Refused(PlainTextResponse("name or password is wrong", status_code=401))
        try:
            name, colon, password = b64decode(given, validate=True).decode().partition(":")
        except ValueError:
            raise wrong from None
        if not colon:
            raise wrong
        key = hmac.new(self._salt, f"{name}\0{password}".encode(), hashlib.sha256).hexdigest()
        async with self._asked.setdefault(key, asyncio.Lock()):  # a client's many requests at once are one try
            try:
                if not self._is_known(key) and not await self._check(scope, name, password):
                    raise wrong
            finally:
                self._asked.pop(key, None)
            if key not in self._right:
                self._right[key] = (name, self.accounts.mark(name), time.monotonic() + _REMEMBERED)
                while len(self._right) > 256:
                    self._right.popitem(last=False)
        return name

    def _is_known(self, key: str) -> bool:
        """Whether a name with its password was right a moment ago."""
        name, mark, until = self._right.get(key, ("", None, 0.0))
        if mark is not None and time.monotonic() < until and mark == self.accounts.mark(name):
            return True
        self._right.pop(key, None)
        return False

    async def _check(self, scope: Scope, name: str, password: str) -> bool:
        """Raises Refused (429) where too many wrong ones came before."""
        address, who = _network(scope), hashlib.sha256(name.encode(errors="replace")).hexdigest()[:3]
        wait = max(self._addresses.wait(address), self._names.wait(who))
        if wait:
            headers = {"retry-after": str(wait)}
            raise Refused(PlainTextResponse(f"too many wrong passwords; wait {wait} s", 429, headers))
        self._addresses.charge(address)
        self._names.charge(who)
        async with self._computing:
            right = await asyncio.to_thread(self.accounts.check, name, password)
        if right:
            self._addresses.clear(address)
            self._names.clear(who)
        return right


def cookie(headers: Headers, name: str) -> str | None:
    """A cookie's value; None: there is none."""
    return cookie_parser("; ".join(headers.getlist("cookie"))).get(name)


def _network(scope: Scope) -> str:
    """The client's address; of IPv6 the network, as a client has all of it."""
    client = scope.get("client")
    try:
        address = ipaddress.ip_address(client[0] if client else "")
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network(f"{address}/64", strict=False))
    return str(address)
