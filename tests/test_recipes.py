"""Recipes: TOML there and back, arguments, what a merged file says of itself, and what is refused."""

import argparse
import json
import os
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imgadapt import AdapterFile, Entry, LoRA, MergeRecipe
from imgadapt.combining.asking import add_arguments, entry_of, recipe_of
from imgadapt.combining.inheriting import inherited, united_words
from imgadapt.combining.layers import Input
from imgadapt.combining.recipes import from_toml, public, read_recipe, recipe_in, text_for, to_toml
from imgadapt.combining.rules import RULES
from imgadapt.embeddings import Embedding
from imgadapt.errors import ConfigError, FormatError
from imgadapt.formats import Part

AB = (Entry("a.safetensors", 0.8), Entry("b.safetensors", -0.5))


def asked(*arguments: str) -> MergeRecipe:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return recipe_of(parser.parse_args(list(arguments)))


# --- TOML

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
TABLES = st.dictionaries(TEXTS, NUMBERS, max_size=3)
ENTRIES = st.builds(
    Entry, TEXTS, NUMBERS, st.dictionaries(st.sampled_from(["te", "unet"]), NUMBERS), TEXTS | TABLES,
    st.dictionaries(st.sampled_from(["attn2", r"to_[qk]\.\d+$", '"\\x7f\'']), NUMBERS),
    st.sampled_from(["", "0f" * 32]),
)  # fmt: skip


@given(st.lists(ENTRIES, min_size=1, max_size=3), st.integers(0, 2**63 - 1), st.none() | TEXTS, st.floats(0.01, 1))
def test_a_recipe_is_the_same_after_toml(entries: list[Entry], seed: int, base: str | None, density: float) -> None:
    recipe = MergeRecipe(
        tuple(entries), "ties", {"density": density, "trim": "model"}, "core", energy=0.99, seed=seed, base=base,
        base_sha256="ab" * 32 if base else "", dtype="bf16", format="kohya",
    )  # fmt: skip
    text = to_toml(recipe, "0.1.0")
    assert from_toml(text) == recipe
    assert to_toml(from_toml(text), "0.1.0") == text
    assert tomllib.loads(text)["imgadapt"] == "0.1.0"


def test_a_recipe_of_every_rule_with_its_options_is_the_same_after_toml() -> None:
    for rule in RULES:
        recipe = MergeRecipe((Entry("a"), Entry("b", 0.5)), rule.name, rule.checked({}))
        assert from_toml(to_toml(recipe)) == recipe


def test_a_recipe_says_only_what_is_not_as_usual() -> None:
    assert to_toml(MergeRecipe(AB)) == (
        'rule = "weighted"\n\n[[inputs]]\npath = "a.safetensors"\nweight = 0.8\n'
        '\n[[inputs]]\npath = "b.safetensors"\nweight = -0.5\n'
    )


