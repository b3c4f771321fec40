"""Checkpoints of tiny or narrow models in the names of the models' own code, with random weights."""

import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor

from imgadapt.arch import architectures
from imgadapt.combining.checkpoints.naming import native_of

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
