"""Peak memory of training steps, predicted on fake tensors and then measured, on the CPU.

    python benchmarks/memory.py
    python benchmarks/memory.py --only "demo 4" "sdxl 256"

Each row is two fresh processes: one predicts, its model on "meta", the other takes two steps of AdamW (the second has
the optimiser's state) on constant weights and reads its own peak from /proc (Linux only). LoRA of rank 16, alpha 8, on
the transformers' layers. "ratio" is measured / predicted of the whole process, "without process" the same without what
it takes before a model is there. The allocator is the C library's own with the two settings in ALLOCATOR (glibc):
blocks of 1 MiB and more are given back when they are freed, as a GPU's allocator could use them again;
--default-allocator leaves them out. SDXL takes 7 GB of RAM. Exit status 1: a ratio is off by more than 15 %.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderTiny, FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from imgadapt import LoRA, attach, demo, parameters
from imgadapt.cli import program
from imgadapt.training.memory import Estimate, estimate, process, resident

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
LIMIT = 0.15
MIB = 2**20
SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL: dict[str, Any] = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
LOADED = AutoencoderTiny, CLIPTextModel, CLIPTokenizer, StableDiffusionPipeline  # by the demo, and imported before
FLUX: dict[str, Any] = {"guidance_embeds": True}


@dataclass(frozen=True)
class Case:
    """One training. side: of the latent, in places."""

    model: str
    side: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    checkpointing: bool = False
    steps: bool = True


BF16, FP32 = torch.bfloat16, torch.float32
CASES = {
    "demo 4": Case("demo", 0, 4, FP32),
    "demo 16": Case("demo", 0, 16, FP32),
    "sd15 256 bf16": Case("sd15", 32),
    "sd15 256 fp32": Case("sd15", 32, 1, FP32),
    "sd15 512 bf16": Case("sd15", 64),
    "sd15 512 fp32": Case("sd15", 64, 1, FP32),
    "sd15 512 bf16 checkpointing": Case("sd15", 64, checkpointing=True),
    "sd15 512 fp32 checkpointing": Case("sd15", 64, 1, FP32, True),
    "sdxl 256 bf16": Case("sdxl", 32),
    "sdxl 256 bf16 checkpointing": Case("sdxl", 32, checkpointing=True),
    "sdxl 1024 bf16 checkpointing": Case("sdxl", 128, checkpointing=True, steps=False),
    "flux 1024 bf16 checkpointing": Case("flux", 128, checkpointing=True, steps=False),
}


def build(case: Case, device: str) -> Any:
    """The model with constant weights, or none on "meta", and a LoRA."""
    if case.model == "demo":
        model: Any = demo.pipeline().unet.to(case.dtype)
    else:
        kind: Any = FluxTransformer2DModel if case.model == "flux" else UNet2DConditionModel
        config = {"sd15": SD15, "sdxl": SDXL, "flux": FLUX}[case.model]
        with torch.device("meta"):
            model = kind(**config).to(case.dtype)
        if device != "meta":
            model.to_empty(device=device)
            for tensor in model.state_dict().values():
                tensor.fill_(0.001)  # drawing random ones takes minutes, and no memory
    model.requires_grad_(False).train()
    if case.checkpointing:
        model.enable_gradient_checkpointing()
    with next(model.parameters()).device:
        attach(model, LoRA(16, 8.0))
    return model


def loss_of(case: Case, model: Any) -> Callable[[], Tensor]:
    """A step's loss on random inputs of the model's own shapes."""
    batch, dtype, config = case.batch, case.dtype, model.config

    def unet() -> Tensor:
        side = case.side or config.sample_size
        noisy = torch.randn(batch, config.in_channels, side, side)
        states = torch.randn(batch, 77, config.cross_attention_dim, dtype=dtype)
        added = {"text_embeds": torch.randn(batch, 1280, dtype=dtype), "time_ids": torch.ones(batch, 6, dtype=dtype)}
        guess = model(noisy.to(dtype), torch.full((batch,), 500), states, added_cond_kwargs=added).sample
        return nn.functional.mse_loss(guess.float(), torch.randn_like(noisy))

    def flux() -> Tensor:
        places = (case.side // 2) ** 2
        packed = torch.randn(batch, places, config.in_channels)
        guess = model(
            packed.to(dtype),
            torch.randn(batch, 512, config.joint_attention_dim, dtype=dtype),
            torch.randn(batch, config.pooled_projection_dim, dtype=dtype),
            torch.full((batch,), 0.5, dtype=dtype),
            torch.zeros(places, 3),
            torch.zeros(512, 3),
            torch.ones(batch),
        ).sample
        return nn.functional.mse_loss(guess.float(), torch.randn_like(packed))

    return flux if case.model == "flux" else unet


def predict(case: Case) -> Estimate:
    base = process(case.dtype)
    model = build(case, "meta")
    return estimate(model, parameters(model), loss_of(case, model), base=base)


def measure(case: Case) -> int:
    """Peak bytes of this process over two steps."""
    torch.manual_seed(0)
    model = build(case, "cpu")
    optimizer, loss = torch.optim.AdamW(parameters(model)), loss_of(case, model)
    for _ in range(2):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    return resident("VmHWM")


def in_process(name: str, what: str, settings: dict[str, str]) -> dict[str, int]:
    """What this program prints as JSON in a process of its own."""
    command = [sys.executable, __file__, "--only", name, "--inner", what]
    done = subprocess.run(command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {what} ended with {done.returncode}; is there enough memory?")
    return json.loads(done.stdout.splitlines()[-1])


def inner(case: Case, what: str) -> None:
    if what == "predict":
        made = predict(case)
        print(json.dumps({"peak": made.peak, "process": made.base, **made.parts}))
    else:
        print(json.dumps({"peak": measure(case)}))


def main(argv: Sequence[str]) -> None:
    diffusers.utils.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, metavar="ROW", help=f"rows: {', '.join(CASES)}")
    parser.add_argument("--default-allocator", action="store_true", help="do not set ALLOCATOR")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--inner", choices=("predict", "measure"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    chosen: list[str] = args.only or list(CASES)
    if args.inner:
        inner(CASES[chosen[0]], args.inner)
        return
    settings = {} if args.default_allocator else ALLOCATOR
    print(
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads, {settings}"
    )
    print(f"{'MiB':<30}{'predicted':>10}{'measured':>10}{'ratio':>8}{'without process':>17}")
    figures: dict[str, dict[str, int]] = {}
    off: list[str] = []
    for name in chosen:
        guess = in_process(name, "predict", settings)
        figures[name] = {f"predicted {key}": value for key, value in guess.items()}
        line = f"{name:<30}{guess['peak'] / MIB:>10.0f}"
        if CASES[name].steps:
            found = in_process(name, "measure", settings)["peak"]
            figures[name]["measured peak"] = found
            ratio, apart = found / guess["peak"], (found - guess["process"]) / (guess["peak"] - guess["process"])
            line += f"{found / MIB:>10.0f}{ratio:>8.3f}{apart:>17.3f}"
            off += [name] if abs(ratio - 1) > LIMIT else []
        print(line, flush=True)
        if args.json:
            args.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    if off:
        raise SystemExit(f"off by more than {LIMIT:.0%}: {', '.join(off)}")


if __name__ == "__main__":
    program(main, sys.argv[1:])
