"""The study of methods: its page, the advice and the defaults say what its results say."""

import re
from pathlib import Path
from typing import Any

import pytest

from imgadapt.errors import ConfigError
from imgadapt.methods import METHODS
from imgadapt.prompting import KINDS
from imgadapt.training import rates, spelling
from imgadapt.training.config import TrainConfig
from tests.scripts import script

ROOT = Path(__file__).parents[1]
LORA = ("lora", "middle")


table = script("benchmarks/methods_table.py")
ROWS = table.read(ROOT / "benchmarks" / "methods.jsonl")
BY_CASE = {(row.case, row.size): row for row in ROWS}


def test_the_page_has_the_table_of_the_results() -> None:
    page = (ROOT / "docs/measured.md").read_text("utf-8")
    assert table.page(page, ROWS) == page


def test_every_method_is_in_it_but_those_that_are_no_choice_of_their_own() -> None:
    assert {kind.name for kind in (*METHODS, *KINDS)} - {row.case for row in ROWS} == {"anchored", "trainable_tokens"}


@pytest.mark.parametrize("kind", [kind for kind in (*METHODS, *KINDS) if (kind.name, "middle") in BY_CASE])
def test_a_methods_rate_is_the_one_that_was_best(kind: Any) -> None:
    row = BY_CASE.get((f"{kind.name}_default", "middle"), BY_CASE[kind.name, "middle"])  # at its default settings
    ratio = row.rate / BY_CASE[LORA].rate
    assert kind.rate_over_lora == float(f"{ratio:.2g}")


def test_rates_of_starts_and_rules_are_those_that_were_best() -> None:
    ratios = {row.case: float(f"{row.rate / BY_CASE[LORA].rate:.2g}") for row in ROWS if row.size == "middle"}
    named = {**rates.STARTS, "lora_fa": rates.RULES["freeze_down"], "lora_plus": float(f"{4**rates.LORA_PLUS:.2g}")}
    cases = {"pissa", "olora", "orthogonal", "eva", "corda", "lora_ga", "lora_fa", "nested", "lora_plus"}
    assert named == {case: ratio for case, ratio in ratios.items() if case in cases and ratio != 1}


def test_a_config_without_a_rate_has_that_of_its_method_start_and_rules() -> None:
    def rate(**settings: Any) -> float:
        return TrainConfig.of({"folder": "x", **settings}).learning_rate

    assert rate() == 1e-4
    lokr = next(kind for kind in METHODS if kind.name == "lokr").rate_over_lora
    assert rate(method="LoKr(factor=8)") == rate(method="dora(lokr)") == pytest.approx(1e-4 * lokr)
    assert rate(method="lokr", learning_rate=3e-4) == 3e-4
    assert rate(start="pissa") == pytest.approx(1e-4 * rates.STARTS["pissa"])
    assert rate(freeze_down=True) == pytest.approx(1e-4 * rates.RULES["freeze_down"])
    assert rate(freeze_down="false") == rate(lora_plus=1) == 1e-4  # pyright: ignore[reportArgumentType] # as TOML may say it
    assert rate(lora_plus=4) == pytest.approx(0.35e-4)
    for text in ("lora(rank={[]:1})", "lora(rank=" + "-" * 10_000 + "1)", "lora" + ".b" * 10_000):
        assert rate(method=text) == 1e-4
        with pytest.raises(ConfigError):
            spelling.method(text, {})


def test_each_line_of_the_advice_stands_on_rows_of_the_table() -> None:
    page = (ROOT / "docs/methods.md").read_text("utf-8")
    advice = page.split("## Which to take\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\d+\. (.*(?:\n   .*)*)", advice, re.MULTILINE)
    assert len(lines) == 10
    known = {table.called(row): row for row in ROWS}
    for line in lines:
        cited = [known[f"`{name}`"] for name in re.findall(r"`([^`]*)`", line) if f"`{name}`" in known]
        assert cited, line
        true = {f"{value:.3f}" for row in cited for value in (row.gain[0], abs(row.over[0]))}
        true |= {f"{row.drift[0]:.2f}" for row in (*cited, BY_CASE[LORA])} | {f"{row.numbers:,}" for row in cited}
        true |= {f"{row.ratio:.2f}" for row in cited if row.ratio is not None}
        said = re.findall(r"(?<![\w.=])\d+(?:,\d{3})+|(?<![\w.=])\d+\.\d{2,}", line)
        assert said, line
        assert set(said) <= true, (line, set(said) - true)
