"""SECURITY.md: each promise names a test, and each test that is named is there."""

import ast
import re
from functools import cache
from pathlib import Path

from imgadapt import header, toml
from imgadapt.training import decoding

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SECURITY.md").read_text("utf-8")
PROMISES = ("Reading files that anyone may have made", "Writing", "Running", "The playground", "Network and supply")
_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def _section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
    assert found, title
    return found[1]


@cache
def _tests_in(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text("utf-8"))
    return frozenset(
        node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


def test_every_promise_names_a_test() -> None:
    for title in PROMISES:
        promises = re.findall(r"^- (.*?)(?=^- |\Z)", _section(title), re.M | re.S)
        assert promises, title
        silent = [promise.splitlines()[0] for promise in promises if not _TEST.search(promise)]
        assert silent == [], title


def test_every_test_that_is_named_is_there() -> None:
    named = _TEST.findall(TEXT)
    assert len(named) > 40
    gone = [f"{file}::{name}" for file, name in named if not (ROOT / file).is_file()]
    gone += [f"{file}::{name}" for file, name in named if name and not gone and name not in _tests_in(ROOT / file)]
    assert gone == []


def test_its_other_sections_are_there() -> None:
    titles = re.findall(r"^## (.*)$", TEXT, re.M)
    assert set(titles) == {"Reporting a vulnerability", *PROMISES, "What is not promised"}
    assert "private advisory" in _section("Reporting a vulnerability")
    assert "latest release" in _section("Reporting a vulnerability")


def test_the_numbers_are_those_of_the_code() -> None:
    assert f"{header.MOST_BYTES // 2**20} MiB of header and {header.MOST_TENSORS:,} tensors" in TEXT
    assert f"have at most {toml.MOST_BYTES // 2**20} MiB" in TEXT
    assert f"those of {', '.join(decoding.FORMATS[:-1])} and {decoding.FORMATS[-1]}, at most" in TEXT
    assert f"at most {decoding.MOST_BYTES // 2**20} MiB; their size" in TEXT
