"""Baking: a checkpoint with adapters added to it is the fp64 sum, rounded once; all else is the base, byte for byte."""

import errno
import hashlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from imgadapt import IA3, OFT, AdapterFile, DoRA, Full, LoHa, LoKr, LoRA, Norm, attach, merge, save
from imgadapt.combining.checkpoints.adding import add
from imgadapt.combining.checkpoints.baking import Baked, Baking, bake
from imgadapt.combining.checkpoints.base import BaseFile, open_base
from imgadapt.combining.checkpoints.rounding import stochastic
from imgadapt.combining.checkpoints.streams import layout_of
from imgadapt.combining.engine import Engine, whole
from imgadapt.combining.layers import Input
from imgadapt.combining.recipe import Entry, MergeRecipe
from imgadapt.combining.recipes import from_toml
from imgadapt.combining.rules.masks import uniform
from imgadapt.combining.terms import Dense, Kron, Pair
from imgadapt.errors import ConfigError, ImgadaptError, OutputError, ShapeError, StateError
from imgadapt.formats import Part
from imgadapt.methods import Method

HERE = Path(__file__).parent
tiny: Any = SimpleNamespace(**runpy.run_path(str(HERE / "tiny.py")))
tools: Any = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
WEIGHTS = (0.8, -0.5)
UNET, FIRST, SECOND = "unet.down_blocks.1.attentions.0.", "text_encoder.text_model.", "text_encoder_2.text_model."
INNER = f"{UNET}transformer_blocks.0."
METHODS: dict[str, Method] = {
    f"{INNER}attn1.to_q": LoRA(rank=4, alpha=2.0),
    f"{INNER}attn1.to_k": LoHa(rank=2, alpha=1.5),
    f"{INNER}attn1.to_v": LoKr(rank=None, factor=4),
    f"{INNER}attn1.to_out.0": LoRA(rank=3, alpha=1.0, bias=True),
    f"{INNER}attn2.to_k": Full(),
    f"{INNER}attn2.to_q": OFT(block_size=4),
    f"{INNER}ff.net.2": DoRA(LoRA(rank=2, alpha=3.0)),
    f"{INNER}ff.net.0.proj": IA3(),
    f"{INNER}norm2": Norm(),
    "unet.conv_in": LoRA(rank=2, alpha=1.0),
    "unet.down_blocks.2.resnets.1.conv2": LoRA(rank=4, alpha=2.0, tucker=True),
    f"{FIRST}encoder.layers.0.self_attn.v_proj": LoRA(rank=2, alpha=1.0, bias=True),
    f"{SECOND}encoder.layers.1.self_attn.q_proj": LoRA(rank=2, alpha=1.0),
    f"{SECOND}encoder.layers.1.self_attn.v_proj": LoKr(rank=2, alpha=1.0, factor=2),
    f"{SECOND}embeddings.token_embedding": LoRA(rank=2, alpha=3.0),
    "text_encoder_2.text_projection": LoRA(rank=2, alpha=3.0),
}


@cache
def _weights() -> dict[str, Tensor]:
    prefix = "conditioner.embedders.1.model."
    (_, first), (_, second) = tools.clip_state(8, projected=False), tools.clip_state(12, projected=True)
    made = tools.prefixed(tools.native_checkpoint("sdxl", tools.model_of("sdxl")), "model.diffusion_model.")
    made |= tools.open_clip_of(second, prefix) | {"first_stage_model.decoder.conv_in.weight": torch.randn(5, 4, 3, 3)}
    made |= tools.prefixed(first, "conditioner.embedders.0.transformer.", "text_model.")
    return made | {f"{prefix}logit_scale": torch.tensor(4.6)}


