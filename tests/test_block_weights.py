"""Weights of blocks, components and masks: which layer each number is for, and what cannot be meant."""

import re

import pytest
import torch

from imgadapt import AdapterFile, Entry, LoRA, MergeRecipe
from imgadapt.arch import Architecture, architectures
from imgadapt.combining.blocks import CONSTANT, LISTS, PRESETS, block_of, expanded
from imgadapt.combining.combine import combine_inputs
from imgadapt.combining.layers import Input
from imgadapt.combining.weights import factor_of
from imgadapt.errors import ConfigError
from imgadapt.formats import Part

ARCHITECTURES = {a.name: a for a in architectures()}
SD1, SDXL, FLUX = (ARCHITECTURES[name] for name in ("sd1", "sdxl", "flux"))


def layer(block: str, inner: str = "transformer_blocks.0.attn1.to_q") -> str:
    return f"unet.{block}.{inner}"


def attention(architecture: Architecture) -> list[str]:
    """What kohya trains by default: linear layers and projections of blocks with attention, and the text encoders."""
    return [
        name
        for name, shape in architecture.shapes.items()
        if len(shape) > 1 and (".attentions." in name or ".encoder.layers." in name)
    ]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("unet.conv_in", "IN00"),
        ("unet.time_embedding.linear_2", "IN00"),
        (layer("down_blocks.0.attentions.0"), "IN01"),
        ("unet.down_blocks.0.resnets.1.conv2", "IN02"),
        ("unet.down_blocks.0.downsamplers.0.conv", "IN03"),
        (layer("down_blocks.1.attentions.0"), "IN04"),
        (layer("down_blocks.2.attentions.1"), "IN08"),
        ("unet.down_blocks.3.resnets.1.conv_shortcut", "IN11"),
        ("unet.mid_block.resnets.1.conv1", "M00"),
        (layer("mid_block.attentions.0"), "M00"),
        ("unet.up_blocks.0.resnets.0.conv1", "OUT00"),
        ("unet.up_blocks.0.upsamplers.0.conv", "OUT02"),
        (layer("up_blocks.1.attentions.0"), "OUT03"),
        (layer("up_blocks.3.attentions.2"), "OUT11"),
        ("unet.conv_out", "OUT11"),
        ("text_encoder.text_model.encoder.layers.3.mlp.fc1", "BASE"),
    ],
)
def test_a_layer_of_sd1_is_in_its_block(name: str, block: str) -> None:
    assert block_of(name, "sd1") == block


def test_every_layer_of_sdxl_is_in_the_block_that_its_own_name_says() -> None:
    seen: set[str] = set()
    for native, slices in SDXL.native.items():
        found = re.match(r"unet\.(in|out)put_blocks\.(\d+)\.", native)
        if found is not None:
            assert {block_of(s.layer, "sdxl") for s in slices} == {f"{found[1].upper()}{int(found[2]):02}"}
            seen.add(f"{found[1]}{found[2]}")
    assert len(seen) == 18


def test_every_layer_of_flux_is_in_the_block_that_its_own_name_says() -> None:
    seen: set[str | None] = set()
    for native, slices in FLUX.native.items():
        found = re.match(r"transformer\.(single|double)_blocks\.(\d+)\.", native)
        expected = f"{found[1][0].upper()}{int(found[2]):02}" if found else "OUT" if "final_layer" in native else "IN"
        assert {block_of(s.layer, "flux") for s in slices} == {expected}
        seen.add(expected)
    assert len(seen) == 19 + 38 + 2
    assert block_of("text_encoder.text_model.encoder.layers.0.mlp.fc1", "flux") == "CLIP"
    assert block_of("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", "flux") == "T5"


def test_lists_have_the_lengths_that_tools_know_and_each_layer_has_a_place_in_the_longest() -> None:
    assert {name: tuple(len(expanded(text)) for text in texts) for name, texts in LISTS.items()} == {
        "sd1": (17, 26), "sd2": (17, 26), "sdxl": (12, 20), "flux": (61,),
    }  # fmt: skip
    for name, texts in LISTS.items():
        longest = set(expanded(texts[-1]))
        assert {block_of(one, name) for one in ARCHITECTURES[name].shapes} == longest
        assert {block_of(one, name) for one in attention(ARCHITECTURES[name])} <= set(expanded(texts[0]))


