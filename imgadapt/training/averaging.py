"""Averages: running means of the trained tensors, shown in their place and taken away again, to the bit."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from imgadapt.training.checkpoint import Stateful


class Averages:
    """An exponential mean of parameters (diffusers' EMAModel), or that which a schedule-free optimiser keeps itself.

    decay: at most; it begins at 0.1 and is min(decay, (1 + n) / (10 + n)) after n steps. None: no exponential mean.
    """

    def __init__(
        self, decay: float | None, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        self.parameters, self.optimizer = parameters, optimizer
        self.ema: Any = None
        if decay is not None:
            from diffusers.training_utils import EMAModel

            self.ema = EMAModel(parameters, decay=decay)
        self._switch: Any = optimizer if hasattr(optimizer, "eval") and hasattr(optimizer, "train") else None
        if self._switch is not None:
            self._switch.train()

    def states(self) -> dict[str, Stateful]:
        """What a checkpoint must hold."""
        return {} if self.ema is None else {"ema": self}

    def state_dict(self) -> Any:
        """Of the exponential mean."""
        return self.ema.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on with a mean; a checkpoint's is on the CPU, and EMAModel takes it as it is."""
        self.ema.load_state_dict(state_dict)
        self.ema.to(self.parameters[0].device)

    def step(self) -> None:
        """After each step of the optimiser."""
        if self.ema is not None:
            self.ema.step(self.parameters)

    @contextmanager
    def shown(self) -> Generator[None]:
        """Within the block the parameters are their means."""
        if self.ema is None and self._switch is None:
            yield
            return
        before = [parameter.detach().clone() for parameter in self.parameters]
        if self._switch is not None:
            self._switch.eval()
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            if self._switch is not None:
                self._switch.train()
            with torch.no_grad():  # a switch there and back is not exact
                for parameter, value in zip(self.parameters, before, strict=True):
                    parameter.copy_(value)
