"""AdapterLayer: the one wrapper. It owns names, strengths, scale, dtype and merging; methods own the maths."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from imgadapt.errors import ShapeError, StateError
from imgadapt.methods.base import Method
from imgadapt.sites import Site


class Slot(nn.Module):
    """One adapter on one layer: method, tensors and strength. Its tensors stay out of the model's state dict."""

    def __init__(self, name: str, method: Method, tensors: Mapping[str, Tensor], weight: float) -> None:
        super().__init__()
        self.name = name
        self.method = method
        self.weight = weight
        for key in method.tensors:
            self.register_parameter(key, nn.Parameter(tensors[key]))

    @property
    def gain(self) -> float:
        """What the unscaled delta is multiplied by: strength times the method's scale."""
        return self.weight * self.method.scale

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The adapter's tensors, cast to `dtype` where one is given."""
        return {key: getattr(self, key).to(dtype) for key in self.method.tensors}

    def forward(self, *_: Any) -> Tensor:
        raise StateError("a slot is not called; its AdapterLayer is")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: `collect` reads adapters, so that the base can be saved and loaded as if it stood alone."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, for the same reason."""


class AdapterLayer(nn.Module):
    """A layer with adapters: base(x) + sum of weight * scale * op(x, delta).

    It takes the base's place in the model and *shares its parameter and buffer dictionaries*, so the state dict is that
    of the base alone and moves reach both; the base itself, with its hooks, is what is called.
    Every delta is taken against the pristine base weight, so the order of adapters does not matter.
    """

    def __init__(self, base: nn.Module, site: Site) -> None:
        super().__init__()
        self.__dict__["base"] = base  # not a child: its parameters are ours already
        self.__dict__["_parameters"] = base._parameters
        self.__dict__["_buffers"] = base._buffers
        self.site = site
        self.slots = nn.ModuleList()
        self.enabled = True
        self.__dict__["original"] = None  # the base's own weight while merged
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # being copied or unpickled; or accelerate asks for a hook of ours, which is the base's and stays there
            if "base" not in self.__dict__ or name in ("_hf_hook", "_old_forward"):
                raise
            return getattr(self.__dict__["base"], name)

    def __iter__(self) -> Iterator[Slot]:
        for slot in self.slots:
            assert isinstance(slot, Slot)
            yield slot

    @property
    def merged(self) -> bool:
        """Whether the base's weight holds the adapters now."""
        return self.original is not None

    def slot(self, name: str) -> Slot | None:
        """The adapter `name` of this layer, if it has it."""
        return next((slot for slot in self if slot.name == name), None)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # (as torch's layers name it)
        x, out = input, self.base(input, *args, **kwargs)
        if self.merged or not self.enabled:
            return out
        for slot in self:
            if slot.weight:
                change = slot.method.act(slot.tensors(x.dtype), self.site, x)
                out = torch.add(out, change, alpha=slot.gain)
        return out

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
        weight = self._parameters["weight"]
        assert weight is not None
        self._present(weight)
        slot.to(weight.device).train(self.training)
        self.slots.append(slot)
        try:
            self.refresh()
        except BaseException:
            self.slots = nn.ModuleList(list(self)[:-1])
            raise

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

    def refresh(self) -> None:
        """Merge anew, from the original weight, if this layer is merged; on failure it stays as it is merged now.

        Raises:
            StateError: the sum is not finite.
        """
        if self.merged:
            self._parameters["weight"] = self._sum(self.original)

    def merge(self) -> None:
        """Put weight + deltas in the base's place, summed in fp32 or better and rounded once; the original is kept.

        Raises:
            StateError: the sum is not finite; the base is untouched.
        """
        if not self.merged:
            weight = self._parameters["weight"]
            self._parameters["weight"] = self._sum(weight)
            self.__dict__["original"] = weight

    @torch.no_grad()
    def _sum(self, weight: Any) -> nn.Parameter:
        self._present(weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(wide, copy=True)
        for slot in self:
            if slot.weight:
                total.add_(slot.method.delta(slot.tensors(wide), self.site).to(total.device), alpha=slot.gain)
        total = total.to(weight.dtype)
        if not torch.isfinite(total).all():
            names = ", ".join(slot.name for slot in self)
            raise StateError(f"NaN or infinity in the weight merged with {names}; the base is left as it was")
        return nn.Parameter(total, requires_grad=weight.requires_grad)

    def unmerge(self) -> None:
        """Put the original weight back, the very same tensor (moved, if the model was moved meanwhile)."""
        if not self.merged:
            return
        current, original = self._parameters["weight"], self.original
        assert current is not None
        if original.device != current.device or original.dtype != current.dtype:
            original.data = original.data.to(current.device, current.dtype)
        original.requires_grad_(current.requires_grad)
        self._parameters["weight"] = original
        self.__dict__["original"] = None

    @staticmethod
    def _present(tensor: Tensor) -> None:
        if tensor.is_meta:
            raise StateError("the weights are offloaded (on 'meta'): attach and merge before offloading the model")

    def train(self, mode: bool = True) -> "AdapterLayer":
        self.base.train(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        names = ", ".join(f"{slot.name}: {slot.method} at {slot.weight:g}" for slot in self)
        return f"{self.base.__class__.__name__}{self.site.shape}, {names}{', merged' if self.merged else ''}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.base._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.merged:
            raise StateError("weights cannot be loaded into a merged layer, whose own would come back: unmerge first")
        self.base._load_from_state_dict(*args, **kwargs)
