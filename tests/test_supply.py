"""What imgadapt stands on: versions that are known to work, without known holes, under licences that allow it."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.scripts import script

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


constraints, licences, audit = (script(f"supply/{name}.py") for name in ("constraints", "licences", "audit"))


def test_all_that_is_installed_is_in_the_constraints_in_its_version() -> None:
    pinned = {canonicalize_name(pin.name): str(pin.specifier) for pin in _pins() if constraints.here(pin)}
    installed = {name: f"=={version}" for name, version in constraints.installed().items()}
    assert installed.items() <= pinned.items(), sorted(installed.items() - pinned.items())


def test_copies_that_a_library_brings_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As setuptools does, when something imports it."""
    (tmp_path / "brought-1.dist-info").mkdir()
    (tmp_path / "brought-1.dist-info" / "METADATA").write_text("Name: brought\nVersion: 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.metadata.version("brought") == "1"
    assert "brought" not in constraints.installed()


def test_every_constraint_is_one_exact_version() -> None:
    for pin in _pins():
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin


def test_constraints_that_are_renewed_keep_comments_and_the_lines_of_other_pythons() -> None:
    text = '# why\nB_b==1\nfuzz==2; python_version < "3"\nfuzz==3; python_version >= "3"\nold==1\n'
    made = constraints.renewed(text, {"b-b": "2", "fuzz": "4", "new": "5"})
    assert made == '# why\nb-b==2\nfuzz==2; python_version < "3"\nfuzz==4; python_version >= "3"\nnew==5\n'


@pytest.mark.parametrize(
    ("name", "closed"),
    [("torch", "2.10"), ("pillow", "12.3"), ("transformers", "5.10"), ("diffusers", "0.38"), ("jinja2", "3.1.6"),
     ("tqdm", "4.66.3"), ("gradio", "6.16")],
)  # fmt: skip
def test_versions_with_known_holes_are_not_installed_beside_imgadapt(name: str, closed: str) -> None:
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for rows in project["optional-dependencies"].values() for line in rows)]
    floors = [Requirement(line) for line in lines if canonicalize_name(Requirement(line).name) == name]
    assert floors
    for floor in floors:
        lowest = min(Version(one.version) for one in floor.specifier if one.operator in (">=", "~=", "=="))
        assert lowest >= Version(closed)


def test_the_licences_of_all_that_is_brought_are_among_those_allowed() -> None:
    found, rules = licences.packages(), licences.rules()
    assert {"torch", "diffusers", "gradio", "tokenizers", "starlette"} <= {package.name for package in found}
    assert not list(licences.refused(found, rules))
    for name in ("GPL-3.0-only", "AGPL-3.0-or-later", "LGPL-3.0-or-later", "Proprietary", ""):
        assert [p.name for p in licences.refused([licences.Package("x", "1", name)], rules)] == ["x"]
    assert not any("GPL" in name for name in rules["allow"])


@pytest.mark.parametrize(
    ("expression", "fits"),
    [
        ("MIT", True),
        ("MIT AND Apache-2.0", True),
        ("MIT AND GPL-3.0-only", False),
        ("GPL-3.0-only OR MIT", True),
        ("Apache-2.0 WITH LLVM-exception AND MIT", True),
        ("MIT AND (GPL-3.0-only OR Apache-2.0)", True),
        ("GPL-3.0-only AND (MIT OR Apache-2.0)", False),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
        *((text, False) for text in ("", "MIT MIT", "(MIT", "MIT)", "MIT AND", "OR MIT", "BSD-like")),
    ],
)
def test_a_licence_fits_by_all_that_and_joins_and_one_that_or_joins(expression: str, fits: bool) -> None:
    allowed = ("MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception")
    assert licences.fits(expression, allowed) is fits


def test_the_notice_names_the_direct_dependencies_with_their_licences() -> None:
    listed = dict(re.findall(r"^  (\S+) {2,}(\S.*)$", _section("Python packages"), re.M))
    project = PROJECT["project"]
    wanted = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    for extra in ("diffusers", "train", "ui", "quant", "wandb"):
        wanted |= {canonicalize_name(Requirement(line).name) for line in project["optional-dependencies"][extra]}
    wanted -= {"imgadapt"}
    assert listed.keys() == wanted
    known = licences.rules()["known"]
    for package in licences.packages():
        if package.name in listed:
            assert listed[package.name] == known.get(package.name, package.licence)


def test_an_audit_tells_what_is_vulnerable_and_never_takes_not_asked_for_none() -> None:
    rows = [
        {"name": "a", "version": "1", "vulns": []},
        {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]},
        {"name": "c", "skip_reason": "Dependency not found on PyPI"},
    ]
    answer = audit.read({"dependencies": rows})
    assert (answer.asked, answer.unknown) == (3, ["c"])
    assert answer.vulnerable == {"b 2": "CVE-1 (fixed in 3)"}


@pytest.mark.parametrize(
    ("said", "status", "lenient", "tells"),
    [
        ({"dependencies": [{"name": "safetensors", "version": "1", "vulns": []}]}, 0, 0, "1 of "),
        ({"dependencies": [{"name": "safetensors", "skip_reason": "not found"}]}, 2, 0, "index here serves no advis"),
        ({"dependencies": [{"name": "x", "version": "1", "vulns": [{"id": "C", "fix_versions": []}]}]}, 1, 1, "x 1: C"),
        ("no JSON", 2, 0, "NOT DONE"),
    ],
)
def test_the_audit_program_ends_as_it_says(said: Any, status: int, lenient: int, tells: str, tmp_path: Path) -> None:
    (tmp_path / "pip_audit.py").write_text(f"print({(said if isinstance(said, str) else json.dumps(said))!r})")
    for flags, wanted in (([], status), (["--if-reachable"], lenient)):
        done = subprocess.run(
            [sys.executable, str(ROOT / "supply" / "audit.py"), *flags], capture_output=True, text=True, check=False,
            cwd=tmp_path,  # where it finds that pip_audit
        )  # fmt: skip
        assert done.returncode == wanted, done.stderr
        assert tells in done.stdout


def _pins() -> list[Requirement]:
    return constraints.pins((ROOT / "constraints.txt").read_text("utf-8"))


def _section(title: str) -> str:
    text = (ROOT / "NOTICE").read_text("utf-8")
    return text.partition(f"{title}\n")[2].partition("\n\n")[0]
