"""Files of tensors, as bytes."""

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save as bytes_of

import imgadapt
from tests.fuzz.target import Target


@cache
def scratch() -> Path:
    """A folder of this process alone."""
    return Path(tempfile.mkdtemp())


def placed(data: bytes, name: str) -> Path:
    """A file of these bytes."""
    path = scratch() / name
    path.write_bytes(data)
    return path


def _load(data: bytes) -> None:
    imgadapt.load(placed(data, "x.safetensors"), strict=False)


def _adapters() -> Iterator[bytes]:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
    yield bytes_of({f"{layer}.lora_down.weight": torch.ones(1, 8), f"{layer}.lora_up.weight": torch.ones(8, 1)})
    yield bytes_of({"emb_params": torch.ones(1, 8)})


TARGETS = (Target("safetensors", _load, _adapters, ("__metadata__", '"F32"', '"BF16"', "data_offsets", ".alpha")),)
