"""Bases by name, folder and single file, and their denoisers in four and eight bits."""

import copy
import json
import logging
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from imgadapt import DoRA, LoRA, attach, parameters
from imgadapt.errors import ConfigError, MissingExtra
from imgadapt.training.families import FAMILIES, hub, load, single_file
from imgadapt.training.families.quantise import Storage, quantise

tiny: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny.py"))))


@pytest.fixture(scope="module", params=list(tiny.PIPELINES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A pipeline of every family, and its folder."""
    torch.manual_seed(0)
    pipeline, folder = tiny.PIPELINES[request.param](), tmp_path_factory.mktemp(request.param)
    pipeline.save_pretrained(folder)
    return pipeline, folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A hub's cache of our own, empty; called with a repository, a folder in it."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def make(name: str) -> Path:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("abc")
        return repository / "snapshots" / "abc"

    return make


# --- folders and names ------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_as_its_family_in_the_dtype_wanted(saved: tuple[Any, Path]) -> None:
    pipeline, folder = saved
    family = load(str(folder), dtype=torch.bfloat16)
    assert type(family) is FAMILIES[type(pipeline).__name__]
    wanted = getattr(pipeline, family.component).state_dict()
    found = family.denoiser.state_dict()
    assert all(torch.equal(found[key], value.to(found[key].dtype)) for key, value in wanted.items())
    assert {value.dtype for value in family.denoiser.parameters()} == {torch.bfloat16}
    exact = pipeline.vae.state_dict()
    assert all(torch.equal(value, exact[key]) for key, value in family.vae.state_dict().items())
    assert not any(p.requires_grad for m in (family.denoiser, *family.encoders.values()) for p in m.parameters())


def test_the_embedded_base_is_stable_diffusion() -> None:
    family = load("demo")
    assert type(family).__name__ == "StableDiffusion"
    assert (family.native, family.latent_shape, family.schedule.prediction) == (64, (16, 8), "v_prediction")
    assert family.schedule.alphas is not None
    assert family.schedule.alphas[-1] == 0
    assert family.draw(["a fox"], [0], steps=2)[0].size == (64, 64)


@pytest.mark.parametrize("name", hub.NAMES)
def test_a_base_that_is_not_in_the_cache_is_never_fetched_but_the_command_told(name: str, cache: Any) -> None:
    with pytest.raises(ConfigError, match=f"base {name} is not on this machine; bring it with: hf download ") as error:
        load(name)
    assert f'hf download {hub.NAMES[name]} --include "*.json"' in str(error.value)


def test_a_base_in_the_cache_is_found_by_short_and_by_full_name(saved: tuple[Any, Path], cache: Any) -> None:
    pipeline, folder = saved
    shutil.copytree(folder, cache(hub.NAMES["sdxl"]))
    shutil.copytree(folder, cache("someone/some.base-2"))
    for name in ("sdxl", "someone/some.base-2"):
        assert type(load(name).pipeline) is type(pipeline)


def test_half_weights_alone_in_the_cache_will_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny.sdxl().save_pretrained(tmp_path, variant="fp16")
    assert load(str(tmp_path)).denoiser.dtype == torch.float32  # pyright: ignore[reportAttributeAccessIssue] # diffusers'


@pytest.mark.parametrize("half", [None, "fp16"])
def test_shards_are_loaded_whatever_lies_beside_them(saved: tuple[Any, Path], tmp_path: Path, half: str | None) -> None:
    """As the hub's folders have them: a pickle's index, what git has not brought of other variants, links to blobs."""
    pipeline, _ = saved
    pipeline.save_pretrained(tmp_path / "base", variant=half, max_shard_size="20KB")
    files = [*(tmp_path / "base").rglob("*.safetensors")]
    assert any("-of-" in file.name for file in files)
    (tmp_path / "blobs").mkdir()
    for k, file in enumerate(files):
        file.rename(tmp_path / "blobs" / str(k))
        file.symlink_to(f"../../blobs/{k}")
        index = {"weight_map": {"x": "pytorch_model-00001-of-00001.bin"}}
        (file.parent / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        if half is None:
            names = ("model.fp16.safetensors", "diffusion_pytorch_model.non_ema.safetensors")
            (file.parent / names["model" in file.name[:5]]).write_text("version https://git-lfs.github.com/spec/v1\n")
        else:
            index = {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
            (file.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    family = load(str(tmp_path / "base"))
    wanted = getattr(pipeline, family.component).state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in family.denoiser.state_dict().items())


def _beside(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"tags": ["a", "b", "c"], "other": 5, "_name_or_path": "x/y", "_diffusers_version": "0.6.0"},
        {"image_encoder": [None, None], "safety_checker": [None, "StableDiffusionSafetyChecker"]},
        {"requires_safety_checker": [None, False], "feature_extractor": ["transformers", "CLIPImageProcessor"]},
    ],
)
def test_entries_of_other_versions_hinder_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    tiny.sd1().save_pretrained(tmp_path)
    _beside(tmp_path, **changes)
    if "feature_extractor" in changes:
        (tmp_path / "feature_extractor").mkdir()
        (tmp_path / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    assert type(load(str(tmp_path))) is FAMILIES["StableDiffusionPipeline"]


def test_a_schedulers_infinity_is_a_number_like_others(tmp_path: Path) -> None:
    tiny.sd1().save_pretrained(tmp_path)
    betas: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    DPMSolverMultistepScheduler(**betas).save_pretrained(tmp_path / "scheduler")
    assert "-Infinity" in (tmp_path / "scheduler" / "scheduler_config.json").read_text()
    _beside(tmp_path, scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    assert load(str(tmp_path)).schedule.alphas is not None


def test_what_is_in_the_cache_in_part_is_told_with_the_command(saved: tuple[Any, Path], cache: Any) -> None:
    _, folder = saved
    shutil.copytree(folder, cache(hub.NAMES["flux"]), ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(
        ConfigError, match=r"flux cannot be read as a base: .*if it is not whole: hf download black-forest"
    ):
        load("flux")


@pytest.mark.parametrize(
    "base", ["sdx", "~nobody-here/x", "no such folder", "./missing/folder/deep", "https://hf.co/a/b"]
)
def test_what_is_no_base_at_all_is_told_what_there_is(base: str, cache: Any) -> None:
    with pytest.raises(ConfigError, match="is not there; wanted 'demo', a diffusers folder, a checkpoint file, or one"):
        load(base)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("StableDiffusionInpaintPipeline", "for inpainting"),
        ("StableDiffusionXLInpaintPipeline", "for inpainting"),
        ("FluxFillPipeline", "for inpainting"),
        ("StableDiffusionInstructPix2PixPipeline", "for editing"),
        ("FluxKontextPipeline", "for editing"),
        ("StableDiffusionXLImg2ImgPipeline", "a refiner, or made to redraw pictures"),
        ("StableDiffusionUpscalePipeline", "for enlarging"),
    ],
)
def test_other_kinds_of_pipeline_are_refused_by_name_before_weights_are_read(
    kind: str, what: str, tmp_path: Path
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(ConfigError, match=f"is a {kind}, {what}; imgadapt trains StableDiffusionPipeline, "):
        load(str(tmp_path))


def test_a_family_that_is_not_trained_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline"}))
    with pytest.raises(ConfigError, match="is a SanaPipeline; imgadapt trains"):
        load(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ConfigError, match=r"model_index\.json is not JSON"):
        load(str(tmp_path))


# --- single files -----------------------------------------------------------------------------------------------------

_UNET = "model.diffusion_model.input_blocks.0.0.weight"
KEYS: dict[str, dict[str, tuple[int, ...]]] = {
    "v1": {_UNET: (2, 4, 3, 3)},
    "v2": {
        _UNET: (2, 4, 3, 3),
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (2, 1024),
    },
    "xl_base": {_UNET: (2, 4, 3, 3), "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (2,)},
    "sd35_large": {"model.diffusion_model.joint_blocks.37.x_block.mlp.fc1.weight": (2, 2)},
    "flux-schnell": {"double_blocks.0.img_attn.norm.key_norm.scale": (2,)},
    "flux-dev": {
        "double_blocks.0.img_attn.norm.key_norm.scale": (2,),
        "guidance_in.in_layer.bias": (2,),
        "img_in.weight": (2, 64),
    },
}
OTHERS: dict[str, dict[str, tuple[int, ...]]] = {
    "xl_refiner": {_UNET: (2, 4, 3, 3), "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": (2,)},
    "inpainting": {_UNET: (2, 9, 3, 3)},
    "flux-fill": {**KEYS["flux-dev"], "img_in.weight": (2, 384)},
    "instruct-pix2pix": {_UNET: (2, 8, 3, 3)},
}


def write(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize("kind", KEYS)
def test_a_files_kind_is_told_by_its_keys_and_the_lender_of_configs_named(
    kind: str, tmp_path: Path, cache: Any
) -> None:
    path = write(tmp_path / "a.safetensors", KEYS[kind])
    assert single_file.kind_of(path, single_file.shapes(path)) == kind
    name = {"v1": "sd1", "v2": "sd2", "xl_base": "sdxl", "flux-dev": "flux"}.get(kind, kind)
    with pytest.raises(ConfigError, match=f"base {name} is not on this machine|the configs of") as error:
        load(str(path))
    assert f"hf download {hub.NAMES[name]} " in str(error.value)


@pytest.mark.parametrize("kind", OTHERS)
def test_single_files_of_other_kinds_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"is of the kind '{kind}'; imgadapt trains single files of v1, "):
        load(str(write(tmp_path / "a.safetensors", OTHERS[kind])))


def test_an_adapter_is_not_taken_for_a_base(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (2, 3)})
    with pytest.raises(ConfigError, match=r"is not a base: .* 1 such as lora_unet_mid_block.*; an adapter\?"):
        load(str(path))


@pytest.mark.parametrize("name", ["torn.safetensors", "torn.ckpt", "picture.png"])
def test_a_torn_file_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x08\0\0\0\0\0\0\0{rubbish")
    with pytest.raises(ConfigError, match=name):
        load(str(tmp_path / name))


_RESNET = (
    *(("norm1.", "in_layers.0."), ("conv1.", "in_layers.2."), ("time_emb_proj.", "emb_layers.1.")),
    *(("norm2.", "out_layers.0."), ("conv2.", "out_layers.3."), ("conv_shortcut.", "skip_connection.")),
)
_DENOISER = (
    *(("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2")),
    *(("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2")),
    *(("down_blocks.0.resnets.0", "input_blocks.1.0"), ("down_blocks.0.attentions.0", "input_blocks.1.1")),
    *(("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"), ("down_blocks.1.resnets.0", "input_blocks.3.0")),
    *(("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1")),
    *(("mid_block.resnets.1", "middle_block.2"), ("up_blocks.0.resnets.0", "output_blocks.0.0")),
    *(("up_blocks.0.resnets.1", "output_blocks.1.0"), ("up_blocks.0.upsamplers.0.conv", "output_blocks.1.1.conv")),
    *(("up_blocks.1.resnets.0", "output_blocks.2.0"), ("up_blocks.1.attentions.0", "output_blocks.2.1")),
    *(("up_blocks.1.resnets.1", "output_blocks.3.0"), ("up_blocks.1.attentions.1", "output_blocks.3.1")),
)
_AUTOENCODER = (
    *(("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")),
    *(("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out")),
    *(("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2")),
    *(("mid_block.attentions.0", "mid.attn_1"), ("down_blocks.0.downsamplers.0", "down.0.downsample")),
    *((f"down_blocks.{k}.resnets.0", f"down.{k}.block.0") for k in (0, 1)),
    *((f"up_blocks.{1 - k}.resnets.{j}", f"up.{k}.block.{j}") for k in (0, 1) for j in (0, 1)),
    ("up_blocks.0.upsamplers.0", "up.1.upsample"),
)


def _renamed(state: dict[str, Tensor], prefix: str, pairs: Any, inner: Any = ()) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        for ours, theirs in pairs:
            key = key.replace(ours, theirs)
        for ours, theirs in inner if ".transformer_blocks." not in key else ():
            key = key.replace(f".{ours}", f".{theirs}")
        yield prefix + key, value.contiguous()


def original(pipeline: Any) -> dict[str, Tensor]:
    """A tiny Stable Diffusion 1 under the names of CompVis' own code."""
    return {
        **dict(_renamed(pipeline.unet.state_dict(), "model.diffusion_model.", _DENOISER, _RESNET)),
        **dict(_renamed(pipeline.vae.state_dict(), "first_stage_model.", _AUTOENCODER)),
        **dict(_renamed(pipeline.text_encoder.state_dict(), "cond_stage_model.transformer.text_model.", ())),
    }


def test_a_single_file_is_the_folder_it_was_made_from(tmp_path: Path, cache: Any) -> None:
    torch.manual_seed(0)
    pipeline = tiny.sd1()
    pipeline.save_pretrained(tmp_path / "folder")
    path = tmp_path / "base.safetensors"
    save_file(original(pipeline), path)
    shutil.copytree(tmp_path / "folder", cache(hub.NAMES["sd1"]), ignore=shutil.ignore_patterns("*.safetensors"))
    family, folder = load(str(path), dtype=torch.bfloat16), load(str(tmp_path / "folder"), dtype=torch.bfloat16)
    assert family.vae.dtype == torch.float32
    assert family.denoiser.dtype == torch.bfloat16  # pyright: ignore[reportAttributeAccessIssue] # diffusers'
    pairs = [(family.denoiser, folder.denoiser), (family.vae, folder.vae)]
    pairs.append((family.encoders["text_encoder"], folder.encoders["text_encoder"]))
    for one, other in pairs:
        wanted = other.state_dict()
        found = one.state_dict()
        assert set(found) == set(wanted)
        assert all(torch.equal(value, wanted[key]) for key, value in found.items())


@pytest.mark.parametrize("zero", [False, True])
def test_files_that_predict_velocity_say_so(zero: bool) -> None:
    pipeline = tiny.sdxl()
    keys = {"v_pred": None, **({"ztsnr": None} if zero else {})}
    made = single_file._with_prediction(pipeline, "xl_base", keys, Path("a"))
    schedule = FAMILIES["StableDiffusionXLPipeline"](made, torch.device("cpu"), torch.float32).schedule
    assert schedule.prediction == "v_prediction"
    assert schedule.alphas is not None
    assert (schedule.alphas[-1].item() == 0) == zero


def test_a_file_of_sd2_is_loaded_with_a_warning_that_it_may_predict_noise() -> None:
    with pytest.warns(UserWarning, match="taken for a base that predicts velocity"):
        single_file._with_prediction(tiny.sd2(), "v2", {}, Path("a.safetensors"))


# --- four and eight bits ----------------------------------------------------------------------------------------------

STORAGES: list[tuple[Storage, float, float]] = [("nf4", 0.33, 0.05), ("int8", 0.56, 0.01)]
"""Size of the whole in bf16, at most, and ‖prediction - unquantised‖ / ‖unquantised‖."""


def transformer(dtype: torch.dtype = torch.float32) -> Any:
    """Flux, large enough that its blocks are most of it."""
    torch.manual_seed(0)
    made: Any = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
    )
    return made.to(dtype).requires_grad_(False).eval()


def predicted(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, states, pooled = (torch.randn(2, *s, generator=generator) for s in ((12, 16), (7, 64), (64,)))
    dtype = model.dtype
    return model(
        hidden_states=x.to(dtype),
        encoder_hidden_states=states.to(dtype),
        pooled_projections=pooled.to(dtype),
        timestep=torch.tensor([0.2, 0.8]),
        img_ids=torch.arange(36.0).view(12, 3),
        txt_ids=torch.zeros(7, 3),
    ).sample.float()


def size(model: Any) -> int:
    """Bytes of all that is kept, scales included: what the state dict holds."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("storage", "share", "coarse"), STORAGES)
@torch.no_grad()
def test_a_denoiser_shrinks_and_still_predicts(storage: Storage, share: float, coarse: float) -> None:
    model = transformer(torch.bfloat16)
    before, expected = size(model), predicted(model)
    kept = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    count = quantise(model, storage, device=torch.device("cpu"), dtype=torch.bfloat16)
    left = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert count == len(kept - left)
    assert {name.split(".")[0] for name in left} == {
        *("time_text_embed", "context_embedder", "x_embedder", "norm_out", "proj_out")
    }
    assert size(model) / before < share
    found = predicted(model)
    assert 1e-4 < distance(found, expected) < coarse
    model.to("cpu").eval()
    assert torch.equal(predicted(model), found)


@pytest.mark.parametrize("method", [LoRA(rank=4, alpha=2), DoRA(LoRA(rank=4, alpha=2))], ids=lambda m: m.name)
@pytest.mark.parametrize(("storage", "share", "coarse"), STORAGES)
def test_gradients_reach_adapters_through_quantised_layers(
    storage: Storage, share: float, coarse: float, method: Any
) -> None:
    exact, losses, gradients = transformer(), [], []
    for model in (exact, copy.deepcopy(exact)):
        if gradients:
            quantise(model, storage, device=torch.device("cpu"), dtype=torch.float32)
            with torch.no_grad():
                predicted(model)  # an evaluation in between must leave the weights as they are
        torch.manual_seed(3)  # the same first values
        attach(model, method, targets=["*.to_q", "*.proj_mlp"])
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for tensor in parameters(model):
                tensor += torch.randn(tensor.shape, generator=generator) * 0.05
        loss = (predicted(model) - 1).square().mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([tensor.grad.flatten() for tensor in parameters(model) if tensor.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert gradients[0].shape == gradients[1].shape
    assert distance(gradients[1], gradients[0]) < 6 * coarse


def test_a_base_is_loaded_quantised_and_its_adapters_learn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipe = tiny.sdxl(block_out_channels=(64, 128), norm_num_groups=32, attention_head_dim=16)
    pipe.save_pretrained(tmp_path)
    family = load(str(tmp_path), dtype=torch.bfloat16, quantise="nf4")
    kinds = {name: type(m).__name__ for name, m in family.denoiser.named_modules() if isinstance(m, torch.nn.Linear)}
    assert kinds["down_blocks.0.attentions.0.proj_in"] == "Linear4bit"
    assert kinds["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"] == "Linear4bit"
    assert kinds["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"] == "Linear"  # 20 inputs
    assert kinds["time_embedding.linear_1"] == kinds["add_embedding.linear_1"] == "Linear"
    assert kinds["mid_block.resnets.0.time_emb_proj"] == "Linear"
    plain = load(str(tmp_path), dtype=torch.bfloat16)
    assert family.identity()["unet"] != plain.identity()["unet"]
    attach(family.denoiser, LoRA(rank=2, alpha=3), targets="transformer")
    conditions = {**family.text(["a fox"]), "sizes": torch.tensor([[12.0, 20, 0, 0, 12, 20]])}
    latents, t = torch.randn(1, 4, 6, 10), torch.tensor([500])
    with torch.no_grad():
        assert distance(family.predict(latents, conditions, t), plain.predict(latents, conditions, t)) < 0.2
    family.predict(latents, conditions, t).square().mean().backward()
    ups = parameters(family.denoiser)[1::2]
    assert all(tensor.grad is not None and tensor.grad.norm() > 0 for tensor in ups)
    assert family.draw(["a fox"], [0], steps=1)[0].size == (16, 16)


def test_int8_does_not_tell_of_each_layer_that_inputs_are_cast(caplog: pytest.LogCaptureFixture) -> None:
    model = transformer(torch.bfloat16)
    quantise(model, "int8", device=torch.device("cpu"), dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        predicted(model)
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


def test_a_denoiser_of_odd_sizes_is_refused() -> None:
    with pytest.raises(ConfigError, match="UNet2DConditionModel has no Linear layer in a block, with inputs in 64s"):
        quantise(tiny.unet(block_out_channels=(8, 12)), "nf4", device=torch.device("cpu"), dtype=torch.float32)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"pip install 'imgadapt\[quant\]'"):
        quantise(transformer(), "nf4", device=torch.device("cpu"), dtype=torch.float32)
