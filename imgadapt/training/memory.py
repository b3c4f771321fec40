"""Peak memory of a training step, predicted without running it and without its weights.

The step's forward and backward run on fake tensors, which have shapes and no memory, and a ledger counts the bytes of
the storages that are alive. What the ledger cannot see is added by rules, each with its reason: how the weights are
stored, the optimiser's state, and what kernels need while they run.
"""

import math
import weakref
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, UnsupportedFakeTensorException
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imgadapt.errors import ConfigError, StateError
from imgadapt.layer import AdapterLayer

RESERVE = 0.1
"""Share to leave free on a GPU, over the prediction: torch's allocator keeps blocks of 2 to 20 MiB, of which the last
parts stay unused, and splits those that it reuses. It was chosen, not measured.
The CUDA context (0.3 to 0.6 GB) comes on top."""


@dataclass(frozen=True)
class Optimizer:
    """What an optimiser keeps.

    state: bytes of its state for a parameter of a shape.
    step: bytes a parameter's element that all take together for the time of a step.
    """

    state: Callable[[torch.Size], int]
    step: int = 0


def _each(count: float) -> Callable[[torch.Size], int]:
    return lambda shape: math.ceil(count * shape.numel())


def _eight_bit(tensors: int) -> Callable[[torch.Size], int]:
    """bitsandbytes' blocks of 256 bytes with a scale in fp32; below 4,096 elements the state is fp32."""

    def state(shape: torch.Size) -> int:
        count = shape.numel()
        return tensors * (4 * count if count < 4096 else count + 4 * math.ceil(count / 256))

    return state


def _factored(shape: torch.Size) -> int:
    """Bytes of a mean over the rows and one over the columns of a parameter's last two axes (arXiv 1804.04235)."""
    if len(shape) < 2:
        return 4 * shape.numel()
    return 4 * shape[:-2].numel() * (shape[-2] + shape[-1])


OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw": Optimizer(_each(8), 4),
    "adamw8bit": Optimizer(_eight_bit(2)),
    "prodigy": Optimizer(_each(16), 4),
    "adafactor": Optimizer(_factored, 4),
    "lion": Optimizer(_each(4), 4),
    "schedule_free": Optimizer(_each(8), 4),
    "came": Optimizer(lambda shape: 4 * shape.numel() + _factored(shape) * (2 if len(shape) > 1 else 1), 4),
    "sgd": Optimizer(_each(0)),
}
"""Two moments in fp32; the same in 8 bits; Prodigy's moments, sum and first values; factored second moments; one
momentum; averages and second moments; CAME's momentum and two factored moments. `step`: the fused loops of torch make
the divisors of all parameters at once."""


@dataclass(frozen=True)
class Storage:
    """How the weights of frozen linear layers are kept; each is made whole again, in its dtype, while it is used.

    element: bytes an element; row: bytes a row; block: bytes a block of 64 elements; tensor: bytes beside.
    """

    element: float
    row: int = 0
    block: int = 0
    tensor: int = 0

    def bytes(self, weight: Tensor) -> int:
        """Of a weight (out, in)."""
        blocks = math.ceil(weight.numel() / 64)
        return math.ceil(self.element * weight.numel()) + self.row * len(weight) + self.block * blocks + self.tensor


STORAGES: Mapping[str, Storage] = {"nf4": Storage(0.5, block=4, tensor=64), "int8": Storage(1, row=4)}
"""bitsandbytes' 4 bits with a scale in fp32 (not nested) and a table of 16 values; its 8 bits with a scale a row."""


@dataclass(frozen=True)
class Estimate:
    """Bytes that a training takes.

    weights: of all that is frozen, as stored. adapter: what is trained. optimizer: its state. ema: averages.
    gradients: all of them. activations: at their most, with the gradients that are there by then, and what the
        kernels take for themselves at that moment.
    step: for the time of the optimiser's step. base: the process without any of it.
    """

    weights: int
    adapter: int
    optimizer: int
    ema: int
    gradients: int
    activations: int
    step: int
    base: int

    @property
    def peak(self) -> int:
        """The most at once: in the backward, or in the optimiser's step, when the activations are gone."""
        fixed = self.weights + self.adapter + self.optimizer + self.ema + self.base
        return fixed + max(self.activations, self.gradients + self.step)

    @property
    def parts(self) -> dict[str, int]:
        """What the peak is the sum of, for tables; what is empty is left out."""
        rows = {
            "process": self.base,
            "weights": self.weights,
            "adapter": self.adapter,
            "optimizer": self.optimizer,
            "ema": self.ema,
            "activations and gradients": max(self.activations, self.gradients + self.step),
        }
        return {name: size for name, size in rows.items() if size}


