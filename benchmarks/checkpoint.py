"""Baking into a checkpoint of SDXL's size, against copying it; taking an adapter out of two.

    python benchmarks/checkpoint.py --folder /tmp/big        # 3 files of 5.6 GB; about five minutes

The file is SDXL's UNet and CLIP-L in the model's own names, bf16, and tensors that no adapter changes. Baking is the
whole command, with a LoRA of rank 16 on the UNet's 722 layers of attention blocks; copying is a copy and an fsync, of
the same file in the same minute. For extracting, a change of rank 16 is planted in each of those layers: weights are
whole numbers over 1024, and up and down are of 1 and -1, so that the difference is of that very rank in bf16, too.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from imgadapt import load
from imgadapt.arch import architectures
from imgadapt.cli import program

RANK, UNIT = 16, 1024
SDXL = next(a for a in architectures() if a.name == "sdxl")
BARS = {"bake_gb": 1.5, "bake_share": 0.5, "extract_seconds": 120.0, "extract_gb": 2.0, "extract_error": 1e-3}


def tensors() -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(key, shape, the adapter's name of the layer or "")."""
    for name, slices in SDXL.native.items():
        shape = SDXL.shape_of(name)
        assert shape is not None
        plain = name.partition(".")[2]
        adapted = len(shape) > 1 and ".attentions." in slices[0].layer
        yield f"model.diffusion_model.{plain}.weight", shape, plain.replace(".", "_") if adapted else ""
        yield f"model.diffusion_model.{plain}.bias", shape[:1], ""
    for name, shape in SDXL.shapes.items():
        if name.startswith("text_encoder."):
            path = name.partition(".")[2]
            path = path if path.startswith("text_model.") else f"text_model.{path}"
            stored = shape[::-1] if "embedding" in name else shape
            yield f"conditioner.embedders.0.transformer.{path}.weight", stored, ""
    for k in range(10):
        yield f"first_stage_model.decoder.{k}.weight", (4096, 4096), ""


def signs(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (rows, columns), generator=generator).float() * 2 - 1


def write(path: Path, *, planted: bool) -> None:
    """The checkpoint, tensor by tensor."""
    rows = [*tensors()]
    header: dict[str, Any] = {}
    end = 0
    for key, shape, _ in rows:
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for k, (_, shape, layer) in enumerate(rows):
            generator = torch.Generator().manual_seed(k)
            values = torch.randint(-100, 101, shape, generator=generator, dtype=torch.int8).to(torch.bfloat16)
            if planted and layer:
                up, down = signs(shape[0], RANK, 2 * k), signs(RANK, values[0].numel(), 2 * k + 1)
                values += (up @ down).view(shape).to(torch.bfloat16)
            file.write((values / UNIT).view(torch.uint8).numpy().tobytes())


def write_adapter(path: Path) -> None:
    made: dict[str, Tensor] = {}
    for key, shape, layer in tensors():
        if layer:
            generator = torch.Generator().manual_seed(len(made))
            down = torch.randn(RANK, *shape[1:], generator=generator) * 0.03
            up = torch.randn(shape[0], RANK, *(1 for _ in shape[2:]), generator=generator) * 0.03
            made[f"lora_unet_{layer}.lora_down.weight"] = down.half()
            made[f"lora_unet_{layer}.lora_up.weight"] = up.half()
            made[f"lora_unet_{layer}.alpha"] = torch.tensor(RANK / 2)
            assert key
    save_file(made, path)


def command(*arguments: str) -> tuple[float, float]:
    """(seconds, peak resident GB) of `imgadapt ...`."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "imgadapt", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"imgadapt {' '.join(arguments)}: exit status {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def copied(source: Path, target: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", source, target], check=True)
    with target.open("rb+") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - start


def error(adapter: Path) -> float:
    """The greatest relative error of a planted layer, from the factors."""
    file = load(adapter)
    planted = {key: (k, shape) for k, (key, shape, layer) in enumerate(tensors()) if layer}
    names = {f"model.diffusion_model.{n.partition('.')[2]}.weight": s[0].layer for n, s in SDXL.native.items()}
    worst = 0.0
    for key, (k, shape) in planted.items():
        part = file.parts[names[key]]
        up, down = part.tensors["up"].flatten(1).double(), part.tensors["down"].flatten(1).double()
        wanted = signs(shape[0], RANK, 2 * k).double() @ signs(RANK, down.shape[1], 2 * k + 1).double() / UNIT
        found = part.method.scale * (up @ down)
        worst = max(worst, float((found - wanted).norm() / wanted.norm()))
    return worst


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    base, tuned, out, adapter = (args.folder / f"{name}.safetensors" for name in ("base", "tuned", "out", "adapter"))
    write(base, planted=False)
    write_adapter(adapter)
    figures: dict[str, Any] = {}
    shares: list[float] = []
    start = min(command("bake", "--help")[0] for _ in range(3))  # Python's and torch's
    for _ in range(args.rounds):
        copy = copied(base, out)
        out.unlink()
        seconds, memory = command("bake", str(base), f"{adapter}:0.8", "--output", str(out))
        out.unlink()
        shares.append(copy / seconds)
        share = f"{copy / seconds:.2f}, without the {start:.1f} s of start {copy / (seconds - start):.2f}"
        print(f"copying {copy:.2f} s, baking {seconds:.2f} s: {share}; peak {memory:.2f} GB", flush=True)
        figures["bake_gb"] = max(memory, figures.get("bake_gb", 0.0))
    figures["bake_share"] = sorted(shares)[len(shares) // 2]
    write(tuned, planted=True)
    seconds, memory = command("extract", str(tuned), str(base), str(out), "--rank", str(RANK), "--dtype", "fp32")
    figures |= {"extract_seconds": seconds, "extract_gb": memory, "extract_error": error(out)}
    print(f"extracting {seconds:.1f} s, peak {memory:.2f} GB, greatest relative error {figures['extract_error']:.1e}")
    report(figures, BARS)
    if args.json:
        args.json.write_text(json.dumps({**figures, "shares": shares}, indent=1))


def report(figures: Mapping[str, float], bars: Mapping[str, float]) -> None:
    for name, bar in bars.items():
        met = figures[name] >= bar if name.endswith("share") else figures[name] <= bar
        print(f"  {name:<16}{figures[name]:10.3g}  bar {bar:g}{'' if met else '  MISSED'}")


if __name__ == "__main__":
    program(main, sys.argv[1:])
