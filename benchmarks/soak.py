"""A soak of the playground: good and hostile requests mixed, for as long as one likes.

    python benchmarks/soak.py --seconds 1800

Starts `imgadapt ui` on the embedded base. Good requests go through all that the API does (draw, redraw, grids, merges,
conversions, restoring, uploads of adapters and data sets and their removal, giving up), and each answer is compared
with the one that was made when nobody else asked: pictures to the bit. Hostile ones are all those of the tests (names,
origins, bodies, settings, ids, paths), hostile files, and clients that are slow or leave halfway; each must be answered
in a few words, or dropped. Every minute is told what was asked, and what the server holds. At the end it must be there,
all that was good right, and memory, threads and open files where they were after the warm-up.
"""

import argparse
import io
import itertools
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.set_int_max_str_digits(0)  # for what is sent
sys.path[:0] = [str(ROOT), str(ROOT / "ui")]

from tests.served import Told, begin, called  # noqa: E402 # after the path
from tests.test_api import WRONG  # noqa: E402
from tests.test_requests import NUMBERS, TEXTS  # noqa: E402
from tests.test_server import BROKEN, ROUTES, SECRET  # noqa: E402

DRAWN = {"prompt": "a fox", "steps": 2}
LONG = {"prompt": "a fox", "seed": 5, "steps": 200, "count": 4}
SEEDS = range(6)
_GROWTH = 50.0  # MB
_FEW = 12  # threads and open files that may come and go
_GRADIOS = (
    "KeyError: -1",
    "KeyError: 1000000",
    "ValueError: An event handler (endpoint) didn't receive enough",
    "gradio.route_utils.FnIndexInferError",
    "starlette.requests.ClientDisconnect",
)
"""What Gradio and Starlette say in the server's terminal of some broken requests, which they answer with 500."""
_PNG = b"\x89PNG\r\n\x1a\n"

Ask = Callable[[httpx.Client, random.Random], bool]
"""A good request: whether the answer is right. Raises Told, OSError, ...: there was none."""
Attack = Callable[[httpx.Client, random.Random], str]
"""A hostile request: what came back, as text."""


@dataclass
class Server:
    """process: the program, whose home is a folder of ours; errors: what it said to stderr."""

    process: subprocess.Popen[str]
    url: str
    home: Path
    errors: Path

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, trust_env=False, verify=False)  # no certificates to read

    def holds(self) -> tuple[float, int, int]:
        """MB, threads, open files."""
        place = Path(f"/proc/{self.process.pid}")
        pages = int((place / "statm").read_text().split()[1])
        return (
            pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
            len([*(place / "task").iterdir()]),
            len([*(place / "fd").iterdir()]),
        )


@dataclass
class Tally:
    """What was asked so far. wrong: of both kinds, with what came."""

    good: Counter[str] = field(default_factory=Counter[str])
    hostile: Counter[str] = field(default_factory=Counter[str])
    full: int = 0
    wrong: list[str] = field(default_factory=list[str])
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, counts: Counter[str], name: str, wrong: str = "") -> None:
        with self.lock:
            counts[name] += 1
            if wrong:
                self.wrong.append(f"{name}: {wrong}"[:300])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--warm", type=float, default=120.0, help="seconds before memory counts [120]")
    parser.add_argument("--fill", type=int, default=16, help="adapters drawn with before, of which 12 are kept [16]")
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second, of each kind [6]")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between lines [60]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        server = start(Path(folder))
        try:
            soak(server, args)
        finally:
            server.process.send_signal(signal.SIGINT)
            server.process.wait(timeout=120)


def start(folder: Path) -> Server:
    """A server on a free port, once it answers."""
    home, errors = folder / "home", folder / "errors.txt"
    command = [sys.executable, "-m", "imgadapt", "ui", "--home", str(home), "--port", "0"]
    with errors.open("w") as told:
        process = subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=told, text=True
        )
    assert process.stdout is not None
    for line in process.stdout:
        if "http://" in line:
            return Server(process, line.rpartition(" ")[2].strip().rstrip("/"), home, errors)
    raise SystemExit(f"the server did not start:\n{errors.read_text()}")


