"""Files that other tools wrote do here what they do there (`tests/ground_truth/README.md`)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from imgadapt import attach, detach, load, merge, save, unmerge
from imgadapt.arch import architectures, canonical
from imgadapt.formats import FORMATS, Writer
from imgadapt.methods import LoKr
from imgadapt.sites import Site
from imgadapt.tensors import read_tensors

HERE = Path(__file__).parent
FOLDER = HERE / "ground_truth"
NEAR = 1e-4  # of the norm of the change
NOISE = 1e-6  # norm of a change that is rounding: the tools took theirs as differences of fp32 weights


@dataclass(frozen=True)
class Truth:
    """One tool's file: in which format, of how many layers.

    untold: layers of which the truth says nothing. factors: (part of a layer's name, the tool's change over ours),
        where the file cannot say what the tool does.
    bends: whether the tool's own strength 0.5 is no half of its change; here it is of every method.
    """

    path: str
    format: str
    layers: int = 16
    untold: int = 0
    factors: Mapping[str, float] = field(default_factory=dict[str, float])
    bends: bool = False

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.path}.safetensors"

    @property
    def flux(self) -> bool:
        return self.path.startswith("flux_tiny")

    def factor(self, name: str) -> float:
        """The tool's change of a tensor over ours."""
        return next((factor for part, factor in self.factors.items() if part in name), 1.0)

    def changes(self, end: str = "delta") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the tool changed at strength 1, and at 0.5 as far as that is known: tensor's full name -> change."""
        full: dict[str, Tensor] = {}
        half: dict[str, Tensor] = {}
        for key, change in read_tensors(FOLDER / f"{self.path}.{end}.safetensors")[0].items():
            name = key.removeprefix("@0.5/")
            component = "transformer" if self.flux else "text_encoder" if name.startswith("te.") else "unet"
            (half if key.startswith("@") else full)[f"{component}.{name.removeprefix('te.')}"] = change
        return full, half


_FULL_FACTORS: dict[str, float] = dict.fromkeys(
    (
        *("conv_in", "conv_out", "attentions.0.proj_in", "attentions.0.transformer_blocks.0.attn1.to_out.0"),
        *("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.downsamplers.0.conv"),
        *("down_blocks.0.resnets.0.conv1", "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_k"),
    ),
    2**0.5,
)
"""Of rank 2: trained by alpha / sqrt(rank), and a file of two full factors says neither rank nor that."""
_SPLIT_QKV: dict[str, float] = {
    **dict.fromkeys(("single_transformer_blocks", "single_blocks"), 4.0),
    **dict.fromkeys(("transformer_blocks", "double_blocks"), 3.0),
}
"""sd-scripts trains each of q, k, v (and mlp) by alpha over its own rank, and files say alpha over the sum of ranks;
every reader follows the file."""

TRUTHS = (
    *(
        Truth(f"lycoris/{name}", "lycoris")
        for name in (
            *("diagoft", "diagoft_constraint", "full", "glora", "ia3", "loha", "loha_rs", "loha_scalar"),
            *("lokr", "lokr_both", "lokr_full", "lora", "lora_scalar", "lora_tucker"),
        )
    ),
    Truth("lycoris/lokr_rs", "lycoris", factors=_FULL_FACTORS),
    *(
        Truth(f"lycoris/{name}", "lycoris", bends=True)
        for name in (
            *("boft", "boft_constraint", "diagoft_rescaled", "loha_dora_in", "lokr_dora_out", "lora_dora_in"),
            "lora_dora_out",
        )
    ),
    Truth("sdscripts/lora_te", "kohya", 20),
    Truth("sdscripts/dylora", "kohya", 13),
    Truth("sdscripts/oft", "kohya-oft", 8),
    Truth("sdscripts/oft_alpha0", "kohya-oft", 8),  # to kohya, alpha 0 is a limit of 0: nothing moves
    *(
        Truth(f"peft/{name}", "peft")
        for name in ("boft", "ia3", "loha", "lokr", "lora", "lora_dora", "lora_rslora", "oft", "oft_coft")
    ),
    Truth("peft/diffusers_save_lora_weights", "diffusers", 128, untold=123),
    *(
        Truth(f"onetrainer/{name}", "onetrainer")
        for name in ("dora_in", "lokr", "lokr_both_tucker", "lora", "oft", "oft_scaled")
    ),
    Truth("onetrainer/aitoolkit_lokr_full", "ai-toolkit"),
    Truth("flux_tiny/kohya_lora", "kohya", 20),
    Truth("flux_tiny/kohya_lora_split_qkv", "kohya", 10, factors=_SPLIT_QKV),
    *(Truth(f"flux_tiny/lycoris_{name}", "lycoris", 23) for name in ("diagoft", "dora_out", "loha")),
    *(Truth(f"flux_tiny/lycoris_{name}", "lycoris", 23) for name in ("lokr", "lokr_full_f4")),
)
EVERY = pytest.mark.parametrize("truth", TRUTHS, ids=lambda truth: truth.path)

