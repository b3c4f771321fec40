"""Time one training step of one adapted layer against the frozen layer's own step: imgadapt, peft, LyCORIS.

    pip install peft==0.21.2 lycoris-lora==4.1.3
    python benchmarks/layers.py --layer conv --only LoRA DoRA --rounds 31 --json conv.json

A step is forward, and backward to input and adapter; the base is frozen. All contenders of a layer run in one process,
shuffled, once a round, the frozen layer several times. A figure is the median over rounds of step / median frozen step
of that round (lowest-highest). Before each step all that is trained gets a new version, as from an optimiser, so that
nothing cached survives. lycoris: the faster of default path and bypass_mode. Bar: 1.3 (linear), 1.5 (conv), and at most
2 % (noise) slower than the faster peer. --flops: matmul and conv FLOPs; MiB kept for backward that no parameter owns.
"""

import argparse
import copy
import json
import logging
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
from lycoris.modules import boft, diag_oft, glora, ia3, locon, loha, lokr
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from imgadapt import BOFT, IA3, OFT, DoRA, GLoRA, LoHa, LoKr, LoRA, Method, attach, parameters
from imgadapt.cli import program

LAYERS = {  # the layer, the shape of its input, the bar
    "linear": (nn.Linear(1280, 1280).requires_grad_(False), (1, 1024, 1280), 1.3),
    "conv": (nn.Conv2d(640, 640, 3, padding=1).requires_grad_(False), (1, 640, 32, 32), 1.5),
}


