"""Time reading, showing and converting files of real size: seconds of work, and peak memory as a share of the file.

    python benchmarks/formats.py
    python benchmarks/formats.py --json formats.json

Each piece of work is a process of its own, timed inside from after its imports; memory is what the process's resident
size grew by at most (Linux). Exit status 1: a bar is missed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from imgadapt.arch import architectures
from imgadapt.cli import program

BARS = {  # work -> (file, most seconds, most memory in sizes of the file)
    "show": ("large", 1.0, None),
    "show without norms": ("large", 1.0, None),
    "load": ("large", 1.0, None),
    "convert kohya to diffusers": ("small", 1.0, 1.2),
    "convert kohya to comfyui": ("small", 1.0, 1.2),
    "convert kohya to peft": ("small", 1.0, 1.2),
}
WORK = {
    "show": "from imgadapt.summary import summary; summary(load(path))",
    "show without norms": "from imgadapt.summary import summary; summary(load(path), norms=False)",
    "load": "load(path)",
    "convert kohya to diffusers": "save(load(path), out, format='diffusers')",
    "convert kohya to comfyui": "save(load(path), out, format='comfyui')",
    "convert kohya to peft": "save(load(path), out, format='peft')",
}
CHILD = """
    import json, sys, time
    from pathlib import Path
    import torch
    from imgadapt import load, save
    from imgadapt.tensors import read_tensors
    path, out = sys.argv[1:]
    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.perf_counter()
    {work}
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, resident("VmHWM") - before]))
"""


def write_adapter(path: Path, rank: int) -> None:
    """A kohya file over the linear layers of SDXL's transformers, fp16."""
    sdxl = next(a for a in architectures() if a.name == "sdxl")
    tensors: dict[str, Tensor] = {}
    for name, slices in sdxl.native.items():
        shape = sdxl.shapes[slices[0].layer]
        if "transformer_blocks" not in name or len(shape) != 2:
            continue
        key = f"lora_unet_{name.partition('.')[2].replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, shape[1]).half() * 0.02
        tensors[f"{key}.lora_up.weight"] = torch.randn(shape[0], rank).half() * 0.02
        tensors[f"{key}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, path, {"ss_network_module": "networks.lora", "ss_network_dim": str(rank)})


def measure(work: str, path: Path, out: Path) -> tuple[float, int]:
    """(seconds, bytes) of the best of three."""
    code = textwrap.dedent(CHILD).replace("{work}", WORK[work])
    runs: list[list[float]] = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), str(out)], check=True, capture_output=True, text=True
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return min(run[0] for run in runs), int(min(run[1] for run in runs))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args(argv)
    rows: dict[str, Any] = {}
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        files = {"small": Path(folder) / "small.safetensors", "large": Path(folder) / "large.safetensors"}
        write_adapter(files["small"], 15)
        write_adapter(files["large"], 36)
        for name, path in files.items():
            print(f"{name}: SDXL, kohya, {path.stat().st_size / 1e6:.0f} MB")
        for work, (which, most, share) in BARS.items():
            size = files[which].stat().st_size
            seconds, used = measure(work, files[which], Path(folder) / "out.safetensors")
            over = seconds > most or (share is not None and used > share * size)
            missed |= over
            rows[work] = {"seconds": seconds, "bytes": used, "file": size}
            memory = f"{used / size:.2f} x the file"
            print(f"{work:<28}{seconds:7.3f} s (<= {most})   {memory:<18}{'  MISSED' if over else ''}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    program(main, sys.argv[1:])
