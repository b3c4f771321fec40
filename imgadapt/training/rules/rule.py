"""Rule: what is done in a step, and when. This one does nothing."""

from collections.abc import Mapping, Sequence

from imgadapt.file import AdapterFile
from imgadapt.training.checkpoint import Stateful


class Rule:
    """A rule of training; `Run.learn` calls it."""

    def begin(self, step: int) -> None:
        """Before the step's forward passes."""

    def end(self) -> None:
        """After its backward passes, or when they failed."""

    def shape(self) -> None:
        """When its gradient is whole, summed over the processes, before it is measured and clipped."""

    def correct(self) -> None:
        """When its gradient is clipped."""

    def after(self, step: int) -> None:
        """When the optimiser has stepped; the gradients are still there."""

    def shown(self) -> None:
        """When running means stand in the place of the tensors."""

    def states(self) -> Mapping[str, Stateful]:
        """What a checkpoint must hold."""
        return {}

    def said(self) -> Sequence[str]:
        """What there is to know of what is written, a line each."""
        return ()

    def file(self, file: AdapterFile) -> AdapterFile:
        """What is written, of what is on the model."""
        return file
