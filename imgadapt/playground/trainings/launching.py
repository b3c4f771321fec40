"""Launching: `imgadapt train` in a process of its own, found again and stopped, also by a later playground."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import imgadapt
from imgadapt.errors import OutputError
from imgadapt.playground import filenames

CONSOLE = "console.log"
"""What the process says, in the run's folder; of its last start only."""


def command(given: Mapping[str, Any], kind: str | None, output: Path) -> list[str]:
    """The arguments. given: settings as `plan.of` takes them; each value is in one argument with its flag, so that
    none can be taken for a flag itself.
    """
    flags = [
        f"--{name.replace('_', '-')}={_text(value)}"
        for name, value in given.items()
        if name not in ("folder", "report")
    ]
    report = [] if given.get("report") else ["--no-report"]
    kinds = [] if kind is None else [f"--kind={kind}"]
    # no TensorBoard: what it would show is in log.jsonl, and on the page
    return [
        sys.executable,
        "-m",
        "imgadapt",
        "train",
        str(given["folder"]),
        *kinds,
        *flags,
        _output(output),
        *report,
        "--log-with",
    ]


def named_after(data: str, kind: str) -> str:
    """A training's name, of its data set's: without blanks, what is in brackets, or the kind twice."""
    plain = "-".join(re.sub(r"\([^()]*\)", " ", data).split())
    name = filenames.cleaned(plain, "training")
    return name if name.casefold().endswith(kind) else f"{name}-{kind}"


def _text(value: Any) -> str:
    (one,) = value if isinstance(value, list | tuple) else (value,)
    return str(one)


def _output(folder: Path) -> str:
    return f"--output={folder}"


def start(arguments: Sequence[str], folder: Path, device: str) -> subprocess.Popen[bytes]:
    """Start it in a session of its own: a Ctrl-C that ends the playground leaves it time to save.

    Raises:
        OutputError: its console's file cannot be written, or no process can be started.
    """
    try:
        with (folder / CONSOLE).open("wb") as console:
            return subprocess.Popen(
                arguments, cwd=folder, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT,
                start_new_session=True, env=_environment(device),
            )  # fmt: skip
    except OSError as error:
        raise OutputError(f"cannot start the training: {error.strerror or error}") from error


def _environment(device: str) -> dict[str, str]:
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "2", "PYTHONSAFEPATH": "1"}
    package = str(Path(imgadapt.__file__).parents[1])  # where a checkout is imported from that is not installed
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), package)))
    kind, _, number = device.partition(":")
    if kind == "cpu":
        env["ACCELERATE_USE_CPU"] = "true"
    elif kind == "cuda" and number:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        env["CUDA_VISIBLE_DEVICES"] = visible[int(number)] if int(number) < len(visible) else number
    return env


def running(pid: int | None, output: Path) -> bool:
    """Whether a process is there that trains into this folder; another one may have the number by now."""
    if pid is None:
        return False
    psutil = _psutil()
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and _output(output) in process.cmdline()
    except psutil.Error:
        return False


def interrupt(pid: int) -> None:
    """Ask it to save and end; once, for the second time it would end at once."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def end(pid: int, patience: float) -> None:
    """Wait for its end, for so many seconds; then kill it and what it started."""
    psutil = _psutil()
    try:
        psutil.Process(pid).wait(patience)
    except psutil.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    except psutil.Error:  # it has ended
        return


def _psutil() -> Any:
    """It comes with accelerate; without types."""
    return import_module("psutil")
