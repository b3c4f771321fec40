"""A denoiser's Linear layers kept in four or eight bits (bitsandbytes), so that adapters train on a base that fits.

Replaced are the layers of the blocks, nearly all of the weight. Kept are those outside of them (first and last
projection, time, text and guidance embedders, the last norm's modulation: all that is predicted passes through each,
together some hundredths of the weight), what a UNet's residual blocks add for the time (`time_emb_proj`, as
sensitive and as small), and those whose inputs are no multiple of 64, the block that shares a scale in NF4 (QLoRA,
arXiv 2305.14314).
"""

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imgadapt.errors import ConfigError, MissingExtra

Storage = Literal["nf4", "int8"]
"""nf4: 4 bits, 4.127 with the scales, themselves quantised; int8: 8 bits, a scale a row (LLM.int8, arXiv 2208.07339),
which also rounds what goes into a layer to 8 bits a row, by way of fp16.
"""

_BLOCK = 64


def quantise(
    model: nn.Module,
    storage: Storage,
    *,
    device: torch.device,
    dtype: torch.dtype,
    originals: dict[str, Tensor] | None = None,
) -> int:
    """Replace layers of a frozen model by quantised ones, in place, each moved to the device as it is made; how many.

    dtype: of the computation. originals: takes the weights as they were, by the layers' names.

    Raises:
        MissingExtra: bitsandbytes is not installed.
        ConfigError: no layer can be quantised.
    """
    try:
        import bitsandbytes
    except ModuleNotFoundError as error:
        raise MissingExtra("bitsandbytes", "quant") from error
    if storage == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_worth_saying)
    names = [name for name, module in model.named_modules() if _taken(name, module)]
    if not names:
        raise ConfigError(
            f"{type(model).__name__} has no Linear layer in a block, with inputs in {_BLOCK}s, to keep in {storage}"
        )
    for name in names:
        path, _, last = name.rpartition(".")
        parent, layer = model.get_submodule(path), model.get_submodule(name)
        if originals is not None:
            originals[name] = layer.get_parameter("weight").detach()
        setattr(parent, last, _made(bitsandbytes.nn, layer, storage, device, dtype))  # the old one goes, or is kept
    return len(names)


def _worth_saying(record: logging.LogRecord) -> bool:
    """Not that inputs are cast to fp16, which is said for every layer in every step."""
    return "inputs will be cast" not in str(record.msg)


def _taken(name: str, module: nn.Module) -> bool:
    inside = any(part.isdigit() for part in name.split("."))
    return type(module) is nn.Linear and inside and "time_emb" not in name and module.in_features % _BLOCK == 0


def _made(nn4: Any, layer: Any, storage: Storage, device: torch.device, dtype: torch.dtype) -> nn.Module:
    shape, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
    with torch.device("meta"):  # its own first weight is not wanted
        if storage == "nf4":
            made = nn4.Linear4bit(*shape, has_bias, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
            # in eval mode on a CPU with AVX512-BF16 a forward without gradients would pack the weight anew, for good,
            # into a form that passes no gradients on and of which the library's way back mixes up the scales (0.50.2)
            made.support_avx512bf16_for_cpu = False
        else:
            made = nn4.Linear8bitLt(*shape, has_bias, has_fp16_weights=False)
    kept = {"requires_grad": False, "has_fp16_weights": False} if storage == "int8" else {"requires_grad": False}
    if storage == "nf4":
        kept |= {"compress_statistics": True, "quant_type": "nf4", "module": made}
    made.weight = type(made.weight)(layer.weight.detach().to(dtype), **kept)._quantize(device)
    if has_bias:
        made.bias = nn.Parameter(layer.bias.detach().to(device, dtype), requires_grad=False)
    return made.requires_grad_(False).train(layer.training)
