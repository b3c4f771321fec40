"""SDXL's UNet at its real size, in bf16 with random weights: imgadapt against diffusers and peft, in one process.

    python benchmarks/sdxl.py
    python benchmarks/sdxl.py --checkpoint sdxl_random.safetensors --json sdxl.json

Two kohya files of rank 16 over all 722 linear layers of the transformers are attached, their strengths changed, both
merged and unmerged. Needs Linux (memory is read from /proc), peft and 13 GB of RAM; takes minutes. A merge's peak is
the largest resident size during it less that before it. Its error is, over some layers, the distance to the formula in
fp32, as a multiple of the distance that rounding to bf16 once leaves: 1 is best, a lost adapter is far above.
--checkpoint writes the model there first (5 GB), so that `merge(originals=)` can read the weights back instead of
keeping them. Exit status 1: a bar is missed.
"""

import argparse
import ctypes
import gc
import hashlib
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import imgadapt
from imgadapt.cli import program
from imgadapt.tensors import write_tensors

CONFIG: dict[str, Any] = {  # stabilityai/stable-diffusion-xl-base-1.0, unet/config.json
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
RANK, ALPHA, WEIGHTS = 16, 8.0, {"a": 0.5, "b": 0.7}
BARS = {  # figure -> (largest value, whether it is a share of theirs)
    "first file, s": (0.1, True),
    "second file, s": (0.1, True),
    "strengths, s": (0.01, False),
    "merge, s": (0.2, True),
    "unmerge, s": (0.1, True),
    "merge's peak, % of the model": (15.0, False),
    "merge's error, x rounding once": (1.01, False),
    "tensors changed by merge + unmerge": (0.0, False),
}
VERSIONS = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft"))
Figures = dict[str, float]
Action = Callable[[], object]


def model() -> Any:
    """The UNet; every tensor is one small random block, repeated."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIG).bfloat16()
    unet.to_empty(device="cpu").requires_grad_(False).eval()
    block = torch.randn(999_983, generator=torch.Generator().manual_seed(0)).mul(0.02).to(torch.bfloat16)
    for tensor in unet.state_dict().values():
        for chunk in tensor.view(-1).split(len(block)):
            chunk.copy_(block[: len(chunk)])
    return unet


def write_adapter(path: Path, seed: int) -> None:
    """A kohya file over all linear layers of the transformers."""
    generator, tensors = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    with torch.device("meta"):
        modules = UNet2DConditionModel(**CONFIG).named_modules()
    for name, module in modules:
        if isinstance(module, nn.Linear) and ".attentions." in name:
            key, (rows, columns) = f"lora_unet_{name.replace('.', '_')}", module.weight.shape
            for end, shape in (("down", (RANK, columns)), ("up", (rows, RANK))):
                tensors[f"{key}.lora_{end}.weight"] = torch.randn(shape, generator=generator).mul(0.02).half()
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path)


def seconds(action: Action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak(action: Action) -> tuple[float, int]:
    """(seconds, bytes over what was resident before) of one call; freed memory is given back and the peak reset."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    return seconds(action), resident("VmHWM") - before


def weights(unet: Any) -> dict[str, Tensor]:
    """The base's own tensors under their own names, whatever is attached."""
    rows = unet.state_dict().items()
    return {name.replace(".base_layer", ""): tensor for name, tensor in rows if ".lora_" not in name}


def digests(unet: Any) -> dict[str, str]:
    return {n: hashlib.sha256(t.view(-1).view(torch.uint8).numpy().data).hexdigest() for n, t in weights(unet).items()}


def expected(unet: Any, files: dict[str, Path]) -> dict[str, Tensor]:
    """What merging makes of every 90th adapted layer, from the formula, in fp32."""
    adapters, base = {name: load_file(file) for name, file in files.items()}, weights(unet)
    names = {f"lora_unet_{n.removesuffix('.weight').replace('.', '_')}": n for n in base}
    wanted: dict[str, Tensor] = {}
    for key in [key for key in names if f"{key}.alpha" in adapters["a"]][::90]:
        pairs = {a: (t[f"{key}.lora_up.weight"], t[f"{key}.lora_down.weight"]) for a, t in adapters.items()}
        change = sum(WEIGHTS[a] * ALPHA / RANK * (up.float() @ down.float()) for a, (up, down) in pairs.items())
        wanted[names[key]] = base[names[key]].float() + change
    return wanted


def measure(
    unet: Any,
    files: dict[str, Path],
    load: Callable[[str, Path], object],
    change: Action,
    merge: Action,
    unmerge: Action,
) -> Figures:
    before, wanted = digests(unet), expected(unet, files)
    first, second = (seconds(lambda n=name, f=file: load(n, f)) for name, file in files.items())
    strengths = median(seconds(change) for _ in range(5))
    merging, extra = peak(merge)
    merged = {name: tensor for name, tensor in weights(unet).items() if name in wanted}
    errors = [((merged[n].float() - w).norm() / (w.bfloat16().float() - w).norm()).item() for n, w in wanted.items()]
    del merged  # or unmerging could not free them
    unmerging, after = seconds(unmerge), digests(unet)
    share = 100 * extra / sum(tensor.nbytes for tensor in weights(unet).values())
    changed = sum(after[name] != digest for name, digest in before.items())
    values = first, second, strengths, merging, unmerging, share, max(errors), float(changed)
    return dict(zip(BARS, values, strict=True))


def theirs(files: dict[str, Path]) -> Figures:
    absent = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    unet, build = model(), cast("Any", StableDiffusionXLPipeline)
    pipe = build(unet=unet, **dict.fromkeys(absent))
    return measure(
        unet,
        files,
        load=lambda name, file: pipe.load_lora_weights(file, adapter_name=name),
        change=lambda: pipe.set_adapters(list(WEIGHTS), list(WEIGHTS.values())),
        merge=lambda: pipe.fuse_lora(components=["unet"], adapter_names=list(WEIGHTS)),
        unmerge=lambda: pipe.unfuse_lora(components=["unet"]),
    )


def ours(files: dict[str, Path], checkpoint: Path | None = None) -> Figures:
    unet, merge = model(), cast("Any", imgadapt.merge)
    if checkpoint:
        write_tensors(checkpoint, unet.state_dict(), {})
    return measure(
        unet,
        files,
        load=lambda name, file: imgadapt.attach(unet, imgadapt.load(file), name=name),
        change=lambda: imgadapt.set_weights(unet, WEIGHTS),
        merge=lambda: merge(unet, originals=checkpoint) if checkpoint else merge(unet),
        unmerge=lambda: imgadapt.unmerge(unet),
    )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="write the model here, and merge with originals= too")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)

    logging.set_verbosity_error()  # on the second file, diffusers lists all keys of the first as missing; see the error
    warnings.simplefilter("ignore")
    figures: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.safetensors") for name in WEIGHTS}
        for seed, file in enumerate(files.values()):
            write_adapter(file, seed)
        figures["theirs"] = theirs(files)
        gc.collect()
        figures["ours"] = ours(files)
        gc.collect()
        if args.checkpoint and "originals" in signature(imgadapt.merge).parameters:
            figures["ours, originals="] = ours(files, args.checkpoint)
    met = True
    print(f"SDXL's UNet, bf16, two files of rank {RANK}, {torch.get_num_threads()} threads; theirs: {VERSIONS}")
    for mode in list(figures)[1:]:
        print(f"{mode:<36}{'ours':>10}{'theirs':>10}{'ratio':>9}   bar")
        for name, (limit, share) in BARS.items():
            own, other = figures[mode][name], figures["theirs"][name]
            ok = own <= (limit * other if share else limit)
            bar = f"<= {limit:g}{' of theirs' if share else ''}"
            print(
                f"{name:<36}{own:>10.4g}{other:>10.4g}{own / (other or 1):>9.3f}   {bar:<18}{'ok' if ok else 'MISSED'}"
            )
            met &= ok
    if args.checkpoint and len(figures) == 2:
        print("merge has no originals= in this imgadapt: that mode is not measured")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    raise SystemExit(0 if met else 1)


if __name__ == "__main__":
    program(main, sys.argv[1:])
