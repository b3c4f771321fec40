"""The server: what strangers, broken programs and bad luck send it; each is followed by a request that works."""

import asyncio
import io
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from imgadapt.playground.converting import ConvertRequest
from imgadapt.playground.house import House
from imgadapt.playground.serving.sessions import OWNER
from imgadapt.playground.settings import Settings
from tests.served import DRAWN, Served, Told, begin, called, served

__all__ = ["served"]
EVIL = "https://evil.example"
LONG = {"prompt": "a fox", "seed": 5, "steps": 200, "count": 4}
"""Some seconds of work, where nobody stops it."""


def ask(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    """Ask an application without a network."""

    async def one() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as http:
            return await http.request(method, path, **options)

    return asyncio.run(one())


@pytest.mark.parametrize("origin", [EVIL, "null"])
def test_gradios_hole_for_foreign_hosts_is_there_and_closed(served: Served, origin: str) -> None:
    """gradio-app/gradio#13594: where the Host is no local one, it lets every page read its answers."""
    foreign = {"host": "192.168.1.5:7860", "origin": origin}
    preflight = {**foreign, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    for method, path, headers in (
        ("GET", "/config", foreign),
        ("OPTIONS", "/gradio_api/queue/join", preflight),
        ("POST", "/gradio_api/queue/join", foreign),
    ):
        hole = ask(served.guard.app, method, path, headers=headers)
        assert hole.headers["access-control-allow-origin"] == origin
        for host in ("192.168.1.5:7860", "localhost:7860", served.url.removeprefix("http://")):
            closed = ask(served.guard, method, path, headers={**headers, "host": host})
            assert closed.status_code in (403, 421)
            assert not [key for key in closed.headers if key.startswith("access-control")]
            assert "components" not in closed.text


def test_answers_that_stream_have_the_headers_too(served: Served) -> None:
    with served.http as http, http.stream("GET", "/gradio_api/heartbeat/abcdef") as stream:
        assert next(stream.iter_lines()) == "data: ALIVE"
        assert stream.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in stream.headers["content-security-policy"]


def test_the_page_tells_no_path_and_runs_no_other_script(served: Served) -> None:
    with served.http as http:
        page = http.get("/")
    assert page.status_code == 200
    assert str(served.home) not in page.text
    assert "'unsafe-inline'" not in page.headers["content-security-policy"].partition("script-src")[2].partition(";")[0]


def _function(http: httpx.Client, name: str) -> int:
    found = [one["id"] for one in http.get("/config").json()["dependencies"] if one["api_name"] == name]
    return found[0]


def _join(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/gradio_api/queue/join", json={"session_hash": "s1", "event_data": None, **body})


Rows = dict[str, Callable[[httpx.Client], httpx.Response]]
_GENERATE, _UPLOAD = "/gradio_api/call/generate", "/gradio_api/upload"
_DEEP = b'{"data": [' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"]}"


def _raw(content: bytes, kind: str = "application/json", path: str = _GENERATE) -> Callable[..., httpx.Response]:
    return lambda http: http.post(path, content=content, headers={"content-type": kind})


def _asked(name: str, *data: Any) -> Callable[..., httpx.Response]:
    return lambda http: _join(http, fn_index=_function(http, name), data=list(data))


def _file(**said: str) -> dict[str, Any]:
    return {**said, "meta": {"_type": "gradio.FileData"}}


_EVENT = {"session_hash": "s", "fn_index": 0, "event_id": "x"}
BROKEN: Rows = {
    "no arguments": _asked("generate"),
    "too many arguments": _asked("generate", *[{}] * 50),
    "an argument of another kind": _asked("generate", [[[[]]]]),
    "a file of a path": _asked("restore", _file(path="/etc/passwd")),
    "a file of an address": _asked("restore", _file(url="http://127.0.0.1:1/", path="x")),
    "a function that is not there": lambda http: _join(http, fn_index=10**6, data=[{}]),
    "a negative function": lambda http: _join(http, fn_index=-1, data=[{}]),
    "a function that is no number": lambda http: _join(http, fn_index="generate", data=[{}]),
    "no session": lambda http: http.post("/gradio_api/queue/join", json={"fn_index": 0, "data": []}),
    "a session of another kind": lambda http: _join(http, fn_index=0, data=[], session_hash={"a": 1}),
    "no body": lambda http: http.post("/gradio_api/queue/join"),
    "half a body": _raw(b'{"data": ['),
    "a body that is no UTF-8": _raw(b'{"data": ["\xff"]}'),
    "NaN": _raw(b'{"data": [{"guidance": NaN}]}'),
    "a deep body": _raw(b"[" * 100_000),
    "deep settings": _raw(_DEEP),
    "another type": _raw(b"data=1", "text/xml"),
    "a large body": _raw(b"x" * (9 * 2**20)),
    "an endpoint that is not there": lambda http: http.post("/gradio_api/call/nothing", json={"data": [{}]}),
    "a call past the queue": lambda http: http.post("/gradio_api/run/generate", json={"data": [DRAWN]}),
    "another's session": lambda http: http.get("/gradio_api/queue/data", params={"session_hash": "another"}),
    "an event that is not there": lambda http: http.get(f"{_GENERATE}/0123456789abcdef"),
    "cancel when idle": lambda http: http.post("/gradio_api/cancel", json=_EVENT),
    "cancel of nothing": lambda http: http.post("/gradio_api/cancel", json={}),
    "reset": lambda http: http.post("/gradio_api/reset", json={"event_id": "x"}),
    "a component's insides": lambda http: _component(http, fn_name="__class__"),
    "a component that is not there": lambda http: _component(http, component_id=10**9),
    "an upload without files": _raw(b"x", "multipart/form-data; boundary=x", _UPLOAD),
    "an upload of another type": _raw(b"{}", path=_UPLOAD),
    "an upload under a path": lambda http: http.post(_UPLOAD, files={"files": ("../../../x.png", b"x")}),
    "a large upload": lambda http: http.post(_UPLOAD, files={"files": ("x.png", b"x" * (2**20 + 1))}),
}


def _component(http: httpx.Client, **more: Any) -> httpx.Response:
    body = {"data": {}, "component_id": 1, "session_hash": "s", "fn_name": "accept_blobs", **more}
    return http.post("/gradio_api/component_server", json=body)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_answered_shortly_and_the_next_request_works(served: Served, name: str) -> None:
    with served.http as http:
        answer = BROKEN[name](http)
        texts = [answer.text]
        if answer.text.startswith('{"event_id"'):
            texts.append(_heard(http, answer.json()["event_id"]))
    for text in texts:
        assert "Traceback" not in text
        assert str(served.home) not in text or name == "an upload under a path"  # its own place, by a hash
        assert "root:" not in text
        assert "site-packages" not in text
    assert not (served.home.parent / "x.png").exists()
    assert served.works()["width"] == 64
    assert served.idle()


def _heard(http: httpx.Client, event: str) -> str:
    """What is said of an event, by its session or its own address."""
    heard = http.get(f"/gradio_api/call/generate/{event}")
    return heard.text


def test_all_events_of_the_page_take_rubbish_without_a_traceback(
    served: Served, capfd: pytest.CaptureFixture[str]
) -> None:
    """Private ones too, which anyone may call by their number."""
    with served.http as http:
        dependencies = http.get("/config").json()["dependencies"]
        assert len(dependencies) > 24
        for rubbish in ({"a": [1]}, "\0", None):
            for one in dependencies:
                answer = _join(
                    http, fn_index=one["id"], data=[rubbish] * len(one["inputs"]), session_hash=f"r{one['id']}"
                )
                assert "Traceback" not in answer.text
    assert served.idle(60)
    assert served.works()["width"] == 64


def test_who_stops_listening_stops_the_work(served: Served) -> None:
    with served.http as http:
        event = begin(http, "generate", LONG)
        with http.stream("GET", f"/gradio_api/call/generate/{event}") as stream:
            for line in stream.iter_lines():
                if '"drawing"' in line:
                    break
    assert served.idle(5)
    assert served.works()["width"] == 64


def test_cancel_stops_within_a_step_any_number_of_times(served: Served) -> None:
    with served.http as http:
        function = _function(http, "generate")
        event = _join(http, fn_index=function, data=[LONG], session_hash="mine").json()["event_id"]
        body = {"session_hash": "mine", "fn_index": function, "event_id": event}
        with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": "mine"}) as stream:
            for line in stream.iter_lines():
                if '"drawing"' in line:
                    break
            for _ in range(3):
                assert http.post("/gradio_api/cancel", json=body).status_code == 200
        assert served.idle(5)
        assert http.get(f"/gradio_api/call/generate/{event}").text.count("pictures/") == 0
    assert served.works()["width"] == 64


def test_an_event_is_told_once(served: Served) -> None:
    with served.http as http:
        event = begin(http, "generate", DRAWN)
        first = http.get(f"/gradio_api/call/generate/{event}").text
        again = ""
        with suppress(httpx.ReadTimeout), http.stream("GET", f"{_GENERATE}/{event}", timeout=1) as stream:
            for text in stream.iter_text():  # nothing, or that there is no such session
                again += text
    assert "event: complete" in first
    assert "/pictures/" not in again


def test_the_queue_is_bounded_and_says_so(served: Served) -> None:
    """Its desk lets 8 wait, and one work."""

    def one(seed: int) -> str:
        with served.http as http:
            try:
                return called(http, "generate", {**DRAWN, "steps": 6, "seed": seed})[-1]["state"]
            except Told as told:
                return str(told)

    with ThreadPoolExecutor(20) as pool:
        ends = list(pool.map(one, range(20)))
    refused = [end for end in ends if end != "done"]
    assert ends.count("done") >= 9
    assert refused
    assert {end.partition(" (")[0] for end in refused} == {"the queue is full"}
    assert served.works()["width"] == 64


def test_a_flood_of_uploads_is_let_in_by_fours(served: Served) -> None:
    def one(number: int) -> int:
        with served.http as http:
            return http.post("/gradio_api/upload", files={"files": (f"{number}.png", os.urandom(500_000))}).status_code

    with ThreadPoolExecutor(24) as pool:
        codes = list(pool.map(one, range(24)))
    assert set(codes) <= {200, 503}
    assert codes.count(200) >= 4
    assert served.works()["width"] == 64


SECRET = [
    "/etc/passwd", "/proc/self/environ", "/etc/hostname", "HOME/secret.txt", "HOME/outputs", "HOME/temporary/link",
    "HOME/temporary/folder/passwd", "HOME/TEMPORARY/../secret.txt", "secret.txt", "../secret.txt", "pyproject.toml",
    "file:///etc/passwd", "http://127.0.0.1:1/", "\\etc\\passwd", "C:\\x", "/etc/passwd%00.png", "%2fetc%2fpasswd",
]  # fmt: skip
ROUTES = ("/gradio_api/file=", "/gradio_api/file/", "/assets/", "/static/", "/pictures/", "/cards/", "/converted/")


@pytest.mark.parametrize("place", SECRET)
def test_no_file_is_read_by_its_path(served: Served, place: str) -> None:
    temporary = served.home / "temporary"
    for name, target in (("link", "/etc/passwd"), ("folder", "/etc")):
        if not (temporary / name).is_symlink():
            (temporary / name).symlink_to(target)
    path = place.replace("HOME", str(served.home))
    with served.http as http:
        for route in (
            "/gradio_api/file=",
            "/gradio_api/file/",
            "/assets/",
            "/static/",
            "/pictures/",
            "/cards/",
            "/converted/",
        ):
            answer = http.get(route + path)
            assert answer.status_code in (400, 403, 404), route
            assert "root:" not in answer.text
            assert "the secret" not in answer.text


def test_what_is_not_there_is_not_there_in_the_same_words(served: Served) -> None:
    paths = (
        "/pictures/0123456789", "/pictures/0123456789?side=x", "/cards/0123456789/preview", "/cards/0123456789/file",
        "/converted/0123456789", "/grids/0123456789/export", "/pictures/x", "/nothing",
    )  # fmt: skip
    with served.http as http:
        answers = [http.get(path) for path in paths]
    assert {(answer.status_code, answer.text) for answer in answers} == {(404, "there is nothing here")}


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[tuple[Any, House]]:
    """Routes that several people use, without the guard: the tests say who asks."""
    from fastapi import FastAPI

    from imgadapt.playground.serving.routes import routes

    house = House(Settings(home=tmp_path, shared=True))
    yield FastAPI(routes=list(routes(house))), house
    house.close()


def test_others_pictures_are_not_there(shared: tuple[Any, House]) -> None:
    app, house = shared
    picture = house.playground.album.keep(Image.new("RGB", (32, 32)), {"version": 1}, owner="user-ada")
    for path in (f"/pictures/{picture.id}", f"/pictures/{picture.id}?side=64"):
        assert ask(app, "GET", path, headers={OWNER: "user-ada"}).status_code == 200
        for other in ({OWNER: "user-bob"}, {OWNER: ""}, {}):
            assert ask(app, "GET", path, headers=other).status_code == 404


def test_a_preview_that_is_no_plain_file_holds_no_thread(shared: tuple[Any, House], tmp_path: Path) -> None:
    app, house = shared
    library = house.playground.library
    ink = library.named("ink")
    shutil.copy(ink.path, tmp_path / "adapters/a.safetensors")
    os.mkfifo(tmp_path / "adapters/a.png")
    library.scan()
    card = library.named("a")
    assert card.preview is not None
    assert ask(app, "GET", f"/cards/{card.id}/preview").status_code == 404
    with Image.open(io.BytesIO(ask(app, "GET", f"/cards/{ink.id}/preview?side=100").content)) as image:
        assert (image.format, max(image.size)) == ("WEBP", 128)


def test_others_converted_files_are_not_there(shared: tuple[Any, House]) -> None:
    app, house = shared
    adapter = house.playground.library.cards()[0].id
    asked = ConvertRequest.of({"adapter": adapter, "format": "imgadapt"})
    made = house.converter.convert(asked, owner="user-ada").result()
    assert ask(app, "GET", f"/converted/{made.id}", headers={OWNER: "user-ada"}).status_code == 200
    for other in ({OWNER: "user-bob"}, {OWNER: ""}, {}):
        assert ask(app, "GET", f"/converted/{made.id}", headers=other).status_code == 404


def test_pictures_keep_their_bytes_and_thumbnails_are_small(shared: tuple[Any, House]) -> None:
    app, house = shared
    picture = house.playground.album.keep(Image.new("RGB", (640, 320)), {"version": 1}, owner="a")
    whole = ask(app, "GET", f"/pictures/{picture.id}", headers={OWNER: "a"})
    assert whole.content == picture.path.read_bytes()
    assert whole.headers["content-disposition"].startswith("inline")
    small = ask(app, "GET", f"/pictures/{picture.id}?side=100", headers={OWNER: "a"})
    assert (small.headers["content-type"], len(small.content) < 1000) == ("image/webp", True)
    assert whole.headers["cache-control"].startswith("private")
    assert ask(app, "GET", f"/pictures/{picture.id}?side=9999999", headers={OWNER: "a"}).status_code == 404


def test_a_picture_from_outside_is_taken_once_it_is_one(served: Served) -> None:
    with served.http as http:
        made = served.works()
        png = http.get(made["url"]).content
        taken = http.post("/pictures", content=png).json()
        assert (taken["width"], taken["height"]) == (64, 64)
        assert http.post("/restore", content=png).json()["request"]["seed"] == DRAWN["seed"]
        for body in (b"", b"x", b"<svg onload=alert(1)>", png[:100], b"GIF89a"):
            wrong = http.post("/pictures", content=body)
            assert (wrong.status_code, list(wrong.json())) == (400, ["error"])
            assert http.post("/restore", content=body).status_code == 400
        assert http.post("/pictures", content=b"x" * (2**20 + 1)).status_code == 413


def test_programs_say_in_a_line_why_they_do_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import app

    from imgadapt.errors import ConfigError

    monkeypatch.delenv("IMGADAPT_AUTH", raising=False)
    home = ["--home", str(tmp_path / "home")]
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ConfigError, match="--add-user"):
            app.main([*home, "--host", host])
    with pytest.raises(ConfigError, match="--add-user"):
        app.main([*home, "--shared"])
    with pytest.raises(ConfigError, match="no such folder"):
        app.main([*home, "--adapters", str(tmp_path / "nothing")])
    with pytest.raises(ConfigError, match="no such file"):
        app.main([*home, "--auth-file", str(tmp_path / "nothing")])
    monkeypatch.setenv("IMGADAPT_PASSWORD", "correct horse")
    app.main([*home, "--add-user", "ada"])
    assert (tmp_path / "home" / "users").read_text().startswith("ada:scrypt$")


def test_a_port_that_is_taken_is_said(served: Served) -> None:
    from imgadapt_ui import server

    from imgadapt.errors import ConfigError

    with pytest.raises(ConfigError, match="--port"):
        server.listen("127.0.0.1", int(served.url.rpartition(":")[2]))
    with pytest.raises(ConfigError, match="--port"):
        server.listen("127.0.0.1", 99999)