def soak(server: Server, args: argparse.Namespace) -> None:
    tally, good, hostile = Tally(), Good(server), Hostile(server)
    held = server.holds()[0]
    good.fill(args.fill)
    print(f"{held:.0f} MB at the start, {server.holds()[0]:.0f} with {args.fill} adapters on the base")
    began = time.monotonic()
    until = began + args.seconds
    workers = [(good.kinds, True)] * 3 + [(hostile.kinds, False)] * 3
    threads = [
        threading.Thread(
            target=keep_asking, args=(server, kinds, right, tally, random.Random(args.seed + k), 3 / args.rate, until)
        )
        for k, (kinds, right) in enumerate(workers)
    ]
    for thread in threads:
        thread.start()
    after: list[tuple[float, int, int]] = []
    tell(server, tally, began)
    while time.monotonic() < until and server.process.poll() is None:
        time.sleep(min(args.every, max(0.1, until - time.monotonic())))
        held = tell(server, tally, began)
        if time.monotonic() >= began + args.warm:
            after.append(held)
    for thread in threads:
        thread.join()
    judge(server, tally, after)


def keep_asking(
    server: Server,
    kinds: Mapping[str, Ask] | Mapping[str, Attack],
    right: bool,
    tally: Tally,
    chance: random.Random,
    pause: float,
    until: float,
) -> None:
    """One client, which asks all kinds in turn, in an order of its own, one at each pause or later."""
    while time.monotonic() < until:
        for name in chance.sample([*kinds], len(kinds)):
            following = time.monotonic() + pause
            if time.monotonic() >= until:
                return
            with server.client() as http:
                (good if right else hostile)(kinds[name], name, http, tally, chance)
            time.sleep(max(0.0, following - time.monotonic()))


def good(ask: Any, name: str, http: httpx.Client, tally: Tally, chance: random.Random) -> None:
    try:
        tally.add(tally.good, name, "" if ask(http, chance) else "another answer than was wanted")
    except Told as told:
        if "queue is full" in str(told):
            with tally.lock:
                tally.full += 1
        else:
            tally.add(tally.good, name, f"refused: {told}")
    except Exception as error:  # whatever it is, it is no right answer
        tally.add(tally.good, name, repr(error))


def hostile(attack: Any, name: str, http: httpx.Client, tally: Tally, chance: random.Random) -> None:
    try:
        said = attack(http, chance)
    except Told as told:
        said = str(told)
    except (httpx.HTTPError, OSError) as error:  # dropped, which is an answer
        said = type(error).__name__
    bad = next((word for word in ("Traceback", "site-packages", "root:", "the secret") if word in said), "")
    tally.add(tally.hostile, name, f"it tells {bad!r}: {said[:120]}" if bad else "")


def tell(server: Server, tally: Tally, began: float) -> tuple[float, int, int]:
    held = server.holds() if server.process.poll() is None else (0.0, 0, 0)
    with tally.lock:
        print(
            f"{time.monotonic() - began:6.0f} s: good {tally.good.total()}, queue full {tally.full}, "
            f"hostile {tally.hostile.total()}, wrong {len(tally.wrong)}; {held[0]:.0f} MB, {held[1]} threads, "
            f"{held[2]} open files",
            flush=True,
        )
    return held


def judge(server: Server, tally: Tally, after: Sequence[tuple[float, int, int]]) -> None:
    """Raises SystemExit: something was not as it has to be."""
    faults = list(tally.wrong)
    if server.process.poll() is not None:
        faults.append(f"the server ended with {server.process.returncode}")
    said = server.errors.read_text()
    if "Traceback" in said:
        faults += [f"the server says: {line}" for line in sorted(set(causes(said))) if not line.startswith(_GRADIOS)]
    if after:
        for name, most, row in zip(
            ("MB", "threads", "open files"), (_GROWTH, _FEW, _FEW), zip(*after, strict=True), strict=True
        ):
            print(f"{name} after the warm-up: {row[0]:.0f}, at the end {row[-1]:.0f}, at most {max(row):.0f}")
            if row[-1] - row[0] > most:
                faults.append(f"{name} grew from {row[0]:.0f} to {row[-1]:.0f}")
    print("good:", ", ".join(f"{name} {count}" for name, count in sorted(tally.good.items())))
    print(f"hostile: {len(tally.hostile)} kinds, {tally.hostile.total()} in all")
    print(f"faults: {len(faults)}", *faults[:20], sep="\n  ")
    if faults or not tally.good or not tally.hostile:
        raise SystemExit(1)


