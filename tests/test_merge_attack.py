"""Merging as an attacker finds it: hostile recipes, numbers at the edges, what would be left out without a word."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from imgadapt import OFT, AdapterFile, Full, LoRA, MergeRecipe, Norm, combine, load, save
from imgadapt.combining.combine import combine_inputs
from imgadapt.combining.engine import Input
from imgadapt.combining.files import merge_files
from imgadapt.combining.keep import Keep
from imgadapt.combining.lowrank import concat, spectrum
from imgadapt.combining.printing import lines, notes
from imgadapt.combining.recipe import Entry
from imgadapt.combining.recipes import KEY, from_toml
from imgadapt.combining.resizing import resize
from imgadapt.combining.terms import Dense, Kron, Pair
from imgadapt.combining.verify import verify
from imgadapt.embeddings import Embedding
from imgadapt.errors import ConfigError, FormatError, StateError
from imgadapt.formats import Part
from tests.changes import LINEAR, NORM, Model, dense, engine, file, lora, merged, near, part, random

INPUT = '[[inputs]]\npath = "a"\n'
LONG = "1" + "0" * 400


def both(files: Sequence[AdapterFile], rule: str = "svd", **settings: Any) -> AdapterFile:
    inputs = engine(rule, files).inputs
    return combine_inputs(MergeRecipe(tuple(Entry(i.name) for i in inputs), rule, **settings), inputs)[0]


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 100_000,
        "options.x = " + "[" * 3000 + "]" * 3000 + "\n" + INPUT,
        f"{INPUT}weight = {LONG}",
        f"{INPUT}weight = 1{'0' * 5000}",
        f"{INPUT}components = {{ te = {LONG} }}",
        f"{INPUT}blocks = {{ IN04 = {LONG} }}",
        f"size = {LONG}\n{INPUT}",
        f"error = {LONG}\n{INPUT}",
        f"{INPUT}blocks = [[1, 2], {{ a = 1 }}]\nmasks = 3",
    ],
)
def test_no_recipe_is_a_traceback(text: str) -> None:
    with pytest.raises(ConfigError):
        from_toml(text)


def test_weights_that_a_file_sets_are_no_difference_without_the_base() -> None:
    """Added up as they are, they would be the base's weights twice."""
    own = file(Part(Full(bias=False, absolute=True), {"diff": random(1, 24, 40)}, shape=(24, 40)))
    with pytest.raises(ConfigError, match=r"unet\.0: the file sets the weights, .*give the base"):
        merged("weighted", [own])
    near(merged("weighted", [own], base=Model({"unet.0": LINEAR})), random(1, 24, 40) - random(99, 24, 40))


def test_what_cancels_and_what_is_zero_is_no_adapter() -> None:
    inputs = [Input(str(k), file(lora(1)), str(k), lambda _, w=w: w) for k, w in enumerate((1.0, -1.0))]
    recipe = MergeRecipe((Entry("0"), Entry("1")))
    with pytest.raises(ConfigError, match=r"the merged change is 0 everywhere.*1 and -1"):
        combine_inputs(recipe, inputs)
    assert combine_inputs(recipe, [inputs[0], replace(inputs[1], weight=lambda _: -0.999)])[0].parts
    with pytest.raises(ConfigError, match="the merged change is 0 everywhere"):
        both([zero()], rank=4)


def test_rotations_without_the_base_are_told_the_rules_for_them() -> None:
    """Before their tensors are held against the size that an architecture has the layer in."""
    own = file(part(OFT(8)), names=["unet.down_blocks.0.attentions.0.proj_in"])
    with pytest.raises(ConfigError, match=r"^0: unet\.down.*give the base .*--base.*--rule compose, polar, geod"):
        combine_inputs(MergeRecipe((Entry("0"),)), [Input("0", replace(own, architecture="sd1"), "0", lambda _: 1.0)])


def test_large_weights_are_right_or_an_error() -> None:
    near(merged("weighted", [file(lora(1))], [1e30]) / 1e30, dense(lora(1)))
    big = [term.scaled(1e30) for term in engine("weighted", [file(lora(1))]).layer("unet.0").terms]
    near(concat(big).rows(0, 24) / 1e30, dense(lora(1)))
    for weight in (1e200, -1e300):
        with pytest.raises(StateError, match=r"unet\.0: the merged change is not finite; lower the weights"):
            engine("weighted", [file(lora(1))], [weight]).merge("unet.0")