def sdxl(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A whole checkpoint, with what is no layer."""
    return {key: value.to(dtype, copy=True) for key, value in _weights().items()} | {"steps": torch.tensor([7])}


METADATA = {"modelspec.hash_sha256": "0xabc", "sshs_model_hash": "abc", "modelspec.title": "Base", "format": "pt"}


def part(method: Method, name: str, base: BaseFile, seed: int, size: float = 0.3) -> Part:
    site = base.site(name)
    method = method.at(site)
    generator = torch.Generator().manual_seed(seed)
    shapes = method.shapes(site)
    return Part(
        method, {k: size * torch.randn(shapes[k], generator=generator) for k in sorted(shapes)}, shape=site.shape
    )


def adapters(base: BaseFile, methods: Mapping[str, Method], count: int = 2, size: float = 0.3) -> list[AdapterFile]:
    """Of the same methods; the last has not the first layer."""
    return [
        AdapterFile({n: part(m, n, base, 100 * k + j, size) for j, (n, m) in enumerate(methods.items()) if k == 0 or j})
        for k in range(count)
    ]


def engine_of(files: Sequence[AdapterFile], base: Any, rule: str = "weighted", **options: Any) -> Engine:
    recipe = MergeRecipe(tuple(Entry(str(k)) for k in range(len(files))), rule, options)
    inputs = [Input(f"{k}", f, f"{k}", lambda _, w=w: w) for k, (f, w) in enumerate(zip(files, WEIGHTS, strict=False))]
    return Engine(recipe, inputs, None, base)


def baked(files: Sequence[AdapterFile], path: Path, output: Path, rule: str = "weighted", **how: Any) -> Baked:
    base = open_base(path)
    return bake(engine_of(files, base, rule), base, output, Baking(**how))


def wanted(files: Sequence[AdapterFile], base: BaseFile, name: str) -> tuple[Tensor, Tensor | None]:
    """A layer's weight and bias with the changes added, fp64."""
    weight, site = base.weight(name)
    bias = base.bias(name)
    total, shift = weight.double().clone(), None if bias is None else bias.double().clone()
    for file, w in zip(files, WEIGHTS, strict=False):
        if name in file.parts:
            own = file.parts[name]
            t = {key: tensor.double() for key, tensor in own.tensors.items()}
            total += w * own.method.scale * own.method.delta(t, site, weight.double())
            change = own.method.bias_delta(t)
            if change is not None and shift is not None:
                shift += w * own.method.scale * change
    return total, shift


def near(found: Tensor, exact: Tensor) -> None:
    """The nearest value of found's dtype, or, where fp32's error decides, its neighbour, seldom."""
    step = torch.finfo(found.dtype).eps
    assert bool(((found.double() - exact).abs() <= step * exact.abs() + 4e-6 * exact.abs().max()).all())
    if found.dtype != torch.float32:
        assert float((found != exact.to(found.dtype)).double().mean()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_layer_is_the_sum_rounded_once_and_the_rest_is_the_base(dtype: torch.dtype, tmp_path: Path) -> None:
    source, output = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(sdxl(dtype), source, METADATA)
    base = open_base(source)
    files = adapters(base, METHODS)
    report = baked(files, source, output, metadata={"merged_from": "[]"})
    result = open_base(output)
    assert sorted(layer.name for layer in report.layers) == sorted(METHODS)
    for name in METHODS:
        weight, bias = wanted(files, base, name)
        near(result.weight(name)[0], weight)
        if bias is not None:
            near(result.bias(name), bias)  # pyright: ignore[reportArgumentType] # it has one
    old, new = load_file(source), load_file(output)
    changed = {place.key for name in METHODS for place in base.places(name)}
    changed |= {p.key for n in METHODS if "bias" in str(files[0].parts[n].tensors.keys()) for p in base.layer(n).bias}
    changed |= {p.key for p in base.layer(f"{INNER}norm2").bias}
    assert {key for key in old if not torch.equal(old[key], new[key])} == changed
    assert report.changed == len(changed)
    assert report.kept == len(old) - len(changed)
    small = [replace(file, parts={"unet.conv_in": file.parts["unet.conv_in"]}) for file in files]
    for file in small:
        file.parts["unet.conv_in"].tensors["up"].mul_(1e-12)  # lost in rounding
    report = baked(small, source, tmp_path / "same.safetensors")
    assert (report.changed, report.kept) == (0, len(old))
    assert [*layout_of(source).rows.items()] == [*layout_of(output).rows.items()]
    with safe_open(output, "pt") as file:
        assert file.metadata() == {"format": "pt", "modelspec.title": "Base", "merged_from": "[]"}


def test_rows_of_flux_that_are_fused_or_swapped_get_their_own_changes(tmp_path: Path) -> None:
    source, output = tmp_path / "flux.safetensors", tmp_path / "out.safetensors"
    save_file({k: v.bfloat16() for k, v in tools.native_checkpoint("flux", tools.model_of("flux")).items()}, source)
    base = open_base(source)
    single, double = "transformer.single_transformer_blocks.1.", "transformer.transformer_blocks.0."
    names = [f"{single}attn.to_k", f"{single}proj_mlp", f"{double}attn.to_v", f"{double}attn.norm_q"]
    methods: dict[str, Method] = {name: LoRA(rank=2, alpha=1.0, bias=True) for name in names}
    methods |= {"transformer.norm_out.linear": LoRA(rank=2, alpha=1.0), f"{double}attn.norm_q": Norm(bias=False)}
    files = adapters(base, methods)
    baked(files, source, output)
    result = open_base(output)
    for name in base.names:
        weight, bias = wanted(files, base, name)
        got = result.weight(name)[0]
        near(got, weight) if name in methods else None
        assert torch.equal(got, base.weight(name)[0]) == (name not in methods)
        if bias is not None:
            near(result.bias(name), bias)  # pyright: ignore[reportArgumentType] # it has one


def test_what_is_baked_is_what_the_live_merge_makes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    pipeline = tiny.sdxl()
    pipeline.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"of before")
    (tmp_path / "base" / "whole.ckpt").write_bytes(b"of before")
    base = open_base(tmp_path / "base")
    names = [n for n in base.names if ".attn" in n or "q_proj" in n or n.endswith("conv_in")]
    files = adapters(base, {name: LoRA(rank=2, alpha=1.0) for name in names})
    report = baked(files, tmp_path / "base", tmp_path / "out")
    assert report.left_out == [Path("unet/diffusion_pytorch_model.fp16.safetensors"), Path("whole.ckpt")]
    for k, (file, w) in enumerate(zip(files, WEIGHTS, strict=True)):
        attach(pipeline, file, name=f"a{k}", weight=w)
    merge(pipeline)
    result = type(pipeline).from_pretrained(tmp_path / "out")
    for component in ("unet", "text_encoder", "text_encoder_2", "vae"):
        ours, live = getattr(result, component).state_dict(), getattr(pipeline, component).state_dict()
        for key, value in ours.items():
            torch.testing.assert_close(value, live[key], rtol=1e-6, atol=1e-6)
    inputs, outputs = ({p.relative_to(tmp_path / d) for p in (tmp_path / d).rglob("*")} for d in ("base", "out"))
    assert inputs - outputs == {*report.left_out}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_shards_are_written_as_shards(tmp_path: Path) -> None:
    torch.manual_seed(1)
    tiny.sdxl().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    base = open_base(tmp_path / "base")
    names = [n for n in base.names if n.startswith("unet") and "attn" in n]
    files = adapters(base, {name: LoRA(rank=2, alpha=1.0, bias=base.bias(name) is not None) for name in names})
    baked(files, tmp_path / "base", tmp_path / "out")
    result = open_base(tmp_path / "out")
    assert {p.relative_to(tmp_path / "out") for p in result.files} == {p.relative_to(base.path) for p in base.files}
    for name in base.names:
        near(result.weight(name)[0], wanted(files, base, name)[0])
    index = Path("unet/diffusion_pytorch_model.safetensors.index.json")
    assert (tmp_path / "out" / index).read_bytes() == (tmp_path / "base" / index).read_bytes()


@pytest.mark.parametrize("rule", ["ties", "dare_linear"])
def test_rules_of_elements_are_baked_whole(rule: str, tmp_path: Path) -> None:
    source, output = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(sdxl(), source)
    base = open_base(source)
    names = [f"{INNER}attn1.to_q", "unet.conv_in", f"{SECOND}embeddings.token_embedding"]
    files = adapters(base, {name: LoRA(rank=3, alpha=2.0) for name in names})
    baked(files, source, output, rule)
    engine = engine_of(files, base, rule)
    result = open_base(output)
    for name in names:
        change = whole(engine.merge(name).terms).reshape(base.site(name).shape)
        assert bool(change.any())
        torch.testing.assert_close(result.weight(name)[0], base.weight(name)[0] + change, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_rounded_once_and_its_scale_is_counted(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = sdxl()
    name, scaled = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q", f"{INNER}attn1.to_q"
    key = "model.diffusion_model.input_blocks.0.0.weight"
    for k in (f"{name}.weight", key):
        tensors[k] = tensors[k].to(dtype)
    tensors[f"{name}.scale_weight"] = torch.tensor(0.25)
    save_file(tensors, tmp_path / "base.safetensors")
    base = open_base(tmp_path / "base.safetensors")
    files = adapters(base, {scaled: LoRA(rank=4, alpha=2.0), "unet.conv_in": LoRA(rank=2, alpha=1.0)}, 1)
    baked(files, tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    made = load_file(tmp_path / "out.safetensors")
    for k, own, scale in ((f"{name}.weight", scaled, 0.25), (key, "unet.conv_in", 1.0)):
        exact = (wanted(files, base, own)[0] / scale).float().to(dtype)
        assert float((made[k].float() != exact.float()).float().mean()) < 0.01
        assert float((made[k].float() != tensors[k].float()).float().mean()) > 0.1


def test_random_rounding_is_right_on_average_and_repeats() -> None:
    values = torch.tensor([1.0, 1.001, -3.0004, 1e-9, 0.0, 70.3, -2e-39])
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        many = values.repeat(20_000, 1)
        made = stochastic(many, dtype, uniform(5, 0, many.numel()))
        assert torch.equal(made, made.to(dtype).float())
        step = torch.finfo(dtype).eps * values.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert bool(((made - values).abs() <= step).all())
        assert bool(((made.double().mean(0) - values.double()).abs() <= 0.02 * step).all())
    assert torch.equal(stochastic(values[:1], torch.bfloat16, torch.tensor([0.999])), values[:1])


def test_changes_below_half_a_step_survive_random_rounding(tmp_path: Path) -> None:
    source = tmp_path / "base.safetensors"
    tensors = sdxl(torch.bfloat16)
    key = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.ff.net.0.proj.weight"
    name = f"{INNER}ff.net.0.proj"
    tensors[key] = torch.ones_like(tensors[key])
    save_file(tensors, source)
    base = open_base(source)
    rows, fan_in = base.site(name).shape
    small = Part(LoRA(rank=1, alpha=1.0), {"up": torch.full((rows, 1), 1e-3), "down": torch.ones(1, fan_in)})
    files = [AdapterFile({name: small})]
    baked(files, source, tmp_path / "nearest.safetensors")
    assert torch.equal(load_file(tmp_path / "nearest.safetensors")[key], tensors[key])
    for k, seed in enumerate((4, 4, 5)):
        baked(files, source, tmp_path / f"{k}.safetensors", rounding="stochastic", seed=seed)
    same, again, other = ((tmp_path / f"{k}.safetensors").read_bytes() for k in range(3))
    assert same == again
    assert same != other
    change = load_file(tmp_path / "0.safetensors")[key].double() - 1
    assert float(change.mean()) == pytest.approx(8e-4, rel=0.2)  # of 0.8 times 1e-3, over 1152 elements of step 2^-7
    assert set(change.unique().tolist()) == {0.0, 2**-7}


def test_terms_of_all_kinds_are_added_by_rows_at_any_place() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = [
        Pair(torch.randn(12, 3, generator=generator), torch.randn(3, 10, generator=generator)),
        Kron(torch.randn(3, 2, generator=generator), torch.randn(4, 5, generator=generator)),
        Dense(torch.randn(12, 10, generator=generator), 0.5),
    ]
    exact = torch.stack([term.rows(0, 12) for term in terms]).sum(0, dtype=torch.float64)
    for start, rows in ((0, 12), (5, 4)):
        values = torch.randn(rows, 10, generator=generator)
        old = values.double()
        assert add(values, terms, start)
        torch.testing.assert_close(values.double(), old + exact[start : start + rows], rtol=1e-5, atol=1e-5)


def test_what_is_not_in_the_base_is_an_error_with_its_names(tmp_path: Path) -> None:
    source, output = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(sdxl(), source)
    base = open_base(source)
    (file,) = adapters(base, {"unet.conv_in": LoRA(rank=2, alpha=1.0), "unet.conv_out": LoRA(rank=2, alpha=1.0)}, 1)
    strange = {f"unet.down_blocks.7.{k}": file.parts["unet.conv_in"] for k in range(4)}
    with pytest.raises(ConfigError, match=r"4 of 6 layers are not in .*down_blocks\.7\.0, .* and 1 more"):
        baked([AdapterFile({**file.parts, **strange})], source, output)
    with pytest.raises(ConfigError, match="nothing to bake"):
        baked([AdapterFile(strange)], source, output, strict=False)
    assert not output.exists()
    report = baked([AdapterFile({**file.parts, **strange})], source, output, strict=False)
    assert report.missing == [*strange]
    near(open_base(output).weight("unet.conv_in")[0], wanted([file], base, "unet.conv_in")[0])
    wrong = AdapterFile({"unet.conv_out": file.parts["unet.conv_in"]})
    with pytest.raises(ShapeError, match=r"unet\.conv_out: "):
        baked([wrong], source, output)
    one = part(LoRA(rank=2, alpha=1.0), f"{INNER}attn1.to_q", base, 0)
    biased = Part(LoRA(rank=2, alpha=1.0, bias=True), {**one.tensors, "bias": torch.ones(12)})
    with pytest.raises(ShapeError, match="bias is there"):
        baked([AdapterFile({f"{INNER}attn1.to_q": biased})], source, output)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 3e3), (torch.bfloat16, 1e19), (torch.float32, 1e19)])
def test_a_sum_beyond_the_range_is_an_error_and_no_file(dtype: torch.dtype, size: float, tmp_path: Path) -> None:
    source, output = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(sdxl(dtype), source)
    base = open_base(source)
    for method in (LoRA(rank=4, alpha=4.0), LoKr(rank=2, alpha=2.0, factor=2)):
        files = adapters(base, {"unet.conv_in": LoRA(rank=2, alpha=1.0)}, 1)
        broken = part(method, f"{INNER}attn1.to_q", base, 3, size)
        with pytest.raises(StateError, match=r"attn1\.to_q: "):
            baked([AdapterFile({**files[0].parts, f"{INNER}attn1.to_q": broken})], source, output)
    assert [*tmp_path.iterdir()] == [source]


def test_a_base_with_nan_is_an_error_that_names_the_layer(tmp_path: Path) -> None:
    tensors = sdxl(torch.bfloat16)
    tensors["model.diffusion_model.input_blocks.0.0.weight"][3, 1, 0, 0] = float("nan")
    save_file(tensors, tmp_path / "base.safetensors")
    files = adapters(open_base(tmp_path / "base.safetensors"), {"unet.conv_in": LoRA(rank=2, alpha=1.0)}, 1)
    with pytest.raises(StateError, match=r"unet\.conv_in: NaN"):
        baked(files, tmp_path / "base.safetensors", tmp_path / "out.safetensors")


def test_the_base_is_never_written_over(tmp_path: Path) -> None:
    source = tmp_path / "base.safetensors"
    save_file(sdxl(), source)
    files = adapters(open_base(source), {"unet.conv_in": LoRA(rank=2, alpha=1.0)}, 1)
    os.link(source, tmp_path / "linked.safetensors")
    before = source.read_bytes()
    for place in (source, tmp_path / "linked.safetensors", tmp_path / "sub" / ".." / "base.safetensors"):
        (tmp_path / "sub").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match="the base itself"):
            baked(files, source, place)
    with pytest.raises(ConfigError, match="must end in"):
        baked(files, source, tmp_path / "out.ckpt")
    assert source.read_bytes() == before
    torch.manual_seed(1)
    tiny.sd1().save_pretrained(tmp_path / "folder")
    files = adapters(open_base(tmp_path / "folder"), {"unet.conv_in": LoRA(rank=2, alpha=1.0)}, 1)
    for place in (tmp_path / "folder", tmp_path / "folder" / "inner", tmp_path):
        with pytest.raises(ConfigError, match="another folder"):
            baked(files, tmp_path / "folder", place)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(OutputError, match="there already"):
        baked(files, tmp_path / "folder", tmp_path / "taken")


