"""Fuzzing: inputs that failed once, and the good ones; new ones are in test_fuzz_minute.py."""

import json
import os
import re
from hashlib import sha1
from pathlib import Path

import pytest

from imgadapt.errors import FormatError
from tests.fuzz import run
from tests.fuzz.target import Target

TARGETS = run.targets()


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


def test_a_run_fails_when_an_input_does_and_when_a_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reads(data: bytes) -> None:
        if data == b"end":
            os._exit(3)
        assert data != b"x", "an x"

    fine, odd = (
        Target(name, reads, lambda seeds=seeds: seeds) for name, seeds in (("fine", [b"a"]), ("x", [b"a", b"x"]))
    )
    targets = {"fine": fine, "odd": odd, "end": Target("end", reads, lambda: [b"a", b"end"])}
    monkeypatch.setattr(run, "targets", lambda: targets)
    given = ["--runs", "2", "--unguided", "--seed", "1", "--found", str(tmp_path)]
    assert run.main(["fine", *given]) == 0
    assert [run.main([name, *given]) for name in ("odd", "end")] == [1, 1]
    assert (tmp_path / "x" / sha1(b"x").hexdigest()).read_bytes() == b"x"
    assert (tmp_path / "end" / sha1(b"end").hexdigest()).read_bytes() == b"end"
    told = capsys.readouterr().out
    assert "AssertionError at tests/test_fuzz.py" in told
    assert "the process ended with 768" in told


def test_without_a_fuzzer_inputs_are_changed_by_chance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--seconds", "20", "--runs", "300", "--unguided", "--seed", "1", "--found", str(tmp_path)]
    assert run.main(["header", *given]) == 0
    assert json.loads((tmp_path / "counts.json").read_text()) == {"header": 300}
    assert "300 inputs, by chance" in capsys.readouterr().out
