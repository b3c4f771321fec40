"""LoRA files that other tools wrote do here what they do there (`tests/ground_truth/README.md`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from imgadapt import attach, detach, load, merge, unmerge
from imgadapt.arch import canonical
from imgadapt.file import read_tensors
from imgadapt.targets import layers

FOLDER = Path(__file__).parent / "ground_truth"
NEAR = 5e-7  # deltas are up to 0.47; the tools took theirs as differences of fp32 weights


@dataclass(frozen=True)
class Truth:
    """One tool's file: who wrote it, in which format, how many layers it has and of how many the change is known."""

    path: str
    format: str
    layers: int
    known: int


TRUTHS = (
    Truth("sdscripts/lora_te", "kohya", 20, 20),
    Truth("lycoris/lora", "kohya", 16, 16),
    Truth("onetrainer/lora", "kohya", 16, 16),
    Truth("peft/diffusers_save_lora_weights", "diffusers", 128, 5),
)
EVERY = pytest.mark.parametrize("truth", TRUTHS, ids=lambda truth: truth.path)


@pytest.fixture(scope="module")
def model() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
        sample_size=8,
    )
    config: Any = CLIPTextConfig(
        hidden_size=12,
        intermediate_size=24,
        num_attention_heads=3,
        num_hidden_layers=2,
        vocab_size=50,
        max_position_embeddings=8,
        projection_dim=12,
        bos_token_id=0,
        eos_token_id=1,
    )
    return {"unet": unet, "text_encoder": CLIPTextModel(config)}


def changes(truth: Truth) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the tool changed at strength 1 and at strength 0.5 (where that is recorded), by canonical layer name."""
    full: dict[str, Tensor] = {}
    half: dict[str, Tensor] = {}
    for key, change in read_tensors(FOLDER / f"{truth.path}.delta.safetensors")[0].items():
        name = key.removeprefix("@0.5/").removesuffix(".weight")
        name = f"text_encoder.{name.removeprefix('te.')}" if name.startswith("te.") else f"unet.{name}"
        (half if key.startswith("@0.5/") else full)[name] = change
    return full, half


def weights(model: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, module in ((row.name, row.module) for row in layers(model)):
        assert isinstance(module.weight, Tensor)
        found[canonical(name)] = module.weight.detach().clone()
    return found


@EVERY
def test_every_delta_of_a_tools_file_is_what_the_tool_measured(truth: Truth, model: dict[str, nn.Module]) -> None:
    file = load(FOLDER / f"{truth.path}.safetensors")
    assert (file.format, file.architecture, file.unknown, len(file.parts)) == (truth.format, "sd1", (), truth.layers)
    sites = {canonical(row.name): row.site for row in layers(model)}
    full, _ = changes(truth)
    assert len(full) == truth.known
    for name, change in full.items():
        part = file.parts[name]
        assert part.method.scale == 0.5
        ours = part.method.scale * part.method.delta(part.tensors, sites[name], None)
        torch.testing.assert_close(ours, change, rtol=0, atol=NEAR, msg=lambda text, name=name: f"{name}: {text}")


@EVERY
def test_a_tools_file_has_no_layer_less_or_more_than_the_tool_changed(truth: Truth) -> None:
    file = load(FOLDER / f"{truth.path}.safetensors")
    full, _ = changes(truth)
    assert set(full) <= set(file.parts)
    assert len(set(file.parts) - set(full)) == truth.layers - truth.known
    tensors, _ = read_tensors(FOLDER / f"{truth.path}.safetensors")
    alphas = sum(key.endswith(".alpha") for key in tensors)
    assert sum(len(part.tensors) for part in file.parts.values()) + alphas == len(tensors)


@EVERY
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_merged_file_changes_the_weights_as_the_tool_does(
    truth: Truth, weight: float, model: dict[str, nn.Module]
) -> None:
    full, half = changes(truth)
    wanted = full if weight == 1 else half or {name: change / 2 for name, change in full.items()}
    before = weights(model)
    attach(model, load(FOLDER / f"{truth.path}.safetensors"), weight=weight)
    try:
        merge(model)
        after = weights(model)
        unmerge(model)
    finally:
        detach(model)
    for name, change in wanted.items():
        torch.testing.assert_close(after[name] - before[name], change, rtol=0, atol=NEAR)
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert len(moved) == truth.layers
    assert moved >= set(full)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