@pytest.mark.parametrize("amount", [{"error": 1.0}, {"size": 0.0014}, {"energy": 1e-30}])
def test_an_adapter_with_nothing_in_it_is_an_error(amount: dict[str, Any]) -> None:
    own = zero() if "energy" in amount else file(lora(1))
    with pytest.raises(ConfigError, match=r"nothing is left|without any rank"):
        both([own], **amount)
    with pytest.raises(ConfigError, match=r"nothing is left|without any rank"):
        resize(own, Keep(**amount))


def zero() -> AdapterFile:
    return file(Part(LoRA(4, 2.0), {"up": torch.zeros(24, 4), "down": random(1, 4, 40)}, shape=(24, 40)))


def test_a_rank_above_the_layers_is_the_layers_and_no_whole_difference() -> None:
    made = both([file(lora(1, 20)), file(lora(2, 20))], rank=64).parts["unet.0"]
    assert made.method.file_rank == 24
    near(dense(made), dense(lora(1, 20)) + dense(lora(2, 20)), 1e-6)


def test_ranks_of_inputs_at_weight_0_do_not_count() -> None:
    made = engine("svd", [file(lora(1, 4)), file(lora(2, 16))], [1.0, 0.0])
    assert made.ranks("unet.0") == [4]


@pytest.mark.parametrize("rule", ["tsv_m", "iso_c", "subspace"])
def test_a_rules_scale_is_for_norms_and_biases_too(rule: str) -> None:
    files = [file(part(Norm(), NORM, k), part(LoRA(3, 1.0, bias=True), seed=k)) for k in (1, 2)]
    once, thrice = (list(engine(rule, files, [0.8, -0.5], scale=s).merged()) for s in (1.0, 3.0))
    for a, b in zip(once, thrice, strict=True):
        near(b.terms[0].rows(0, 24) + sum(t.rows(0, 24) for t in b.terms[1:]),
             3 * (a.terms[0].rows(0, 24) + sum(t.rows(0, 24) for t in a.terms[1:])))  # fmt: skip
        assert a.bias is not None
        assert b.bias is not None
        near(b.bias, 3 * a.bias)


def test_knots_merges_norms_and_biases_as_ties_does() -> None:
    """A mean of those that agree, as of the weights; their sum would be k times as much for k equal ones."""
    own = [file(part(Norm(), NORM, 1), part(LoRA(3, 1.0, bias=True), seed=1), part(LoRA(2, 1.0), seed=5))] * 2
    bare = file(part(Norm(), NORM, 3), part(LoRA(3, 1.0), seed=3), part(LoRA(2, 1.0), seed=4))
    for files in (own, [*own, bare]):
        knots, ties = (list(engine(rule, files, density=0.6).merged()) for rule in ("knots", "ties"))
        near(knots[0].terms[0].rows(0, 24), ties[0].terms[0].rows(0, 24), 1e-7)
        for a, b in zip(knots[:2], ties[:2], strict=True):
            assert a.bias is not None
            assert b.bias is not None
            near(a.bias, b.bias, 1e-7)
        assert knots[2].bias is None
    one = list(engine("knots", own, density=1.0).merged())[1]
    assert one.bias is not None
    near(one.bias, own[0].parts["unet.1"].tensors["bias"] / 3)


def test_singular_values_without_vectors_are_the_same() -> None:
    terms = (Pair(random(1, 30, 3), random(2, 3, 20)), Kron(random(3, 5, 4), random(4, 6, 5)), Dense(random(5, 30, 20)))
    for own in ([terms[0]], [terms[1]], [terms[2]], [terms[0], terms[0].scaled(2)], list(terms)):
        found, bare = spectrum(own), spectrum(own, vectors=False)
        torch.testing.assert_close(bare.values, found.values, rtol=1e-6, atol=1e-6 * float(found.values[0]))
        assert bare.u.numel() == bare.vt.numel() == 0
        assert bare.left is None


def test_numbers_beyond_fp16_are_an_error_before_anything_is_written(tmp_path: Path) -> None:
    own = part(LoRA(4, 2.0), seed=1)
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    site = {"up": random(1, 320, 4), "down": random(2, 4, 320)}
    path = save(
        AdapterFile({name: Part(own.method, site)}, {}, None, "sd1"), tmp_path / "a.safetensors", format="kohya"
    )
    with pytest.raises(StateError, match=rf"{name}: the merged change is beyond what fp16 holds"):
        combine(MergeRecipe((Entry(path, 1e12),), dtype="fp16"))
    assert load(path).parts.keys() == combine(MergeRecipe((Entry(path, 1e12),), dtype="bf16")).parts.keys()


