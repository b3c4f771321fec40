"""Extraction: an adapter out of two checkpoints is the best of its rank; what is no weight travels as it differs."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from imgadapt import AdapterFile, attach, load, save
from imgadapt.arch import architectures
from imgadapt.combining.checkpoints.differences import _HALF_STEP
from imgadapt.combining.checkpoints.extracting import Settings, extract
from imgadapt.combining.checkpoints.naming import native_of
from imgadapt.combining.keep import Keep
from imgadapt.errors import ConfigError, ShapeError, StateError, TargetError
from imgadapt.sites import Site
from tests import tiny

UNET = "unet/diffusion_pytorch_model.safetensors"
Weights = dict[str, Tensor]


def weights(seed: int = 0) -> Weights:
    """Of a few layers of a UNet."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "a.to_q.weight": (40, 24), "a.to_q.bias": (40,), "a.to_k.weight": (24, 56), "conv.weight": (32, 20, 3, 3),
        "conv.bias": (32,), "norm.weight": (24,), "norm.bias": (24,), "same.weight": (8, 8), "same.bias": (8,),
    }  # fmt: skip
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def change(own: Weights, amount: float = 0.1, seed: int = 9) -> Weights:
    """The same, fine-tuned: all but one layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value if key.startswith("same") else value + amount * torch.randn(value.shape, generator=generator)
        for key, value in own.items()
    }


def folder(path: Path, own: Mapping[str, Tensor]) -> Path:
    """A diffusers folder of a UNet that no table knows."""
    (path / "unet").mkdir(parents=True, exist_ok=True)
    save_file(dict(own), path / UNET)
    return path


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path, Weights]:
    """(tuned, base, their difference in fp64)."""
    base = weights()
    tuned = change(base)
    wanted = {key: tuned[key].double() - base[key].double() for key in base}
    return folder(tmp_path / "tuned", tuned), folder(tmp_path / "base", base), wanted


def delta(file: AdapterFile, layer: str, shape: Sequence[int]) -> Tensor:
    part = file.parts[layer]
    t = {key: tensor.double() for key, tensor in part.tensors.items()}
    return (part.method.scale * part.method.delta(t, Site(tuple(shape), bias="bias"), None)).flatten(1)


def best(whole: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(whole, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


LAYERS = {"unet.a.to_q": "a.to_q.weight", "unet.a.to_k": "a.to_k.weight", "unet.conv": "conv.weight"}


def test_weights_are_cut_best_and_the_rest_travels_as_it_differs(both: tuple[Path, Path, Weights]) -> None:
    tuned, base, wanted = both
    file, report = extract(tuned, base, Keep(rank=6, rank_conv=4))
    assert file.parts.keys() == {*LAYERS, "unet.norm"}
    cut = total = 0.0
    for layer, key in LAYERS.items():
        whole, rank = wanted[key].flatten(1), 4 if layer == "unet.conv" else 6
        part = file.parts[layer]
        assert (part.method.name, part.method.file_rank, part.method.file_alpha) == ("lora", rank, rank)
        found = delta(file, layer, wanted[key].shape)
        assert (found - best(whole, rank)).norm() < 1e-5 * whole.norm()
        tail = float(torch.linalg.svdvals(whole)[rank:].norm())
        row = next(row for row in report.rows if row.layer == layer)
        assert row.residual == pytest.approx(tail / float(whole.norm()), rel=1e-4)
        assert row.norm == pytest.approx(float(whole.norm()), rel=1e-5)
        cut, total = cut + tail**2, total + float(whole.norm()) ** 2
    for layer in ("a.to_q", "conv"):
        part = file.parts[f"unet.{layer}"]
        torch.testing.assert_close(part.tensors["bias"].double() * part.method.scale, wanted[f"{layer}.bias"])
    norm = file.parts["unet.norm"].tensors
    torch.testing.assert_close(norm["w_norm"].double(), wanted["norm.weight"])
    torch.testing.assert_close(norm["b_norm"].double(), wanted["norm.bias"])
    total += float(wanted["norm.weight"].norm()) ** 2
    assert report.residual == pytest.approx((cut / total) ** 0.5, rel=1e-4)
    assert "1 layers are the same in both." in report.notes
    names = json.loads(file.metadata["extracted_from"])
    assert names["tuned"]["sha256"] == {UNET: hashlib.sha256((tuned / UNET).read_bytes()).hexdigest()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_planted_difference_is_recovered(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of whole numbers over 1024, so that both checkpoints and their difference are exact in bf16."""
    shape, rank = (320, 400), 6
    base = torch.randint(-100, 101, shape).float()
    up, down = (torch.randint(0, 2, size).float() * 2 - 1 for size in ((320, rank), (rank, 400)))
    planted = up @ down / 1024
    a, b = (
        folder(tmp_path / n, {"x.weight": w.to(dtype)}) for n, w in (("a", base / 1024 + planted), ("b", base / 1024))
    )
    assert torch.equal(load_file(a / UNET)["x.weight"].float(), base / 1024 + planted)
    file, report = extract(a, b, Keep(rank=rank))  # by random projections: 2 * (6 + 16) < 320
    assert (delta(file, "unet.x", shape) - planted).norm() < 1e-5 * planted.norm()
    assert report.residual < 1e-3
    _, report = extract(a, b, Keep(rank=4))
    tail = torch.linalg.svdvals(planted)[4:].norm() / planted.norm()
    assert report.residual == pytest.approx(float(tail), rel=0.01)