Model = dict[str, nn.Module]


@pytest.fixture(scope="module")
def sd1() -> Model:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
        sample_size=8,
    )
    unet.load_state_dict(read_tensors(FOLDER / "base_unet_sd15_tiny.safetensors")[0])
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
    return {"unet": unet.eval(), "text_encoder": CLIPTextModel(config).eval()}


@pytest.fixture(scope="module")
def flux() -> Model:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=10,
        pooled_projection_dim=6,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 4),
    )
    base = read_tensors(FOLDER / "flux_tiny" / "base_diffusers.safetensors")[0]
    rest = transformer.load_state_dict(base, strict=False)
    assert not rest.unexpected_keys
    assert all(".norm_" in name for name in rest.missing_keys)  # of q and k; they are 1, and no file has them
    return {"transformer": transformer.eval()}


@pytest.fixture
def model(truth: Truth, sd1: Model, flux: Model) -> Model:
    return flux if truth.flux else sd1


def values(model: Model) -> dict[str, Tensor]:
    """Every tensor of the model under its canonical name."""
    return {
        canonical(f"{component}.{name}"): tensor.detach().clone()
        for component, module in model.items()
        for name, tensor in module.state_dict().items()
    }


@torch.no_grad()
def outputs(model: Model) -> Tensor:
    """What all components put out, for a batch of two."""
    numbers = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers)

    given: dict[str, Any] = {
        "unet": {"sample": random(2, 4, 8, 8), "timestep": 500, "encoder_hidden_states": random(2, 5, 12)},
        "text_encoder": {"input_ids": torch.arange(1, 15).view(2, 7)},
        "transformer": {
            "hidden_states": random(2, 4, 8),
            "encoder_hidden_states": random(2, 3, 10),
            "pooled_projections": random(2, 6),
            "timestep": torch.tensor([0.5, 0.2]),
            "img_ids": random(4, 3),
            "txt_ids": torch.zeros(3, 3),
            "guidance": torch.tensor([3.5, 2.0]),
        },
    }
    modules: dict[str, Any] = dict(model)
    return torch.cat([module(**given[name])[0].flatten() for name, module in modules.items()])


def near(ours: Tensor, theirs: Tensor, name: str) -> None:
    error = float((ours - theirs).norm())
    assert error <= NEAR * float(theirs.norm()) + NOISE, f"{name}: off by {error:.2e} of {float(theirs.norm()):.2e}"


@EVERY
def test_a_tools_file_is_recognised_whole(truth: Truth) -> None:
    file = load(truth.file)
    assert (file.format, file.architecture) == (truth.format, "flux" if truth.flux else "sd1")
    assert (dict(file.unknown), dict(file.embeddings)) == ({}, {})
    assert file.metadata == read_tensors(truth.file)[1]
    kept = [part.source.tensors for part in file.parts.values() if part.source is not None]
    assert {key for tensors in kept for key in tensors} == set(read_tensors(truth.file)[0])


@EVERY
def test_a_merged_file_changes_the_weights_as_the_tool_does_and_no_others(truth: Truth, model: Model) -> None:
    full, half = truth.changes("delta_diffusers" if truth.flux else "delta")
    before = values(model)
    attach(model, load(truth.file))
    try:
        live = outputs(model)
        merge(model)
        after, merged = values(model), outputs(model)
        unmerge(model)
        unmerged = values(model)
        detach(model)
        bare = outputs(model)
        attach(model, load(truth.file), weight=0.5)
        merge(model)
        weaker = values(model)
    finally:
        detach(model)

    ours = {name: after[name] - before[name] for name in before}
    for name, change in full.items():
        near(ours[name] * truth.factor(name), change, name)
        near(weaker[name] - before[name], ours[name] / 2, f"{name} at strength 0.5")
    if truth.bends:  # LyCORIS' own rules for DoRA, BOFT and rescaled OFT are no other reader's
        assert max(float((change * 2 - full[name]).norm() / full[name].norm()) for name, change in half.items()) > 0.05
    else:
        for name, change in half.items():
            near((weaker[name] - before[name]) * truth.factor(name), change, f"{name} at strength 0.5")

    moved = {name for name, change in ours.items() if change.any()}
    assert moved & set(full) == {name for name, change in full.items() if float(change.norm()) > NOISE}
    assert len(moved - set(full)) == truth.untold
    assert len({name.rpartition(".")[0] for name in moved | set(full)}) == truth.layers
    assert float((live - merged).norm()) < 1e-4 * float((live - bare).norm()) + 1e-6 * float(bare.norm())
    assert all(torch.equal(tensor, before[name]) for name, tensor in unmerged.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in values(model).items())


