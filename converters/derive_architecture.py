"""Derive an architecture's layer names from the models themselves, built from their configs on the meta device.

    python converters/derive_architecture.py sd1 imgadapt/arch/sd1.json

For developers: run it when a family is added; the JSON is committed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from imgadapt.arch import canonical
from imgadapt.targets import layers


def sd1() -> dict[str, nn.Module]:
    """Stable Diffusion 1.x: runwayml/stable-diffusion-v1-5, unet/config.json and text_encoder/config.json."""
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
    )
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    return {"unet": unet, "text_encoder": text}


def sdxl() -> dict[str, nn.Module]:
    """Stable Diffusion XL: stabilityai/stable-diffusion-xl-base-1.0, config.json of unet and both text encoders."""
    build: Any = UNet2DConditionModel  # annotated for one transformer layer a block
    unet = build(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    clip_l = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    big_g = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
        projection_dim=1280,
    )
    return {
        "unet": unet,
        "text_encoder": CLIPTextModel(clip_l),
        "text_encoder_2": CLIPTextModelWithProjection(big_g),
    }


FAMILIES = {"sd1": sd1, "sdxl": sdxl}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("family", choices=sorted(FAMILIES))
parser.add_argument("output", type=Path)
args = parser.parse_args()

with torch.device("meta"):
    models = FAMILIES[args.family]()
names: dict[str, list[str]] = {component: [] for component in models}
for name in (row.name for row in layers(models) if row.site.kind in ("linear", "conv")):
    component, _, path = canonical(name).partition(".")
    names[component].append(path)
args.output.write_text(json.dumps(names, indent=0) + "\n", "utf-8")
print(", ".join(f"{component}: {len(paths)} layers" for component, paths in names.items()), "->", args.output)