def test_block_weights_may_be_a_list() -> None:
    recipe = from_toml('[[inputs]]\npath = "a"\nblocks = [1, 0, 0.5]\n[[inputs]]\npath = "b"\nweight = 2\n')
    assert recipe.inputs == (Entry("a", 1.0, blocks="1,0,0.5"), Entry("b", 2.0))
    assert isinstance(recipe.inputs[1].weight, float)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rule = ", "not TOML"),
        ('rule = "svd"', r"no \[\[inputs\]\]"),
        ('rul = "svd"\n[[inputs]]\npath = "a"', "unknown key 'rul', did you mean 'rule'"),
        ('outptu = "b"\n[[inputs]]\npath = "a"', "unknown key 'outptu', did you mean 'output'.*there are: .*, output"),
        ('[[inputs]]\npath = "a"\nwieght = 1', "input 1: unknown key 'wieght', did you mean 'weight'"),
        ("[[inputs]]\nweight = 1", "input 1: no path"),
        ("[[inputs]]\npath = 3", "path is 3; wanted text"),
        ('[[inputs]]\npath = "a"\nweight = "1"', "weight is '1'; it must be a finite number"),
        ('[[inputs]]\npath = "a"\nweight = nan', "weight is nan; it must be a finite number"),
        ('[[inputs]]\npath = "a"\nmasks = "x"', "masks is 'x'; wanted a table of numbers"),
        ('[[inputs]]\npath = "a"\nblocks = 3', "blocks is 3; wanted a preset's name"),
        ('rank = 4.5\n[[inputs]]\npath = "a"', "rank is 4.5; wanted a whole number"),
        ('rank = true\n[[inputs]]\npath = "a"', "rank is True; wanted a whole number"),
        ('rank = 4\nerror = 0.1\n[[inputs]]\npath = "a"', "rank and error: one of them"),
        ('options = 3\n[[inputs]]\npath = "a"', "options is 3; wanted a table"),
        ('[[inputs]]\npath = "a\\u0000b"', "is no path"),
        ('output = "a\\u0000b"\n[[inputs]]\npath = "a"', "is no path"),
        ('output = 3\n[[inputs]]\npath = "a"', "output is 3; wanted text"),
        (
            'rule = "ties"\n[options]\ndensty = 0.3\n[[inputs]]\npath = "a"',
            "ties has no option 'densty'; it has: density",
        ),
        ('rule = "tise"\n[[inputs]]\npath = "a"', "no rule 'tise', did you mean 'ties'"),
        ('dtype = "fp8"\n[[inputs]]\npath = "a"', "dtype is 'fp8'; there are: fp32, fp16, bf16"),
        ('format = "khoya"\n[[inputs]]\npath = "a"', "format is 'khoya'; there are: kohya"),
    ],
)
def test_what_a_recipe_cannot_mean_is_an_error(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_toml(text)


def test_paths_of_a_recipe_start_at_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = MergeRecipe((Entry("loras/a.safetensors"), Entry("/far/b.safetensors")), base="base.safetensors")
    place = Path("recipes/one.toml")
    place.parent.mkdir()
    text = text_for(recipe, place, "0.1.0")
    assert [row["path"] for row in tomllib.loads(text)["inputs"]] == [
        os.path.join("..", "loras", "a.safetensors"), "/far/b.safetensors",
    ]  # fmt: skip
    place.write_text(f'output = "both.safetensors"\n{text}')
    read, output = read_recipe(place)
    assert read == recipe
    assert output == Path("recipes/both.safetensors")
    with pytest.raises(ConfigError, match=r"two\.toml: .*no such file"):
        read_recipe(Path("two.toml"))


def test_a_file_tells_no_folders_of_its_maker() -> None:
    assert public("loras/a.safetensors") == "loras/a.safetensors"
    assert public("/home/me/loras/a.safetensors") == "a.safetensors"
    assert public(r"C:\Users\me\a.safetensors") == "a.safetensors"


def test_a_file_without_a_recipe_says_so() -> None:
    with pytest.raises(FormatError, match="c has no recipe in its metadata"):
        recipe_in({"ss_network_dim": "4"}, "c")


# --- arguments


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1e-1", "a.safetensors", -0.1),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:0.5", r"C:\loras\a.safetensors", 0.5),
        ("C:/loras/a.safetensors:2", "C:/loras/a.safetensors", 2.0),
        ("//host/a:b/c.safetensors", "//host/a:b/c.safetensors", 1.0),
    ],
)
def test_a_colon_is_of_a_weight_and_not_of_a_drive(text: str, path: str, weight: float) -> None:
    assert entry_of(text) == Entry(path, weight)


def test_a_name_with_a_colon_that_is_there_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a:2"
    path.write_bytes(b"")
    assert entry_of(str(path)) == Entry(str(path))
    assert entry_of(f"{path}:3") == Entry(str(path), 3.0)


@pytest.mark.parametrize("text", ["a.safetensors:", "a.safetensors:0,8", "a.safetensors:nan", "a.safetensors:x"])
def test_a_weight_that_is_no_number_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"the weight of a\.safetensors is '.*'; it must be a finite number"):
        entry_of(text)


def test_arguments_are_a_recipe() -> None:
    arguments = "l/a.safetensors:0.8 b.safetensors:-0.5 --rule dare_ties --density 0.3 --space core --rank 8 --seed 7"
    rest = ["--te", "0.5", "--te", "b=0", "--unet", "1=2", "--dtype", "bf16", "--format", "kohya", "--base", "x"]
    blocks = ["--blocks", "a=INS", "--blocks", "b:IN04=0.5", "--blocks", "2:*.to_q=0", "--mask", "b:a:b=0.25"]
    made = asked(*arguments.split(), *rest, *blocks, "--mask", "attn[12]=.*=0.5")
    first = Entry("l/a.safetensors", 0.8, {"te": 0.5, "denoiser": 2.0}, "INS", {"attn[12]=.*": 0.5})
    second = Entry("b.safetensors", -0.5, {"te": 0.0}, {"IN04": 0.5, "*.to_q": 0.0}, {"a:b": 0.25, "attn[12]=.*": 0.5})
    assert made == MergeRecipe(
        (first, second), "dare_ties", {"density": 0.3}, "core", rank=8, seed=7, base="x", dtype="bf16", format="kohya"
    )


def test_options_are_of_the_type_that_the_rule_has() -> None:
    assert asked("a", "b", "--rule", "ties", "--option", "density=1", "--trim", "model").options == {
        "density": 1.0, "trim": "model",
    }  # fmt: skip
    for rule in RULES:
        for name, option in rule.options.items():
            value = str(option.default).lower() if isinstance(option.default, bool) else str(option.default)
            both = ["1", "2"][: max(rule.least, 1)] if rule.most > 1 else ["1"]
            assert asked(*both, "--rule", rule.name, f"--{name.replace('_', '-')}", value).options == {
                name: option.default
            }


