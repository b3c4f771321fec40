"""Slot: one adapter on one layer, with its strength and dropout."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imgadapt.constants import Constants, Source, constants
from imgadapt.errors import ConfigError, StateError
from imgadapt.methods.base import Method, Tensors, Way
from imgadapt.moment import Moment
from imgadapt.ready import Ready
from imgadapt.sites import Site


@dataclass(frozen=True)
class Dropout:
    """What is left out in training, at random; merging and evaluation leave out nothing.

    input: share of the elements of the activation that the adapter reads; the base reads all. The rest is scaled up.
    rank: share of the adapter's ranks (of its blocks for OFT and BOFT) in a forward; the rest is scaled up where the
        change is linear in them.
    module: probability that the adapter is left out of a forward on this layer altogether.

    Raises:
        ConfigError: one is not in [0, 1).
    """

    input: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    def __post_init__(self) -> None:
        for name in ("input", "rank", "module"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} dropout is {getattr(self, name)}; it must be 0 or more, and below 1")

    def __bool__(self) -> bool:
        return self != Dropout()


Strength = float | Tensor
"""One number, or a tensor (batch,): one for each sample."""


class Slot(nn.Module):
    """One adapter on one layer: method, tensors, strength, dropout. Its tensors stay out of the model's state dict.

    moment: of the denoiser it is in, for a method that is `timed`. still: tensors that a training leaves as they are.
    first: 1 for the ranks that act in this step, 0 for the others, (rank,); None: all do.
    """

    weight: Strength
    per_sample: bool
    on: bool
    name: str
    method: Method
    way: Way
    dropout: Dropout
    absent: bool
    keys: tuple[str, ...]
    settings: int
    gain: Tensor
    moment: Moment | None
    still: tuple[str, ...]
    first: Tensor | None
    _kept: tuple[Any, Tensors] | None
    _made: Constants | None

    def __init__(
        self,
        name: str,
        method: Method,
        site: Site,
        tensors: Tensors,
        weight: Strength = 1.0,
        dropout: Dropout = Dropout(),
        trainable: bool = True,
    ) -> None:
        super().__init__()
        # past nn.Module's own __setattr__, which looks for parameters: a model has thousands of slots
        way = Way() if site.kind in ("fused", "norm") else method.way(site)
        self.__dict__.update(name=name, method=method, way=way, dropout=dropout, absent=False, keys=tuple(tensors))
        for key, tensor in tensors.items():
            given = (
                tensor if isinstance(tensor, nn.Parameter) and key in method.common else None
            )  # of other layers, too
            own = nn.Parameter(tensor, trainable and key not in method.frozen) if given is None else given
            self._parameters[key] = own
        # strength * scale in double precision, changed in place: a plain CPU tensor, which moves and casts pass by and
        # which compiled code takes as an input
        with torch.inference_mode(False):
            self.__dict__["gain"] = torch.zeros((), dtype=torch.float64)
        self.__dict__.update(
            moment=None, still=(), first=None, _kept=None, _made=None, settings=0
        )  # settings: how often the strength was set
        self.set(weight)

    def set(self, weight: Strength) -> None:
        """Change the strength."""
        per_sample, scale = isinstance(weight, Tensor), 0.0 if self.absent else self.method.scale
        # past nn.Module's own __setattr__, which looks for parameters: a model has thousands of slots
        on = not self.absent and (per_sample or weight != 0)
        self.__dict__.update(weight=weight, per_sample=per_sample, on=on, settings=self.settings + 1)
        if not isinstance(weight, Tensor) and not self.gain.ndim:
            self.gain.fill_(weight * scale)
        else:
            with torch.inference_mode(False):
                self.__dict__["gain"] = torch.as_tensor(weight, dtype=torch.float64).detach().cpu().clone() * scale

    def route(self, weight: Tensor) -> None:
        """Strengths (batch,) for the forwards to come, wherever they are and with their gradient; `set` was told some
        per sample before.
        """
        self.__dict__["gain"] = weight * (0.0 if self.absent else self.method.scale)

    def fill(self, method: Method, tensors: Tensors) -> None:
        """Other tensors of the same shapes, in place."""
        with torch.no_grad():
            for key, tensor in tensors.items():
                getattr(self, key).copy_(tensor)
        if method != self.method:  # compiled code guards which object it is
            self.method = method
        self.absent = False
        self.set(self.weight)

    def vacate(self) -> None:
        """No effect, whatever the strength, until it is filled."""
        self.absent = True
        self.set(self.weight)

    @property
    def learning(self) -> tuple[str, ...]:
        """Names of the tensors that training changes."""
        return tuple(key for key in self.keys if key not in (*self.method.frozen, *self.still))

    def hold(self, *names: str) -> None:
        """Leave these tensors as they are from now on."""
        self.__dict__["still"] = names
        for name in names:
            getattr(self, name).requires_grad_(False)

    def restrict(self, first: Tensor | None) -> None:
        """Let only some of its ranks act: see `first`."""
        self.__dict__["first"] = first

    @property
    def strength(self) -> float:
        """What the unscaled delta is multiplied by: weight * scale."""
        return float(self.gain)

    def tensors(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> dict[str, Tensor]:
        """The adapter's tensors, cast and moved where asked."""
        return {key: getattr(self, key).to(device, dtype) for key in self.keys}

    @property
    def reads_weight(self) -> bool:
        """Whether a forward needs the base's weight."""
        return self.way.weight or (self.way.dense and self.method.needs_weight)

    def forward(self, site: Site, base: Source, device: torch.device, dtype: torch.dtype) -> Tensors:
        """The method's operands in the dtype of the activation, with the strength in them unless it is per sample.

        base: gives the weight as methods see it. It is a forward so that offloading hooks on this module bring its
        tensors first.
        """
        key = None if torch.compiler.is_compiling() else self._state(base.stamp(), device, dtype)
        if key is not None and self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        wide = torch.promote_types(dtype, torch.float32)
        weight = base.values().to(device) if self.reads_weight else None
        t: Tensors = self.tensors(wide, device)
        if self.method.constant_names:
            t = {**t, **self._constants(site, base, device, wide)}
        if self.first is not None or (self.training and self.dropout.rank):
            t = self._ranks_left_out(t)
        if self.way.dense:
            made = {"delta": self.method.delta(t, site, None if weight is None else weight.to(wide))}
            if (bias := self.method.bias_delta(t)) is not None:
                made["bias"] = bias
        else:
            made = dict(self.method.operands(t, site, weight))
        gain = self.gain
        if self.training and self.dropout.module:
            gain = gain * (torch.rand((), dtype=gain.dtype) >= self.dropout.module)
        if not self.per_sample:
            linear = tuple(made) if self.way.dense else self.way.linear
            made = {name: tensor * gain if name in linear else tensor for name, tensor in made.items()}
        made = {name: self._narrow(tensor, dtype) for name, tensor in made.items()}
        if key is not None:
            self.__dict__["_kept"] = (key, made)
        return made

    def prepare(self, site: Site, base: Source, device: torch.device) -> None:
        """Make the method's constants now: compiled code could not."""
        if self.method.constant_names:
            self._constants(site, base, device, torch.float32)

    def _constants(self, site: Site, base: Source, device: torch.device, dtype: torch.dtype) -> Tensors:
        """The method's constants; compiled code has those that were made last."""
        if self._made is not None and torch.compiler.is_compiling():
            return {
                name: tensor.to(device, dtype if tensor.is_floating_point() else None)
                for name, tensor in self._made.tensors.items()
            }
        made = constants(self._made, self.method, site, base, device, dtype)
        self.__dict__["_made"] = made
        return made.tensors

    def whole(self, weight: Tensor, dtype: torch.dtype) -> Tensors:
        """Its tensors where a weight is, in a dtype, with the constants if they were made of it."""
        t: Tensors = self.tensors(dtype, weight.device)
        made = {} if self._made is None or self._made.key[-1] != self.method else self._made.of(weight)
        return {**t, **{k: v.to(weight.device, dtype if v.is_floating_point() else None) for k, v in made.items()}}

    def _narrow(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """An operand in the activation's dtype; of one that is a constant as it stands, the copy that layers share."""
        if tensor.dtype == dtype or not tensor.is_floating_point():
            return tensor
        kept = None if self._made is None or torch.compiler.is_compiling() else self._made.narrowed(tensor, dtype)
        return tensor.to(dtype) if kept is None else kept

    def _state(self, stamp: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> tuple[Any, ...] | None:
        """What the operands depend on, to keep them for the next forward; None while they are being trained."""
        tensors = [getattr(self, key) for key in self.keys]
        if (
            (self.training and self.dropout)
            or self.first is not None
            or self.way.dense
            or any(t.requires_grad for t in tensors)
        ):
            return None
        if any(t.is_inference() for t in tensors):
            return None  # they count no versions
        base = stamp if self.reads_weight or self.method.needs_weight else ()
        return (
            torch.is_inference_mode_enabled(),
            device,
            dtype,
            self.settings,
            base,
            *((t.data_ptr(), t._version) for t in tensors),
        )

    def _ranks_left_out(self, t: Tensors) -> Tensors:
        made = dict(t)
        for name, axis in self.method.ranked.items():
            if name in made:
                shape = [made[name].shape[axis] if d == axis else 1 for d in range(made[name].ndim)]
                if self.training and self.dropout.rank:
                    kept = (torch.rand(shape, device=made[name].device) >= self.dropout.rank).to(made[name].dtype)
                    if self.method.additive:
                        kept = kept / (1 - self.dropout.rank)
                    made[name] = made[name] * kept
                if self.first is not None:
                    made[name] = made[name] * self.first.to(made[name]).reshape(shape)
        return made

    def ready(self, operands: Tensors, site: Site, batch: int) -> Ready:
        """This adapter for one forward over `batch` samples.

        Raises:
            StateError: it has strengths for a number of samples that does not divide the batch.
        """
        gain = None
        if self.per_sample:
            if batch not in (len(self.gain), 2 * len(self.gain), 3 * len(self.gain)):
                raise StateError(
                    f"{self.name} has weights for {len(self.gain)} samples, and this layer gets {batch}; "
                    "it must be that number, or two or three times that (guidance)"
                )
            gain = self.gain.repeat(batch // len(self.gain))
            if self.training and self.dropout.module:
                gain = gain * (torch.rand((), dtype=gain.dtype) >= self.dropout.module)
        dropped = self.dropout.input if self.training else 0.0
        ranks = None if self.moment is None else self.moment.acting(self.method, batch)
        return Ready(self.method, self.way, site, operands, gain, dropped, ranks)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: `collect` reads adapters, so that the base can be saved and loaded as if it stood alone."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, for the same reason."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_made": None, "gain": self.gain.detach()}
