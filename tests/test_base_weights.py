"""Bases in files: every layer of a folder or a single file is the tensor that diffusers' converters make of it."""

import json
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from torch import Tensor

from imgadapt.arch import architectures
from imgadapt.combining.base import BaseFile, open_base
from imgadapt.combining.naming import native_of
from imgadapt.errors import FormatError, StateError

tiny: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny.py"))))
BY_NAME = {architecture.name: architecture for architecture in architectures()}
CROSS = ("CrossAttnDownBlock2D",) * 2, ("CrossAttnUpBlock2D",) * 2
_UNET: dict[str, Any] = {"sample_size": 8, "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 8}


_FOUR: dict[str, Any] = {"block_out_channels": (8, 12, 16, 16)}
_ADDED: dict[str, Any] = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 30,
    "use_linear_projection": True,
}  # fmt: skip
_LAYERS: dict[str, Any] = {"transformer_layers_per_block": (1, 2, 3)}
_SD3: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 16, "num_layers": 24, "attention_head_dim": 4,
    "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 8, "pooled_projection_dim": 6,
    "pos_embed_max_size": 16,
}  # fmt: skip
_FLUX: dict[str, Any] = {"num_layers": 2, "num_single_layers": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "sd1": lambda: UNet2DConditionModel(**_UNET, **_FOUR),
    "sd2": lambda: UNet2DConditionModel(**_UNET, **_FOUR, use_linear_projection=True),
    "sdxl": lambda: UNet2DConditionModel(
        **_UNET, **_ADDED, **_LAYERS, block_out_channels=(8, 12, 16),
        down_block_types=("DownBlock2D", *CROSS[0]), up_block_types=(*CROSS[1], "UpBlock2D"),
    ),
    "sdxl_refiner": lambda: UNet2DConditionModel(
        **_UNET, **_ADDED, **_FOUR, transformer_layers_per_block=2,
        down_block_types=("DownBlock2D", *CROSS[0], "DownBlock2D"), up_block_types=("UpBlock2D", *CROSS[1], "UpBlock2D")
    ),
    "sd3": lambda: SD3Transformer2DModel(**_SD3),
    "sd35_medium": lambda: SD3Transformer2DModel(**_SD3, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
    "flux": lambda: FluxTransformer2DModel(**_FLUX, guidance_embeds=True),
    "schnell": lambda: FluxTransformer2DModel(**_FLUX, guidance_embeds=False),
}  # fmt: skip
"""Of each architecture's structure, but narrow or of few blocks; Flux's are on the meta device, for they are wide."""


CONVERT = {
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "sd35_medium": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "schnell": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
}
ARCHITECTURE = {"schnell": "flux"}
NORMS = ("query_norm", "key_norm")


def model_of(name: str) -> Any:
    with torch.device("meta" if name in ("flux", "schnell") else "cpu"):
        return MODELS[name]()


def native_checkpoint(name: str, model: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights under the names of the model's own code, without prefix."""
    generator = torch.Generator().manual_seed(len(name))
    state = model.state_dict()
    architecture = BY_NAME[ARCHITECTURE.get(name, name)]
    component = architecture.layers[0].partition(".")[0]
    made: dict[str, Tensor] = {}
    for module, slices in native_of(architecture, component).items():
        paths = list(dict.fromkeys(s.layer.partition(".")[2] for s in slices))
        if any(f"{path}.weight" not in state for path in paths):
            continue
        rows = sum(len(state[f"{path}.weight"]) for path in paths)
        inputs = state[f"{paths[0]}.weight"].shape[1:]  # of Flux two are enough: its converter counts on the rows
        shape = (rows, *(inputs if len(inputs) != 1 or rows < 1000 else (2,)))
        end = "scale" if module.endswith(NORMS) else "weight"
        made[f"{module}.{end}"] = torch.randn(shape, generator=generator).to(dtype)
        if f"{paths[0]}.bias" in state:
            made[f"{module}.bias"] = torch.randn(rows, generator=generator).to(dtype)
    return made


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
    model = model_of(name)
    own = native_checkpoint(name, model)
    save_file({f"{prefix}{key}": value for key, value in own.items()}, tmp_path / "one.safetensors")
    base = open_base(tmp_path / "one.safetensors")
    assert base.architecture is not None
    assert base.architecture.name in (ARCHITECTURE.get(name, name), *(("sd1", "sd2") if name in ("sd1", "sd2") else ()))
    component = "unet" if isinstance(model, UNet2DConditionModel) else "transformer"
    wanted = converted(name, own, model)
    layers = {key for key in model.state_dict() if not key.startswith("pos_embed.pos_embed")}
    assert wanted.keys() == layers
    assert same(base, component, wanted) == len(layers)
    assert {n for n in base.names if n.startswith(component)} == {f"{component}.{k.rpartition('.')[0]}" for k in wanted}


def open_clip_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """CLIP's weights as open_clip keeps them: q, k and v as one, the projection the other way round."""
    outer = {"embeddings.token_embedding.weight": "token_embedding.weight", "final_layer_norm": "ln_final"}
    outer |= {
        "embeddings.position_embedding.weight": "positional_embedding",
        "text_projection.weight": "text_projection",
    }
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    inner |= {"self_attn.out_proj": "attn.out_proj", "encoder.layers": "transformer.resblocks"}
    made: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("text_model.")
        if "q_proj" in name:
            whole = torch.cat([state[key.replace("q_proj", f"{n}_proj")] for n in "qkv"])
            stem = name.partition("self_attn")[0].replace("encoder.layers", "transformer.resblocks")
            made[f"{prefix}{stem}attn.in_proj_{name.rpartition('.')[2]}"] = whole
        elif "k_proj" not in name and "v_proj" not in name:
            for theirs, ours in (*outer.items(), *inner.items()):
                name = name.replace(theirs, ours)
            made[prefix + name] = value.t().contiguous() if name == "text_projection" else value
    return made


def clip_state(width: int, *, projected: bool) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(width)
    model = tiny.clip(tiny.clip_tokenizer(), width, projected=projected)
    return model, {key: value.detach().clone() for key, value in model.state_dict().items()}


def prefixed(state: Mapping[str, Tensor], prefix: str, inner: str = "") -> dict[str, Tensor]:
    return {
        f"{prefix}{inner if key.startswith(('encoder', 'embed', 'final')) else ''}{key}": v for key, v in state.items()
    }


def test_a_whole_sdxl_file_has_both_text_encoders(tmp_path: Path) -> None:
    model = model_of("sdxl")
    (_, first), (second_model, second) = clip_state(8, projected=False), clip_state(12, projected=True)
    unet = native_checkpoint("sdxl", model)
    prefix = "conditioner.embedders.1.model."
    theirs = open_clip_of(second, prefix)
    wanted = single_file_utils.convert_open_clip_checkpoint(second_model, theirs, prefix)
    plain = {key.removeprefix("text_model."): value for key, value in wanted.items()}
    assert {key.removeprefix("text_model.") for key in second} == plain.keys()
    tensors = prefixed(unet, "model.diffusion_model.") | theirs | {f"{prefix}logit_scale": torch.tensor(4.6)}
    tensors |= prefixed(first, "conditioner.embedders.0.transformer.", "text_model.")
    tensors |= {"first_stage_model.decoder.conv_in.weight": torch.zeros(3, 4, 1, 1)}
    save_file(tensors, tmp_path / "sdxl.safetensors")
    base = open_base(tmp_path / "sdxl.safetensors")
    assert base.architecture is BY_NAME["sdxl"]
    assert same(base, "unet", converted("sdxl", unet, model)) == len(unet)
    assert same(base, "text_encoder", first) == len(first)
    assert same(base, "text_encoder_2", wanted) == len(second)
    assert not any("decoder" in name for name in base.names)
    projection = base.places("text_encoder_2.text_projection")
    assert [p.turned for p in projection] == [True]
    value = base.places("text_encoder_2.text_model.encoder.layers.1.self_attn.v_proj")[0]
    assert (value.key, value.first, value.rows) == (f"{prefix}transformer.resblocks.1.attn.in_proj_weight", 24, 12)


def test_sd2_has_open_clip_and_sd3_three_encoders(tmp_path: Path) -> None:
    _, clip = clip_state(8, projected=False)
    tensors = prefixed(native_checkpoint("sd2", model_of("sd2")), "model.diffusion_model.")
    save_file(tensors | open_clip_of(clip, "cond_stage_model.model."), tmp_path / "sd2.safetensors")
    assert same(open_base(tmp_path / "sd2.safetensors"), "text_encoder", clip) == len(clip)
    (_, first), (_, second) = clip_state(8, projected=True), clip_state(12, projected=True)
    t5 = {key: value.clone() for key, value in tiny.t5(tiny.t5_tokenizer()).state_dict().items()}
    t5.pop("encoder.embed_tokens.weight", None)
    tensors = prefixed(native_checkpoint("sd3", model_of("sd3")), "model.diffusion_model.")
    tensors |= prefixed(first, "text_encoders.clip_l.transformer.") | prefixed(t5, "text_encoders.t5xxl.transformer.")
    save_file(tensors | prefixed(second, "text_encoders.clip_g.transformer."), tmp_path / "sd3.safetensors")
    base = open_base(tmp_path / "sd3.safetensors")
    assert base.architecture is BY_NAME["sd3"]
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
    own = native_checkpoint("flux", model_of("flux"))
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
    with pytest.raises(FormatError, match="its header says"):
        open_base(tmp_path / "short.safetensors")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    with pytest.raises(FormatError, match="not there"):
        open_base(tmp_path)
