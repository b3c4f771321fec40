"""Writes constraints.txt anew, from what is installed in this environment.

    make constraints

Lines for other Pythons or systems stay as they are. torch's CUDA build brings packages that torch itself pins: they are
left out.
"""

import re
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

FILE = Path(__file__).parents[1] / "constraints.txt"
_OWN = {"imgadapt", "pip", "setuptools", "wheel"}
_CUDA = re.compile(r"(nvidia|cuda|triton)(-|$)")


def pins(text: str) -> list[Requirement]:
    """The lines of a constraints file."""
    return [Requirement(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def here(pin: Requirement) -> bool:
    """Whether a line is for this Python and this system."""
    return pin.marker is None or pin.marker.evaluate()


def installed() -> dict[str, str]:
    """Name -> version, of what is in this environment; without what a build's version has after a `+`."""
    found: dict[str, str] = {}
    # setuptools puts copies of its own on sys.path
    ours = [*{sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}]
    for one in distributions(path=ours):
        name = canonicalize_name(one.metadata["Name"])
        if name not in _OWN and not _CUDA.match(name):
            found.setdefault(name, Version(one.version).public)
    return found


def renewed(text: str, now: dict[str, str]) -> str:
    """The file's text, with the versions that are installed: its comments, and lines by name."""
    markers = {str(canonicalize_name(pin.name)): pin.marker for pin in pins(text) if here(pin)}
    kept = [pin for pin in pins(text) if not here(pin)]
    new = [Requirement(f"{n}=={v}" + (f"; {markers[n]}" if markers.get(n) else "")) for n, v in now.items()]
    rows = sorted((canonicalize_name(pin.name), f"{pin.specifier}", pin.marker) for pin in (*kept, *new))
    head = [line for line in text.splitlines() if line.startswith("#")]
    return "\n".join([*head, *(f"{n}{v}" + (f"; {m}" if m else "") for n, v, m in rows)]) + "\n"


def main() -> None:
    text = FILE.read_text("utf-8")
    made = renewed(text, installed())
    FILE.write_text(made, "utf-8")
    before, after = set(map(str, pins(text))), set(map(str, pins(made)))
    print(
        "\n".join(
            [*(f"- {line}" for line in sorted(before - after)), *(f"+ {line}" for line in sorted(after - before))]
        )
    )


if __name__ == "__main__":
    main()