def test_a_list_gives_each_block_its_number() -> None:
    numbers = [0.1 * k for k in range(17)]
    factor = factor_of(Entry("a", 2.0, blocks=",".join(map(str, numbers))), SD1, attention(SD1))
    assert factor("text_encoder.text_model.encoder.layers.0.mlp.fc1") == 0.0
    assert factor(layer("down_blocks.0.attentions.0")) == pytest.approx(0.2)
    assert factor(layer("mid_block.attentions.0")) == pytest.approx(2 * 0.7)
    assert factor(layer("up_blocks.3.attentions.2")) == pytest.approx(2 * 1.6)
    spaced = factor_of(Entry("a", blocks="[1" + ", 0.25" * 11 + "]"), SDXL, [])
    assert spaced(layer("up_blocks.0.attentions.2")) == 0.25


def test_presets_are_the_blocks_that_they_say() -> None:
    lists = {
        "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
        "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
        "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
        "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
        "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
        "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
        "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    }  # DEF_WEIGHT_PRESET of sd-webui-lora-block-weight 04b986c
    names = attention(SD1)
    assert set(lists) == set(PRESETS["sd1"])
    for name, numbers in lists.items():
        one, other = (factor_of(Entry("a", blocks=said), SD1, names) for said in (name, numbers))
        assert [one(n) for n in names] == [other(n) for n in names]
    shallow = factor_of(Entry("a", blocks="OUTS"), SDXL, attention(SDXL))
    assert shallow(layer("up_blocks.1.attentions.0")) == 1.0
    assert shallow(layer("up_blocks.0.attentions.0")) == 0.0


@pytest.mark.parametrize(("name", "number"), CONSTANT.items())
def test_presets_of_one_number_are_for_every_layer_of_any_base(name: str, number: float) -> None:
    for architecture in (SD1, FLUX, None):
        assert factor_of(Entry("a", 3.0, blocks=name), architecture, ["unet.conv_in"])("unet.conv_in") == 3 * number


def test_all_that_matches_multiplies() -> None:
    name = layer("down_blocks.1.attentions.0", "transformer_blocks.0.attn2.to_k")
    other = layer("up_blocks.1.attentions.0", "transformer_blocks.0.attn2.to_v")
    text = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    entry = Entry(
        "a",
        0.5,
        components={"te": 3.0, "text_encoder": 5.0, "denoiser": 7.0},
        blocks={"unet.down_blocks.1*": 11.0, "IN04": 13.0, "*.to_v": 0.0},
        masks={r"attn2\.to_[kv]$": 17.0, "^unet": 19.0},
    )
    factor = factor_of(entry, SD1, [name, other, text])
    assert factor(name) == 0.5 * 7 * 11 * 13 * 17 * 19
    assert factor(other) == 0.0
    assert factor(text) == 0.5 * 3 * 5


def test_globs_may_be_presets_of_targets() -> None:
    names = attention(SDXL)
    factor = factor_of(Entry("a", blocks={"b-lora-style": 0.0}), SDXL, names)
    silent = {name for name in names if factor(name) == 0}
    assert len(silent) == 10 * 2 * 4
    assert all(".up_blocks.0.attentions.1." in name for name in silent)


@pytest.mark.parametrize(
    ("entry", "architecture", "said"),
    [
        (Entry("a", blocks="1,0,1"), SD1, r"3 block weights; sd1 has 17 \(BASE IN01-02 .*\) or 26 \(BASE IN00-11"),
        (Entry("a", blocks="1," * 16 + "1"), SDXL, r"17 block weights; sdxl has 12 .* or 20"),
        (Entry("a", blocks="1," * 25 + "1"), FLUX, r"61 \(CLIP T5 IN D00-18 S00-37 OUT\)"),
        (Entry("a", blocks="1," * 16 + "R"), SD1, "'R' is not a finite number"),
        (Entry("a", blocks="1," * 16 + "nan"), SD1, "'nan' is not a finite number"),
        (Entry("a", blocks="OUTSIDE"), SD1, "no block preset 'OUTSIDE' for sd1; there are: INS"),
        (
            Entry("a", blocks="INS"),
            ARCHITECTURES["sd3"],
            "lists and presets for sd1, sd2, sdxl, flux only, not for sd3",
        ),
        (Entry("a", blocks="INS"), None, "not for a base without a table"),
        (Entry("a", blocks={"unet.down_block.1*": 0.5}), SD1, r"the block 'unet.down_block.1\*' matches none"),
        (Entry("a", masks={"attn3": 0.0}), SD1, "the mask 'attn3' matches none of its"),
        (Entry("a", components={"unett": 0.0}), SD1, "no component 'unett', did you mean 'unet'"),
    ],
)
def test_what_cannot_be_meant_is_an_error(entry: Entry, architecture: Architecture | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        factor_of(entry, architecture, attention(architecture or SD1))


def test_layers_that_a_list_has_no_number_for_are_an_error_and_not_guessed() -> None:
    names = [layer("down_blocks.0.attentions.0"), "unet.down_blocks.0.downsamplers.0.conv"]
    seventeen = ",".join("1" * 17)
    with pytest.raises(ConfigError, match=r"have no number for IN03, where it has layers; give 26 "):
        factor_of(Entry("a", blocks=seventeen), SD1, names)
    preset = factor_of(Entry("a", blocks="INS"), SD1, names)  # which names what it keeps
    assert [preset(name) for name in names] == [1.0, 0.0]
    full = ",".join("1" if block == "IN03" else "0" for block in expanded(LISTS["sd1"][1]))
    factor = factor_of(Entry("a", blocks=full), SD1, names)
    assert [factor(name) for name in names] == [0.0, 1.0]


def test_a_layer_that_nothing_can_split_has_one_weight() -> None:
    fused = "transformer.double_blocks.3.img_attn.qkv"
    assert factor_of(Entry("a", blocks={"D03": 0.25}), FLUX, [fused])(fused) == 0.25
    assert factor_of(Entry("a", masks={"attn.to_": 0.5}), FLUX, [fused])(fused) == 0.5
    with pytest.raises(ConfigError, match=r"is one layer of the file, and must have one weight: .*to_q 0.5, .*to_k 1"):
        factor_of(Entry("a", masks={"to_q": 0.5}), FLUX, [fused])(fused)


def test_a_number_that_is_not_finite_is_refused_wherever_it_is() -> None:
    for entry in (
        {"weight": float("nan")},
        {"components": {"te": float("inf")}},
        {"blocks": {"IN01": float("-inf")}},
        {"masks": {"x": "1"}},
    ):
        with pytest.raises(ConfigError, match="must be a finite number"):
            Entry("a", **entry)  # pyright: ignore[reportArgumentType] # that is what is tested
    with pytest.raises(ConfigError, match="no regular expression"):
        Entry("a", masks={"attn(": 0.0})


def test_the_merged_change_of_each_layer_has_its_own_weight() -> None:
    names = [layer("down_blocks.0.attentions.0"), layer("up_blocks.1.attentions.1"), layer("mid_block.attentions.0")]
    parts = {name: Part(LoRA(4, 2.0), {"up": torch.randn(640, 4), "down": torch.randn(4, 320)}) for name in names}
    other = {name: Part(LoRA(3, 1.0), {"up": torch.randn(640, 3), "down": torch.randn(3, 320)}) for name in names}
    entries = (Entry("a", 0.5, blocks="OUTALL", masks={"up_blocks": 4.0}), Entry("b", -2.0, blocks={"IN01": 0.25}))
    inputs = [
        Input(entry.path, AdapterFile(own), str(entry.path), factor_of(entry, SD1, names))  # pyright: ignore[reportArgumentType] # a str
        for entry, own in zip(entries, (parts, other), strict=True)
    ]
    made, report = combine_inputs(MergeRecipe(entries), inputs)
    for name, weights in zip(names, ((0.0, -0.5), (2.0, -2.0), (0.0, -2.0)), strict=True):
        wanted = sum(
            w * s * own[name].tensors["up"].double() @ own[name].tensors["down"].double()
            for w, s, own in zip(weights, (0.5, 1 / 3), (parts, other), strict=True)
        )
        found = made.parts[name].tensors["up"].double() @ made.parts[name].tensors["down"].double()
        assert (found - wanted).norm() < 1e-6 * wanted.norm()  # pyright: ignore[reportAttributeAccessIssue] # tensors
    assert report.total.alone == [0, 2]