def causes(said: str) -> list[str]:
    """Of each traceback the line that says what went wrong."""
    rows = [text.splitlines()[1:] for text in said.split("Traceback")[1:]]
    return [next((line for line in lines if line and not line.startswith((" ", "\t"))), "?") for lines in rows]


class Good:
    """Good requests and their answers, made while nobody else asks."""

    def __init__(self, server: Server) -> None:
        self.server, self._names = server, itertools.count()
        with server.client() as http:
            assert http.get("/").status_code == 200
            cards = called(http, "list_adapters", {})[-1]["adapters"]
            self.adapters = {card["name"]: card["id"] for card in cards}
            self.ink, self.blend = self.adapters["ink"], [{"adapter": self.adapters[n]} for n in ("ink", "duotone")]
            self.file = http.get(f"/cards/{self.ink}/file").content
            self.pixels = {
                (seed, name): self._drawn(http, seed, name) for seed in SEEDS for name in ("", "ink", "duotone")
            }
            self.inspected = called(http, "inspect", {"id": self.ink})[-1]
            self.converted = self._convert(http)
            self.cells = self._grid(http)
            self.merged = self._merge(http)
            self.png = http.get(called(http, "generate", {**DRAWN, "seed": 1})[-1]["result"][0]["url"]).content
            self.redrawn = self._redraw(http)
            config = http.get("/config").json()
        places = {one["props"].get("elem_id"): one["id"] for one in config["components"]}
        events = {(t[0], t[1]): one["id"] for one in config["dependencies"] for t in one["targets"]}
        self.bring, self.keep = events[places["bring"], "upload"], events[places["train-upload"], "click"]
        self.kinds: dict[str, Ask] = {
            "draw": self.draw, "grid": lambda http, chance: self._grid(http) == self.cells,
            "merge": lambda http, chance: self._merge(http) == self.merged,
            "convert": lambda http, chance: self._convert(http) == self.converted,
            "inspect": lambda http, chance: called(http, "inspect", {"id": self.ink})[-1] == self.inspected,
            "restore": self.restore, "redraw": lambda http, chance: self._redraw(http) == self.redrawn,
            "list": self.list, "bring": self.brought, "data set": self.kept, "give up": self.give_up,
            "draw again": self.draw, "draw once more": self.draw,
        }  # fmt: skip

    def _drawn(self, http: httpx.Client, seed: int, name: str = "", **more: Any) -> bytes:
        adapters = [{"adapter": self.adapters[name], "weight": 0.8}] if name else []
        made = called(http, "generate", {**DRAWN, "seed": seed, "adapters": adapters, **more})[-1]
        return pixels(http.get(made["result"][0]["url"]).content)

    def draw(self, http: httpx.Client, chance: random.Random) -> bool:
        seed, name = chance.choice([*self.pixels])
        return self._drawn(http, seed, name) == self.pixels[seed, name]

    def _redraw(self, http: httpx.Client) -> bytes:
        given = http.post("/pictures", content=self.png).json()["id"]
        return self._drawn(http, 4, init=given, denoise=0.5, steps=4)

    def _grid(self, http: httpx.Client) -> list[bytes]:
        grid = called(http, "grid", {"common": {**DRAWN, "seed": 3}, "x": {"kind": "seed", "values": "1..3"}})[-1]
        with zipfile.ZipFile(io.BytesIO(http.get(grid["result"]["url"]).content)) as packed:
            return [pixels(packed.read(name)) for name in sorted(packed.namelist()) if name.endswith(".png")]

    def _merge(self, http: httpx.Client) -> bytes:
        """What the merged adapter draws; it is taken away again."""
        name = f"blend {next(self._names):06}"
        made = called(http, "merge", {"adapters": self.blend, "rule": "svd", "rank": 4, "name": name})[-1]["result"]
        drawn = self._drawn(http, 2, adapters=[{"adapter": made["id"]}])
        (self.server.home / "adapters" / "merged" / f"{name}.safetensors").unlink()
        return drawn

    def fill(self, count: int) -> None:
        """Draw with so many adapters, which the playground keeps on the base for the next request."""
        with self.server.client() as http:
            for _ in range(count):
                self._merge(http)

    def _convert(self, http: httpx.Client) -> bytes:
        made = called(http, "convert", {"adapter": self.adapters["duotone"], "format": "kohya"})[-1]["result"]
        return http.get(made["url"]).content

    def restore(self, http: httpx.Client, chance: random.Random) -> bool:
        seed, name = chance.choice([*self.pixels])
        adapters = [{"adapter": self.adapters[name], "weight": 0.8}] if name else []
        first = called(http, "generate", {**DRAWN, "seed": seed, "adapters": adapters})[-1]["result"][0]
        found = called(http, "restore", {"id": first["id"]})[-1]
        again = called(http, "generate", found["request"])[-1]["result"][0]
        drawn = [pixels(http.get(one["url"]).content) for one in (first, again)]
        return found["exact"] and drawn[0] == drawn[1] == self.pixels[seed, name]

    def list(self, http: httpx.Client, chance: random.Random) -> bool:
        names = [card["name"] for card in called(http, "list_adapters", {"search": "ink"})[-1]["adapters"]]
        return "ink" in names and called(http, "bases", {})[-1]["bases"][0]["name"] == "demo"

    def brought(self, http: httpx.Client, chance: random.Random) -> bool:
        name = f"brought {next(self._names):06}"
        event(http, self.bring, [upload(http, f"{name}.safetensors", self.file)])
        path = next((self.server.home / "adapters" / "brought").glob(f"*{name.rpartition(' ')[2]}.safetensors"))
        there = called(http, "list_adapters", {"search": path.stem})[-1]["adapters"]
        drawn = self._drawn(http, 3, adapters=[{"adapter": there[0]["id"], "weight": 0.8}])
        path.unlink()
        gone = called(http, "list_adapters", {"search": path.stem})[-1]["adapters"]
        return len(there) == 1 and not gone and drawn == self.pixels[3, "ink"]

    def kept(self, http: httpx.Client, chance: random.Random) -> bool:
        name = f"set{next(self._names):06}"
        files = [upload(http, "fox.png", self.png), upload(http, "fox.txt", b"a fox")]
        event(http, self.keep, [files, name])
        found = [one for one in called(http, "datasets", {})[-1]["datasets"] if one["name"] == name]
        shutil.rmtree(self.server.home / "data" / name)
        gone = name not in [one["name"] for one in called(http, "datasets", {})[-1]["datasets"]]
        return gone and [one["pictures"] for one in found] == [1]

    def give_up(self, http: httpx.Client, chance: random.Random) -> bool:
        """A long drawing, of which nobody wants to hear: the next one does not wait for its end."""
        with http.stream("GET", f"/gradio_api/call/generate/{begin(http, 'generate', LONG)}") as stream:
            for line in stream.iter_lines():
                if '"drawing"' in line or "event: error" in line:
                    break
        return self.draw(http, chance)


