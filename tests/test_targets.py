"""Which layers a target names, and which components a model has."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from imgadapt.errors import TargetError
from imgadapt.targets import PRESETS, Targets, components, find, layers, matches

QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"


@pytest.fixture(scope="module")
def sd() -> dict[str, nn.Module]:
    """SD1.5's layer names, but the two-layer text encoder's."""
    config = CLIPTextConfig(
        hidden_size=12,
        intermediate_size=24,
        num_attention_heads=3,
        num_hidden_layers=2,
        vocab_size=50,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(8, 12, 16, 16),
            layers_per_block=2,
            cross_attention_dim=20,
            attention_head_dim=4,
            norm_num_groups=4,
            sample_size=8,
        )
        return {"unet": unet, "text_encoder": CLIPTextModel(config)}


@pytest.fixture(scope="module")
def flux() -> FluxTransformer2DModel:
    with torch.device("meta"):
        return FluxTransformer2DModel(
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            in_channels=4,
            axes_dims_rope=(4, 4, 8),
        )


def named(model: dict[str, nn.Module], targets: Targets) -> set[str]:
    return {layer.name for layer in find(model, targets)}


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("attention", 128),  # 16 transformer blocks: to_q, to_k, to_v, to_out.0 of attn1 and attn2
        ("transformer", 192),  # 128, and ff.net.0.proj, ff.net.2, proj_in, proj_out: what sd-scripts adapts
        ("convolution", 64),  # 22 resnets twice, 14 conv_shortcut, 3 down, 3 up
        ("denoiser", 282),
        ("text", 12),
        ("*", 294),
        (["transformer", "convolution"], 256),
        (["transformer", "text"], 204),
        (["*", "!text"], 282),
        (["denoiser", "!transformer", "!convolution"], 26),  # 22 time_emb_proj, conv_in, conv_out, time embedding
    ],
    ids=str,
)
def test_a_preset_names_so_many_layers_of_sd1(targets: Targets, count: int, sd: dict[str, nn.Module]) -> None:
    assert len(named(sd, targets)) == count


def test_the_preset_convolution_has_no_convolution_of_another_preset(sd: dict[str, nn.Module]) -> None:
    assert named(sd, "convolution").isdisjoint(named(sd, "transformer"))
    assert "unet.down_blocks.0.downsamplers.0.conv" in named(sd, "convolution")
    assert "unet.down_blocks.1.resnets.0.conv_shortcut" in named(sd, "convolution")
    assert "unet.conv_in" not in named(sd, "convolution")


def test_transformer_names_the_39_layers_of_a_dits_blocks_and_nothing_around_them(
    flux: FluxTransformer2DModel,
) -> None:
    found = named(components(flux), "transformer")
    assert len(found) == 2 * 12 + 3 * 5
    block, single = "transformer.transformer_blocks.1", "transformer.single_transformer_blocks.2"
    ends = {name.removeprefix(f"{block}.") for name in found if name.startswith(block)}
    assert ends == {
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    }
    ends = {name.removeprefix(f"{single}.") for name in found if name.startswith(single)}
    assert ends == {"attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"}
    assert found.isdisjoint({"transformer.proj_out", "transformer.x_embedder", f"{block}.norm1.linear"})
    assert len(named(components(flux), "*")) == 54


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (QUERY, True),
        ("to_q", True),
        ("attn2.to_q", True),
        ("attn?.to_[qk]", True),
        ("unet.*", True),
        ("mid_block.*", True),
        ("*.to_?", True),
        ("o_q", False),  # an end is cut at a dot
        ("to_k", False),
        ("attn2", False),  # a target names layers, not what holds them
        ("text_encoder.*", False),
        (["to_k", "to_q"], True),
        (["to_q", "!mid_block.*"], False),
        (["!mid_block.*", "to_q"], False),  # exclusions win wherever they stand
        (["to_q", "!attn1.*"], True),
        (["!to_k"], False),  # exclusions alone name nothing
        (["attention", "!attention"], False),
        ([], False),
    ],
    ids=str,
)
def test_a_target_is_a_glob_over_a_name_or_its_end_and_exclusions_win(targets: Targets, wanted: bool) -> None:
    assert matches(QUERY, targets) is wanted


def test_layers_are_the_linear_ones_and_the_convolutions_with_their_shapes(sd: dict[str, nn.Module]) -> None:
    shapes = {row.name: row.site.shape for row in layers(sd) if row.site.kind in ("linear", "conv")}
    assert shapes["unet.conv_in"] == (8, 4, 3, 3)
    assert shapes[QUERY] == (16, 16)
    assert shapes["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"] == (8, 20)
    assert shapes["text_encoder.encoder.layers.1.mlp.fc1"] == (24, 12)
    assert not any("norm" in name or "embedding.token" in name for name in shapes)


def test_components_of_a_pipeline_are_its_denoisers_and_text_encoders(sd: dict[str, nn.Module]) -> None:
    parts = {**sd, "text_encoder_2": None, "vae": nn.Linear(2, 2), "scheduler": object(), "tokenizer": "words"}
    assert components(SimpleNamespace(components=parts)) == sd


def test_components_of_a_mapping_are_its_modules_under_its_names(sd: dict[str, nn.Module]) -> None:
    assert components({"prior": sd["unet"]}) == {"prior": sd["unet"]}


def test_a_single_module_is_called_by_its_kind(sd: dict[str, nn.Module], flux: FluxTransformer2DModel) -> None:
    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config(d_model=8, d_ff=16, d_kv=4, num_layers=1, num_heads=2, vocab_size=10))
    model = nn.Sequential(nn.Linear(2, 3))
    for module, kind in (
        *((m, k) for k, m in sd.items()),
        (flux, "transformer"),
        (t5, "text_encoder"),
        (model, "model"),
    ):
        assert components(module) == {kind: module}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            SimpleNamespace(components={"vae": nn.Linear(2, 2)}),
            "SimpleNamespace has no UNet, transformer or text encoder",
        ),
        ({}, "dict has no UNet, transformer or text encoder; wanted a diffusers pipeline"),
        ({"unet": nn.Linear(2, 2), "vae": None}, "a mapping maps component names to modules only"),
        (3, "int has no UNet, transformer or text encoder"),
    ],
    ids=["nothing to adapt", "empty", "no module", "no model"],
)
def test_a_model_without_components_is_refused(model: object, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        components(model)


@pytest.mark.parametrize("targets", ["atention", ["!*", "*"], []], ids=str)
def test_targets_that_name_nothing_are_refused_with_what_there_is(targets: Targets, sd: dict[str, nn.Module]) -> None:
    with pytest.raises(TargetError) as caught:
        find(sd, targets)
    message = str(caught.value)
    assert "no layer matches targets=" in message
    assert "; there are 410: unet.conv_in, " in message
    assert ("did you mean 'attention'" in message) == (targets == "atention")
    assert all(preset in message for preset in PRESETS)
