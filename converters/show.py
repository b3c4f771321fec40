"""What is in an adapter file: tool, base, method, ranks, strength of the change, metadata.

imgadapt show style.safetensors
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from imgadapt import load
from imgadapt.cli import program
from imgadapt.formats import Part


def norm(part: Part) -> float | None:
    """Frobenius norm of scale * up @ down, from the two small Gram matrices; None where that is not the change."""
    if set(part.tensors) != {"up", "down"}:
        return None
    up, down = (part.tensors[key].flatten(1).double() for key in ("up", "down"))
    return part.method.scale * torch.sum((up.T @ up) * (down @ down.T)).clamp(min=0).sqrt().item()


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", action="store_true", help="a line a layer")
    args = parser.parse_args(argv)

    file = load(args.file, strict=False)
    parts = file.parts
    tensors = [t for part in parts.values() for t in part.tensors.values()]
    kinds = Counter((part.method.name, part.method.file_rank, round(part.method.scale, 6)) for part in parts.values())
    print(f"{args.file}: {args.file.stat().st_size / 1e6:.2f} MB, {file.format} format")
    print(f"base          {file.architecture or 'not one with a table'}")
    for component, count in Counter(name.partition(".")[0] for name in parts).items():
        print(f"{component:<14}{count} layers")
    for (method, rank, scale), count in kinds.most_common():
        said = "" if rank is None else f"rank {rank}, alpha {scale * rank:g} "
        print(f"{method:<14}{said}(scale {scale:g}): {count} layers")
    print(f"parameters    {sum(t.numel() for t in tensors):,}, {', '.join(sorted({str(t.dtype) for t in tensors}))}")
    norms = {name: value for name, part in parts.items() if (value := norm(part)) is not None}
    if norms:
        print("largest       " + ", ".join(f"{n} {norms[n]:.3g}" for n in sorted(norms, key=lambda n: -norms[n])[:3]))
    if args.layers:
        for name, part in parts.items():
            shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in part.tensors.items())
            said = f"norm {norms[name]:.4g}, " if name in norms else ""
            print(f"  {name}: {said}{shapes}")
    for key, value in sorted(file.metadata.items()):
        print(f"metadata      {key} = {value if len(value) <= 80 else f'{value[:77]}...'}".replace("\n", " "))
    if file.unknown:
        print(f"UNKNOWN       {len(file.unknown)} keys that no table knows: {', '.join(file.unknown[:3])} ...")
        raise SystemExit(1)


if __name__ == "__main__":
    program(main, sys.argv[1:])
