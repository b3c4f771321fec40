"""The soak of the playground (benchmarks/soak.py), for a few seconds."""

import os
import re
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"


def test_good_and_hostile_requests_are_all_answered_as_they_should_be() -> None:
    command = [sys.executable, str(SOAK), "--seconds", "8", "--rate", "12", "--warm", "100", "--fill", "0"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"good (\d+), queue full \d+, hostile (\d+), wrong (\d+)", done.stdout)[-1]
    assert int(counts[0]) > 2
    assert int(counts[1]) > 5
    assert counts[2] == "0"
