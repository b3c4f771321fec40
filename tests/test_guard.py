"""The guard: names, origins, sizes, passwords; in front of an application that would answer anything."""

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from imgadapt.errors import ConfigError
from imgadapt.playground.serving import accounts, guard, policy
from imgadapt.playground.serving.accounts import Accounts, Throttle, Tokens
from imgadapt.playground.serving.entrance import COOKIE, Entrance
from imgadapt.playground.serving.guard import Guard, Rules
from imgadapt.playground.serving.sessions import Guests, owner_of

EVIL = "https://evil.example"
PAGE = "<html><script>let a = 1;</script><script src='/assets/x.js'></script><script data-x>let b;</script></html>"


async def anything(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers every request, with headers that would let everyone read it."""
    request = Request(scope, receive)
    body = await request.body()
    told = {"owner": owner_of(request.headers), "bytes": len(body), "path": request.url.path}
    response: Response = HTMLResponse(PAGE) if request.url.path == "/" else JSONResponse(told)
    response.headers["access-control-allow-origin"] = request.headers.get("origin", "*")
    response.headers["access-control-allow-credentials"] = "true"
    await response(scope, receive, send)


Call = Callable[..., httpx.Response]


def caller(app: ASGIApp, base: str = "http://127.0.0.1:7860") -> Call:
    """Ask an application in this process."""

    def call(method: str, path: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            client = options.pop("client", ("10.0.0.9", 1))
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False, client=client)
            async with httpx.AsyncClient(transport=transport, base_url=base) as http:
                return await http.request(method, path, **options)

        return asyncio.run(ask())

    return call


@pytest.fixture
def call() -> Call:
    return caller(Guard(anything, Rules(hosts=("play.example",))))


@pytest.mark.parametrize(
    "host", ["127.0.0.1:7860", "localhost", "LOCALHOST:1", "[::1]:7860", "play.example", "localhost.:7860"]
)
def test_own_names_are_answered_with_any_port(call: Call, host: str) -> None:
    assert call("GET", "/config", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "192.168.1.5", "localhost.evil.example", "127.0.0.1.evil.example", "", "localhost:x",
    "a@localhost",
     "localhost, evil.example", "0.0.0.0", "[::2]", "127.1"],
)  # fmt: skip
def test_another_name_is_no_name_of_this_server(call: Call, host: str) -> None:
    """DNS rebinding: a foreign name that points here."""
    answer = call("GET", "/config", headers={"host": host})
    assert answer.status_code == 421
    assert "owner" not in answer.text


def test_the_address_that_was_connected_to_is_a_name_and_no_other_address_is() -> None:
    async def here(scope: Scope, receive: Receive, send: Send) -> None:
        await Guard(anything, Rules())({**scope, "server": ("192.168.1.5", 7860)}, receive, send)

    assert caller(here)("GET", "/config", headers={"host": "192.168.1.5:7860"}).status_code == 200
    assert caller(here)("GET", "/config", headers={"host": "192.168.1.6:7860"}).status_code == 421


def test_two_host_headers_are_none(call: Call) -> None:
    assert call("GET", "/config", headers=[("host", "localhost"), ("host", "evil.example")]).status_code == 421


@pytest.mark.parametrize(
    "origin",
    [
        EVIL,
        "null",
        "http://127.0.0.1:9999",
        "http://localhost:7860",
        "file://",
        "http://127.0.0.1:7860@evil.example",
        "",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_foreign_origin_is_refused_and_told_nothing(call: Call, origin: str, method: str) -> None:
    path = "/config" if method == "GET" else "/gradio_api/queue/join"
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    answer = call(method, path, headers={"origin": origin, **(preflight if method == "OPTIONS" else {})})
    assert answer.status_code == 403
    assert not [key for key in answer.headers if key.startswith("access-control")]


def test_its_own_origin_may_post_behind_tls_too(call: Call) -> None:
    assert call("POST", "/gradio_api/queue/join", headers={"origin": "http://127.0.0.1:7860"}).status_code == 200
    own = {"host": "play.example", "origin": "https://play.example"}
    answer = call("POST", "/gradio_api/queue/join", headers=own)
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_may_link_here_and_embed_nothing(call: Call, site: str) -> None:
    link = {"sec-fetch-site": site, "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert call("GET", "/", headers=link).status_code == 200
    assert call("POST", "/gradio_api/queue/join", headers=link).status_code == 403
    assert call("GET", "/", headers={**link, "sec-fetch-dest": "iframe"}).status_code == 403
    image = {"sec-fetch-site": site, "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}
    assert call("GET", "/pictures/0123456789", headers=image).status_code == 403


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/proxy=http://x/", "/gradio_api/file=http://x/y", "/gradio_api/file=https://x",
    "/gradio_api/file/etc/passwd",
     "/monitoring", "/monitoring/summary", "/gradio_api/mcp/sse", "/gradio_api/deep_link", "/gradio_api/dev/reload",
     "/gradio_api/vibe-code", "/gradio_api/component_server", "/gradio_api/runs", "/gradio_api/run-history/records",
     "/gradio_api/token",
     "/docs", "/svelte/x",
     "/gradio_api/custom_component/a/client/b/c", "/gradio_api/stream/a/b/1/playlist.m3u8",
     "/gradio_api/profiling/traces",
     "/gradio_api/api/generate", "/gradio_api/login", "/openapi.json", "/gradio_api/openapi.json", "/pwa_icon",
     "/cards",
     "/assets/../../etc/passwd", "/assets/%2e%2e/%2e%2e/etc/passwd",
     "/gradio_api/file=..%2f..%2fetc%2fpasswd", "/gradio_api/file=a%00b", "/pictures/..%2f..%2fx",
     "/pictures/ABCDEFGHIJ",
     "/static/..%5c..%5cx", "/cards/0123456789/other", "/pictures/0123456789/"],
)  # fmt: skip
def test_what_the_page_does_not_need_is_shut(call: Call, path: str) -> None:
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
        assert call(method, path).status_code == 404, method


@pytest.mark.parametrize(
    "path", ["/gradio_api/file=/tmp/../etc/passwd", "//config", "/assets/../x", "/config\n", "/assets/a\0"]
)
def test_paths_that_clients_tidy_up_are_shut_where_they_come_as_they_are(path: str) -> None:
    assert not policy.is_open("GET", path)


def test_every_answer_has_the_headers_even_the_refusals(call: Call) -> None:
    def breaks(scope: Scope, receive: Receive, send: Send) -> Any:
        raise ValueError("/secret/place")

    broken = caller(Guard(breaks, Rules()))("GET", "/config")
    assert (broken.status_code, "secret" in broken.text) == (500, False)
    for answer in (
        call("GET", "/"), call("GET", "/config"), call("GET", "/nothing"), call("GET", "/", headers={"host": "x"}),
        call("POST", "/login", headers={"origin": "null"}), call("POST", "/restore", content=b"1" * 100), broken,
    ):  # fmt: skip
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"


def test_only_the_scripts_of_the_page_itself_may_run(call: Call) -> None:
    said = call("GET", "/").headers["content-security-policy"]
    scripts = next(part for part in said.split("; ") if part.startswith("script-src"))
    assert scripts.count("sha256-") == 2
    assert "'unsafe-inline'" not in scripts
    assert "sandbox" in call("GET", "/pictures/0123456789").headers["content-security-policy"]


def test_a_body_is_cut_off_where_it_is_too_large_said_or_not() -> None:
    call = caller(Guard(anything, Rules(body=1000, upload=5000)))
    reached = 0

    async def drops(count: int) -> AsyncIterator[bytes]:
        nonlocal reached
        for _ in range(count):
            reached += 100
            yield b"x" * 100

    assert call("POST", "/gradio_api/queue/join", content=b"x" * 1000).json()["bytes"] == 1000
    assert call("POST", "/gradio_api/queue/join", content=b"x" * 1001).status_code == 413
    assert call("POST", "/gradio_api/queue/join", content=drops(10)).json()["bytes"] == 1000
    reached = 0
    answer = call("POST", "/gradio_api/queue/join", content=drops(1000))
    assert (answer.status_code, reached) == (413, 1100)
    assert "1,000 bytes" in answer.text
    assert call("POST", "/gradio_api/upload", content=drops(50)).json()["bytes"] == 5000
    assert call("POST", "/gradio_api/upload", content=drops(51)).status_code == 413
    for lie in ("-1", "1e9", "9" * 30, "٣", "1, 1"):
        assert call("POST", "/restore", content=b"", headers={"content-length": lie.encode()}).status_code == 413


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_SLOWEST", 0.05)

    async def slow() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    assert caller(Guard(anything, Rules()))("POST", "/restore", content=slow()).status_code == 408


def test_uploads_wait_for_room(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 100)
    call = caller(Guard(anything, Rules(stores=(tmp_path,), stored=100)))
    assert call("POST", "/restore", content=b"x").status_code == 507
    assert call("POST", "/gradio_api/queue/join", content=b"x").status_code == 200
    (tmp_path / "large").unlink()
    assert call("POST", "/restore", content=b"x").status_code == 200


def test_only_so_many_uploads_are_on_their_way_at_once() -> None:
    async def run() -> list[int]:
        inside = asyncio.Semaphore(0)
        go = asyncio.Event()

        async def waits(scope: Scope, receive: Receive, send: Send) -> None:
            inside.release()
            await go.wait()
            await anything(scope, receive, send)

        transport = httpx.ASGITransport(app=Guard(waits, Rules(uploads=2)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            first = [asyncio.create_task(http.post("/restore", content=b"x")) for _ in range(2)]
            for _ in first:
                await inside.acquire()
            third = await http.post("/restore", content=b"x")
            go.set()
            answers = [third, *[await one for one in first], await http.post("/restore", content=b"x")]
            return [answer.status_code for answer in answers]

    assert asyncio.run(run()) == [503, 200, 200, 200]


def test_a_guest_is_known_by_the_cookie_and_by_nothing_that_they_say(call: Call) -> None:
    first = call("GET", "/")
    line = first.headers["set-cookie"]
    assert all(word in line for word in ("HttpOnly", "SameSite=Strict", "Path=/"))
    assert "Secure" not in line
    cookie = line.partition(";")[0]
    owners = [call("GET", "/config", headers={"cookie": cookie}).json()["owner"] for _ in range(2)]
    assert owners[0] == owners[1]
    assert owners[0].startswith("guest-")
    assert owners[0].removeprefix("guest-") not in cookie
    forged = {"cookie": f"imgadapt_session={'a' * 32}.{'b' * 32}", "x-imgadapt-owner": owners[0]}
    assert call("GET", "/config", headers=forged).json()["owner"] not in (owners[0], "")
    assert "set-cookie" not in call("GET", "/", headers={"cookie": cookie}).headers


def test_guests_are_known_after_a_restart(tmp_path: Path) -> None:
    cookie = Guests.kept_in(tmp_path / "secret").new()
    assert Guests.kept_in(tmp_path / "secret").owner(cookie) is not None
    assert (tmp_path / "secret").stat().st_mode & 0o077 == 0
    assert Guests.kept_in(tmp_path / "other").owner(cookie) is None


@pytest.fixture
def users(tmp_path: Path) -> Path:
    accounts.add(tmp_path / "users", "ada", "correct horse")
    return tmp_path / "users"


def basic(name: str, password: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}


def test_nothing_is_open_without_a_login(users: Path) -> None:
    call = caller(Guard(anything, Rules(), Entrance(Accounts(users))))
    for method, path in [
        ("GET", "/config"), ("POST", "/gradio_api/cancel"), ("POST", "/gradio_api/reset"), ("POST",
        "/gradio_api/queue/join"),
        ("GET", "/gradio_api/queue/data"), ("GET", "/gradio_api/heartbeat/abc"), ("POST",
        "/gradio_api/upload"), ("GET", "/assets/x.js"),
        ("GET", "/pictures/0123456789"), ("GET", "/gradio_api/startup-events"), ("GET", "/theme.css"), ("POST",
        "/restore"),
    ]:  # fmt: skip
        answer = call(method, path)
        assert (answer.status_code, "owner" in answer.text) == (401, False), path
    page = call("GET", "/", headers={"accept": "text/html"})
    assert (page.status_code, page.headers["location"]) == (303, "/login")
    assert 'type="password"' in call("GET", "/login").text
    assert call("GET", "/health").json()["owner"] == ""


def test_the_cookie_of_a_login_is_the_user_until_they_log_out(users: Path) -> None:
    call = caller(Guard(anything, Rules(), Entrance(Accounts(users))), base="https://127.0.0.1:7860")
    wrong = call("POST", "/login", data={"name": "ada", "password": "wrong"})
    assert (wrong.status_code, "set-cookie" in wrong.headers) == (401, False)
    right = call("POST", "/login", data={"name": "ada", "password": "correct horse"})
    line = right.headers["set-cookie"]
    assert all(word in line for word in ("HttpOnly", "SameSite=strict", "Secure"))
    cookie = {"cookie": line.partition(";")[0]}
    assert call("GET", "/config", headers=cookie).json()["owner"] == "user-ada"
    assert call("POST", "/logout", headers=cookie).status_code == 303
    assert call("GET", "/config", headers=cookie).status_code == 401


def test_programs_say_who_they_are_with_every_request(users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entrance = Entrance(Accounts(users))
    call = caller(Guard(anything, Rules(), entrance))
    assert call("GET", "/config", headers=basic("ada", "correct horse")).json()["owner"] == "user-ada"
    with monkeypatch.context() as patch:
        patch.delattr(hashlib, "scrypt")  # which takes long, so it is not computed again
        assert call("GET", "/config", headers=basic("ada", "correct horse")).status_code == 200
    accounts.add(users, "ada", "another one")
    assert call("GET", "/config", headers=basic("ada", "correct horse")).status_code == 401
    assert call("GET", "/config", headers={"authorization": "Basic ?"}).status_code == 401
    assert call("GET", "/config", headers=basic("bob", "correct horse")).status_code == 401


def test_fifty_requests_of_one_program_at_once_are_one_try(users: Path) -> None:
    async def run() -> set[int]:
        transport = httpx.ASGITransport(app=Guard(anything, Rules(), Entrance(Accounts(users))))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            asked = [http.get("/config", headers=basic("ada", "correct horse")) for _ in range(50)]
            return {answer.status_code for answer in await asyncio.gather(*asked)}

    assert asyncio.run(run()) == {200}


def test_the_sixth_wrong_password_is_not_looked_at(users: Path) -> None:
    call = caller(Guard(anything, Rules(), Entrance(Accounts(users))))
    tries = [call("GET", "/config", headers=basic("ada", f"wrong {k}")).status_code for k in range(8)]
    assert tries == [401] * 5 + [429] * 3
    right = call("POST", "/login", data={"name": "ada", "password": "correct horse"})
    assert (right.status_code, int(right.headers["retry-after"])) == (429, 1)
    elsewhere = call("GET", "/config", headers=basic("eve", "x"), client=("10.0.0.10", 1))
    assert elsewhere.status_code == 401  # another address, another name: not slowed down


def test_many_wrong_passwords_at_once_are_no_way_round_it(users: Path) -> None:
    async def run() -> list[int]:
        transport = httpx.ASGITransport(app=Guard(anything, Rules(), Entrance(Accounts(users))))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            asked = [http.get("/config", headers=basic("ada", f"wrong {k}")) for k in range(20)]
            return sorted(answer.status_code for answer in await asyncio.gather(*asked))

    assert asyncio.run(run()) == [401] * 5 + [429] * 15


def test_the_wait_doubles_ends_and_is_forgotten() -> None:
    now = 0.0
    throttle = Throttle(longest=60, most=10, clock=lambda: now)
    waits: list[int] = []
    for _ in range(12):
        throttle.charge("x")
        waits.append(throttle.wait("x"))
    assert waits == [0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 60, 60]
    now = 60.0
    assert throttle.wait("x") == 0
    now = 200.0
    throttle.charge("x")
    assert throttle.wait("x") == 0
    for k in range(1000):
        throttle.charge(str(k))
    assert len(throttle._tries) == 10


def test_tokens_end_with_their_time_and_their_user(users: Path) -> None:
    now = 0.0
    known = Accounts(users)
    tokens = Tokens(known, lasts=100, most=3, clock=lambda: now)
    token = tokens.new("ada")
    assert tokens.name(token) == "ada"
    assert tokens.name(token + "x") is None
    now = 101.0
    assert tokens.name(token) is None
    token = tokens.new("ada")
    accounts.add(users, "ada", "another one")
    assert tokens.name(token) is None
    token = tokens.new("ada")
    users.unlink()
    assert tokens.name(token) is None
    for _ in range(10):
        tokens.new("ada")
    assert len(tokens._known) <= 3


def test_the_file_has_no_password_in_it_and_is_nobody_elses(users: Path) -> None:
    assert "correct" not in users.read_text()
    assert users.stat().st_mode & 0o077 == 0
    accounts.add(users, "bob", "long enough")
    assert list(accounts.read(users)) == ["ada", "bob"]
    for name, password in [("a:b", "long enough"), ("", "long enough"), ("x" * 33, "long enough"), ("eve", "short")]:
        with pytest.raises(ConfigError):
            accounts.add(users, name, password)
    users.write_text("ada:plain\n")
    with pytest.raises(ConfigError, match="line 1"):
        Accounts(users)
    with pytest.raises(ConfigError, match="NAME:PASSWORD"):
        accounts.found(None, "adapassword")


def test_a_login_is_small_and_odd_ones_are_only_wrong(users: Path) -> None:
    call = caller(Guard(anything, Rules(), Entrance(Accounts(users))))
    assert call("POST", "/login", content=b"name=" + b"x" * 5000).status_code == 413
    for body in (b"", b"\xff", b"name=ada", b"a&" * 50, b"name=ada&password=%00"):
        assert call("POST", "/login", content=body, client=(str(len(body)), 1)).status_code in (400, 401, 429)
    assert COOKIE not in str(call("GET", "/login").headers)


def test_no_websocket_is_opened() -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(anything, Rules())({"type": "websocket", "path": "/", "headers": []}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_sources_of_the_page_are_its_own() -> None:
    said = policy.for_scripts(b"<script>x</script>")["content-security-policy"]
    assert "http:" not in said
    assert "https:" not in said
    assert "*" not in said