def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    source = tmp_path / "base.safetensors"
    save_file(sdxl(torch.bfloat16), source, METADATA)
    files = adapters(open_base(source), METHODS)
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            baked(files, source, tmp_path / f"{count}.safetensors")
            baked(files, source, tmp_path / f"t{count}.safetensors", "ties", rounding="stochastic")
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    assert (tmp_path / "t1.safetensors").read_bytes() == (tmp_path / "t2.safetensors").read_bytes()


def test_a_failure_midway_leaves_what_was_there(tmp_path: Path) -> None:
    source, output = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(sdxl(), source)
    output.write_bytes(b"of before")
    base = open_base(source)
    files = adapters(base, METHODS)

    def stop(what: str, done: int, of: int) -> None:
        if done > of // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bake(engine_of(files, base), base, output, progress=stop)
    assert output.read_bytes() == b"of before"
    os.utime(source, (1, 1))
    with pytest.raises(StateError, match="has changed"):
        bake(engine_of(files, base), base, output)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "out.safetensors"]


def test_a_disk_that_fails_while_it_is_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(sdxl(), source)
    output.write_bytes(b"of before")
    base = open_base(source)

    def fail(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)  # the sync at the end goes well: the kernel tells of it once only
    monkeypatch.setattr("imgadapt.combining.checkpoints.streams._FLUSH", 1e-3)
    with pytest.raises(OutputError, match="Input/output error"):
        bake(engine_of(adapters(base, METHODS), base), base, output)
    assert output.read_bytes() == b"of before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "out.safetensors"]