def test_a_rank_alone_is_the_best_of_that_rank() -> None:
    assert asked("a", "b").rule == "weighted"
    assert asked("a", "b", "--rank", "4").rule == "svd"
    assert asked("a", "b", "--energy", "0.9").rule == "svd"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to merge: name the adapters"),
        (["a", "b", "--blocks", "c=INS"], "--blocks: 'c' is no input"),
        (["x/a", "y/a", "--te", "a=0"], r"'a' is more than one input; there are: 1 \(x/a\), 2 \(y/a\)"),
        (["a", "b", "--te", "c=0"], "--te: 'c' is no input"),
        (["a", "--te", "much"], "--te is 'much'; it must be a finite number"),
        (["a", "--mask", "attn2"], r"--mask attn2: wanted \[INPUT:\]REGEX=NUMBER"),
        (["a", "--blocks", "INS", "--blocks", "IN04=0.5"], "has a list of block weights already"),
        (["a", "--blocks", "IN04=0.5", "--blocks", "INS"], "has weights of single blocks already"),
        (["a", "b", "--rule", "svd", "--density", "0.3"], "svd has no option 'density'; it has: none"),
        (["a", "--rule", "ties", "--density", "3"], "density is 3.0; it must be a number from"),
        (["a", "--rule", "ties", "--trim", "all"], "trim is 'all'; ties takes"),
        (["a", "--option", "density"], "--option density: wanted NAME=VALUE"),
        (["a", "--rule", "slerp"], "slerp merges 2 adapters, and there are 1"),
        (["a", "r.toml"], "a recipe has its own inputs"),
    ],
)
def test_arguments_that_cannot_be_meant_are_an_error(arguments: Sequence[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        asked(*arguments)


def test_arguments_change_a_recipe_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text_for(MergeRecipe(AB, "ties", {"density": 0.3, "trim": "model"}, rank=4, seed=3), path, "0"))
    before = asked(str(path))
    assert (before.rule, before.options, before.rank) == ("ties", {"density": 0.3, "trim": "model"}, 4)
    after = asked(str(path), "--density", "0.5", "--error", "0.1", "--te", "b=0")
    expected = (before.inputs[0], replace(before.inputs[1], components={"te": 0.0}))
    assert after == replace(before, inputs=expected, options={"density": 0.5, "trim": "model"}, rank=None, error=0.1)
    assert asked(str(path), "--rule", "svd") == replace(before, rule="svd", options={})


# --- what is inherited


def adapter(name: str, metadata: dict[str, str] | None = None, **words: Any) -> Input:
    embeddings = {token: Embedding(token, {"clip_l": vectors}) for token, vectors in words.items()}
    part = Part(LoRA(1, 1.0), {"up": torch.ones(2, 1), "down": torch.ones(1, 3)})
    file = AdapterFile({"unet.conv_in": part}, metadata or {}, embeddings=embeddings)
    return Input(f"{name}.safetensors", file, name * 4, lambda _: 1.0)


def test_what_is_true_of_the_merged_file_is_kept_and_what_would_lie_is_not() -> None:
    common = {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    a = adapter("a", {
        **common, "ss_network_dim": "16", "ss_network_alpha": "8", "sshs_model_hash": "1", "ss_max_train_steps": "100",
        "modelspec.title": "Ink", "modelspec.trigger_phrase": "ohwx style", "modelspec.author": "Ann",
        "ss_sd_model_name": "one.safetensors", "modelspec.date": "2024", "modelspec.license": "CC0",
    })  # fmt: skip
    b = adapter("b", {**common, "ss_output_name": "hero", "trigger_words": "sks man", "modelspec.author": "Bob",
        "ss_sd_model_name": "two.safetensors", "modelspec.license": "CC0"})  # fmt: skip
    c = adapter("c", {"modelspec.trigger_phrase": "blurry", **common})
    assert inherited([a, b, c], [0.8, 1.0, -0.5]) == {
        **common,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": "Ink + hero - c",
        "modelspec.merged_from": "Ink, hero, c",
        "modelspec.trigger_phrase": "ohwx style, sks man",  # what is taken away has none
        "modelspec.author": "Ann, Bob",
        "modelspec.license": "CC0",
        "merged_from": json.dumps(
            [
                {"name": "a.safetensors", "weight": 0.8, "sha256": "aaaa"},
                {"name": "b.safetensors", "weight": 1.0, "sha256": "bbbb"},
                {"name": "c.safetensors", "weight": -0.5, "sha256": "cccc"},
            ]
        ),
    }


def test_tags_stand_in_for_words_that_nobody_wrote_down() -> None:
    tags = json.dumps({"1_x": {"fox": 3, "red": 7}})
    made = inherited([adapter("a", {"ss_tag_frequency": tags}), adapter("b", {"trigger_words": "red"})], [1.0, 1.0])
    assert made["modelspec.trigger_phrase"] == "red, fox"


def test_words_are_united_and_one_word_for_two_things_is_an_error() -> None:
    one, two = torch.randn(2, 8), torch.randn(3, 8)
    made = united_words([adapter("b", zed=one, cat=two), adapter("a", ann=two, cat=two.clone())])
    assert list(made) == ["ann", "cat", "zed"]
    assert torch.equal(made["zed"].vectors["clip_l"], one)
    with pytest.raises(
        ConfigError, match=r"b\.safetensors and a\.safetensors both have the word 'cat', with different"
    ):
        united_words([adapter("b", cat=one), adapter("a", cat=two)])
