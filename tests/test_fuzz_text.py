"""Text of anyone: what is spelled is read as what it was, and what is refused is refused in a line."""

import json
import string
import unicodedata
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from imgadapt import cli
from imgadapt.combining import recipes
from imgadapt.errors import ConfigError, DataError, ImgadaptError
from imgadapt.playground import filenames, prompts
from imgadapt.playground.grids import ranges
from imgadapt.playground.library.remembering import Memory
from imgadapt.playground.pictures import foreign, infotext
from imgadapt.playground.requests import STRONGEST, GenerateRequest, Use
from imgadapt.playground.samplers import SAMPLERS
from imgadapt.training import captions, flags
from imgadapt.training.config import TrainConfig

TEXTS = st.text(max_size=40)
LINES = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=40)
NAMES = LINES.filter(lambda text: not set(text) & set('<>:"') and text == text.strip() != "")
WEIGHTS = st.floats(-STRONGEST, STRONGEST).map(lambda x: x + 0.0) | st.integers(-10, 10).map(float)
BLOCKS = st.sampled_from(["", "INS", "1,0,0.5", "ALL0.5"]) | NAMES
USES = st.builds(
    lambda weight, text, blocks, start, more: {
        "weight": weight, "text": text, "blocks": blocks, "start": start, "stop": start + more if more else None,
    },
    WEIGHTS, st.none() | WEIGHTS, BLOCKS, st.integers(0, 90), st.integers(0, 99),
)  # fmt: skip


@given(
    st.lists(st.tuples(NAMES, USES), max_size=4, unique_by=lambda row: row[0].casefold()),
    st.sampled_from(["", "a fox, red"]),
)
def test_a_stack_is_the_same_after_tags(rows: list[tuple[str, dict[str, Any]]], prompt: str) -> None:
    uses = [Use.of({"adapter": f"{k:016x}", **about}) for k, (_, about) in enumerate(rows)]
    names = {use.adapter: name for use, (name, _) in zip(uses, rows, strict=True)}
    for te_first in (False, True):  # one number of a tag is the denoiser's in both orders
        found = prompts.parse(f"{prompt} {prompts.spell(uses, names)}".strip(), te_first=te_first)
        assert found.prompt == prompt
        assert [tag.name for tag in found.tags] == [name for name, _ in rows]
        assert [tag.use(use.adapter) for tag, use in zip(found.tags, uses, strict=True)] == uses


@given(
    LINES, LINES, st.integers(1, 200), st.integers(0, 2**53 - 1), st.sampled_from(list(SAMPLERS)),
    st.integers(1, 512).map(lambda k: 8 * k), st.none() | st.integers(0, 500).map(lambda k: k / 10), NAMES,
)  # fmt: skip
def test_a_picture_says_the_same_in_a1111s_words(
    prompt: str, negative: str, steps: int, seed: int, sampler: str, side: int, guidance: float | None, base: str
) -> None:
    if any(word in f"{prompt}\n{negative}" for word in ("Negative prompt:", "Steps:", "<lora:", "<lyco:")):
        return
    said = {"prompt": prompt, "negative": negative, "steps": steps, "seed": seed, "sampler": sampler, "width": side}
    request = GenerateRequest.of({**said, "height": side, "guidance": guidance})
    image = Image.new("RGB", (1, 1))
    image.info[infotext.A1111] = infotext.parameters({"request": request.model_dump(), "base": {"name": base}})
    found = foreign.read(image)
    texts = {"prompt": prompt.strip(), "negative": negative.strip()}
    more = {} if guidance is None else {"guidance": guidance}
    assert found.values == {**said, **texts, "height": side, **more}
    assert (found.model, list(found.lacks)) == (base, [])


DECIMALS = st.decimals(-(10**6), 10**6, allow_nan=False, places=6)


@given(st.lists(DECIMALS, min_size=1, max_size=20), DECIMALS, DECIMALS.filter(bool), st.integers(0, 30))
def test_numbers_are_the_same_after_text(numbers: list[Decimal], start: Decimal, step: Decimal, more: int) -> None:
    assert ranges.listed(", ".join(map(ranges.plain, numbers)), 20) == numbers
    text = f"{ranges.plain(start)}:{ranges.plain(start + more * step)}:{ranges.plain(step)}"
    assert ranges.listed(text, 31) == [start + k * step for k in range(more + 1)]