@dataclass(eq=False)
class Contender:
    """A layer to step, what it trains, and its times or counts."""

    layer: Any
    trained: Sequence[nn.Parameter] = ()
    figures: list[float] = field(default_factory=list[float])
    saved: float = 0.0

    def time(self, x: Tensor, gradient: Tensor) -> float:
        """Seconds of one step, from no gradients and new versions of all that is trained."""
        for tensor in (x, *self.trained):
            tensor.grad = None
            tensor.detach().mul_(1)
        start = time.perf_counter()
        self.layer(x).backward(gradient)
        return time.perf_counter() - start

    def count(self, x: Tensor, gradient: Tensor) -> int:
        """FLOPs of one step; `saved` becomes the MiB of the storages it keeps for backward that no parameter owns."""
        kept: list[Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
        with FlopCounterMode(display=False) as counter, hooks:
            out = self.layer(x)
            sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
            out.backward(gradient)
        owned = {tensor.untyped_storage().data_ptr() for tensor in (*self.layer.parameters(), *self.trained)}
        self.saved = sum(size for pointer, size in sizes.items() if pointer not in owned) / 2**20
        return counter.get_total_flops()


@dataclass(frozen=True)
class Row:
    """One method as each library names it; `blocks` (stages, size) replace those that LyCORIS picks."""

    ours: Method
    config: Any  # of peft
    module: Any  # of lycoris
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    blocks: tuple[int, ...] = ()
    count: int = 1

    def enter(self, base: nn.Module) -> Iterator[tuple[str, Contender]]:
        """Every contender, each on its own copy of the layer, its tensors away from any zero they start at."""
        makers = {"ours": self.in_imgadapt, "lycoris": self.in_lycoris}
        if "weight_decompose" not in self.options:  # which bypass_mode ignores
            makers["lycoris bypass"] = lambda layer: self.in_lycoris(layer, bypass=True)
        if not (isinstance(self.config, peft.GloraConfig) and isinstance(base, nn.Conv2d)):  # peft has none on conv
            makers["peft"] = self.in_peft
        for tool, make in makers.items():
            contender = make(copy.deepcopy(base))
            dtype = base.get_parameter("weight").dtype if "lycoris" in tool else torch.float32  # it refuses to mix
            for tensor in contender.trained:
                tensor.data = (tensor.data + 0.01 * torch.randn(tensor.shape)).to(dtype)
            yield tool, contender

    def in_imgadapt(self, layer: nn.Module) -> Contender:
        model = nn.Sequential(layer)
        for i in range(self.count):
            attach(model, self.ours, targets="*", name=str(i))
        return Contender(model[0], [tensor for i in range(self.count) for tensor in parameters(model, str(i))])

    def in_peft(self, layer: nn.Module) -> Contender:
        names, self.config.target_modules = [f"adapter{i}" for i in range(self.count)], {"0"}
        model: Any = peft.get_peft_model(nn.Sequential(layer), copy.copy(self.config), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, copy.copy(self.config))
        model.base_model.set_adapter(names)
        return Contender(model.base_model.model[0], [tensor for tensor in model.parameters() if tensor.requires_grad])

    def in_lycoris(self, layer: nn.Module, bypass: bool = False) -> Contender:
        trained: list[nn.Parameter] = []
        for _ in range(self.count):
            module = self.module("adapter", layer, bypass_mode=bypass, **{"lora_dim": 16, **self.options})
            if self.blocks:
                *stages, size = self.blocks
                module.oft_blocks = nn.Parameter(torch.zeros(*stages, module.dim // size, size, size))
            module.apply_to()
            trained += module.parameters()
        return Contender(layer, trained)


LORA, KRON, FULL = locon.LoConModule, lokr.LokrModule, {"full_matrix": True, "factor": 16}
ROWS = {
    "LoRA r16": Row(LoRA(rank=16, alpha=8), peft.LoraConfig(r=16), LORA),
    "DoRA r16": Row(DoRA(LoRA(rank=16)), peft.LoraConfig(r=16, use_dora=True), LORA, {"weight_decompose": True}),
    "LoHa r8": Row(LoHa(rank=8), peft.LoHaConfig(r=8), loha.LohaModule, {"lora_dim": 8}),
    "LoKr f16 full": Row(LoKr(rank=None, factor=16), peft.LoKrConfig(r=1280, decompose_factor=16), KRON, FULL),
    "LoKr f-1 r8": Row(LoKr(rank=8, factor=-1), peft.LoKrConfig(r=8, decompose_factor=-1), KRON, {"lora_dim": 8}),
    "OFT b32": Row(OFT(block_size=32), peft.OFTConfig(oft_block_size=32), diag_oft.DiagOFTModule, blocks=(32,)),
    "BOFT b4 m4": Row(BOFT(block_size=4, factors=4), peft.BOFTConfig(), boft.ButterflyOFTModule, blocks=(4, 4)),
    "GLoRA r16": Row(GLoRA(rank=16), peft.GloraConfig(r=16, config_C="none", config_D_E="none"), glora.GLoRAModule),
    "IA3": Row(IA3(), peft.IA3Config(feedforward_modules=[]), ia3.IA3Module),
    "1 LoRA r64": Row(LoRA(rank=64, alpha=8), peft.LoraConfig(r=64), LORA, {"lora_dim": 64}),
    "4 LoRA r16": Row(LoRA(rank=16, alpha=8), peft.LoraConfig(r=16), LORA, count=4),
}
METHODS = ["LoRA", "DoRA", "LoHa", "LoKr", "OFT", "BOFT", "GLoRA", "IA3"]
NOTES = """Not alike: peft's BOFT has 1 factor (more need its CUDA extension), its OFT 5 Neumann terms, its GLoRA W * A
elementwise; blocks of lycoris' BOFT, and OFT on conv, are set by hand. 4 LoRA: all live; compare with 1 of rank 64."""


def measure(table: Mapping[str, Mapping[str, Contender]], frozen: Contender, x: Tensor, rounds: int) -> float:
    """Seconds of the frozen step, or FLOPs without rounds; the contenders' figures become theirs relative to it."""
    gradient, bases = torch.randn_like(x), list[float]()
    contenders = [contender for tools in table.values() for contender in tools.values()]
    step = Contender.time if rounds else Contender.count
    for i in range(rounds + 1):  # the first warms up; only what takes 40 frozen steps is timed in it, and never again
        order = [c for c in contenders if c.figures[:1] < [40.0]] + [frozen] * (len(contenders) // 4 + 1)
        times = [(contender, step(contender, x, gradient)) for contender in random.sample(order, len(order))]
        bases.append(median(t for c, t in times if c is frozen))
        for contender, seconds in times:
            contender.figures += [seconds / bases[-1]] * (i > 0 or not rounds or seconds > 40 * bases[0])
    return median(bases[1:] or bases)


def line(name: str, tools: Mapping[str, Contender], bar: float, flops: bool) -> str:
    """A line of the table: ours, peft, the better path of LyCORIS, the bar, and whether it is missed."""
    middle = {tool: median(contender.figures) for tool, contender in tools.items()}
    path = min((tool for tool in tools if "lycoris" in tool), key=lambda tool: (middle[tool], tools[tool].saved))
    cells = dict.fromkeys(("ours", "peft", path), "-")
    for tool in cells.keys() & tools:
        figures, saved = tools[tool].figures, tools[tool].saved
        more = f"{saved:.1f} MiB" if flops else f"({min(figures):.2f}-{max(figures):.2f})"
        cells[tool] = f"{middle[tool]:.2f} {more}{' bypass' if 'bypass' in tool else ''}"
    text = f"{name:<15}" + "".join(f"{cell:<{25 if tool == path else 18}}" for tool, cell in cells.items())
    peer = min(middle[tool] for tool in tools if tool != "ours")
    missed = [f"  OVER {bar}"] * (middle["ours"] > bar) + ["  SLOWER THAN A PEER"] * (middle["ours"] > 1.02 * peer)
    return text.rstrip() if flops else f"{text}{min(bar, peer):.2f}{''.join(missed)}"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", choices=[*LAYERS], nargs="+", default=[*LAYERS])
    parser.add_argument("--only", choices=METHODS, nargs="+", default=METHODS, metavar="METHOD", help=str(METHODS))
    parser.add_argument("--rounds", type=int, default=15, help="of timing, after one that warms up")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of base and x")
    parser.add_argument("--flops", action="store_true", help="count FLOPs and bytes kept instead of timing")
    parser.add_argument("--json", type=Path, help="write every figure there")
    args = parser.parse_args(argv)
    written: dict[str, Any] = {"dtype": args.dtype, "flops": args.flops, "threads": torch.get_num_threads()}
    for kind in args.layer:
        layer, shape, bar = LAYERS[kind]
        x = torch.randn(shape, dtype=getattr(torch, args.dtype), requires_grad=True)
        layer.to(x.dtype)
        table = {name: dict(row.enter(layer)) for name, row in ROWS.items() if {*name.split()} & {*args.only}}
        base = measure(table, Contender(layer), x, 0 if args.flops else args.rounds)
        print(f"{kind}, {shape}, {args.dtype}; the frozen step: {base:.4g} {'FLOP' if args.flops else 'seconds'}")
        print(f"{'':<15}{'ours':<18}{'peft':<18}{'lycoris':<25}{'' if args.flops else 'bar'}")
        for name, tools in table.items():
            print(line(name, tools, bar, args.flops))
            written[f"{kind}, {name}"] = {t: {"figures": c.figures, "saved_mib": c.saved} for t, c in tools.items()}
    print(NOTES)
    if args.json:
        args.json.write_text(json.dumps(written, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    logging.disable(logging.INFO)
    program(main, sys.argv[1:])