class Hostile:
    """Hostile requests, by name."""

    def __init__(self, server: Server) -> None:
        self.server = server
        (server.home / "secret.txt").write_text("the secret of this machine")
        host, port = server.url.removeprefix("http://").split(":")
        self.address = host, int(port)
        self.kinds: dict[str, Attack] = {
            **{f"broken: {name}": self._row(row) for name, row in BROKEN.items()},
            **{f"wrong: {k}": self._call(name, settings) for k, (name, settings, _) in enumerate(WRONG)},
            **{f"number: {k}": self._call("generate", {name: value}) for k, (name, value, _) in enumerate(NUMBERS)},
            **{f"text: {k}": self._call("generate", {"prompt": text}) for k, (text, _) in enumerate(TEXTS)},
            **{f"path: {path}": self._path(path) for path in SECRET},
            **{f"header: {name}: {value}": self._headers({name: value}) for name, value in _HEADERS},
            **{f"shut: {path}": self._get(path) for path in _SHUT},
            **{f"picture: {name}": self._picture(data) for name, data in _PICTURES.items()},
            **{f"adapter: {name}": self._adapter(data) for name, data in _ADAPTERS.items()},
            **{f"line: {name}": self._raw(data, wait) for name, (data, wait) in _RAW.items()},
            "leaves in the middle": self.leaves,
        }

    @staticmethod
    def _row(row: Any) -> Attack:
        return lambda http, chance: row(http).text

    @staticmethod
    def _call(name: str, settings: Any) -> Attack:
        data = json.dumps({"data": [settings]})  # NaN, half characters and all

        def attack(http: httpx.Client, chance: random.Random) -> str:
            place = f"/gradio_api/call/{name}"
            said = http.post(place, content=data, headers={"content-type": "application/json"}).text
            return said + (http.get(f"{place}/{json.loads(said)['event_id']}").text if "event_id" in said else "")

        return attack

    def _path(self, place: str) -> Attack:
        path = place.replace("HOME", str(self.server.home))
        return lambda http, chance: "".join(http.get(route + path).text for route in ROUTES)

    @staticmethod
    def _headers(headers: Mapping[str, str]) -> Attack:
        def attack(http: httpx.Client, chance: random.Random) -> str:
            answers = [http.get("/config", headers=headers), http.post("/restore", headers=headers, content=b"x")]
            assert all(one.status_code >= 400 for one in answers), f"Traceback: {headers} is let in"
            return "".join(one.text for one in answers)

        return attack

    @staticmethod
    def _get(path: str) -> Attack:
        return lambda http, chance: http.get(path).text + http.post(path).text

    @staticmethod
    def _picture(data: bytes) -> Attack:
        return lambda http, chance: http.post("/pictures", content=data).text + http.post("/restore", content=data).text

    def _adapter(self, data: bytes) -> Attack:
        def attack(http: httpx.Client, chance: random.Random) -> str:
            config = http.get("/config").json()
            place = next(one["id"] for one in config["components"] if one["props"].get("elem_id") == "bring")
            function = next(one["id"] for one in config["dependencies"] if [place, "upload"] in one["targets"])
            return event(http, function, [upload(http, "evil.safetensors", data)])

        return attack

    def _raw(self, data: bytes, wait: float) -> Attack:
        """What a socket of our own hears after these bytes and a while."""

        def attack(http: httpx.Client, chance: random.Random) -> str:
            with socket.create_connection(self.address, timeout=10) as line:
                line.sendall(data.replace(b"HOST", f"127.0.0.1:{self.address[1]}".encode()))
                line.settimeout(max(0.05, wait))
                try:
                    return line.recv(2**16).decode(errors="replace")
                except TimeoutError:
                    return "(nothing yet)"

        return attack

    @staticmethod
    def leaves(http: httpx.Client, chance: random.Random) -> str:
        """A few moments after it has asked for something long."""
        name, settings = chance.choice([("generate", LONG), ("merge_report", {"adapters": []}), ("bases", {})])
        with http.stream("GET", f"/gradio_api/call/{name}/{begin(http, name, settings)}") as stream:
            time.sleep(chance.uniform(0, 0.3))
            return str(stream.status_code)


