"""imgadapt merge, as a user runs it: what it writes and says, that it is the same each time, and how it is verified."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from imgadapt import (
    AdapterFile,
    DoRA,
    Entry,
    LoHa,
    LoRA,
    MergeRecipe,
    attach,
    combine,
    demo,
    detach,
    load,
    save,
)
from imgadapt.arch import canonical
from imgadapt.combining.files import digest_of, merge_files, told_apart
from imgadapt.combining.printing import notes
from imgadapt.combining.recipes import KEY
from imgadapt.combining.rules import RULES
from imgadapt.combining.verify import said, verify
from imgadapt.embeddings import Embedding
from imgadapt.errors import ConfigError, FormatError, StateError
from imgadapt.formats import Part
from imgadapt.methods import Method
from imgadapt.sites import Site
from imgadapt.targets import components, find

Run = Callable[[str, Sequence[str]], None]
DOWN, UP = "unet.down_blocks.0.attentions.0.transformer_blocks.0", "unet.up_blocks.3.attentions.2.transformer_blocks.0"
LAYERS: Mapping[str, tuple[int, ...]] = {
    f"{DOWN}.attn1.to_q": (320, 320),
    f"{DOWN}.attn2.to_k": (320, 768),
    f"{UP}.attn1.to_q": (320, 320),
    "unet.down_blocks.0.resnets.0.conv1": (320, 320, 3, 3),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (768, 768),
}
NAMES = list(LAYERS)


def part(name: str, method: Method, seed: int, dtype: torch.dtype = torch.float32) -> Part:
    shape = LAYERS[name]
    generator = torch.Generator().manual_seed(1000 * seed + NAMES.index(name))
    started = method.init(Site(shape, "conv" if len(shape) > 2 else "linear"), None)
    size = 0.3 if isinstance(method, LoHa) else 0.05
    tensors = {key: (size * torch.randn(t.shape, generator=generator)).to(dtype) for key, t in started.items()}
    return Part(method, tensors, shape=shape)


def adapter(method: Method, seed: int, names: Sequence[str] = NAMES, **rest: Any) -> AdapterFile:
    return AdapterFile({name: part(name, method, seed) for name in names}, architecture="sd1", **rest)


def delta(file: AdapterFile, name: str) -> Tensor:
    """fp64, (out, fan_in); 0 for a layer that it does not have."""
    shape = LAYERS[name]
    if name not in file.parts:
        return torch.zeros(shape, dtype=torch.float64).flatten(1)
    own = file.parts[name]
    tensors = {key: t.double() for key, t in own.tensors.items()}
    made = own.method.delta(tensors, Site(shape, "conv" if len(shape) > 2 else "linear"), None)
    return made.flatten(1) * own.method.scale


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[AdapterFile]:
    """A LoRA of kohya's and a LoHa of LyCORIS', which has one layer less and another alpha; in the current folder."""
    monkeypatch.chdir(tmp_path)
    common = {"ss_base_model_version": "sd_v1", "ss_max_train_steps": "99"}
    style = adapter(LoRA(rank=4, alpha=2.0), 1, metadata={**common, "modelspec.trigger_phrase": "ohwx"})
    hero = adapter(LoHa(rank=2, alpha=1.0), 2, NAMES[1:], metadata={**common, "modelspec.trigger_phrase": "sks"})
    save(style, "style.safetensors", format="kohya")
    save(hero, "hero.safetensors", format="lycoris")
    return [load("style.safetensors"), load("hero.safetensors")]


AB = ["style.safetensors:0.8", "hero.safetensors:-0.5"]


def report_of(run: Run, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    run("merge", [*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


# --- what it writes and says


def test_the_file_is_the_exact_sum_of_a_lora_and_a_loha(files: list[AdapterFile], run: Run) -> None:
    run("merge", [*AB, "--output", "both.safetensors"])
    both = load("both.safetensors")
    for name in NAMES:
        wanted = 0.8 * delta(files[0], name) - 0.5 * delta(files[1], name)
        assert (delta(both, name) - wanted).norm() < 1e-6 * wanted.norm()
        assert both.parts[name].method.file_rank == (4 if name == NAMES[0] else 4 + 2 * 2)


def test_a_rank_is_the_best_of_that_rank_and_the_residual_printed_is_what_is_left(
    files: list[AdapterFile], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report_of(run, capsys, *AB, "--rank", "3", "--output", "both.safetensors", "--format", "diffusers")
    both = load("both.safetensors")
    assert (both.format, found["format"], found["rule"]) == ("diffusers", "diffusers", "svd")
    assert found["sha256"] == digest_of(Path("both.safetensors"))
    assert [*found][:4] == ["written", "format", "bytes", "sha256"]
    assert found["weights"] == [0.8, -0.5]
    run("merge", [*AB, "--rank", "3", "--dry-run", "--json"])
    assert len(capsys.readouterr().out.splitlines()) < 2 * len(NAMES) + 20  # a line to each layer
    left = total = 0.0
    for name in NAMES:
        wanted = 0.8 * delta(files[0], name) - 0.5 * delta(files[1], name)
        values = torch.linalg.svdvals(wanted)
        assert float((delta(both, name) - wanted).norm()) == pytest.approx(float(values[3:].norm()), rel=1e-4)
        left, total = left + float(values[3:].norm()) ** 2, total + float(values.norm()) ** 2
    assert found["residual"] == pytest.approx((left / total) ** 0.5, rel=1e-4)


def test_the_report_says_what_matched_norms_cosines_and_ranks(
    files: list[AdapterFile], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report_of(run, capsys, *AB, "--te", "0", "--rank", "5", "--dry-run")
    assert found["inputs"] == ["style.safetensors", "hero.safetensors"]
    assert found["about"] == ["lora, rank 4, 5 layers", "loha, rank 2, 4 layers"]
    (unet,) = found["components"]
    assert (unet["name"], unet["matched"], unet["alone"], unet["skipped"]) == ("unet", 3, [1, 0], 0)
    stacked = [torch.cat([delta(file, name).flatten() for name in NAMES[:4]]) for file in files]
    assert unet["norms"] == pytest.approx([float(d.norm()) for d in stacked], rel=1e-5)
    cosine = float(stacked[0] @ stacked[1] / (stacked[0].norm() * stacked[1].norm()))
    assert unet["cosines"][0][1] == pytest.approx(cosine, abs=1e-6)
    assert unet["norm"] == pytest.approx(float((0.8 * stacked[0] - 0.5 * stacked[1]).norm()), rel=1e-5)
    assert unet["ranks"] == [4, 5]
    run("merge", [*AB, "--te", "0", "--rank", "5", "--dry-run"])
    said = capsys.readouterr().out
    turned = report_of(run, capsys, *reversed(AB), "--te", "0", "--rank", "5", "--dry-run")
    assert turned["components"][0]["alone"] == [0, 1]
    assert turned["components"][0]["norms"] == unet["norms"][::-1]
    for line in (
        "svd, rank 5\n", "  [2] hero.safetensors      -0.5  loha, rank 2, 4 layers\n",
        "unet            3 layers matched, 1 only in [1]\n", "rank 4 to 5, residual 0.",
        "skipped, their weight is 0: text_encoder.text_model.encoder.layers.0.self_attn.q_proj\n",
    ):  # fmt: skip
        assert line in said
    assert sorted(os.listdir()) == ["hero.safetensors", "style.safetensors"]


def test_inputs_of_one_name_are_told_apart_by_their_folders(
    files: list[AdapterFile], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, name in (("run/a", "style"), ("run/b", "hero")):
        os.makedirs(folder)
        os.rename(f"{name}.safetensors", f"{folder}/adapter.safetensors")
    shutil.copy("run/a/adapter.safetensors", "third.safetensors")
    given = ["run/a/adapter.safetensors:0.8", "./run/b/adapter.safetensors", "third.safetensors"]
    found = report_of(run, capsys, *given, "--dry-run")
    wanted = [str(Path("a/adapter.safetensors")), str(Path("b/adapter.safetensors")), "third.safetensors"]
    assert found["inputs"] == wanted
    alike = ["x/a/s.safetensors", "y/a/s.safetensors", "a/s.safetensors", "s.safetensors", "s.safetensors"]
    assert told_apart(alike) == [str(Path(path)) for path in alike]


def test_every_rule_is_listed_with_its_options(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("merge", ["--list"])
    said = capsys.readouterr().out
    for rule in RULES:
        assert f"\n{rule.name}: " in f"\n{said}"
        assert all(f"--{name.replace('_', '-')} " in said for name in rule.options)


def test_metadata_has_the_recipe_its_inputs_and_their_words_and_nothing_that_is_not_true(
    files: list[AdapterFile], run: Run
) -> None:
    run(
        "merge",
        [*AB, "--rule", "ties", "--density", "0.4", "--rank", "6", "--format", "kohya", "--output", "both.safetensors"],
    )
    data = load("both.safetensors").metadata
    digests = {name: digest_of(Path(f"{name}.safetensors")) for name in ("style", "hero")}
    named = {row["name"]: (row["weight"], row["sha256"]) for row in json.loads(data["merged_from"])}
    assert named == {
        "style.safetensors": (0.8, digests["style"]), "hero.safetensors": (-0.5, digests["hero"])
    }  # fmt: skip
    assert data["modelspec.trigger_phrase"] == "ohwx"
    assert data["ss_base_model_version"] == "sd_v1"
    assert "ss_max_train_steps" not in data
    assert all(f'sha256 = "{digest}"' in data[KEY] for digest in digests.values())
    assert 'rule = "ties"\nrank = 6\n' in data[KEY]
    assert "density = 0.4\n" in data[KEY]
    assert (data["ss_network_dim"], data["ss_network_alpha"]) == ("6", "6")


def test_words_of_the_inputs_are_in_the_file_and_one_word_for_two_things_is_an_error(
    files: list[AdapterFile], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = {name: torch.randn(2, 768) for name in ("<ann>", "<bob>")}
    for file, name, token in zip(files, ("one", "two"), vectors, strict=True):
        words = {token: Embedding(token, {"clip_l": vectors[token]})}
        save(replace(file, embeddings=words), f"{name}.safetensors")
    run("merge", ["one.safetensors", "two.safetensors", "--output", "both.safetensors"])
    assert "words: <ann>, <bob>\n" in capsys.readouterr().out
    both = load("both.safetensors")
    assert {t: e.vectors["clip_l"].tolist() for t, e in both.embeddings.items()} == {
        token: v.tolist() for token, v in vectors.items()
    }
    other = {"<ann>": Embedding("<ann>", {"clip_l": vectors["<bob>"]})}
    save(replace(files[1], embeddings=other), "two.safetensors")
    with pytest.raises(ConfigError, match=r"one\.safetensors and two\.safetensors both have the word '<ann>'"):
        run("merge", ["one.safetensors", "two.safetensors", "--output", "new.safetensors"])
    assert not Path("new.safetensors").exists()


@pytest.mark.parametrize(
    ("dtypes", "asked", "wanted"),
    [
        ((torch.float16, torch.float16), None, torch.float16),
        ((torch.float16, torch.bfloat16), None, torch.float32),
        ((torch.float32, torch.float32), "bf16", torch.bfloat16),
    ],
)
def test_the_dtype_is_the_inputs_own_where_they_have_one(
    files: list[AdapterFile], run: Run, dtypes: Sequence[torch.dtype], asked: str | None, wanted: torch.dtype
) -> None:
    for file, name, dtype in zip(files, ("a", "b"), dtypes, strict=True):
        save(file, f"{name}.safetensors", dtype=dtype)
    rest = ["--dtype", asked] if asked else []
    run("merge", ["a.safetensors:0.8", "b.safetensors:-0.5", "--output", "both.safetensors", *rest])
    both = load("both.safetensors")
    assert {t.dtype for own in both.parts.values() for t in own.tensors.values()} == {wanted}
    for name in NAMES:
        expected = 0.8 * delta(files[0], name) - 0.5 * delta(files[1], name)
        assert (delta(both, name) - expected).norm() < 0.01 * expected.norm()


def test_ranks_that_bf16_cannot_count_have_their_own_alpha(tmp_path: Path) -> None:
    name = NAMES[0]
    save(
        AdapterFile({name: part(name, LoRA(150, 30.0), 1, torch.bfloat16)}), tmp_path / "a.safetensors", format="kohya"
    )
    save(AdapterFile({name: part(name, LoRA(151, 7.0), 2, torch.bfloat16)}), tmp_path / "b.safetensors", format="kohya")
    made = combine(MergeRecipe((Entry(tmp_path / "a.safetensors"), Entry(tmp_path / "b.safetensors", 0.5))))
    both = load(save(made, tmp_path / "c.safetensors"))
    assert (both.format, both.parts[name].method.file_rank, both.parts[name].method.scale) == ("kohya", 301, 1.0)
    wanted = delta(load(tmp_path / "a.safetensors"), name) + 0.5 * delta(load(tmp_path / "b.safetensors"), name)
    assert (delta(both, name) - wanted).norm() < 0.01 * wanted.norm()


def test_what_reads_the_base_is_refused_without_it_and_merged_with_it(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    from imgadapt.combining.checkpoints.base import open_base

    base = open_base(demo.PIPELINE)
    name = f"{DOWN}.attn1.to_q"
    weight, site = base.weight(name)
    parts: list[Part] = []
    for k, method in enumerate((DoRA(LoRA(4, 2.0)), LoRA(3, 1.0))):
        tensors = method.init(site, weight)
        torch.manual_seed(k)
        parts.append(
            Part(method, {key: t + 0.1 * torch.randn(t.shape) for key, t in tensors.items()}, shape=site.shape)
        )
        save(AdapterFile({name: parts[-1]}), f"{k}.safetensors", format="kohya" if k else "lycoris")
    with pytest.raises(ConfigError, match=f"{name}: what dora changes depends on the base's weights; give the base"):
        run("merge", ["0.safetensors", "1.safetensors", "--output", "c.safetensors"])
    run("merge", ["0.safetensors:0.5", "1.safetensors", "--base", str(demo.PIPELINE), "--output", "c.safetensors"])
    changes = [own.method.delta(own.tensors, site, weight.float()) * own.method.scale for own in parts]
    made = load("c.safetensors").parts[name]
    found = made.method.delta(made.tensors, site, None) * made.method.scale
    wanted = 0.5 * changes[0] + changes[1]
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    assert 'base = "pipeline"\n' in load("c.safetensors").metadata[KEY]
    with pytest.raises(FormatError, match=r"pipeline .* is neither there nor beside"):
        verify(Path("c.safetensors"))
    for folder in (demo.PIPELINE.parent, demo.PIPELINE):
        assert verify(Path("c.safetensors"), folder).identical
    run("merge", ["--verify", "c.safetensors", "--base", str(demo.PIPELINE)])
    with pytest.raises(FormatError, match="is not the file that the recipe means"):
        run("merge", ["--verify", "c.safetensors", "--base", str(demo.PIPELINE / "unet")])
    named = ["--base", "demo", "--output", "d.safetensors", "--save-recipe", "out/d.toml"]
    run("merge", ["0.safetensors:0.5", "1.safetensors", *named])
    assert 'base = "demo"\n' in load("d.safetensors").metadata[KEY]
    assert 'base = "demo"\n' in Path("out/d.toml").read_text()
    again = load("d.safetensors").parts[name].tensors
    assert all(torch.equal(again[key], tensor) for key, tensor in made.tensors.items())
    assert verify(Path("d.safetensors")).identical
    shutil.copytree(demo.PIPELINE / "unet", "demo/unet")  # another base of that name
    for base in ("./demo", os.path.abspath("demo")):
        run("merge", ["0.safetensors", "1.safetensors", "--base", base, "--output", "e.safetensors"])
        assert load("e.safetensors").metadata[KEY].count('demo"\n') == 1
        assert verify(Path("e.safetensors")).identical


def test_what_python_saves_in_a_format_of_its_own_is_verified_in_that(files: list[AdapterFile]) -> None:
    save(adapter(LoRA(4, 2.0), 5), "one.safetensors", format="diffusers")
    save(adapter(LoRA(3, 2.0), 6), "two.safetensors", format="diffusers")
    made = combine(MergeRecipe((Entry("one.safetensors", 0.5), Entry("two.safetensors", 0.25)), "svd", rank=2))
    save(made, "kohya.safetensors", format="kohya")
    assert load("kohya.safetensors").format == "kohya"
    assert verify(Path("kohya.safetensors")).identical
    save(made, "rounded.safetensors", format="kohya", dtype=torch.float16)
    assert 0 < verify(Path("rounded.safetensors")).difference < 1e-3
    with pytest.raises(ConfigError, match="made without a base"):
        verify(Path("kohya.safetensors"), base="demo")


def test_what_the_inputs_format_cannot_say_is_written_in_another_and_that_is_said(
    files: list[AdapterFile], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    save(adapter(LoRA(4, 2.0), 5), "one.safetensors", format="diffusers")
    save(adapter(LoRA(3, 2.0), 6), "two.safetensors", format="diffusers")
    run("merge", ["one.safetensors", "two.safetensors", "--rule", "ties", "--whole", "--output", "whole.safetensors"])
    assert "NOTE diffusers has no word for all of it" in capsys.readouterr().out
    assert load("whole.safetensors").format == "imgadapt"
    assert verify(Path("whole.safetensors")).identical


# --- the same each time


def test_bytes_do_not_depend_on_threads(files: list[AdapterFile], tmp_path: Path) -> None:
    rules = (["--rank", "3"], ["--rule", "dare_ties", "--density", "0.4", "--seed", "5", "--rank", "3"])
    code = "import runpy, sys; m = runpy.run_path(sys.argv[1], run_name='x')['main']\n" + "".join(
        f"m({[*AB, *rule]!r} + ['--output', sys.argv[2] + '{k}.safetensors'])\n" for k, rule in enumerate(rules)
    )
    program = str(Path(__file__).parents[1] / "converters" / "merge.py")
    for threads in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        command = [sys.executable, "-c", code, program, f"t{threads}_"]
        subprocess.run(command, check=True, capture_output=True, env=environment)
    for k in range(len(rules)):
        assert Path(f"t1_{k}.safetensors").read_bytes() == Path(f"t2_{k}.safetensors").read_bytes()


@pytest.mark.parametrize(
    "rule",
    ["weighted", "svd", "karcher", "model_stock", "knots", "tsv_m", "ties", "dare_linear", "della", "breadcrumbs"],
)
def test_bytes_do_not_depend_on_the_order_of_inputs(files: list[AdapterFile], run: Run, rule: str) -> None:
    save(adapter(LoRA(rank=3, alpha=3.0), 3, NAMES[2:]), "third.safetensors", format="diffusers")
    three = [*AB, "third.safetensors:0.3", "style.safetensors:0.25"]  # one file twice
    for k, order in enumerate(([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0])):
        run("merge", [*(three[i] for i in order), "--rule", rule, "--output", f"{k}.safetensors"])
    digests = {digest_of(Path(f"{k}.safetensors")) for k in range(3)}
    assert len(digests) == 1
    assert verify(Path("0.safetensors")).identical


def test_a_saved_recipe_makes_the_same_file(files: list[AdapterFile], run: Run, tmp_path: Path) -> None:
    options = ["--rule", "della", "--density", "0.4", "--rank", "4", "--seed", "9", "--te", "hero=0.5"]
    blocks = ["--blocks", "style:IN01=0.5", "--mask", "hero:attn2=-1"]
    run("merge", [*AB, *options, *blocks, "--output", "both.safetensors", "--save-recipe", "recipes/r.toml"])
    text = Path("recipes/r.toml").read_text()
    Path("recipes/r.toml").write_text(f'output = "again.safetensors"\n{text}')
    run("merge", ["recipes/r.toml"])
    one, two = (load(path) for path in ("both.safetensors", "recipes/again.safetensors"))
    for name in one.parts:
        assert all(torch.equal(t, two.parts[name].tensors[key]) for key, t in one.parts[name].tensors.items())
    assert {**one.metadata, KEY: ""} == {**two.metadata, KEY: ""}


def test_a_recipe_checks_the_hashes_of_its_inputs(files: list[AdapterFile], run: Run) -> None:
    run("merge", [*AB, "--dry-run", "--save-recipe", "r.toml"])
    save(files[1], "style.safetensors")
    with pytest.raises(FormatError, match=r"style\.safetensors is not the file that the recipe means: its SHA-256 is"):
        run("merge", ["r.toml", "--output", "both.safetensors"])


# --- verifying


@pytest.fixture
def merged(files: list[AdapterFile], run: Run) -> Path:
    run("merge", [*AB, "--rank", "3", "--format", "kohya", "--output", "out/both.safetensors"])
    return Path("out/both.safetensors")


def edited(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    with safe_open(path, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        metadata = dict(opened.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def test_a_merged_file_is_what_its_recipe_makes(
    merged: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run("merge", ["--verify", str(merged)])
    assert capsys.readouterr().out.startswith("identical: out/both.safetensors is what its recipe makes of ")
    monkeypatch.chdir("/")  # its inputs are beside it, or found by their hashes
    with pytest.raises(FormatError, match=r"\(SHA-256 .*\) is neither there nor beside .*--look-in FOLDER"):
        verify(tmp_path / merged)
    (tmp_path / "kept" / "old").mkdir(parents=True)
    shutil.move(tmp_path / "style.safetensors", tmp_path / "kept" / "old" / "renamed.safetensors")
    shutil.move(tmp_path / "hero.safetensors", tmp_path / "out" / "hero.safetensors")
    found = verify(tmp_path / merged, tmp_path / "kept")
    assert found.identical
    assert {path.name for path in found.found} == {"renamed.safetensors", "hero.safetensors"}


def test_a_tensor_that_was_changed_is_found_and_measured(
    merged: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: delta(load(merged), name) for name in NAMES}

    def louder(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        for key in tensors:
            if "attn2_to_k.lora_up" in key:
                tensors[key] = tensors[key] * 1.5

    edited(merged, louder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run("merge", ["--verify", str(merged), "--json"])
    assert stop.value.code == 1
    found = json.loads(capsys.readouterr().out)
    total = sum(float(d.norm()) ** 2 for d in before.values()) ** 0.5
    assert found["difference"] == pytest.approx(0.5 * float(before[f"{DOWN}.attn2.to_k"].norm()) / total, rel=1e-4)
    assert found["reasons"] == [f"1 of 5 layers have other tensors: {DOWN}.attn2.to_k"]
    with pytest.raises(SystemExit):
        run("merge", ["--verify", str(merged)])
    assert capsys.readouterr().out.startswith("NOT the same: ")


def test_other_metadata_and_missing_layers_are_found(merged: Path) -> None:
    whole = merged.read_bytes()
    edited(merged, lambda _, metadata: metadata.update({"modelspec.trigger_phrase": "mine"}))
    found = verify(merged)
    assert (found.identical, found.difference) == (False, 0.0)
    assert found.reasons == ("its metadata says otherwise: modelspec.trigger_phrase",)
    merged.write_bytes(whole)

    def shorter(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        for key in [key for key in tensors if "lora_te" in key]:
            del tensors[key]

    edited(merged, shorter)
    assert verify(merged).reasons[-1] == f"1 layers are in one of them only: {NAMES[-1]}"
    assert verify(merged).difference == float("inf")


def test_factors_turned_in_their_own_space_are_other_bytes_and_the_same_change(merged: Path) -> None:
    def turned(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        for key in [key for key in tensors if key.endswith("lora_up.weight")]:
            down = key.replace("lora_up", "lora_down")
            tensors[key], tensors[down] = -tensors[key], -tensors[down]

    edited(merged, turned)
    found = verify(merged)
    assert not found.identical
    assert 0 <= found.difference < 1e-6
    assert any("or the file was changed" in line for line in said(merged, replace(found, difference=1e-7)))


def test_an_input_that_has_changed_since_is_named(merged: Path, files: list[AdapterFile]) -> None:
    save(files[1], "style.safetensors")
    with pytest.raises(FormatError, match=r"style\.safetensors has changed since .*both\.safetensors was made of it"):
        verify(merged)


def test_a_file_that_no_recipe_made_cannot_be_verified(files: list[AdapterFile]) -> None:
    with pytest.raises(FormatError, match=r"style\.safetensors has no recipe in its metadata"):
        verify(Path("style.safetensors"))


# --- what goes wrong


def test_nothing_to_merge_is_an_error(files: list[AdapterFile], run: Run) -> None:
    with pytest.raises(ConfigError, match="nothing to merge: no input has a layer whose weight is not 0"):
        run("merge", [*AB, "--blocks", "NONE", "--output", "both.safetensors"])
    with pytest.raises(ConfigError, match=r"where to\? give --output FILE"):
        run("merge", AB)
    with pytest.raises(ConfigError, match="is an input; wanted another name"):
        run("merge", [*AB, "--output", "./style.safetensors"])
    with pytest.raises(FormatError, match=r"nowhere\.safetensors: no such file"):
        run("merge", ["nowhere.safetensors:0.5", "--output", "both.safetensors"])
    assert sorted(os.listdir()) == ["hero.safetensors", "style.safetensors"]


def test_adapters_of_different_bases_are_not_merged(files: list[AdapterFile], run: Run) -> None:
    name = "transformer.single_transformer_blocks.3.attn.to_q"
    flux = Part(LoRA(2, 1.0), {"up": torch.randn(3072, 2), "down": torch.randn(2, 3072)})
    save(AdapterFile({name: flux}, architecture="flux"), "flux.safetensors", format="diffusers")
    with pytest.raises(ConfigError, match=r"style\.safetensors is for sd1 and flux\.safetensors is for flux"):
        run("merge", ["style.safetensors", "flux.safetensors", "--output", "both.safetensors"])


@pytest.mark.parametrize("rule", ["weighted", "ties", "knots"])
def test_what_is_not_finite_is_an_error_that_names_the_file_and_the_layer(
    files: list[AdapterFile], run: Run, rule: str
) -> None:
    def broken(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        tensors["lora_te_text_model_encoder_layers_0_self_attn_q_proj.hada_w1_a"][0, 0] = torch.nan

    edited(Path("hero.safetensors"), broken)
    with pytest.raises(StateError, match=f"{NAMES[-1]}: the merged change is not finite; hero.safetensors has NaN"):
        run("merge", [*AB, "--rule", rule, "--output", "both.safetensors"])
    assert not Path("both.safetensors").exists()


def test_numbers_that_fp16_cannot_hold_are_not_written(files: list[AdapterFile], run: Run) -> None:
    with pytest.raises(StateError, match=r"beyond what fp16 holds; take another dtype"):
        run("merge", ["style.safetensors:1e12", "--dtype", "fp16", "--output", "both.safetensors"])
    assert not Path("both.safetensors").exists()


def test_notes_say_what_should_be_looked_at(files: list[AdapterFile]) -> None:
    def said(recipe: MergeRecipe) -> str:
        return "\n".join(notes(merge_files(recipe)[1]))

    style, hero = Entry("style.safetensors"), Entry("hero.safetensors")
    assert said(MergeRecipe((style, hero))) == ""
    halves = replace(style, masks={"attn1": 0.0}), replace(hero, masks={"attn2": 0.0, "conv1": 0.0, "q_proj": 0.0})
    assert said(MergeRecipe(halves)).startswith("the inputs share no layer")
    assert "[1] and [2] are nearly the same (cosine 1.000)" in said(MergeRecipe((style, replace(style, weight=0.5))))
    assert "% of the change's norm does not fit in what is kept: a higher --rank" in said(
        MergeRecipe((style, hero), "svd", rank=1)
    )
    whole = said(MergeRecipe((style, hero), "ties", whole=True))
    size = sum(4 * int(np.prod(shape)) for shape in LAYERS.values()) / 1e6
    assert f"5 layers are written whole, {size:.1f} MB" in whole
    assert "nothing of [2] hero.safetensors is in the result" in said(
        MergeRecipe((style, replace(hero, components={"te": 0.0, "unet": 0.0})))
    )


def test_errors_are_one_line_and_exit_status_1(files: list[AdapterFile]) -> None:
    command = [sys.executable, "-m", "imgadapt", "merge", *AB, "--rule", "tise", "--output", "both.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("imgadapt: error: no rule 'tise', did you mean 'ties'?")
    assert done.stderr.count("\n") == 1


# --- formats, folders, and the model itself


def test_a_folder_of_pefts_and_a_pickle_are_merged_into_a_folder(files: list[AdapterFile], run: Run) -> None:
    unet = {name: own for name, own in files[0].parts.items() if name in NAMES[:3]}
    save(replace(files[0], parts=unet), "folder", format="peft")
    with safe_open("style.safetensors", "pt") as opened:
        torch.save({key: opened.get_tensor(key) for key in opened.keys()}, "style.pt")  # noqa: SIM118
    with pytest.raises(FormatError, match=r"style\.pt: a pickle"):
        run("merge", [*AB[:1], "style.pt", "--output", "both"])
    run("convert", ["--pickle", "style.pt", "style.kohya.safetensors", "--to", "kohya"])
    only = ["--te", "0", "--mask", "conv1=0"]
    inputs = ["folder:2", "style.kohya.safetensors:-0.5", *only[:2], "--mask", "2:conv1=0"]
    run("merge", [*inputs, "--format", "peft", "--output", "both"])
    both = load("both")
    assert (both.format, set(both.parts)) == ("peft", set(unet))
    for name in unet:
        wanted = 1.5 * delta(files[0], name)
        assert (delta(both, name) - wanted).norm() < 1e-6 * wanted.norm()
    assert verify(Path("both")).identical


def picture(pipe: Any) -> Any:
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np"}
    return pipe("a fox", height=64, width=64, generator=torch.Generator().manual_seed(3), **options).images[0]


def test_a_stack_of_adapters_draws_what_the_merged_file_draws(pipe: Any, tmp_path: Path) -> None:
    layers = list(find(components(pipe), ["transformer", "convolution", "text"]))
    bare, weights = picture(pipe), (0.7, -0.4)
    for k, (method, form) in enumerate(((LoRA(rank=4, alpha=2.0), "kohya"), (LoHa(rank=3, alpha=6.0), "lycoris"))):
        parts: dict[str, Part] = {}
        for layer in layers[k:]:
            tensors = {key: 0.15 * torch.randn(t.shape) for key, t in method.init(layer.site, None).items()}
            parts[canonical(layer.name)] = Part(method, tensors)
        save(AdapterFile(parts, architecture="sd1"), tmp_path / f"{k}.safetensors", format=form)
    for k, weight in enumerate(weights):
        attach(pipe, load(tmp_path / f"{k}.safetensors"), name=f"of{k}", weight=weight)
    stacked = picture(pipe)
    detach(pipe)
    entries = tuple(Entry(tmp_path / f"{k}.safetensors", weight) for k, weight in enumerate(weights))
    for rule in ("weighted", "concat"):
        path = save(combine(MergeRecipe(entries, rule)), tmp_path / f"{rule}.safetensors")
        attach(pipe, load(path))
        merged = picture(pipe)
        detach(pipe)
        assert np.abs(merged - stacked).max() <= 1e-4
    assert np.abs(stacked - bare).max() > 0.1