def test_lokr_is_off_by_the_root_of_the_rank_in_layers_of_two_full_factors_only() -> None:
    """What `_FULL_FACTORS` names are those layers, all of them."""
    truth = next(truth for truth in TRUTHS if truth.path == "lycoris/lokr_rs")
    for name, part in load(truth.file).parts.items():
        assert isinstance(part.method, LoKr)
        assert (part.method.rank is None) == (truth.factor(name) != 1), name


@pytest.mark.parametrize("truth", [truth for truth in TRUTHS if truth.flux], ids=lambda truth: truth.path)
def test_fused_again_a_file_changes_the_models_own_layers_as_the_tool_does(truth: Truth, tmp_path: Path) -> None:
    """In Black Forest Labs' naming, where q, k and v are one layer, as ComfyUI has it."""
    file = load(truth.file)
    base, _ = read_tensors(FOLDER / "flux_tiny" / "base_bfl.safetensors")
    full, _ = truth.changes("delta_bfl")
    form = next(form for form in FORMATS if form.name == "comfyui")
    architecture = next(a for a in architectures() if a.name == "flux")
    found: dict[str, Tensor] = {}
    for step in Writer(form, architecture, architectures(), dense=True).steps(file.parts):
        for name, part in step.parts.items():
            weight = base[f"{name.removeprefix('transformer.')}.weight"]
            delta = part.method.delta(part.tensors, Site(tuple(weight.shape)), weight)
            found[f"{name}.weight"] = part.method.scale * delta
    assert set(found) == set(full)
    for name, change in full.items():
        near(found[name] * truth.factor(name), change, name)
    stems = {key.removeprefix("diffusion_model.") for key in read_tensors(_as_comfyui(truth, tmp_path))[0]}
    layers = {name.removeprefix("transformer.").removesuffix(".weight") for name in full}
    assert {layer for layer in layers if any(stem.startswith(f"{layer}.") for stem in stems)} == layers
    assert all(any(stem.startswith(f"{layer}.") for layer in layers) for stem in stems)


def _as_comfyui(truth: Truth, folder: Path) -> Path:
    return save(load(truth.file), folder / "x.safetensors", format="comfyui", dense=True)


def test_every_file_of_the_folder_is_tested() -> None:
    paths = {path.relative_to(FOLDER) for path in FOLDER.glob("*/*.safetensors")}
    files = {path for path in paths if ".delta" not in path.name and not path.name.startswith("base")}
    assert files == {Path(f"{truth.path}.safetensors") for truth in TRUTHS}


def test_cloneofsimos_layers_are_found_by_their_numbers() -> None:
    """A really trained file; 144 layers of the UNet are known by their shapes, 48 of the text encoder by structure."""
    path = FOLDER / "real_cloneofsimo_lora_disney.safetensors"
    file = load(path)
    tensors, metadata = read_tensors(path)
    assert (file.format, file.architecture, dict(file.unknown)) == ("cloneofsimo", "sd1", {})
    index: dict[str, list[str]] = json.loads((HERE / "keys" / "cloneofsimo_sd15_index.json").read_text())
    unet = {f"unet.{name}" for name in index["unet"]}
    text = {
        f"text_encoder.text_model.encoder.layers.{block}.self_attn.{end}"
        for block in range(12)
        for end in ("q_proj", "k_proj", "v_proj", "out_proj")
    }
    assert (len(unet), len(text)) == (144, 48)
    assert set(file.parts) == unet | text
    shapes = next(a for a in architectures() if a.name == "sd1").shapes
    for number, name in enumerate(f"unet.{name}" for name in index["unet"]):
        part = file.parts[name]
        assert part.tensors["up"].equal(tensors[f"unet:{number}:up"])
        assert part.tensors["down"].equal(tensors[f"unet:{number}:down"])
        assert (part.tensors["up"].shape[0], part.tensors["down"].shape[1]) == shapes[name]
        assert part.method.scale == 1.0
    assert len(file.embeddings) == 2
    for word in file.embeddings:
        assert word in metadata
