"""Method: what every adapter method is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from imgadapt.sites import Site

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Method(ABC):
    """One adapter method with its hyper-parameters. Stateless: tensors in, a delta out.

    The wrapper multiplies by `scale`, once; `delta` and `act` never do. Shapes are those of `Site`:
    `site.shape` is (out, in) or (out, in / groups, *kernel).
    """

    name: ClassVar[str]
    tensors: ClassVar[tuple[str, ...]]
    """Names of the method's tensors; what a file must hold for one layer."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """What the wrapper multiplies the delta by: alpha / rank, or 1 where there is neither."""

    @abstractmethod
    def check(self, site: Site) -> str | None:
        """Why the method cannot act on this site; None if it can."""

    @abstractmethod
    def init(self, site: Site) -> dict[str, Tensor]:
        """Fresh fp32 tensors whose delta is zero, drawn from torch's global generator."""

    @abstractmethod
    def delta(self, t: Tensors, site: Site) -> Tensor:
        """Unscaled change of the weight, `site.shape`."""

    @abstractmethod
    def act(self, t: Tensors, site: Site, x: Tensor) -> Tensor:
        """`site.op(x, delta)` without building the delta."""

    @abstractmethod
    def fits(self, t: Tensors, site: Site) -> str | None:
        """What is wrong with these tensors for this site, as 'down is (16, 640), ...'; None if they fit."""

    @classmethod
    @abstractmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        """The hyper-parameters that a file's tensors imply; alpha None: the file has none.

        Raises:
            ShapeError: the tensors do not belong together.
            ConfigError: they imply what cannot be (rank 0).
        """

    @abstractmethod
    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        """(up, down), (out, r) and (r, in * kernel), with up @ down == delta flattened, exactly, where they exist."""
