"""One process or many: who computes what of a step, and how it is put together (accelerate)."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from imgadapt import locking
from imgadapt.errors import ConfigError, OutputError

T = TypeVar("T")


class Processes:
    """The processes that `accelerate launch` started, or this one.

    index, count: which of how many; main: whether it is the one that writes; device: where it computes.

    The base is in every process, or split over them (`shard`); adapters are a few MB, so their gradients are summed in
    one piece when a step's are complete. A step's batch, its noise and its order do not depend on how many there are.
    """

    def __init__(self, *, cpu: bool = False) -> None:
        # while one process encodes pictures or draws, the others wait, for longer than the usual ten minutes
        patient = InitProcessGroupKwargs(timeout=timedelta(days=1))
        self.accelerator = Accelerator(cpu=cpu, kwargs_handlers=[patient])
        if self.accelerator.mixed_precision not in ("no", "fp8") or self.accelerator.gradient_accumulation_steps > 1:
            raise ConfigError("set --precision and --pieces instead of accelerate's mixed_precision and accumulation")
        self.index, self.count = self.accelerator.process_index, self.accelerator.num_processes
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device

    def share(self, batch: int) -> range:
        """The places of a step's batch that this process computes.

        Raises:
            ConfigError: there are fewer pictures than processes.
        """
        if batch < self.count:
            raise ConfigError(
                f"batch_size is {batch}, for {self.count} processes; it is the whole step's: give it more"
            )
        return range(self.index * batch // self.count, (self.index + 1) * batch // self.count)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its sum over all processes, in place."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        whole = self.accelerator.reduce(flat, "sum")
        assert isinstance(whole, Tensor)
        for tensor, part in zip(tensors, whole.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def shard(self, model: nn.Module, whole: Sequence[nn.Parameter]) -> None:
        """Split a model's frozen weights over the processes, block by block (FSDP2); `whole` ones stay in each.

        All of them must then call the model together.
        """
        if self.count == 1:
            return
        mesh = init_device_mesh(self.device.type, (self.count,))
        kept = set(whole)
        lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
        for module in (*(block for blocks in lists for block in blocks), model):
            fully_shard(module, mesh=mesh, ignored_params=kept)

    def told(self, things: list[T]) -> list[T]:
        """The main process's list, in all of them."""
        rows: list[Any] = [things]
        broadcast_object_list(rows)
        return rows[0]

    def hold(self, folder: Path) -> locking.Lock:
        """The lock of an output folder, for all of them: the main process has it.

        Raises:
            OutputError: another run has it, or it cannot be written.
        """
        lock, fault = locking.Lock(-1, True), ""
        if self.main:
            try:
                lock = locking.take(folder)
            except OutputError as error:
                fault = str(error)
        (fault,) = self.told([fault])
        if fault:
            raise OutputError(fault)
        return lock

    def wait(self) -> None:
        """Until all are here."""
        self.accelerator.wait_for_everyone()
