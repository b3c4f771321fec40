"""Write a base of real size with random weights, to see that a training of that size fits and runs without a download.

    python benchmarks/random_base.py sdxl /tmp/sdxl             # 7 GB in bf16, from the configs that imgadapt brings
    imgadapt style ./pictures --base /tmp/sdxl --precision bf16 --resolution 256 --steps 3 --batch-size 1

Its tokenizers are the embedded base's, whose few words every text encoder has room for. It draws nothing worth seeing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imgadapt import demo
from imgadapt.cli import program
from imgadapt.training.families import hub
from imgadapt.training.families.sketch import sketch


def fill(module: nn.Module) -> nn.Module:
    """Weights for a module on "meta": small normal numbers, norms that scale by 1, no biases."""
    module.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.ndim > 1 and tensor.is_floating_point():
                tensor.normal_(0, 0.02)
            elif tensor.is_floating_point():
                tensor.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))  # position ids
    return module


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=hub.NAMES)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    small: Any = demo.pipeline()
    pipeline: Any = sketch(args.name, torch.bfloat16).pipeline
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            fill(part)
        elif name.startswith("tokenizer"):
            pipeline.register_modules(**{name: small.tokenizer})
    pipeline.save_pretrained(args.folder)
    print(f"{args.folder}: {sum(f.stat().st_size for f in args.folder.rglob('*.safetensors')) / 1e9:.1f} GB")


if __name__ == "__main__":
    program(main, sys.argv[1:])
