"""A minute of new inputs, guided by coverage where atheris is installed; more: `python tests/fuzz/run.py --help`."""

import json
import subprocess
import sys
from pathlib import Path

from tests.fuzz import run

SECONDS = 60.0  # of all targets, one after the other; their start is not counted


def test_a_minute_of_new_inputs_finds_nothing(tmp_path: Path) -> None:
    targets = run.targets()
    command = [sys.executable, str(run.HERE / "run.py"), "--found", str(tmp_path), "--jobs", "1"]
    command += ["--seconds", str(SECONDS / len(targets))]
    told = subprocess.run(command, capture_output=True, text=True, cwd=run.ROOT, timeout=900, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    tried: dict[str, int] = json.loads((tmp_path / "counts.json").read_text())
    assert tried.keys() == targets.keys()
    assert all(tried[name] > 2 * len({*target.seeds()}) for name, target in targets.items()), tried  # more than replays
