"""Disks that fail: see tests/faults/. Each call that an operation makes to the disk fails, in every way."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "faults" / "run.py"


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler, cc")
def test_a_failing_disk_costs_nobody_anything() -> None:
    """What is there is old or new, whole; errors name the file and the reason; nothing is left behind."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", RUN],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    said = re.search(r"(\d+) faults in (\d+) operations, (\d+) wrong", done.stdout)
    assert said is not None, f"ended with {done.returncode}: {done.stdout}{done.stderr}"
    faults, operations, wrong = (int(number) for number in said.groups())
    assert (operations, wrong, done.returncode) == (13, 0, 0), done.stdout
    assert faults > 2000, done.stdout
