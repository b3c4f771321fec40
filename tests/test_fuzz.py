"""Inputs that failed once, the good ones, and a minute of new ones; for more: `python tests/fuzz/run.py --help`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from imgadapt.errors import FormatError
from tests.fuzz import run
from tests.fuzz.target import Target

TARGETS = run.targets()
_MINUTE = 100.0
"""Seconds of a core for all targets, their start not counted."""


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_what_failed_once_does_not_and_what_is_good_is_taken(target: Target) -> None:
    for path in run.regressions(target.name):
        target(path.read_bytes())
    taken = [target(seed) for seed in target.seeds()]
    assert taken[0], "the first of its seeds is a good one"


def test_regressions_are_of_targets_that_there_are() -> None:
    kept = run.HERE / "regressions"
    assert {folder.name for folder in kept.iterdir()} <= TARGETS.keys()
    assert all(path.stat().st_size <= 2**16 for path in kept.rglob("*"))


def test_a_minute_of_new_inputs_finds_nothing(tmp_path: Path) -> None:
    seconds = max(1.0, _MINUTE / len(TARGETS))
    told = _run(tmp_path, "--seconds", str(seconds), "--jobs", str(min(2, os.cpu_count() or 1)))
    assert told.returncode == 0, told.stdout + told.stderr
    tried: dict[str, int] = json.loads((tmp_path / "counts.json").read_text())
    assert tried.keys() == TARGETS.keys()
    assert all(tried[name] >= len([*target.seeds()]) for name, target in TARGETS.items()), tried


def test_the_runner_finds_counts_and_keeps_what_fails(tmp_path: Path) -> None:
    def reads(data: bytes) -> None:
        if data.startswith(b"no"):
            raise FormatError("no")
        assert b"x" not in data, "an x"

    tally = run.Tally(tmp_path / "tally")
    one = run.tried(Target("letters", reads, lambda: [b"a"]), tally, tmp_path / "found")
    for data in (b"a", b"no", b"ax", b"axx"):
        one(data)
    assert (tally.tried, tally.taken, tally.current) == (4, 1, b"axx")
    kept = [path for path in (tmp_path / "found").iterdir() if path.suffix != ".why"]
    assert [path.read_bytes() for path in kept] == [b"ax"]  # the second is the first again
    assert re.match(r"AssertionError at tests/test_fuzz.py:\d+: an x", kept[0].with_suffix(".why").read_text())


def _run(found: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(run.HERE / "run.py"), "--found", str(found), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=run.ROOT, timeout=900)


def test_without_a_fuzzer_inputs_are_changed_by_chance(tmp_path: Path) -> None:
    told = _run(tmp_path, "header", "--seconds", "20", "--runs", "300", "--unguided", "--seed", "1")
    assert told.returncode == 0, told.stdout + told.stderr
    assert json.loads((tmp_path / "counts.json").read_text()) == {"header": 300}
    assert "by chance" in told.stdout
