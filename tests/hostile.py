"""Files for tests of what is wrong with files."""

import json
import math
import struct
from typing import Any

import torch
from torch import Tensor

LAYER = "lora_unet_mid_block_attentions_0_proj_in"
NAN, INF = math.nan, math.inf


def lora(**other: Tensor | None) -> dict[str, Tensor]:
    """A LoRA of one layer; other: tensors in place of its own (None: without)."""
    own: dict[str, Tensor | None] = {
        "up": torch.ones(8, 2),
        "down": torch.ones(2, 8),
        "alpha": torch.tensor(1.0),
    } | other
    names = {"up": "lora_up.weight", "down": "lora_down.weight"}
    return {f"{LAYER}.{names.get(end, end)}": tensor for end, tensor in own.items() if tensor is not None}


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def row(shape: Any = (2,), first: Any = 0, last: Any = 8, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}
