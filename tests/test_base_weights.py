"""Bases in files: every layer of a folder or a single file is the tensor that diffusers' converters make of it."""

import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from torch import Tensor

from imgadapt.combining.checkpoints.base import BaseFile, open_base
from imgadapt.errors import FormatError, StateError

tiny: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny.py"))))
tools: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
CONVERT = {
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "sd35_medium": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "schnell": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
}


def converted(name: str, own: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    if isinstance(model, UNet2DConditionModel):
        named = {f"model.diffusion_model.{key}": value for key, value in own.items()}
        return single_file_utils.convert_ldm_unet_checkpoint(named, dict(model.config))
    extra = {"pos_embed": torch.zeros(1, 256, 8)} if name.startswith("sd3") else {}
    made = CONVERT[name]({**{key: value.clone() for key, value in own.items()}, **extra}, config=dict(model.config))
    made.pop("pos_embed.pos_embed", None)
    return made


def same(base: BaseFile, component: str, wanted: Mapping[str, Tensor]) -> int:
    """Each weight and bias of these is the base's; how many there were."""
    count = 0
    for key, value in wanted.items():
        layer, _, end = f"{component}.{key}".rpartition(".")
        if end == "weight":
            got, site = base.weight(layer)
            assert tuple(got.shape) == site.shape
            assert torch.equal(got.t() if site.kind == "embedding" else got, value), key
        else:
            bias = base.bias(layer)
            assert end == "bias", key
            assert bias is not None, key
            assert torch.equal(bias, value), key
        count += 1
    return count


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl_refiner", "sd3", "sd35_medium", "flux", "schnell"])
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_a_single_file_has_the_tensors_that_diffusers_makes_of_it(name: str, prefix: str, tmp_path: Path) -> None:
    model = tools.model_of(name)
    own = tools.native_checkpoint(name, model)
    save_file({f"{prefix}{key}": value for key, value in own.items()}, tmp_path / "one.safetensors")
    base = open_base(tmp_path / "one.safetensors")
    assert base.architecture is not None
    assert base.architecture.name in (
        tools.ARCHITECTURE.get(name, name),
        *(("sd1", "sd2") if name in ("sd1", "sd2") else ()),
    )
    component = "unet" if isinstance(model, UNet2DConditionModel) else "transformer"
    wanted = converted(name, own, model)
    layers = {key for key in model.state_dict() if not key.startswith("pos_embed.pos_embed")}
    assert wanted.keys() == layers
    assert same(base, component, wanted) == len(layers)
    assert {n for n in base.names if n.startswith(component)} == {f"{component}.{k.rpartition('.')[0]}" for k in wanted}


def test_a_whole_sdxl_file_has_both_text_encoders(tmp_path: Path) -> None:
    model = tools.model_of("sdxl")
    (_, first), (second_model, second) = tools.clip_state(8, projected=False), tools.clip_state(12, projected=True)
    unet = tools.native_checkpoint("sdxl", model)
    prefix = "conditioner.embedders.1.model."
    theirs = tools.open_clip_of(second, prefix)
    wanted = single_file_utils.convert_open_clip_checkpoint(second_model, theirs, prefix)
    plain = {key.removeprefix("text_model."): value for key, value in wanted.items()}
    assert {key.removeprefix("text_model.") for key in second} == plain.keys()
    tensors = tools.prefixed(unet, "model.diffusion_model.") | theirs | {f"{prefix}logit_scale": torch.tensor(4.6)}
    tensors |= tools.prefixed(first, "conditioner.embedders.0.transformer.", "text_model.")
    tensors |= {"first_stage_model.decoder.conv_in.weight": torch.zeros(3, 4, 1, 1)}
    save_file(tensors, tmp_path / "sdxl.safetensors")
    base = open_base(tmp_path / "sdxl.safetensors")
    assert base.architecture is tools.BY_NAME["sdxl"]
    assert same(base, "unet", converted("sdxl", unet, model)) == len(unet)
    assert same(base, "text_encoder", first) == len(first)
    assert same(base, "text_encoder_2", wanted) == len(second)
    assert not any("decoder" in name for name in base.names)
    projection = base.places("text_encoder_2.text_projection")
    assert [p.turned for p in projection] == [True]
    value = base.places("text_encoder_2.text_model.encoder.layers.1.self_attn.v_proj")[0]
    assert (value.key, value.first, value.rows) == (f"{prefix}transformer.resblocks.1.attn.in_proj_weight", 24, 12)


def test_sd2_has_open_clip_and_sd3_three_encoders(tmp_path: Path) -> None:
    _, clip = tools.clip_state(8, projected=False)
    tensors = tools.prefixed(tools.native_checkpoint("sd2", tools.model_of("sd2")), "model.diffusion_model.")
    save_file(tensors | tools.open_clip_of(clip, "cond_stage_model.model."), tmp_path / "sd2.safetensors")
    assert same(open_base(tmp_path / "sd2.safetensors"), "text_encoder", clip) == len(clip)
    (_, first), (_, second) = tools.clip_state(8, projected=True), tools.clip_state(12, projected=True)
    t5 = {key: value.clone() for key, value in tiny.t5(tiny.t5_tokenizer()).state_dict().items()}
    t5.pop("encoder.embed_tokens.weight", None)
    tensors = tools.prefixed(tools.native_checkpoint("sd3", tools.model_of("sd3")), "model.diffusion_model.")
    tensors |= tools.prefixed(first, "text_encoders.clip_l.transformer.") | tools.prefixed(
        t5, "text_encoders.t5xxl.transformer."
    )
    save_file(tensors | tools.prefixed(second, "text_encoders.clip_g.transformer."), tmp_path / "sd3.safetensors")
    base = open_base(tmp_path / "sd3.safetensors")
    assert base.architecture is tools.BY_NAME["sd3"]
    for component, state in (("text_encoder", first), ("text_encoder_2", second), ("text_encoder_3", t5)):
        assert same(base, component, state) == len(state)


@pytest.mark.parametrize("way", ["whole", "sharded", "fp16", "beside"])
def test_a_diffusers_folder_has_the_models_weights(way: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    pipeline = tiny.sdxl()
    options: dict[str, Any] = {"sharded": {"max_shard_size": "20KB"}, "fp16": {"variant": "fp16"}}.get(way, {})
    pipeline.save_pretrained(tmp_path, **options)
    if way == "sharded":
        assert len([*(tmp_path / "unet").glob("*.safetensors")]) > 1
    if way == "beside":  # weights of a variant are not those that a pipeline loads
        save_file({"conv_in.weight": torch.zeros(2)}, tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    base = open_base(tmp_path)
    for component in ("unet", "text_encoder", "text_encoder_2"):
        state = getattr(pipeline, component).state_dict()
        assert same(base, component, state) == len(state)
    assert {name.partition(".")[0] for name in base.names} == {"unet", "text_encoder", "text_encoder_2"}
    assert "text_encoder.text_model.final_layer_norm" in base.names
    assert "text_encoder.final_layer_norm" in base.names


def test_a_folder_of_a_model_that_no_table_knows_has_its_own_names(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    weights = {"blocks.0.proj.weight": torch.randn(6, 4), "blocks.0.proj.bias": torch.randn(6), "mix": torch.zeros(2)}
    save_file(weights, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    base = open_base(tmp_path)
    assert base.architecture is None
    assert [*base.names] == ["transformer.blocks.0.proj"]
    assert torch.equal(base.weight("transformer.blocks.0.proj")[0], weights["blocks.0.proj.weight"])
    with pytest.raises(StateError, match=r"no layer transformer\.blocks\.1"):
        base.weight("transformer.blocks.1")


def test_float8_is_multiplied_by_its_scale_and_integers_are_refused(tmp_path: Path) -> None:
    own = tools.native_checkpoint("flux", tools.model_of("flux"))
    key = "double_blocks.0.img_mlp.0"
    own[f"{key}.weight"], own[f"{key}.scale_weight"] = own[f"{key}.weight"].to(torch.float8_e4m3fn), torch.tensor(0.5)
    own["double_blocks.0.txt_mlp.0.weight"] = torch.ones(12288, 2, dtype=torch.int8)
    save_file(own, tmp_path / "flux.safetensors")
    base = open_base(tmp_path / "flux.safetensors")
    got, _ = base.weight("transformer.transformer_blocks.0.ff.net.0.proj")
    assert torch.equal(got, own[f"{key}.weight"].float() * 0.5)
    with pytest.raises(FormatError, match="stored as I8"):
        base.weight("transformer.transformer_blocks.0.ff_context.net.0.proj")


def test_what_is_no_base_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_file({"lora_unet_conv_in.lora_down.weight": torch.zeros(2, 2)}, tmp_path / "adapter.safetensors")
    with pytest.raises(FormatError, match="no table knows"):
        open_base(tmp_path / "adapter.safetensors")
    with pytest.raises(FormatError, match="no such file"):
        open_base(tmp_path / "none.safetensors")
    (tmp_path / "pickle.ckpt").write_bytes(b"")
    with pytest.raises(FormatError, match=r"only \.safetensors"):
        open_base(tmp_path / "pickle.ckpt")
    whole = (tmp_path / "adapter.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-3])
    with pytest.raises(FormatError, match="not whole"):
        open_base(tmp_path / "short.safetensors")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    with pytest.raises(FormatError, match="not there"):
        open_base(tmp_path)
