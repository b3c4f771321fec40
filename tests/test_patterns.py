"""Patterns: they find what `re` finds, and nothing in them takes for ever. TOML: within bounds."""

import os
import re
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imgadapt import Entry, toml
from imgadapt.combining.recipes import from_toml
from imgadapt.combining.weights import factor_of
from imgadapt.errors import ConfigError
from imgadapt.patterns import Budget, Pattern

SIGNS = st.sampled_from([
    *"ab01_A.*+?()[]|^$\\{}-,", "(?:", "(?=", "(?!", "(?<=", "(?<!", r"\d", r"\W", r"\b", r"\B", r"\.", "[a-b]", "[^a]",
    "{1,2}", "{,1}", "a*", "(a|b)", "(?P<x>", r"\Z", r"\A", r"[\s.]", "+?", r"\x61", "(a|)*",
    "(?P=x)", r"\1", "(?>", "a++", "(?(1)", "(?i)", "(?s:", "(?-i:", "{e}", "{e<=1}", "{,}", "{}", "[[:alpha:]]", "[]",
    "(?R)", r"\p{L}", r"\N{DIGIT ONE}", "(?#a)", "--", "&&", "||", "(?x) ", "{ 1}", r"\h", r"\R", "(?m)", "(?a)", "\n",
])  # fmt: skip


@settings(max_examples=1000, deadline=None)
@given(st.lists(SIGNS, max_size=9).map("".join), st.lists(st.text("ab01_.A\n -", min_size=1, max_size=7), max_size=4))
@example("(?i)[^a]B", ["xb", "Ab"])
@example("(?:ab){e<=2}", ["_", "ab{e<=2}"])
@example("[[:alpha:]]", ["a]", "b]", ":]", "1"])
@example(r"(?:\\\{a){e}", ["_"])
@example(r"(?<!\.)to_q$", ["attn.to_q", "xto_q"])
def test_a_pattern_finds_what_re_finds_or_is_refused(pattern: str, texts: list[str]) -> None:
    try:
        own = Pattern(pattern)
    except ConfigError:
        return
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # a set in a set, some day
        known = re.compile(pattern)
    assert [own.search(text) for text in texts] == [known.search(text) is not None for text in texts]