_KILLED = """
import os, random, signal, sys, time
from pathlib import Path

from imgadapt import load
from imgadapt.combining.checkpoints.baking import bake
from imgadapt.combining.checkpoints.base import open_base
from imgadapt.combining.engine import Engine
from imgadapt.combining.layers import Input
from imgadapt.combining.recipe import Entry, MergeRecipe

source, adapter, output, whole = map(Path, sys.argv[1:])
recipe, inputs = MergeRecipe((Entry("a"),)), [Input("a", load(adapter), "a", lambda name: 0.8)]
draw, found = random.Random(0), []


def begun():
    output.write_bytes(b"of before")
    child = os.fork()
    if child == 0:
        base = open_base(source)
        bake(Engine(recipe, inputs, None, base), base, output)
        os._exit(0)
    return child


start = time.perf_counter()
os.waitpid(begun(), 0)
whole_time = time.perf_counter() - start
for _ in range(20):
    child = begun()
    time.sleep(draw.random() * 1.2 * whole_time)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found.append({b"of before": "old", whole.read_bytes(): "new"}.get(output.read_bytes(), "broken"))
print(*found)
"""


def test_killed_at_any_moment_the_output_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    source, whole, adapter = (tmp_path / f"{name}.safetensors" for name in ("base", "whole", "adapter"))
    save_file(sdxl(), source)
    (file,) = adapters(open_base(source), {n: m for n, m in METHODS.items() if m.name == "lora"}, 1)
    save(file, adapter, format="imgadapt")
    baked([file], source, whole)
    run = subprocess.run(
        [sys.executable, "-c", _KILLED, str(source), str(adapter), str(tmp_path / "out.safetensors"), str(whole)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    found = run.stdout.split()
    assert len(found) == 20
    assert "broken" not in found
    assert "old" in found


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "imgadapt", "bake", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "120"})


