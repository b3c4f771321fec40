"""Trains small adapted models alone and in two processes that split every batch; test_ecosystem.py compares.

python tests/two_processes.py RANK FOLDER  # 0 and 1, at the same time
"""

import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from imgadapt import OFT, DoRA, LoRA, Method, attach, collect, parameters, set_weights

METHODS: dict[str, Method] = {
    "lora": LoRA(rank=3, alpha=2),
    "oft": OFT(block_size=4),
    "dora": DoRA(LoRA(rank=3, alpha=2)),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 8, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            h = block(h).sin()
        return h


def sharded(model: Any) -> Any:
    """FSDP2, with an adapted layer as a group of its own."""
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.blocks[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(method: Method, wrap: Callable[[Any], Any], rank: int, processes: int) -> dict[str, list[Tensor]]:
    """An adapter's tensors before and after three steps of SGD, and the output at another strength."""
    torch.manual_seed(0)
    model: Any = Net().requires_grad_(False)
    x = torch.randn(8, 4, 5, 6)
    attach(model, method, targets="*")
    with torch.no_grad():
        for tensor in parameters(model):
            tensor.add_(torch.randn_like(tensor) * 0.2)
    before = [tensor.detach().clone() for tensor in parameters(model)]
    model = wrap(model)
    optimizer = torch.optim.SGD(parameters(model), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(x.chunk(processes)[rank]).cos().mean().backward()
        optimizer.step()
    set_weights(model, {"default": 0.4})
    with torch.no_grad():
        out = model(x)
    after = [whole(tensor).detach().clone() for tensor in parameters(model)]
    made = {"before": before, "after": after, "out": [out]}
    file = [tensor for part in collect(model).parts.values() for tensor in part.tensors.values()]
    return {**made, "collected": [tensor for tensor in file if type(tensor) is Tensor]}


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    made = {f"alone {name}": trained(method, lambda model: model, 0, 1) for name, method in METHODS.items()}
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=2)
    wraps: dict[str, Callable[[Any], Any]] = {"ddp": DistributedDataParallel, "fsdp": sharded}
    for wrapper, wrap in wraps.items():
        for name, method in METHODS.items():
            made[f"{wrapper} {name}"] = trained(method, wrap, rank, 2)
    torch.save(made, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
