"""Derive an architecture's layer names from the models themselves, built from their configs on the meta device.

    python converters/derive_architecture.py sd1 imgadapt/arch/sd1.json

For developers: run it when a family is added; the JSON is committed.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

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


FAMILIES = {"sd1": sd1}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("family", choices=sorted(FAMILIES))
parser.add_argument("output", type=Path)
args = parser.parse_args()

with torch.device("meta"):
    models = FAMILIES[args.family]()
names: dict[str, list[str]] = {component: [] for component in models}
for name, _, _ in layers(models):
    component, _, path = canonical(name).partition(".")
    names[component].append(path)
args.output.write_text(json.dumps(names, indent=0) + "\n", "utf-8")
print(", ".join(f"{component}: {len(paths)} layers" for component, paths in names.items()), "->", args.output)