def test_projections_are_within_a_hundredth_of_the_best(tmp_path: Path) -> None:
    """Of a spectrum as flat as it gets, noise, and of one that falls."""
    for k, falls in enumerate((0.0, 0.5)):
        u, s, vt = torch.linalg.svd(torch.randn(200, 260), full_matrices=False)
        whole = u * (s * torch.arange(1, 201) ** -falls) @ vt
        a, b = (folder(tmp_path / f"{k}{n}", {"x.weight": w}) for n, w in (("a", whole), ("b", torch.zeros(200, 260))))
        file, report = extract(a, b, Keep(rank=12))
        left = float((delta(file, "unet.x", whole.shape) - whole.double()).norm() / whole.norm())
        optimal = float(torch.linalg.svdvals(whole)[12:].norm() / whole.norm())
        assert optimal * (1 - 1e-5) <= left <= 1.01 * optimal
        assert report.residual == pytest.approx(left, rel=1e-4)


@pytest.mark.parametrize("keep", [Keep(error=0.3), Keep(energy=0.91)], ids=["error", "energy"])
def test_an_error_of_the_whole_is_met(both: tuple[Path, Path, Weights], keep: Keep) -> None:
    tuned, base, wanted = both
    file, report = extract(tuned, base, keep, Settings(whole=False))
    left = total = 0.0
    for layer, key in LAYERS.items():
        left += float((delta(file, layer, wanted[key].shape) - wanted[key].flatten(1)).norm()) ** 2
        total += float(wanted[key].norm()) ** 2
    assert 0.28 < (left / total) ** 0.5 <= 0.3 * (1 + 1e-5)
    assert report.residual <= 0.3


def test_a_size_of_the_file_is_met(both: tuple[Path, Path, Weights], tmp_path: Path) -> None:
    tuned, base, _ = both
    for size in (0.012, 0.02):
        file, _ = extract(tuned, base, Keep(size=size), Settings(dtype=torch.float16, hashes=False))
        path = save(file, tmp_path / "x.safetensors")
        assert 0.5 * size * 1e6 < path.stat().st_size <= size * 1e6


def test_each_layer_by_a_rule_of_its_own(both: tuple[Path, Path, Weights]) -> None:
    tuned, base, wanted = both
    file, _ = extract(tuned, base, Keep(rule="fro", bound=0.7), Settings(whole=False))
    for layer, key in LAYERS.items():
        squares = torch.linalg.svdvals(wanted[key].flatten(1)) ** 2
        rank = int((squares.cumsum(0) / squares.sum() < 0.49).sum()) + 1
        assert file.parts[layer].method.file_rank == rank


def test_what_factors_would_not_shrink_is_whole(both: tuple[Path, Path, Weights]) -> None:
    tuned, base, wanted = both
    file, report = extract(tuned, base, Keep(rank=8))  # 2 * 8 * (40 + 24) > 40 * 24 and 2 * 8 * (32 + 180) < 32 * 180
    assert file.parts["unet.a.to_q"].method.name == "full"
    torch.testing.assert_close(file.parts["unet.a.to_q"].tensors["diff"].double(), wanted["a.to_q.weight"])
    torch.testing.assert_close(file.parts["unet.a.to_q"].tensors["diff_b"].double(), wanted["a.to_q.bias"])
    assert file.parts["unet.conv"].method.name == "lora"
    assert [row.layer for row in report.rows if row.rank is None] == ["unet.a.to_q", "unet.norm"]
    file, _ = extract(tuned, base, Keep(rank=8), Settings(whole=False))
    assert file.parts["unet.a.to_q"].method.file_rank == 8