def test_what_masks_use_is_read() -> None:
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
    found = [r"attn2\.to_(out|v)\.?",
             r"^unet\.(down|up)_blocks\.\d+\.", r"(?i)ATTN[12]", r"^(?!.*attn1)", r"\bto_out\b", "attn2",
             
             r"(?<=attn)2", r"(?P<n>\d)\.attn", "a{0,2}t{2}n", "[^_]$", "(down(_blocks)?)+.*(0)+$",
             r"(t)\1", "(?>a|t)+n", "t++n", "(?P<t>t)(?P=t)", "(d)?(?(1)own|x)", "(?s:.)n", r"\.0{1}$"]  # fmt: skip
    assert [pattern for pattern in found if not Pattern(pattern).search(name)] == []
    missed = [r"attn2\.to_v", "^attn2", r"(?!.*attn2)^", "to_out$", r"(?<!attn)2", "A", r"\bo_out"]
    assert [pattern for pattern in missed if Pattern(pattern).search(name)] == []


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "unterminated"), ("a)", "unbalanced"), ("[a", "unterminated"), ("*", "nothing to repeat"),
        ("\\", "bad escape"),
        ("[b-a]", "bad character range"), ("a{3,2}", "min repeat"), ("(?<=a*)b", "fixed-width"), (r"\x4", "incomplete"),
        ("(?P<1>a)", "group name"), ("a(?i)b", "start"), ("(?R)", "unknown"), (r"\p{L}", "may mean two things"),
        (r"\pL", "bad escape"), ("(?r)a", "unknown"), ("(*FAIL)", "nothing"), ("(?V1)a", "unknown"),
        (r"\K", "bad escape"), ("a{", "write \\{"), ("[a||b]", "may mean two"),
        ("(?:ab){e<=1}", "the { at position 6 may mean two things"), (r"\\{e}", "the { at position 2"),
        ("[[:alpha:]]", "the [ at position 1"), ("[a--b]", "the - at position 3"),
        ("(" * 400 + ")" * 400, "recursion"), ("(" * 330 + "a" + ")*" * 330, "recursion"),
        ("(a{99}){99}", "too large"), ("(?:a?){4294967294}", "too large"), ("a{" + "9" * 900 + "}", "too large"),
        ("a{0,99999999999999}", "too large"), ("a" * 1001, "1,001 characters"),
    ],
)  # fmt: skip
def test_what_is_no_pattern_here_says_why(pattern: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Pattern(pattern)
    assert said in str(caught.value)


BOMBS = ["(a+)+$", "(a|aa)+$", ".*.*.*.*.*.*.*.*[xy]", "(?!(a*)*b)x", "(?=.*.*[xy])" * 80, "(?:a{50}){10}",
         r"(.*)(.*)(.*)\3\2\1[xy]", "(" * 60 + "a|b" + ")*" * 60 + "[xy]"]  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_no_mask_of_a_recipe_takes_for_ever(bomb: str) -> None:
    layers = [f"unet.{'a' * 120}.{k}" for k in range(1000)]
    began = time.thread_time()
    try:
        factor = factor_of(Entry("x", masks={bomb: 0.5}), None, layers)
        assert {factor(layer) for layer in layers} <= {0.5, 1.0}
    except ConfigError as error:
        assert any(word in str(error) for word in ("too long", "too large", "matches none"))  # noqa: PT017 # or it is read
    assert time.thread_time() - began < 5


def test_the_seconds_of_all_searches_are_counted_together() -> None:
    budget, text = Budget(0.5), "ab" * 60
    first, second = (Pattern(pattern, budget) for pattern in ("(a|b|ab)*[xy]", "a"))
    assert second.search(text)
    assert 0.4 < budget.seconds < 0.5
    for pattern in (first, second):  # the first has used all of them
        with pytest.raises(ConfigError, match="too long"):
            pattern.search(text)
    assert Pattern("a").search(text)


def test_a_name_that_is_none_is_not_searched() -> None:
    assert Pattern("^a").search("a" * 10_000)
    with pytest.raises(ConfigError, match="10,001 characters"):
        Pattern("^a").search("a" * 10_001)


def test_a_mask_that_takes_long_is_named_with_its_file_whenever_it_is_asked() -> None:
    factor = factor_of(Entry("x.safetensors", masks={"(a|b|ab)*[xy]": 2.0}), None, ["unet.x"])
    assert factor("unet.x") == 2.0
    with pytest.raises(ConfigError, match=r"x\.safetensors: the mask '\(a\|b\|ab\)\*\[xy\]': it takes too long"):
        factor("ab" * 60)


def test_a_recipe_has_no_more_than_can_be_looked_for() -> None:
    masks = ", ".join(f"m{k} = 1" for k in range(251))
    inputs = f'[[inputs]]\npath = "a"\nmasks = {{ {masks} }}\n'
    assert len(from_toml(inputs).inputs[0].masks) == 251
    rows = "".join(f"'{k:02}{'(a)?' * 240}' = 1\n" for k in range(52))
    long = f"[[inputs]]\npath = 'a'\n[inputs.masks]\n{rows}"
    assert len(from_toml(long.replace("(a)?" * 240, "", 1)).inputs[0].masks) == 52
    for text, said in (
        (inputs * 2, "502 masks and blocks; 500"),
        ("[[inputs]]\npath = 'a'\n" * 501, "501 inputs"),
        (long, "50,024 characters of masks and blocks; 50,000"),
    ):
        with pytest.raises(ConfigError, match=said):
            from_toml(text)


TOMLS: list[tuple[str, str]] = [
    ("a = " + "[" * 100_000, "not TOML"), (".".join("a" * 100_000) + " = 1", "more than 32 parts"),
    ("a = 0x" + "f" * 5000, "64 bits"), ("a = " + "9" * 5000, "not TOML"), ("a = 9223372036854775808", "64 bits"),
    ("a = [[[1, 99999999999999999999]]]", "64 bits"), ("a = " + "{a=" * 40 + "1" + "}" * 40, "deep"),
    ("[" + ".".join('"a"' for _ in range(1000)) + "]", "parts"), ("x" * 2**21, "1,048,576"),
    ("a = 2026-02-31", "not TOML"), ("a = '\x00'", "not TOML"), ("a = 1\na = 2", "not TOML"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), TOMLS, ids=range(len(TOMLS)))
def test_toml_is_read_within_bounds(text: str, said: str, tmp_path: Path) -> None:
    began = time.thread_time()
    (tmp_path / "x.toml").write_text(text, "utf-8")
    for read in (lambda: toml.read(text, "it"), lambda: toml.read_file(tmp_path / "x.toml")):
        with pytest.raises(ConfigError) as caught:
            read()
        assert said in str(caught.value)
        assert len(str(caught.value)) < 400
    assert time.thread_time() - began < 2


def test_a_toml_file_says_what_is_wrong_with_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    for data, said in (
        (b"a = '\xff'", "not UTF-8"),
        (b"\xff\xfea\x00", "not UTF-8"),
        (b"a" * (2**20 + 1), "1,048,577 bytes, wanted 1,048,576 at most"),
    ):
        file.write_bytes(data)
        with pytest.raises(ConfigError, match=said):
            toml.read_file(file)
    os.mkfifo(tmp_path / "pipe")
    for path, said in ((tmp_path, "only a folder"), (tmp_path / "none", "no such file"), (tmp_path / "a\0b", "null"),
                       (tmp_path / ("a" * 5000), "too long"), (tmp_path / "pipe", "a pipe, socket or device"),
                       (Path("/dev/zero"), "a pipe, socket or device")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            toml.read_file(path)
    file.write_bytes(b'\xef\xbb\xbfa = -9223372036854775808\r\nb = """x\r\ny"""\r\n')
    assert toml.read_file(file) == {"a": -(2**63), "b": "x\ny"}