def test_the_program_bakes_with_weights_and_says_what_the_file_was_made_of(tmp_path: Path) -> None:
    source, output = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(sdxl(torch.bfloat16), source, METADATA)
    base = open_base(source)
    files = adapters(base, {n: m for n, m in METHODS.items() if m.name in ("lora", "dora", "oft")})
    for file, name in zip(files, "ab", strict=True):
        told = replace(file, metadata={"modelspec.title": name, "modelspec.trigger_phrase": f"{name} style"})
        save(told, tmp_path / f"{name}.safetensors", format="imgadapt")
    inputs = [f"{tmp_path}/a.safetensors:{WEIGHTS[0]}", f"{tmp_path}/b.safetensors:{WEIGHTS[1]}"]
    done = run(source, *inputs, "-o", output, "--hash-base")
    assert done.returncode == 0, done.stderr
    assert "text_encoder_2" in done.stdout
    assert "tensors changed" in done.stdout
    result = open_base(output)
    for name in files[0].parts:
        near(result.weight(name)[0], wanted(files, base, name)[0])
    metadata = layout_of(output).metadata
    rows = json.loads(metadata["merged_from"])
    assert rows[0]["name"] == "base.safetensors"
    assert {row["name"] for row in rows[1:]} == {"a.safetensors", "b.safetensors"}  # by their digests
    assert [row["sha256"] for row in rows] == [
        hashlib.sha256((tmp_path / row["name"]).read_bytes()).hexdigest() for row in rows
    ]
    assert from_toml(metadata["imgadapt_recipe"]).base_sha256 == rows[0]["sha256"]
    assert rows[0]["hash_sha256"] == "0xabc"
    assert metadata["modelspec.title"] in ("Base + a - b", "Base - b + a")
    assert metadata["modelspec.trigger_phrase"] == "a style"
    entries = from_toml(metadata["imgadapt_recipe"]).inputs
    assert {Path(entry.path).stem: entry.weight for entry in entries} == dict(zip("ab", WEIGHTS, strict=True))
    assert not {"sshs_model_hash", "modelspec.hash_sha256"} & metadata.keys()


