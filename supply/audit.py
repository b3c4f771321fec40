"""Asks PyPI, by pip-audit, whether a version in constraints.txt has a known vulnerability.

    make audit

Status: 0, none has; 1, some have; 2, it could not be asked about all of them (0 with --if-reachable, for CI without
a network).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
_PROBE = "safetensors"
"""Asked about first, and alone: who does not know it knows nothing."""


@dataclass
class Answer:
    """vulnerable: what is wrong with a package. unknown: those that the service did not know. why: it gave no
    answer.
    """

    asked: int = 0
    vulnerable: dict[str, str] = field(default_factory=dict[str, str])
    unknown: list[str] = field(default_factory=list[str])
    why: str = ""


def read(report: Mapping[str, Any]) -> Answer:
    """What pip-audit's JSON says."""
    answer = Answer(len(report["dependencies"]))
    for row in report["dependencies"]:
        if "skip_reason" in row:
            answer.unknown.append(row["name"])
        elif row["vulns"]:
            said = [f"{one['id']} (fixed in {', '.join(one['fix_versions']) or 'none'})" for one in row["vulns"]]
            answer.vulnerable[f"{row['name']} {row['version']}"] = ", ".join(said)
    return answer


def ask(lines: Sequence[str]) -> Answer:
    """Run pip-audit over pinned requirements."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        file.write_text("\n".join(lines), "utf-8")
        command = [sys.executable, "-m", "pip_audit", "-r", str(file), "--no-deps", "--disable-pip", "--format", "json",
                   "--progress-spinner", "off", "--timeout", "15"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return read(json.loads(done.stdout))
    except ValueError:
        return Answer(why=(done.stderr.strip().splitlines() or ["no answer"])[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--if-reachable", action="store_true", help="not to be reached is no failure")
    unasked = 0 if parser.parse_args().if_reachable else 2
    lines = [line for line in CONSTRAINTS.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    probe = ask([line for line in lines if line.startswith(f"{_PROBE}==")])
    if probe.why or probe.unknown:
        why = probe.why or "the package index here serves no advisories"
        print(f"audit: NOT DONE: PyPI's advisories cannot be reached from here: {why}")
        sys.exit(unasked)
    answer = ask(lines)
    for name, said in answer.vulnerable.items():
        print(f"audit: {name}: {said}")
    if answer.why:
        print(f"audit: NOT DONE: {answer.why}")
    elif answer.unknown:
        print(f"audit: not known to PyPI, and so not looked up: {', '.join(answer.unknown)}")
    print(f"audit: {answer.asked - len(answer.unknown)} of {len(lines)} looked up, {len(answer.vulnerable)} vulnerable")
    sys.exit(1 if answer.vulnerable else unasked if answer.why or answer.unknown else 0)


if __name__ == "__main__":
    main()