def upload(http: httpx.Client, name: str, data: bytes) -> dict[str, Any]:
    """A file as events take it."""
    answer = http.post("/gradio_api/upload", files={"files": (name, data)})
    if answer.status_code != 200:
        raise Told(f"{answer.status_code}: {answer.text}")
    return {"path": answer.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def event(http: httpx.Client, function: int, data: Sequence[Any]) -> str:
    """An event of the page, to its end: what was told of it. Few visitors: each leaves 40 KB until others come."""
    visitor = f"soak{threading.get_ident() % 100}"
    body = {"data": data, "fn_index": function, "session_hash": visitor, "event_data": None}
    asked = http.post("/gradio_api/queue/join", json=body)
    if asked.status_code != 200:
        raise Told(f"{asked.status_code}: {asked.text}")
    told = ""
    with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": visitor}) as stream:
        for line in stream.iter_lines():
            told += line
            if "process_completed" in line or "close_stream" in line:
                break
    return told


def pixels(png: bytes) -> bytes:
    """Of a picture, without what its PNG says of when it was made."""
    with Image.open(io.BytesIO(png)) as image:
        return image.tobytes()


def _safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


_HEADERS = [
    ("host", "evil.example"), ("host", "192.168.1.5"), ("host", "localhost.evil.example"), ("host", "a@localhost"),
    ("host", "0.0.0.0"), ("origin", "https://evil.example"), ("origin", "null"), ("origin", "file://"),
    ("origin", "http://localhost:1"), ("sec-fetch-site", "cross-site"), ("sec-fetch-site", "same-site"),
]  # fmt: skip
_SHUT = [
    "/gradio_api/proxy=http://x/", "/gradio_api/file=http://x/y", "/monitoring", "/gradio_api/mcp/sse", "/docs",
    "/gradio_api/deep_link", "/gradio_api/component_server", "/gradio_api/token", "/openapi.json", "/cards",
    "/assets/%2e%2e/%2e%2e/etc/passwd", "/gradio_api/file=..%2f..%2fetc%2fpasswd", "/pictures/..%2f..%2fx",
]  # fmt: skip
_BOMB = struct.pack(">IIBBBBB", 60000, 60000, 8, 6, 0, 0, 0)
_PICTURES = {
    "empty": b"", "text": b"x", "svg": b"<svg onload=alert(1)>", "gif": b"GIF89a",
    "noise": random.Random(0).randbytes(50_000),
    "a bomb": _PNG + _chunk(b"IHDR", _BOMB) + _chunk(b"IDAT", b"\x78\x9c" + b"\0" * 1000) + _chunk(b"IEND", b""),
    "a broken text": _PNG + _chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    + _chunk(b"zTXt", b"parameters\0\0x"),
    "a long text": _PNG + _chunk(b"tEXt", b"parameters\0" + b"Steps: 1, " * 100_000),
    "deep json": _PNG + _chunk(b"tEXt", b"imgadapt\0" + b"[" * 100_000),
}  # fmt: skip
_ADAPTERS = {
    "empty": b"", "a pickle": b"\x80\x04\x95.", "a zip": b"PK\x03\x04" + b"\0" * 64,
    "a long header": _safetensors(b"{}", length=2**62),
    "a deep header": _safetensors(b"[" * 100_000), "no table": _safetensors(b"[]"),
    "half": _safetensors(b'{"a":{"dtype":"F32"'),
    "a lie": _safetensors(b'{"a.up.weight":{"dtype":"F32","shape":[9999999,9999999],"data_offsets":[0,4]}}', b"\0" * 4),
    "beyond the end": _safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000]}}', b"\0" * 4),
    "html": _safetensors(b'{"__metadata__":{"modelspec.title":"<script>alert(1)</script>"}}'),
    "no layers": _safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
}  # fmt: skip
_POST = b"POST /restore HTTP/1.1\r\nHost: HOST\r\n"
_RAW: Mapping[str, tuple[bytes, float]] = {
    "half a line": (b"GET / HT", 2), "half the headers": (b"GET / HTTP/1.1\r\nHost: HOST\r\nA: ", 2),
    "half a body": (_POST + b"Content-Length: 1000\r\n\r\nx", 2),
    "left at once": (b"GET /config HTTP/1.1\r\nHost: HOST\r\n\r\n", 0),
    "noise": (random.Random(1).randbytes(3000), 1), "no host": (b"GET /config HTTP/1.1\r\n\r\n", 1),
    "two hosts": (b"GET /config HTTP/1.1\r\nHost: HOST\r\nHost: evil\r\n\r\n", 1),
    "a long line": (b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: HOST\r\n\r\n", 1),
    "many headers": (b"GET / HTTP/1.1\r\nHost: HOST\r\n" + b"a: b\r\n" * 20_000 + b"\r\n", 1),
    "two lengths": (_POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx", 1),
    "a negative length": (_POST + b"Content-Length: -1\r\n\r\n", 1),
    "chunks that lie": (_POST + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFF\r\nx", 1),
    "a websocket": (b"GET / HTTP/1.1\r\nHost: HOST\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                    b"Sec-WebSocket-Key: eA==\r\n"
                    b"Sec-WebSocket-Version: 13\r\n\r\n", 1),
    "a proxy": (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example\r\n\r\n", 1),
}  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
