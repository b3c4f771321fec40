"""Lists the licences of all that `pip install imgadapt[all]` brings, as its packages declare them.

    make licences

Ends with status 1 where one is not among those that pyproject.toml allows ([tool.imgadapt.licences]).
"""

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
_SPDX = {
    "Apache Software License": "Apache-2.0", "BSD License": "BSD-3-Clause", "ISC License (ISCL)": "ISC",
    "MIT License": "MIT", "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "Apache": "Apache-2.0", "Apache 2.0": "Apache-2.0", "Apache 2.0 License": "Apache-2.0", "BSD": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause", "ISC License": "ISC",
}  # fmt: skip
"""What metadata says where it does not say it by SPDX's names. (Whether BSD has two clauses or three makes no odds.)"""


@dataclass(frozen=True)
class Package:
    """licence: an SPDX expression; "" where the metadata say nothing that can be read."""

    name: str
    version: str
    licence: str


def packages(root: str = "imgadapt", extra: str = "all") -> list[Package]:
    """All that a package with an extra requires here, and what those require, by name."""
    seen: dict[str, frozenset[str]] = {}
    _walk(root, frozenset({extra}), seen)
    found: list[Package] = []
    for name in sorted(seen):
        try:
            found.append(Package(name, distribution(name).version, licence_of(distribution(name).metadata)))
        except PackageNotFoundError:  # for another platform, or an extra that is not installed
            continue
    return found


def _walk(name: str, extras: frozenset[str], seen: dict[str, frozenset[str]]) -> None:
    try:
        requires = distribution(name).requires or []
    except PackageNotFoundError:
        return
    for text in requires:
        wanted = Requirement(text)
        if wanted.marker and not any(wanted.marker.evaluate({"extra": extra}) for extra in {*extras, ""}):
            continue
        key, more = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if key not in seen or not more <= seen[key]:
            seen[key] = seen.get(key, frozenset()) | more
            _walk(wanted.name, more, seen)


def licence_of(metadata: Any) -> str:
    """The licence that a package's metadata declare: by expression, else by classifiers, else by a line of text."""
    if expression := metadata.get("License-Expression"):
        return expression
    rows: list[list[str]] = [row.split(" :: ") for row in metadata.get_all("Classifier") or []]
    if named := [_SPDX.get(row[-1], row[-1]) for row in rows if row[0] == "License" and len(row) > 2]:
        return " AND ".join(named)
    text = (metadata.get("License") or "").strip()
    return _SPDX.get(text, text) if len(text.splitlines()) == 1 else ""


def fits(expression: str, allowed: Sequence[str]) -> bool:
    """Whether one may use what is licensed so: all of what AND joins, one of what OR joins."""
    tokens = re.findall(r"[()]|[^\s()]+(?:\s+WITH\s+[^\s()]+)?", expression)
    rest = _either(tokens, allowed)
    return bool(tokens) and rest[0] and not rest[1]


def _either(tokens: Sequence[str], allowed: Sequence[str]) -> tuple[bool, Sequence[str]]:
    good, tokens = _both(tokens, allowed)
    while tokens[:1] == ["OR"]:
        other, tokens = _both(tokens[1:], allowed)
        good = good or other
    return good, tokens


def _both(tokens: Sequence[str], allowed: Sequence[str]) -> tuple[bool, Sequence[str]]:
    good, tokens = _one(tokens, allowed)
    while tokens[:1] == ["AND"]:
        other, tokens = _one(tokens[1:], allowed)
        good = good and other
    return good, tokens


def _one(tokens: Sequence[str], allowed: Sequence[str]) -> tuple[bool, Sequence[str]]:
    if tokens[:1] == ["("]:
        good, tokens = _either(tokens[1:], allowed)
        return good and tokens[:1] == [")"], tokens[1:]
    return bool(tokens) and tokens[0] in allowed, tokens[1:]


def refused(found: Sequence[Package], rules: Mapping[str, Any]) -> Iterator[Package]:
    """Those whose licence is not allowed. rules: `allow`, and `known`: of packages whose metadata do not say it."""
    for package in found:
        if not fits(rules["known"].get(package.name, package.licence), rules["allow"]):
            yield package


def rules() -> Mapping[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["imgadapt"]["licences"]


def main() -> None:
    found, said = packages(), rules()
    for package in found:
        print(f"{package.name:<26}{package.version:<14}{said['known'].get(package.name, package.licence)}")
    if wrong := list(refused(found, said)):
        names = ", ".join(f"{package.name} ({package.licence or 'none declared'})" for package in wrong)
        sys.exit(f"licences: not among those that pyproject.toml allows: {names}; look, then allow it or do without it")


if __name__ == "__main__":
    main()