def estimate(
    model: nn.Module,
    trainable: Sequence[nn.Parameter],
    loss: Callable[[], Tensor],
    *,
    optimizer: str = "adamw",
    ema: bool = False,
    accumulate: bool = False,
    kept: Iterable[nn.Module] = (),
    storage: Literal["nf4", "int8"] | None = None,
    device: str = "cpu",
    base: int = 0,
) -> Estimate:
    """What a training step of a model takes. The model may be on "meta", with adapters attached; it is left as it is.

    loss: makes the loss, (), from inputs that it makes itself on the CPU (`torch.zeros(1, 4, 64, 64)`); it is called on
        fake tensors, so it may not look at values. Gradient checkpointing, precision and dropout are the model's.
    optimizer: a row of OPTIMIZERS. ema: whether averages are kept, in fp32.
    accumulate: gradients of earlier micro-batches are there.
    kept: other modules that stay in memory (autoencoder, text encoders); those that `loss` calls are among them.
    storage: how the model's frozen linear layers will be stored, a row of STORAGES; as they are when not given.
    device: type of the device that it will run on; the CPU's kernels need memory of their own, see `_onednn`.
    base: bytes of the process without models, as `process()` says.

    Attention is the CPU's fused kernel, which keeps what the GPU's keep: the output and a number a row. Dense changes
    (LoHa, LoKr, Full) are taken as added apart, not into the weight, which is up to an output of the layer too much.

    Raises:
        ConfigError: an optimiser or storage that is not in the table.
        StateError: nothing is trainable, the loss does not depend on it, or a model's own code needs values.
    """
    row = _row("optimizer", optimizer, OPTIMIZERS)
    packed = None if storage is None else _row("storage", storage, STORAGES)
    if not trainable:
        raise StateError("nothing is trainable: attach an adapter, and give its parameters")
    kept = list(kept)
    own = {id(parameter) for parameter in trainable}
    quantised = _linear_weights(model, own) if packed else {}
    adapter = _bytes(trainable)
    frozen = [tensor for module in (model, *kept) for tensor in _tensors(module) if id(tensor) not in own]
    weights = _bytes(tensor for tensor in frozen if id(tensor) not in quantised)
    weights += sum(packed.bytes(tensor) for tensor in quantised.values()) if packed else 0
    return Estimate(
        weights=weights,
        adapter=adapter,
        optimizer=sum(row.state(parameter.shape) for parameter in trainable),
        ema=4 * sum(parameter.numel() for parameter in trainable) if ema else 0,
        gradients=adapter,
        activations=_activations((model, *kept), own, quantised, loss, accumulate, device == "cpu"),
        step=row.step * sum(parameter.numel() for parameter in trainable),
        base=base,
    )


def resident(field: Literal["VmRSS", "VmHWM"] = "VmRSS") -> int:
    """Bytes of this process in memory now, or (VmHWM) at their most so far.

    Raises:
        StateError: the system is not Linux, which alone says so in /proc.
    """
    try:
        lines = Path("/proc/self/status").read_text("ascii", "replace").splitlines()
    except OSError as error:
        raise StateError(f"the memory of this process is read from /proc/self/status: {error.strerror}") from error
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def process(dtype: torch.dtype = torch.float32) -> int:
    """Bytes of this process without a model: after a step of a tiny one, which loads what a first step loads (kernels,
    threads' stacks, modules imported late: about 20 MB here). Import what the training imports before.

    Raises:
        StateError: the system is not Linux.
    """
    conv, linear = nn.Conv2d(8, 8, 3, padding=1, dtype=dtype), nn.Linear(8, 8, dtype=dtype)
    optimizer = torch.optim.AdamW([*conv.parameters(), *linear.parameters()])
    x = linear(conv(torch.zeros(2, 8, 4, 8, dtype=dtype)))
    F.scaled_dot_product_attention(x, x, x).sum().backward()
    optimizer.step()
    return resident()


T = TypeVar("T")


def _row(what: str, name: str, table: Mapping[str, T]) -> T:
    if name not in table:
        raise ConfigError(f"{what} is {name!r}; its memory is known for {', '.join(table)}")
    return table[name]


def _activations(
    modules: Sequence[nn.Module],
    own: Collection[int],
    quantised: Collection[int],
    loss: Callable[[], Tensor],
    accumulate: bool,
    on_cpu: bool,
) -> int:
    """The most that a forward and backward have alive beyond what was there before."""
    fakes, ledger = FakeTensorMode(allow_non_fake_inputs=True), _Ledger(on_cpu)
    with _faked(modules, fakes) as made:
        trained = [fake for key, fake in made.items() if key in own]
        if len(trained) < len(own):
            raise StateError(f"{len(own) - len(trained)} of the {len(own)} trainable tensors are not the model's")
        ledger.enter(made.values(), {id(made[key]) for key in quantised})
        for again in range(2 if accumulate else 1):
            with fakes, ledger:
                value = _run(loss)
                value.backward()
                del value
            if not again and all(fake.grad is None for fake in trained):
                raise StateError("no gradient reaches what is trainable: is the adapter on, and in the loss?")
        for fake in trained:
            fake.grad = None
    return ledger.peak


