"""Many clients of one playground at once: no picture mixed up, the queue bounded, memory flat.

    python benchmarks/clients.py --clients 50 --seconds 60

Starts `imgadapt ui` on the embedded base. Each client asks for its own seed again and again; what it gets is compared,
to the bit, with what that seed gave when nobody else asked.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=2, help="of a picture [2]")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as home:
        server, url = start(Path(home))
        try:
            measure(server, url, args)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=60)


def start(home: Path) -> tuple[subprocess.Popen[str], str]:
    """A server on a free port, once it answers."""
    command = [sys.executable, "-m", "imgadapt", "ui", "--home", str(home), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        if "http://" in line:
            return server, line.rpartition(" ")[2].strip().rstrip("/")
    raise SystemExit("the server did not start")


def measure(server: subprocess.Popen[str], url: str, args: argparse.Namespace) -> None:
    """Let all click, and print what came of it."""
    with client(url) as http:
        alone = {seed: pixels(http, generate(http, seed, args.steps)) for seed in range(args.clients)}
    assert len(set(alone.values())) == args.clients, "seeds that draw the same picture tell nothing"
    ends: Counter[str] = Counter()
    waits: list[float] = []
    lock, until = threading.Lock(), time.monotonic() + args.seconds

    def click(seed: int) -> None:
        with client(url) as http:
            while time.monotonic() < until:
                began = time.monotonic()
                try:
                    same = pixels(http, generate(http, seed, args.steps)) == alone[seed]
                    end = "right" if same else "mixed up"
                except Refused as refused:
                    end = "refused" if "queue is full" in str(refused) else f"error: {refused}"
                    time.sleep(1.0)
                with lock:
                    ends[end] += 1
                    if end == "right":
                        waits.append(time.monotonic() - began)

    memory = [resident(server.pid)]
    with ThreadPoolExecutor(args.clients) as pool:
        clicking = [pool.submit(click, seed) for seed in range(args.clients)]
        while time.monotonic() < until:
            time.sleep(min(5.0, args.seconds / 6))
            memory.append(resident(server.pid))
        for one in clicking:
            one.result()
    print(f"{args.clients} clients, {args.seconds:g} s, {args.steps} steps a picture")
    print(", ".join(f"{end}: {count}" for end, count in sorted(ends.items())))
    if waits:
        waits.sort()
        slow, usual = waits[int(len(waits) * 0.95)], statistics.median(waits)
        print(f"{ends['right'] / args.seconds:.1f} pictures/s; one takes {usual:.2f} s (median), {slow:.2f} s (95 %)")
    print(f"memory of the server, MB: {' '.join(f'{one:.0f}' for one in memory)}")
    if set(ends) - {"right", "refused"} or not ends["right"]:
        raise SystemExit(1)


class Refused(Exception):
    """What the API said instead of a picture."""


def client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=120, trust_env=False, verify=False)  # no certificates to read


def generate(http: httpx.Client, seed: int, steps: int) -> dict[str, Any]:
    """A picture of a seed, as the API tells of it."""
    settings = {"prompt": "a fox", "seed": seed, "steps": steps}
    answer = http.post("/gradio_api/call/generate", json={"data": [settings]})
    if answer.status_code != 200:
        raise Refused(f"{answer.status_code} {answer.text[:80]}")
    kind, last = "", None
    with http.stream("GET", f"/gradio_api/call/generate/{answer.json()['event_id']}") as stream:
        for line in stream.iter_lines():
            kind = line.removeprefix("event: ") if line.startswith("event: ") else kind
            if line.startswith("data: "):
                data = json.loads(line.removeprefix("data: "))
                if kind == "error":
                    raise Refused(str((data or {}).get("error")))
                last = data[0] if data and data[0] else last
    if not last or last["state"] != "done":
        raise Refused(f"it ended with {last}")
    return last["result"][0]


def pixels(http: httpx.Client, picture: dict[str, Any]) -> bytes:
    """The picture's image data, without what its PNG says of when it was made."""
    png = http.get(picture["url"]).content
    parts, place = [], 8
    while place < len(png):
        size, kind = int.from_bytes(png[place : place + 4], "big"), png[place + 4 : place + 8]
        if kind == b"IDAT":
            parts.append(png[place + 8 : place + 8 + size])
        place += 12 + size
    return b"".join(parts)


def resident(pid: int) -> float:
    """MB that a process holds."""
    text = Path(f"/proc/{pid}/statm").read_text()
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main(sys.argv[1:])