def words(path: Path, **tokens: int) -> Path:
    made = {token: Embedding(token, {"clip_l": random(seed, 2, 768)}) for token, seed in tokens.items()}
    return save(AdapterFile({}, embeddings=made), path)


def test_files_of_words_are_united_and_no_note_says_that_they_are_left_out(tmp_path: Path) -> None:
    a, b = words(tmp_path / "a.safetensors", cat=1), words(tmp_path / "b.safetensors", dog=2)
    made, report = merge_files(MergeRecipe((Entry(a), Entry(b))))
    assert sorted(made.embeddings) == ["cat", "dog"]
    assert notes(report) == []
    assert next(iter(lines(report))) == "weighted"
    path = save(made, tmp_path / "c.safetensors")
    (vectors,) = load(path).embeddings["dog"].vectors.values()
    assert torch.equal(vectors, random(2, 2, 768))
    assert verify(path).identical
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {"up": random(1, 320, 4), "down": random(2, 4, 320)}
    lora = save(
        AdapterFile({name: Part(LoRA(4), tensors)}, {}, None, "sd1"), tmp_path / "l.safetensors", format="kohya"
    )
    made, report = merge_files(MergeRecipe((Entry(lora), Entry(b))))
    assert list(made.embeddings) == ["dog"]
    assert notes(report) == []
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge_files(MergeRecipe((Entry(lora, 0.0), Entry(b))))


@pytest.mark.parametrize("place", ["/dev/zero", "..", "", "/"])
def test_a_hostile_recipe_in_a_file_is_looked_for_and_not_found(tmp_path: Path, place: str) -> None:
    """A device has no end, and folders that are no base are no error of theirs."""
    recipe = f'rule = "weighted"\n[[inputs]]\npath = "{place}"\nsha256 = "{"0" * 64}"\n'
    made = AdapterFile({}, {KEY: recipe}, embeddings={"cat": Embedding("cat", {"clip_l": random(1, 1, 768)})})
    path = save(made, tmp_path / "hostile.safetensors")
    with pytest.raises(FormatError, match=r"is neither there nor beside"):
        verify(path)


def test_layers_of_other_widths_are_not_fused_as_the_architectures_are() -> None:
    """Their rows would be looked for where the architecture has them, and none would be found."""
    names = [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    files = [file(*(part(LoRA(3, 1.0), seed=10 * f + k) for k in range(3)), names=names) for f in (1, 2)]
    inputs = [Input(str(k), replace(one, architecture="flux"), str(k), lambda _: 0.5) for k, one in enumerate(files)]
    made, _ = combine_inputs(MergeRecipe((Entry("0"), Entry("1")), "svd", rank=6, format="kohya"), inputs)
    for name in names:
        near(dense(made.parts[name]), 0.5 * (dense(files[0].parts[name]) + dense(files[1].parts[name])), 1e-6)


def test_the_recipe_is_written_over_no_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words(Path("a.safetensors"), cat=1)
    before = Path("a.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"a\.safetensors is an input"):
        run("merge", ["a.safetensors", "--dry-run", "--save-recipe", "./a.safetensors"])
    with pytest.raises(ConfigError, match="wanted two names"):
        run("merge", ["a.safetensors", "--output", "b.safetensors", "--save-recipe", "b.safetensors"])
    assert Path("a.safetensors").read_bytes() == before
    assert not Path("b.safetensors").exists()


def test_a_verdict_is_json_where_layers_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_"
    own = {name + x: Part(LoRA(4), {"up": random(1, 320, 4), "down": random(2, 4, 320)}) for x in "qk"}
    save(AdapterFile(own, {}, None, "sd1"), "a.safetensors", format="kohya")
    run("merge", ["a.safetensors", "--output", "b.safetensors"])
    merged = load("b.safetensors")
    save(replace(merged, parts={name + "q": merged.parts[name + "q"]}), "c.safetensors", format="kohya")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("merge", ["--verify", "c.safetensors", "--json"])
    said = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert said["difference"] is None
    assert not said["identical"]
