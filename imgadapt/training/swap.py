"""Swap: frozen blocks of a denoiser wait in the machine's memory, and are on the GPU only while they compute.

In the backward a block is computed again (gradient checkpointing), for which it is brought once more; it stays until
the next one is, since autograd takes the nodes of a later block before those of an earlier one.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from imgadapt.errors import ConfigError


class Swap:
    """The first `count` of a model's repeated blocks, swapped; trained tensors stay where they are.

    model: a diffusers model with gradient checkpointing on. device: where it computes.

    Raises:
        ConfigError: it has no repeated blocks, or fewer; or activations are kept, with which weights would have to be.
    """

    def __init__(self, model: Any, count: int, device: torch.device) -> None:
        blocks = repeated(model)
        if count > len(blocks):
            raise ConfigError(f"swap_blocks is {count}; {type(model).__name__} has {len(blocks)} blocks to swap")
        if not getattr(model, "is_gradient_checkpointing", False):
            raise ConfigError("swap_blocks needs --checkpointing: what is kept of activations holds on to the weights")
        self.device, self._here = device, list[nn.Module]()
        self._waiting = {block: _frozen(block, pin=device.type == "cuda") for block in blocks[:count]}
        for block in self._waiting:
            block.register_forward_pre_hook(lambda module, _: self._bring(module))
            block.register_forward_hook(lambda module, _, __: None if _backward() else self._send(module))
            self._send(block)

    @property
    def bytes(self) -> int:
        """Of all that waits."""
        return sum(x.numel() * x.element_size() for rows in self._waiting.values() for _, x in rows)

    def _bring(self, block: nn.Module) -> None:
        for other in [other for other in self._here if other is not block]:
            self._send(other)
        for parameter, waiting in self._waiting[block]:
            parameter.data = waiting.to(self.device, non_blocking=True) if waiting.device != self.device else waiting
        self._here = [block]

    def _send(self, block: nn.Module) -> None:
        for parameter, waiting in self._waiting[block]:
            parameter.data = torch.empty(0, dtype=waiting.dtype, device=self.device)
        self._here = [other for other in self._here if other is not block]


def repeated(model: Any) -> list[nn.Module]:
    """The blocks that a diffusers model is made of, those that it checkpoints one by one."""
    kinds = {"BasicTransformerBlock", *(getattr(model, "_repeated_blocks", None) or ())}
    found = [module for module in model.modules() if type(module).__name__ in kinds]
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    return found or [block for blocks in lists for block in blocks]


def _frozen(block: nn.Module, *, pin: bool) -> list[tuple[nn.Parameter, Tensor]]:
    """(parameter, its values in the machine's memory) of what is not trained."""
    rows: Iterable[nn.Parameter] = (p for p in block.parameters() if not p.requires_grad)
    return [(p, p.data.cpu().pin_memory() if pin else p.data.cpu()) for p in rows]


def _backward() -> bool:
    """Whether autograd is at work: this forward is a checkpoint's second one."""
    return torch._C._current_graph_task_id() != -1
