"""Bases in files: every layer of a folder or a single file is the tensor that diffusers' converters make of it."""

from collections.abc import Callable, Mapping
from pathlib import Path
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