@pytest.mark.parametrize("text", ["0:1e9:1e-9", "0:999999999999:0.000000000001", "1..999999999", "0-1 [999999999]"])
def test_more_numbers_than_fit_are_refused_before_there_are_any(text: str) -> None:
    with pytest.raises(ConfigError):
        ranges.listed(text, 400)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(LINES, max_size=3), LINES, st.floats(1e-9, 100), st.integers(0, 2**63 - 1), st.booleans())
@example(['"""\\', "\u00ad\ufeff#"], "'''#", 1e-4, 0, False)
def test_a_config_is_the_same_after_toml(
    tmp_path: Path, prompts: list[str], title: str, rate: float, seed: int, flip: bool
) -> None:
    values = {"folder": tmp_path, "sample_prompts": prompts, "title": title, "learning_rate": rate, "flip": flip}
    config = TrainConfig.of({**values, "seed": seed, "learning_rates": {f"{title}*": rate}})
    file = tmp_path / "config.toml"
    file.write_text(flags.write_toml(config), "utf-8")
    found = TrainConfig.of(flags.read_toml(file))
    for name in ("sample_prompts", "title", "learning_rate", "learning_rates", "seed", "flip"):
        assert getattr(found, name) == getattr(config, name)


SETTINGS = st.sampled_from([*GenerateRequest.model_fields, "x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(10**30), 10**30) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SETTINGS, inner),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(SETTINGS, JSON, max_size=4) | JSON)
def test_a_request_of_any_json_is_checked_or_refused_in_a_line(said: Any) -> None:
    try:
        made = GenerateRequest.of(said)
    except ConfigError as error:
        text = str(error)
    else:
        assert GenerateRequest.of(json.loads(made.model_dump_json())) == made
        return
    assert text.isprintable()
    assert 0 < len(text) < 500


@given(st.text(string.ascii_letters + "{}|,\n \x00\ud800[]", max_size=60))
@example("{a|b}" * 7)
def test_captions_of_any_text_are_few_or_refused(text: str) -> None:
    try:
        found = captions.wordings(text.split("\n"), "x.txt")
    except DataError as error:
        refusal = str(error)
    else:
        assert len(found) <= captions.MOST_WORDINGS
        assert all(line == " ".join(line.split()) != "" for line in found)
        assert not {"\0", "\ud800"} & set("".join(found))
        return
    assert refusal.startswith("x.txt: ")
    refusal.encode()


@given(TEXTS)
@example("\x1b]0;x\x07\u202e\u2028\ud800\x9b")
def test_what_an_error_repeats_moves_no_cursor(text: str) -> None:
    shown = str(ImgadaptError(f"a{text}b"))
    assert all(c.isprintable() or c == "\n" or unicodedata.category(c) == "Zs" for c in shown)
    shown.encode()
    if text.isprintable():
        assert shown == f"a{text}b"


def test_a_message_is_as_long_as_one_can_read_whatever_it_repeats() -> None:
    name = "a" * 900_000
    assert str(ConfigError("b" * 4000)) == "b" * 4000
    for text in (f"{name} = 1\n[[inputs]]\npath='a'", f"rule = '{name}'\n[[inputs]]\npath = 'a'"):
        with pytest.raises(ConfigError) as caught:
            recipes.from_toml(text, "x.toml")
        said = str(caught.value)
        assert len(said) < 4100
        assert "there are: " in said


@given(TEXTS | st.sampled_from(["con", "CON.txt", "nul.tar.gz", "a/../b", "x" * 300, "con." + "x" * 96, ".", "\ud800"]))
def test_a_cleaned_name_is_a_files_and_stays_as_it_is(text: str) -> None:
    name = filenames.cleaned(text, "otherwise")
    assert filenames.cleaned(name, "x") == name
    assert not set(name) & set('/\\\0<>:"|?*\n')
    assert name not in ("", ".", "..")
    assert 0 < len(name.encode()) <= filenames.MOST


@given(st.text(st.characters(exclude_characters="\0"), max_size=30), st.floats(allow_nan=False))
@example("x" * 5000, 0.5)
def test_a_file_with_a_strength_is_both(name: str, strength: float) -> None:
    assert cli.adapter(f"{name}:{strength!r}") == (Path(name), strength)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | JSON.map(lambda said: json.dumps(said).encode()))
@example(b'{"version": 1e999, "headers": {"a": [1e999, 2, {}]}, "digests": []}')
def test_a_memory_of_any_bytes_is_forgotten(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "library.json").write_bytes(data)
    memory = Memory(tmp_path / "library.json")
    assert memory.header("a", (1, 2)) is None
    assert memory.digest("a", (1, 2)) is None
