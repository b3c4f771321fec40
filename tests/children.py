"""Programs in forked children of this process, which has imported everything: how they end, and what they say."""

import faulthandler
import os
import random
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgadapt import cli

CALLS = ("open", "fsync", "replace", "mkdir", "unlink")
"""Of `os`: the moments at which something is half done."""


@dataclass(frozen=True)
class Ended:
    """status: of the process, minus the number of the signal that killed it."""

    status: int
    said: str
    printed: str


def main_of(name: str) -> Callable[[Sequence[str]], None]:
    """A program's main; what it imports is imported then."""
    return runpy.run_path(str(cli._folder() / cli.PROGRAMS[name][0]), run_name="tested")["main"]


def started(main: Callable[[Sequence[str]], None], arguments: Sequence[str], log: Path, before: Any = None) -> int:
    """The number of a child that runs a program as the command does. before: called in it first."""
    process = os.fork()
    if process:
        return process
    status: Any = 99
    try:
        for number, end in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{log}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["imgadapt program"]
        faulthandler.enable(2)
        if before is not None:
            before()
        cli.program(main, arguments)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


class Hung(AssertionError):
    """A child that does not end. It may be none of the program's doing: a fork copies the locks that other threads of
    this process, which earlier tests left, hold at that moment, and nobody gives them back.
    """


def ended(process: int, log: Path, seconds: float = 150) -> Ended:
    """Wait for a child's end.

    Raises:
        Hung: it took longer, and was killed; with where it was.
    """
    late = time.monotonic() + seconds
    while not (found := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() > late:
            os.kill(process, signal.SIGABRT)  # it says where it is
            os.waitpid(process, 0)
            raise Hung(Path(f"{log}.err").read_text())
        time.sleep(0.002)
    status = os.waitstatus_to_exitcode(found[1])
    return Ended(status, Path(f"{log}.err").read_text(), Path(f"{log}.out").read_text())


def run(main: Callable[[Sequence[str]], None], arguments: Sequence[str], log: Path, before: Any = None) -> Ended:
    return ended(started(main, arguments, log, before), log)


def at_calls(wanted: Sequence[int], act: Callable[[], object] = int, counted: Path | None = None) -> None:
    """In a child: act before these of the calls that touch the disk; how many there are is written to a file."""
    count = 0

    def hooked(usual: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if counted is not None:
                counted.write_text(str(count))
            if count in wanted:
                act()
            return usual(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, hooked(getattr(os, name)))


def at_steps(wanted: Sequence[int], act: Callable[[], object] = int, counted: Path | None = None) -> None:
    """In a child: act at these of the calls of Python functions, whichever; how many there are goes to a file."""
    count = 0

    def look(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event != "call":
            return
        count += 1
        if count in wanted:
            act()

    def call(main: Any, arguments: Sequence[str]) -> Any:
        sys.setprofile(look)
        try:
            return usual(main, arguments)
        finally:
            sys.setprofile(None)
            if counted is not None:
                counted.write_text(str(count))

    usual, cli._raised = cli._raised, call


def after(count: int, act: Callable[[], None]) -> None:
    """In a child: act at a call of a Python function, so many from now."""
    left = count

    def look(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        left -= event == "call"
        if left == 0:
            act()

    sys.setprofile(look)


def some(seed: int, most: int, count: int) -> list[int]:
    """Numbers from 1 to `most`, spread over it, the same each time."""
    draw = random.Random(seed)
    return [1 + int((k + draw.random()) * most / count) for k in range(count)]
