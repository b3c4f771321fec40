"""The soak of the playground (benchmarks/soak.py), for a few seconds, by someone whose network is watched."""

import re
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"


def test_good_and_hostile_requests_are_all_answered_as_they_should_be(alone: dict[str, str]) -> None:
    command = [sys.executable, str(SOAK), "--seconds", "8", "--rate", "12", "--warm", "100", "--fill", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"good (\d+), queue full \d+, hostile (\d+), wrong (\d+)", done.stdout)[-1]
    assert int(counts[0]) > 2
    assert int(counts[1]) > 5
    assert counts[2] == "0"
    attempts = Path(alone["IMGADAPT_NETWORK"])
    assert not attempts.exists(), attempts.read_text("utf-8", "replace")