def test_a_bias_alone_travels(tmp_path: Path) -> None:
    base = weights()
    tuned = {**base, "conv.bias": base["conv.bias"] + 1}
    file, _ = extract(folder(tmp_path / "a", tuned), folder(tmp_path / "b", base), Keep(rank=4))
    assert file.parts.keys() == {"unet.conv"}
    assert not delta(file, "unet.conv", (32, 20, 3, 3)).any()
    torch.testing.assert_close(file.parts["unet.conv"].tensors["bias"], torch.ones(32))


def test_targets_choose(both: tuple[Path, Path, Weights]) -> None:
    tuned, base, _ = both
    file, _ = extract(tuned, base, Keep(rank=4), Settings(targets=["to_*", "!to_k"]))
    assert file.parts.keys() == {"unet.a.to_q"}
    with pytest.raises(TargetError, match="no layer matches to_z"):
        extract(tuned, base, Keep(rank=4), Settings(targets=["to_z"]))
    for target, meant in (("transformerz", "transformer"), ("a.to", r"\*a.to\*")):
        hint = (
            rf"no layer matches {target} \(did you mean '{meant}'\?\); a target is a preset \(attention, .* as unet\."
        )
        with pytest.raises(TargetError, match=hint):
            extract(tuned, base, Keep(rank=4), Settings(targets=[target]))


