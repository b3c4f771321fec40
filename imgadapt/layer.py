"""AdapterLayer: the one wrapper. It owns names, strengths, scale, dropout, dtype and merging; methods own the maths."""

from collections.abc import Collection, Iterable, Iterator
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from imgadapt.dequantize import follow, is_plain, values_of, weight_of
from imgadapt.errors import ShapeError, StateError
from imgadapt.merging import merged, sums
from imgadapt.ready import Ready, add_pairs
from imgadapt.sites import Site
from imgadapt.slot import Slot
from imgadapt.stored import Stored


class _Source:
    """A layer's weight, for its slots (which must not get the layer: offloading hooks move what they are given)."""

    def __init__(self, layer: "AdapterLayer") -> None:
        self._base, self._site = layer.base, layer.site

    def values(self) -> Tensor:
        return self._site.seen(weight_of(self._base, self._site.parameter))

    def stamp(self) -> tuple[int, ...]:
        weight: Any = self._base._parameters[self._site.parameter]
        return (id(weight), 0 if weight.is_inference() else weight._version)


class AdapterLayer(nn.Module):
    """A layer with adapters: base(x) + sum of weight * scale * op(x, delta).

    It takes the base's place in the model and *shares its parameter and buffer dictionaries*, so the state dict is that
    of the base alone and moves reach both; the base itself, with its hooks, is what is called (accelerate's hook, which
    brings the weights, comes to stand on the wrapper).
    Every delta is taken against the pristine base weight, so the order of adapters does not matter.
    """

    def __init__(self, base: nn.Module, site: Site) -> None:
        super().__init__()
        self.__dict__["base"] = base  # not a child: its parameters are ours already
        self.__dict__["_parameters"] = base._parameters
        self.__dict__["_buffers"] = base._buffers
        self._modules.update(base._modules)  # nn.MultiheadAttention's out_proj
        self.site = site
        self.slots = nn.ModuleList()
        self.enabled = True
        self.__dict__["originals"] = {}  # the base's own parameters while merged, by name
        self.requantised: float | None = None  # what storing the last merge cost, see `restore`; None: a plain weight
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # being copied or unpickled; or a hook of ours is asked for, and the base's is not
            if "base" not in self.__dict__ or name in ("_hf_hook", "_old_forward", "_diffusers_hook"):
                raise
            return getattr(self.__dict__["base"], name)

    def __iter__(self) -> Iterator[Slot]:
        slots: Any = self._modules["slots"]  # past nn.Module's __getattr__: a model has thousands of slots
        yield from slots._modules.values()

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Without the slots: accelerate.cpu_offload, which asks, would look for their tensors in the state dict. They
        stay where they are and are brought to the activation when they are used.
        """
        return ((name, module) for name, module in super().named_children() if name != "slots")

    def children(self) -> Iterator[nn.Module]:
        return (module for _, module in super().named_children())

    @property
    def merged(self) -> bool:
        """Whether the base's weight holds the adapters now."""
        return bool(self.originals)

    @property
    def kept(self) -> Stored | None:
        """Where the original weight waits while merged, if not in memory."""
        original = self.originals.get(self.site.parameter)
        return original if isinstance(original, Stored) else None

    def pristine(self) -> Tensor:
        """The base's own weight as methods see it, whether merged or not."""
        parameter = self.site.parameter
        original = self.originals.get(parameter)
        if original is None:
            return self.site.seen(weight_of(self, parameter))
        return self.site.seen(original.read() if isinstance(original, Stored) else values_of(self.base, original))

    def slot(self, name: str) -> Slot | None:
        """The adapter `name` of this layer, if it has it."""
        return next((slot for slot in self if slot.name == name), None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.merged or not self.enabled:
            return self.base(*args, **kwargs)
        # when compiled, a strength of 0 is a number like any other: no guard on it, no recompilation
        slots = [slot for slot in self if torch.compiler.is_compiling() or slot.on]
        if not slots:
            return self.base(*args, **kwargs)
        if self.site.kind == "fused":
            return self._fused(slots, args, kwargs)
        if not args:
            first = next(iter(kwargs))  # `input`, or as the layer calls it
            args = (kwargs.pop(first),)
        x, *rest = args
        if self.site.kind == "conv" and x.ndim == len(self.site.shape) - 1:  # one picture, without a batch
            return self.forward(x[None], *rest, **kwargs)[0]
        ready = self._ready(slots, x)

        turned = x
        for adapter in ready:
            if adapter.way.turn:
                turned = adapter.turn(x, turned)
        dense = [adapter for adapter in ready if adapter.way.dense]
        if dense and turned is x and self._foldable(ready, x):
            out = self._call_with(self._changed(dense), (x, *rest), kwargs)
            dense = []
        else:
            out = self.base(turned, *rest, **kwargs)
        y = self._without_bias(out if turned is x else self.base(x, *rest, **kwargs)) if _reads_output(ready) else None

        out = add_pairs(self.site, [adapter for adapter in ready if adapter.way.pair], x, out)
        for adapter in ready:
            if adapter.way.act:
                out = adapter.act(x, y, out)
            if not adapter.way.dense and (bias := adapter.bias_delta()) is not None:
                out = out + adapter.scaled(self.site.along(bias).expand_as(out)).to(out.dtype)
        for adapter in dense:
            out = self._add_dense(adapter, x, out)
        return out

    def _ready(self, slots: list[Slot], x: Tensor) -> list[Ready]:
        weight: Any = self._parameters.get("weight", None)
        dtype = x.dtype if x.is_floating_point() else weight.dtype
        if dtype.itemsize == 1:
            dtype = self.base(x).dtype  # an embedding that is stored as fp8 or quantised
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        return [
            slot.ready(slot(self.site, _Source(self), x.device, dtype), self.site, len(x) if x.ndim else 1)
            for slot in slots
        ]

    def _foldable(self, ready: list[Ready], x: Tensor) -> bool:
        """Whether dense changes may go into the weight of the one call of the base: all read its plain input."""
        weight: Any = self._parameters[self.site.parameter]
        plain = type(weight) in (nn.Parameter, Tensor) and weight.device == x.device and weight.dtype.is_floating_point
        alike = all(adapter.gain is None and not adapter.dropped for adapter in ready if adapter.way.dense)
        return plain and weight.dtype.itemsize > 1 and alike and not _reads_output(ready)

    def _changed(self, dense: list[Ready]) -> dict[str, Tensor]:
        """The base's parameters with dense changes in them."""
        weight: Any = self._parameters[self.site.parameter]
        made = {self.site.parameter: weight}
        for adapter in dense:
            delta = self.site.seen(adapter.delta()).to(weight.dtype)
            made[self.site.parameter] = made[self.site.parameter] + delta
            if (change := adapter.bias_delta()) is not None:
                assert self.site.bias is not None
                bias: Any = made.get(self.site.bias, self._parameters[self.site.bias])
                made[self.site.bias] = bias + change.to(bias.dtype)
        return made

    def _call_with(self, parameters: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return functional_call(self.base, parameters, args, kwargs)

    def _fused(self, slots: list[Slot], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """nn.MultiheadAttention, whose kernel reads the weights itself: they are changed for the call."""
        weight: Any = self._parameters[self.site.parameter]
        ready = [
            slot.ready(slot(self.site, _Source(self), weight.device, torch.float32), self.site, 1) for slot in slots
        ]
        if any(adapter.gain is not None for adapter in ready):
            raise StateError("weights per sample cannot act on a fused in-projection; give it one number")
        return self._call_with(self._changed(ready), args, kwargs)

    def _without_bias(self, out: Tensor) -> Tensor:
        if self._parameters.get("bias") is None:
            return out
        return out - self.site.along(weight_of(self.base, "bias").to(out.device, out.dtype))

    def _add_dense(self, adapter: Ready, x: Tensor, out: Tensor) -> Tensor:
        """A dense change apart from the base, for bases that are quantised, dropout, and strengths per sample."""
        if self.site.kind == "norm":
            weight = adapter.delta()
            changed = {"weight": weight}
            if self.site.bias is not None:
                bias = adapter.bias_delta()
                changed["bias"] = torch.zeros_like(weight) if bias is None else bias
            change = self._call_with(changed, (x,), {})
        else:
            change = self.site.op(adapter.read(x), adapter.delta().to(adapter.dtype))
            if (bias := adapter.bias_delta()) is not None:
                change = change + self.site.along(bias.to(change.dtype))
        return out + adapter.scaled(change).to(out.dtype)

    def add(self, slot: Slot) -> None:
        """Put an adapter on this layer; a merged layer is merged anew.

        Raises:
            ShapeError: its tensors do not fit the layer.
            StateError: the layer has an adapter of this name, or the merge is not finite.
        """
        if self.slot(slot.name) is not None:
            raise StateError(f"the name '{slot.name}' is taken: detach it first, or choose another name=")
        if wrong := slot.method.fits(slot.tensors(), self.site):
            raise ShapeError(wrong)
        weight: Any = self._parameters[self.site.parameter]
        slot.training = self.training
        if not weight.is_meta and any(p.device != weight.device for p in slot.parameters()):
            slot.to(weight.device)  # one that is offloaded, or not loaded yet, is moved when it is used
        self._prepare([slot])
        self.slots.append(slot)
        try:
            self.refresh()
        except BaseException:
            self.slots = nn.ModuleList(list(self)[:-1])
            raise
        _move_hook(self.base, self)

    def _prepare(self, slots: Iterable[Slot]) -> None:
        """Make what adapters need of this weight, or of a seed, for compiled code could not; merged, `unmerge` does."""
        weight: Any = self._parameters[self.site.parameter]
        if not weight.is_meta and not self.merged:
            for slot in slots:
                slot.prepare(self.site, _Source(self), weight.device)

    def remove(self, names: Collection[str]) -> None:
        """Take adapters off; what stays is merged anew if the layer is merged, and unmerged when none stays.

        Raises:
            StateError: that merge is not finite; all adapters are still on.
        """
        before = self.slots
        self.slots = nn.ModuleList([slot for slot in self if slot.name not in names])
        try:
            if self.slots:
                self.refresh()
            else:
                self.unmerge()
        except BaseException:
            self.slots = before
            raise

    def release(self) -> nn.Module:
        """The base, with the offloading hook that this layer had meanwhile, to be put back in its place."""
        _move_hook(self, self.base)
        return self.base

    def refresh(self) -> None:
        """Merge anew, from the original weight, if this layer is merged; on failure it stays as it is merged now, or,
        where the original waits in a file, it is live.

        Raises:
            StateError: the sum is not finite, or a strength differs from sample to sample.
        """
        if self.merged:
            self._here()
            self._put(self.originals)

    def _here(self) -> None:
        """Raises StateError if the merged weights were offloaded: the hooks hold them, and would bring them back."""
        if any(parameter is not None and parameter.is_meta for parameter in self._parameters.values()):
            raise StateError("the model was offloaded while merged; remove the offloading hooks first")

    def merge(self, kept: Stored | None = None) -> None:
        """Put weight + deltas in the base's place, summed in fp32 or better and rounded once; the original is kept.

        kept: where the original weight waits; it is then changed in place. None: in memory.

        Raises:
            StateError: the sum is not finite, or a strength differs from sample to sample; the base is untouched.
        """
        if self.merged:
            return
        names = [name for name in (self.site.parameter, self.site.bias) if name is not None]
        originals: dict[str, Any] = {name: self._parameters[name] for name in names}
        if kept is not None:
            if not is_plain(self.base, originals[self.site.parameter]):
                raise StateError("its weight is quantised and cannot be read back from a file: keep it in memory")
            originals[self.site.parameter] = kept
        self._put(originals)
        self.__dict__["originals"] = originals

    def _put(self, originals: dict[str, Any]) -> None:
        """The merged parameters in the place of the originals, stored as those are."""
        weight = originals[self.site.parameter]
        if isinstance(weight, Stored):
            self._put_in_place(weight, originals)
            return
        made, self.requantised = merged(self.base, self.site, list(self), originals)
        self._parameters.update({**originals, **made})

    def _put_in_place(self, kept: Stored, originals: dict[str, Any]) -> None:
        """The same where the original waits in a file; when that fails the weight is the original."""
        parameter = self.site.parameter
        current: Any = self._parameters[parameter]
        if self.merged:
            kept.fill(current)
        try:
            made = sums(self.site, list(self), {**originals, parameter: current}, in_place=True)
        except BaseException:  # then it is live, honestly
            kept.fill(current)
            self._parameters.update({name: value for name, value in originals.items() if name != parameter})
            self.__dict__["originals"] = {}
            raise
        others = {name: value for name, value in originals.items() if name != parameter}
        self._parameters.update({**others, **made})
        self.requantised = None

    def unmerge(self) -> None:
        """Put the original parameters back: the very same tensors (moved, if the model was moved meanwhile), or what
        the file that keeps them has.
        """
        if self.merged:
            self._here()
        for name, original in self.originals.items():
            current: Any = self._parameters[name]
            if isinstance(original, Stored):
                original.fill(current)
                continue
            follow(original, current)
            original.requires_grad_(current.requires_grad)
            self._parameters[name] = original
        self.__dict__["originals"] = {}
        self._prepare(self)

    def train(self, mode: bool = True) -> "AdapterLayer":
        self.base.train(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        names = ", ".join(f"{slot.name}: {slot.method} at {slot.weight}" for slot in self)
        return f"{self.base.__class__.__name__}{self.site.shape}, {names}{', merged' if self.merged else ''}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.base._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.merged:
            raise StateError("weights cannot be loaded into a merged layer, whose own would come back: unmerge first")
        self.base._load_from_state_dict(*args, **kwargs)
        self._prepare(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare(self)


def _move_hook(source: nn.Module, target: nn.Module) -> None:
    """Hand accelerate's hook over (accelerate/hooks.py, add_hook_to_module), and with it the care for the weights.

    It stands on whatever is in the model, where accelerate finds it to remove it, and around the wrapper's forward,
    which reads the weights.
    """
    own, other = source.__dict__, target.__dict__
    call = own.get("forward")
    if isinstance(call, partial) and call.func.__module__ == "accelerate.hooks":  # not if another hook is around it
        inner = own.pop("_old_forward")
        if isinstance(inner, partial):  # a hook that was there before accelerate's
            own["forward"] = inner
        else:
            del own["forward"]
        other["_hf_hook"], other["_old_forward"] = own.pop("_hf_hook"), target.forward
        other["forward"] = update_wrapper(partial(call.func, target), target.forward)


def _reads_output(ready: list[Ready]) -> bool:
    return any(adapter.way.output for adapter in ready)
