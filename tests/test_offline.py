"""No network: programs ask for none, whatever their libraries would like, and nobody is told that they run.

Attempts are written down where they are made (offline/), in Python and below it, so that one which a library tries and
forgets is seen too. conftest.py holds every other test to the same, and test_soak.py the playground, so watched.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from imgadapt.demo import PIPELINE
from imgadapt.errors import ConfigError
from imgadapt.training import families

HERE = Path(__file__).parent


def attempts(environment: dict[str, str]) -> str:
    path = Path(environment["IMGADAPT_NETWORK"])
    return path.read_text("utf-8", "replace") if path.exists() else ""


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("socket.create_connection(('example.org', 80))", "socket.getaddrinfo 'example.org'"),
        ("socket.socket().connect(('192.0.2.1', 80))", "socket.connect ('192.0.2.1', 80)"),
        ("socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))", "socket.sendto ('192.0.2.1', 53)"),
        ("socket.socket().bind(('', 0))", "socket.bind ('', 0)"),
        ("urllib.request.urlopen('http://192.0.2.1/')", "'192.0.2.1'"),
        (
            "subprocess.run([sys.executable, '-c', 'import socket; socket.getaddrinfo(\"a.b\", 1)'], check=True)",
            "'a.b'",
        ),
    ],
)
def test_an_attempt_is_refused_and_seen_though_it_is_caught(alone: dict[str, str], code: str, seen: str) -> None:
    caught = f"import socket, subprocess, sys, urllib.request\ntry:\n    {code}\nexcept Exception:\n    print('caught')"
    done = subprocess.run([sys.executable, "-c", caught], env=alone, capture_output=True, text=True, check=True)
    assert done.stdout == "caught\n"
    assert seen in attempts(alone)


def test_an_attempt_below_python_is_refused_and_seen(alone: dict[str, str], native: Path | None) -> None:
    if native is None:
        pytest.skip("no C compiler: what does not ask Python is not looked at (apt-get install gcc)")
    code = (
        "import ctypes, socket, struct\nc = ctypes.CDLL(None, use_errno=True)\n"
        "fd = socket.socket().detach()\nto = struct.pack('=HH4s8x', 2, 80, bytes((192, 0, 2, 1)))\n"
        "print(c.connect(fd, to, 16), c.getaddrinfo(b'example.org', b'80', None, ctypes.byref(ctypes.c_void_p())) != 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=alone, capture_output=True, text=True, check=True)
    assert done.stdout == "-1 True\n"
    assert attempts(alone) == "native connect 192.0.2.1\nnative getaddrinfo example.org\n"


def test_this_machine_may_be_asked(alone: dict[str, str]) -> None:
    code = (
        "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n"
        "socket.create_connection(('localhost', s.getsockname()[1])).sendall(b'x'); print(s.accept()[0].recv(1))\n"
        "a, b = socket.socketpair(); a.sendall(b'y'); print(b.recv(1))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=alone, capture_output=True, text=True, check=True)
    assert done.stdout == "b'x'\nb'y'\n"
    assert not attempts(alone)


def test_no_program_asks_for_the_network(alone: dict[str, str], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, str(HERE / "offline" / "programs.py"), str(folder), str(out)]
    done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ran ") == 16
    assert "some-model is not on this machine; bring it with: hf download someone/some-model" in done.stdout
    assert not attempts(alone)


def test_programs_switch_telemetry_off_and_the_hub(alone: dict[str, str]) -> None:
    file = HERE / "ground_truth" / "lycoris" / "lora.safetensors"
    code = (
        f"import sys; sys.argv = ['imgadapt', 'show', {str(file)!r}]; from imgadapt import cli; cli.main()\n"
        "from huggingface_hub import constants as c; print(c.HF_HUB_OFFLINE, c.HF_HUB_DISABLE_TELEMETRY)"
    )
    del alone["HF_HUB_OFFLINE"]
    done = subprocess.run([sys.executable, "-c", code], env=alone, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True True"


def test_only_a_hub_id_makes_the_hubs_library_be_asked_and_only_for_what_is_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    asked: list[tuple[str, Any]] = []

    def snapshot(name: str, *, local_files_only: bool = False, **more: Any) -> str:
        asked.append((name, local_files_only))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for base in ("demo", str(PIPELINE)):
        families.load(base)
    for base in (str(tmp_path / "nothing.safetensors"), "nothing", "./some/folder", "https://example.org/x"):
        with pytest.raises(ConfigError, match="is not there"):
            families.load(base)
    assert asked == []
    with pytest.raises(ConfigError, match=r"no model_index\.json"):
        families.load("someone/some-model")
    assert asked == [("someone/some-model", True)]