def test_the_program_refuses_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program: Any = runpy.run_path(str(HERE.parent / "converters" / "bake.py"))["main"]
    source, adapter = tmp_path / "base.safetensors", tmp_path / "a.safetensors"
    save_file(sdxl(), source)
    (file,) = adapters(open_base(source), {"unet.conv_in": LoRA(rank=2, alpha=1.0)}, 1)
    parts = {"unet.conv_in": file.parts["unet.conv_in"], "unet.down_blocks.9.conv": file.parts["unet.conv_in"]}
    save(AdapterFile(parts), adapter, format="imgadapt")
    (tmp_path / "r.toml").write_text("rule = 'svd'\nrank = 4\n[[inputs]]\npath = 'a.safetensors'\n")
    entry = "[[inputs]]\npath = 'a.safetensors'\nmasks = { 'blocks.9' = 0.0 }\n"
    (tmp_path / "s.toml").write_text(f"rule = 'weighted'\nbase_sha256 = '{'5' * 64}'\n{entry}")
    out = tmp_path / "out.safetensors"
    for arguments, said in (
        ((source, adapter), "give --output"),
        ((source, adapter, "-o", adapter), "is an input"),
        ((source, adapter, "-o", source), "is the base itself"),
        ((source, adapter, "-o", out), "1 of 2 layers are not in"),
        ((source, tmp_path / "r.toml", "-o", out), "the recipe has rank"),
        ((source, tmp_path / "s.toml", "-o", out), "is not the base that the recipe means"),
        ((adapter, adapter, "-o", out), "no table knows"),
    ):
        with pytest.raises(ImgadaptError, match=said):
            program([str(argument) for argument in arguments])
    assert not out.exists()
    more = ("--skip-missing", "--json", "--rounding", "stochastic", "--seed", "3")
    capsys.readouterr()
    program([str(source), str(adapter), "-o", str(out), *more])
    told = json.loads(capsys.readouterr().out)
    assert (told["missing"], told["changed"]) == (["unet.down_blocks.9.conv"], 1)
    metadata = layout_of(out).metadata
    assert metadata["imgadapt_rounding"] == "stochastic"
    assert json.loads(metadata["merged_from"])[0] == {"name": "base.safetensors", "base": True}