def _run(loss: Callable[[], Tensor]) -> Tensor:
    try:
        value = loss()
    except (DataDependentOutputException, UnsupportedFakeTensorException) as error:
        raise StateError(f"the step cannot be simulated, it needs values: {error}") from error
    if not value.requires_grad:
        raise StateError("the loss does not depend on what is trainable: is the adapter on, and in the loss?")
    return value


class _Ledger(TorchDispatchMode):
    """Counts the bytes of storages that are alive, and the most there were, with what kernels take for themselves.

    live, peak: bytes beyond those of the tensors it was entered with.
    """

    def __init__(self, on_cpu: bool) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._on_cpu = on_cpu
        self._sizes: dict[int, int] = {}
        self._whole: dict[int, int] = {}

    def enter(self, tensors: Iterable[Tensor], quantised: Collection[int]) -> None:
        """Tensors that are there before; quantised: ids of those that are made whole when used."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._sizes[storage._cdata] = 0
            if id(tensor) in quantised:
                self._whole[storage._cdata] = storage.nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:  # which fake tensors ask all the time
            return out
        fresh = [self._count(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if any(fresh) and not _in_place(func):
            self.peak = max(self.peak, self.live + self._scratch(func, args, out))
        return out

    def _count(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return False
        size = self._sizes[key] = storage.nbytes()
        self.live += size
        weakref.finalize(storage, self._free, key)
        return True

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def _scratch(self, func: Any, args: Any, out: Any) -> int:
        size = 0
        if self._whole:
            keys = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
            size += sum(self._whole.get(key, 0) for key in keys)
        return size + (_onednn(func, args, out) if self._on_cpu else 0)


def _in_place(func: Any) -> bool:
    """Whether it is autograd's own sum of the gradients of a tensor that was used twice. It is done in place, but not
    while a dispatch mode is on (torch/csrc/autograd/input_buffer.cpp): the ledger sees a tensor that is not there. In
    the backward gradients are off, save where a checkpoint computes anew, whose sums are real.
    """
    return func is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() >= 0 and not torch.is_grad_enabled()


def _onednn(func: Any, args: Any, out: Any) -> int:
    """What oneDNN's convolutions take: they work on copies in a layout of their own, of the weight, and of the larger
    of input and output (the copy of the smaller is freed before the result is copied back, or made after). With torch
    2.13 and kernels of 3 x 3 most of those measured were within 1 % of this. Not modelled: kernels of 1 x 1 take
    nothing to one copy in fp32, and both in bf16; the backward of attention takes about a query more.
    """
    if func is torch.ops.aten.convolution.default:
        return max(args[0].nbytes, out.nbytes) + args[1].nbytes
    if func is torch.ops.aten.convolution_backward.default:
        return max(args[0].nbytes, args[1].nbytes) + args[2].nbytes
    return 0


@contextmanager
def _faked(modules: Iterable[nn.Module], mode: FakeTensorMode) -> Generator[dict[int, Tensor]]:
    """Within it all tensors of the modules are fake ones on the CPU; gives id of the tensor -> fake.

    They are exchanged in the modules' dictionaries, in the order found, so that tied ones stay tied.
    """
    made: dict[int, Tensor] = {}
    undo: list[tuple[dict[str, Any], str, Tensor]] = []
    seen: set[int] = set()
    try:
        for held in _dictionaries(modules):
            if id(held) in seen:  # an adapter's wrapper shares those of its base
                continue
            seen.add(id(held))
            for name, tensor in held.items():
                if isinstance(tensor, Tensor):
                    if id(tensor) not in made:
                        made[id(tensor)] = _fake(tensor, mode)
                    undo.append((held, name, tensor))
                    held[name] = made[id(tensor)]
        yield made
    finally:
        for held, name, tensor in undo:
            held[name] = tensor


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _dictionaries(modules: Iterable[nn.Module]) -> Generator[dict[str, Any]]:
    """Where modules hold tensors: parameters, buffers, and plain attributes (an adapter's strength)."""
    for root in modules:
        for module in root.modules():
            yield from (module._parameters, module._buffers, module.__dict__)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _linear_weights(model: nn.Module, own: Collection[int]) -> dict[int, Tensor]:
    """The frozen weights of linear layers, by id."""
    bases = (module.base if isinstance(module, AdapterLayer) else module for module in model.modules())
    found = [base.weight for base in bases if isinstance(base, nn.Linear)]
    return {id(weight): weight for weight in found if id(weight) not in own}


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each counted once."""
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())
