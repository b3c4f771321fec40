"""Merging files of real size, whole processes: time and peak memory; against peft's on the same layers.

    python benchmarks/merge.py                    # SDXL and Flux, rank 16, two files to one of rank 16
    python benchmarks/merge.py --only sdxl --json merge.json

peft's `add_weighted_adapter(combination_type="svd")` is timed on one layer of each size, with both of its ways
(`svd_full_matrices`, True by default), and multiplied by how many layers of that size there are: all would take it
many minutes. Its time is that of the call alone, with the model and both adapters in memory; ours is the whole command,
with Python's start, reading, checking and writing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from imgadapt.arch import Architecture, architectures

RANK = 16
BARS = {"sdxl": (5.0, 1e9), "flux": (15.0, None)}


def layers(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Kohya's names of what it trains by default -> shapes: 722 layers of SDXL's UNet, 304 of Flux."""
    native = {
        name: (architecture.native_rows[name], *architecture.shapes[slices[0].layer][1:])
        for name, slices in architecture.native.items()
    }
    if architecture.name == "sdxl":
        wanted = {s.layer for slices in architecture.native.values() for s in slices if ".attentions." in s.layer}
        native = {n: shape for n, shape in native.items() if architecture.native[n][0].layer in wanted}
    else:
        native = {n: shape for n, shape in native.items() if "_blocks." in n}
    return {n.partition(".")[2].replace(".", "_"): shape for n, shape in native.items() if len(shape) > 1}


def write(path: Path, architecture: Architecture, seed: int) -> int:
    """A kohya file of random factors, fp16; how many layers it has."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.03).half()

    tensors: dict[str, Tensor] = {}
    for name, shape in layers(architecture).items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = tensor(RANK, *shape[1:])
        tensors[f"lora_unet_{name}.lora_up.weight"] = tensor(shape[0], RANK, *(1 for _ in shape[2:]))
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(RANK / 2)
    save_file(tensors, path, {"ss_network_module": "networks.lora"})
    return len(tensors) // 3


def command(arguments: Sequence[str]) -> tuple[float, int]:
    """(seconds, peak resident bytes) of `imgadapt ...`."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "imgadapt", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"imgadapt {' '.join(arguments)}: exit status {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_maxrss * 1024


def theirs(counts: Mapping[tuple[int, ...], int], full: bool) -> float:
    """Seconds that peft takes for all layers, from one of each size."""
    total = 0.0
    for shape, count in counts.items():
        model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
        made: Any = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK // 2, target_modules=["0"]))  # pyright: ignore[reportArgumentType]
        made.add_adapter("other", LoraConfig(r=RANK, lora_alpha=RANK // 2, target_modules=["0"]))
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.03)
        start = time.perf_counter()
        made.base_model.add_weighted_adapter(
            ["default", "other"], [0.8, 0.5], "merged", combination_type="svd", svd_rank=RANK, svd_full_matrices=full
        )
        total += count * (time.perf_counter() - start)
    return total


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*BARS], help="one of the two bases")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args(argv)
    figures: dict[str, Any] = {}
    for architecture in (a for a in architectures() if a.name in ([args.only] if args.only else BARS)):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            count, _ = (write(folder / f"{k}.safetensors", architecture, k) for k in (1, 2))
            pair = [f"{folder / '1.safetensors'}:0.8", f"{folder / '2.safetensors'}:0.5"]
            rule = ["--rule", "svd", "--rank", str(RANK), "--dtype", "fp16", "--output", str(folder / "c.safetensors")]
            runs = [command(["merge", *pair, *rule]) for _ in range(args.rounds)]
        counts = Counter((shape[0], shape[1]) for shape in layers(architecture).values())
        seconds, memory = min(run[0] for run in runs), max(run[1] for run in runs)
        row: dict[str, Any] = {"layers": count, "seconds": [run[0] for run in runs], "peak_gb": memory / 1e9}
        print(f"{architecture.name}: {count} layers, 2 x rank {RANK} to rank {RANK}, file to file")
        print(f"  imgadapt merge     {seconds:9.2f} s  peak {memory / 1e9:.2f} GB")
        for full in (False, True):
            taken = theirs(counts, full)
            row[f"peft_{'full' if full else 'thin'}"] = taken
            name = f"peft svd, {'full (its default)' if full else 'thin'}"
            print(
                f"  {name:<27}{taken:9.1f} s  ({taken / seconds:.0f}x), from one layer of each of {len(counts)} sizes"
            )
        figures[architecture.name] = row
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