def test_nothing_differs_is_an_error(tmp_path: Path) -> None:
    base = weights()
    a, b = folder(tmp_path / "a", base), folder(tmp_path / "b", base)
    with pytest.raises(ConfigError, match=r"nothing differs: .* 5 layers are the same in both"):
        extract(a, b, Keep(rank=4))
    c = folder(tmp_path / "c", {key: value.bfloat16() for key, value in base.items()})
    for pair in ((a, c), (c, a)):
        with pytest.raises(
            ConfigError, match=r"nothing differs: .* 5 layers differ by the rounding of their dtypes only"
        ):
            extract(*pair, Keep(rank=4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_difference_within_rounding_is_pointed_out(tmp_path: Path, dtype: torch.dtype) -> None:
    base = {key: value.to(dtype) for key, value in weights().items()}
    step = torch.finfo(dtype).eps
    for amount, loud in ((0.05 * step, True), (0.2 * step, True), (10 * step, False)):
        tuned = {key: value.to(dtype) for key, value in change({k: v.float() for k, v in base.items()}, amount).items()}
        true = torch.cat([amount * torch.ones(base[key].numel()) for key in base]).norm()
        _, report = extract(folder(tmp_path / "a", tuned), folder(tmp_path / "b", base), Keep(rank=4))
        notes = [note for note in report.notes if "within rounding" in note]
        assert bool(notes) == loud, (amount, float(true), report.notes)


def test_the_estimate_of_rounding_is_right() -> None:
    for w in (torch.randn(10**6), torch.rand(10**6)):
        error = (w.bfloat16().float() - w).norm()
        assert float(error) == pytest.approx(_HALF_STEP * torch.finfo(torch.bfloat16).eps * float(w.norm()), rel=0.15)


def test_checkpoints_of_other_models_are_refused(tmp_path: Path) -> None:
    base = weights()
    b = folder(tmp_path / "b", base)
    fewer = {key: value for key, value in change(base).items() if not key.startswith("conv")}
    a = folder(tmp_path / "a", fewer)
    with pytest.raises(ConfigError, match=r"a has no unet\.conv; is the one a fine-tune"):
        extract(a, b, Keep(rank=4))
    file, report = extract(a, b, Keep(rank=4), Settings(strict=False))
    assert "unet.conv" not in file.parts
    assert any("unet.conv: not compared" in note for note in report.notes)
    folder(tmp_path / "a", {**change(base), "a.to_k.weight": torch.zeros(24, 60)})
    with pytest.raises(ShapeError, match=r"unet\.a\.to_k is \(24, 60\) and \(24, 56\)"):
        extract(a, b, Keep(rank=4))
    folder(tmp_path / "a", {key: value for key, value in change(base).items() if key != "a.to_q.bias"})
    with pytest.raises(ConfigError, match=r"a has no bias of unet\.a\.to_q"):
        extract(a, b, Keep(rank=4))
    (tmp_path / "c" / "transformer").mkdir(parents=True)
    save_file(base, tmp_path / "c" / "transformer" / "model.safetensors")
    with pytest.raises(ConfigError, match="the one has transformer, the other unet: nothing to compare"):
        extract(tmp_path / "c", b, Keep(rank=4))
    broken = {key: value.clone() for key, value in base.items()}
    broken["a.to_k.weight"][0, 0] = torch.nan
    with pytest.raises(StateError, match=r"unet\.a\.to_k has NaN or infinity"):
        extract(folder(tmp_path / "a", broken), b, Keep(rank=4))


def test_threads_change_no_byte(both: tuple[Path, Path, Weights], tmp_path: Path) -> None:
    tuned, base, _ = both
    hashes: set[str] = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            for k, keep in enumerate((Keep(rank=3), Keep(error=0.5))):
                path = save(extract(tuned, base, keep)[0], tmp_path / f"{k}.safetensors")
                hashes.add(f"{k} {hashlib.sha256(path.read_bytes()).hexdigest()}")
        finally:
            torch.set_num_threads(1)
    assert len(hashes) == 2


def sd1() -> UNet2DConditionModel:
    """Of its structure, but narrow."""
    torch.manual_seed(1)
    widths = (8, 12, 16, 16)
    return UNet2DConditionModel(
        sample_size=8, norm_num_groups=4, attention_head_dim=4, cross_attention_dim=8, block_out_channels=widths
    )


def test_a_folder_against_a_single_file(tmp_path: Path) -> None:
    model = sd1()
    own = model.state_dict()
    table = next(a for a in architectures() if a.name == "sd1")
    tuned = {key: value + 0.05 * torch.randn(value.shape) for key, value in own.items()}
    native: Weights = {}
    for module, slices in native_of(table, "unet").items():
        path = slices[0].layer.partition(".")[2]
        for end in ("weight", "bias"):
            if f"{path}.{end}" in tuned:
                native[f"model.diffusion_model.{module}.{end}"] = tuned[f"{path}.{end}"].contiguous()
    assert len(native) == len(own)
    save_file(native, tmp_path / "tuned.safetensors")
    base = folder(tmp_path / "base", {key: value.contiguous() for key, value in own.items()})
    file, _ = extract(tmp_path / "tuned.safetensors", base, Keep(rank=3), Settings(dtype=torch.float16))
    again = load(save(file, tmp_path / "x.safetensors"))
    assert (again.format, again.architecture, len(again.parts)) == ("lycoris", "sd1", len(file.parts))
    assert again.metadata["ss_base_model_version"] == "sd_v1"
    for key in ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "mid_block.resnets.0.conv1"):
        whole = (tuned[f"{key}.weight"] - own[f"{key}.weight"]).double()
        found = delta(again, f"unet.{key}", whole.shape)
        wanted = whole.flatten(1) if "diff" in again.parts[f"unet.{key}"].tensors else best(whole.flatten(1), 3)
        assert (found - wanted).norm() < 2e-3 * whole.norm()


def test_the_adapter_on_the_base_is_the_tuned_model(tmp_path: Path) -> None:
    """Text encoders and UNet; at full rank nothing is left out."""
    base, tuned = tiny.sdxl(), tiny.sdxl()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in ("unet", "text_encoder", "text_encoder_2"):
            for (key, a), b in zip(
                getattr(tuned, name).named_parameters(), getattr(base, name).parameters(), strict=True
            ):
                a.copy_(b + (0.05 * torch.randn(b.shape, generator=generator) if "embeddings" not in key else 0))
    for name, pipe in (("base", base), ("tuned", tuned)):
        for component in ("unet", "text_encoder", "text_encoder_2"):
            getattr(pipe, component).save_pretrained(tmp_path / name / component)
    file, report = extract(tmp_path / "tuned", tmp_path / "base", Keep(rank=64), Settings(whole=False))
    assert report.residual < 1e-3
    path = save(file, tmp_path / "x.safetensors")
    tokens = torch.arange(77)[None] % 40
    sample, times = torch.randn(1, 4, 8, 8), torch.tensor([7])

    def out(pipe: tiny.Any) -> list[Tensor]:
        with torch.no_grad():
            states = [pipe.text_encoder(tokens).last_hidden_state, pipe.text_encoder_2(tokens).last_hidden_state]
            added = {"text_embeds": torch.ones(1, tiny.PROJECTION), "time_ids": torch.ones(1, 6)}
            text = torch.cat(states, -1)
            return [*states, pipe.unet(sample, times, encoder_hidden_states=text, added_cond_kwargs=added).sample]

    wanted, before = out(tuned), out(base)
    attach(base, load(path))
    for w, found, plain in zip(wanted, out(base), before, strict=True):
        assert (w - plain).abs().max() > 0.01
        torch.testing.assert_close(found, w, atol=1e-4, rtol=1e-3)


def test_embeddings_are_left_out_and_that_is_said_or_become_lora(tmp_path: Path) -> None:
    for name, extra in (("base", 0.0), ("tuned", 1.0)):
        torch.manual_seed(0)
        encoder = tiny.clip(tiny.clip_tokenizer(), 24, projected=False)
        with torch.no_grad():
            encoder.get_input_embeddings().weight[:, :] += extra * torch.outer(
                torch.arange(len(encoder.get_input_embeddings().weight)), torch.ones(24)
            )
        encoder.save_pretrained(tmp_path / name / "text_encoder")
    both = tmp_path / "tuned", tmp_path / "base"
    with pytest.raises(ConfigError, match=r"token_embedding differ, and are left out"):
        extract(*both, Keep(rank=1))
    file, report = extract(*both, Keep(rank=1), Settings(embeddings=True, whole=False))
    (part,) = file.parts.values()
    found = part.tensors["up"] @ part.tensors["down"]
    torch.testing.assert_close(
        found, torch.outer(torch.ones(24), torch.arange(float(found.shape[1]))), atol=1e-3, rtol=1e-4
    )
    assert report.residual < 1e-3


def test_tensors_of_no_layer_that_differ_are_named(tmp_path: Path) -> None:
    base = {**weights(), "scale_shift_table": torch.zeros(2, 8), "number": torch.ones(3)}
    tuned = {**change(base), "scale_shift_table": torch.ones(2, 8), "number": torch.ones(3)}
    _, report = extract(folder(tmp_path / "a", tuned), folder(tmp_path / "b", base), Keep(rank=2))
    assert any("1 tensors of no layer differ" in note and "scale_shift_table" in note for note in report.notes)


def test_a_fused_layer_has_one_rank_in_formats_that_have_it(tmp_path: Path) -> None:
    """q, k and v of Flux in its own words, narrow, for kohya's tools and for diffusers."""
    keys = {"double_blocks.0.img_attn.qkv": (48, 16), "double_blocks.0.img_attn.proj": (16, 16)}
    base = {
        f"{key}.{end}": torch.randn(shape if end == "weight" else shape[:1])
        for key, shape in keys.items()
        for end in ("weight", "bias")
    }
    tuned = {key: value + 0.1 * torch.randn(value.shape) for key, value in base.items()}
    tuned |= {key: base[key] for key in base if key.endswith("bias")}
    for name, own in (("a", tuned), ("b", base)):
        save_file(own, tmp_path / f"{name}.safetensors")
    both = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    whole = (tuned["double_blocks.0.img_attn.qkv.weight"] - base["double_blocks.0.img_attn.qkv.weight"]).double()
    layers = [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    for form, wanted in (("kohya", best(whole, 2)), ("diffusers", torch.cat([best(w, 2) for w in whole.chunk(3)]))):
        file, _ = extract(*both, Keep(rank=2), Settings(format=form, dtype=torch.float16))
        path = save(file, tmp_path / f"{form}.safetensors", format=form)
        again = load(path)
        found = torch.cat([delta(again, layer, (16, 16)) for layer in layers])
        assert (found - wanted).norm() < 2e-3 * wanted.norm(), form
    shapes = {key: tuple(t.shape) for key, t in load_file(tmp_path / "kohya.safetensors").items()}
    assert shapes["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"] == (2, 16)


Run = Callable[[str, Sequence[str]], None]


def test_the_program_reports_and_writes(
    both: tuple[Path, Path, Weights], tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned, base, wanted = both
    out = str(tmp_path / "x.safetensors")
    run("extract", [str(tuned), str(base), out, "--rank", "4", "--no-whole", "--json"])
    found = json.loads(capsys.readouterr().out)
    file = load(out)
    assert {t.dtype for part in file.parts.values() for t in part.tensors.values()} == {torch.float16}
    assert {row["layer"] for row in found["layers"]} == file.parts.keys()
    whole = wanted["conv.weight"].flatten(1)
    assert (delta(file, "unet.conv", (32, 20, 3, 3)) - best(whole, 4)).norm() < 2e-3 * whole.norm()
    run("extract", [str(tuned), str(base), out, "--rank", "4"])
    said = capsys.readouterr().out
    assert "1 layers are the same in both." in said
    for wrong in ([str(tuned), str(base), str(base), "--rank", "2"], [str(tuned), str(base), out]):
        with pytest.raises(ConfigError):
            run("extract", wrong)
