"""Moment: the time at which a denoiser is asked, for adapters that depend on it."""

import inspect
from bisect import bisect_right
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imgadapt.errors import StateError, TargetError
from imgadapt.methods.base import Method

_MOST = 4096  # forwards between one and its backward


class Clock(NamedTuple):
    """How a denoiser is told the time: the argument's name, what it is in pure noise, and whether it counts backwards,
    from there to 0."""

    argument: str
    total: float
    backwards: bool = False


CLOCKS = {
    **dict.fromkeys(
        (
            *("UNet2DConditionModel", "SD3Transformer2DModel", "PixArtTransformer2DModel", "SanaTransformer2DModel"),
            *("HunyuanDiT2DModel", "HunyuanImageTransformer2DModel", "CogView4Transformer2DModel"),
            *("WanTransformer3DModel", "LTXVideoTransformer3DModel"),
        ),
        Clock("timestep", 1000),
    ),
    **dict.fromkeys(
        (
            *("FluxTransformer2DModel", "Flux2Transformer2DModel", "ChromaTransformer2DModel"),
            *("QwenImageTransformer2DModel", "AuraFlowTransformer2DModel"),
        ),
        Clock("timestep", 1),
    ),
    "HiDreamImageTransformer2DModel": Clock("timesteps", 1000),
    "Lumina2Transformer2DModel": Clock("timestep", 1, backwards=True),
    "ZImageTransformer2DModel": Clock("t", 1, backwards=True),
}
"""diffusers' denoisers by class, as their pipelines call them (diffusers 0.42.1)."""


class Moment:
    """One denoiser's time in the forward that is going on; hooks on the denoiser set it.

    A forward that is computed a second time in the backward pass (gradient checkpointing) has the time that it had: the
    node of the graph that asks for it was made in one forward, and nodes are numbered.
    """

    def __init__(self, root: nn.Module, clock: Clock) -> None:
        self.clock = clock
        parameters = list(inspect.signature(type(root).forward).parameters)
        self._place = parameters.index(clock.argument) - 1
        self._share: Tensor | None = None
        self._log: deque[tuple[int, Tensor]] = deque(maxlen=_MOST)  # (number of the first node, share) of forwards
        self._masks: dict[Method, Tensor] = {}
        self._handles = [
            root.register_forward_pre_hook(self._enter, with_kwargs=True),
            root.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs[self.clock.argument] if self.clock.argument in kwargs else args[self._place]
        with torch.no_grad():
            share = torch.as_tensor(given).float().reshape(-1) / self.clock.total
            self._share = 1 - share if self.clock.backwards else share
        if not torch.compiler.is_compiling():
            self._masks = {}
            if torch.is_grad_enabled():
                self._log.append((torch.autograd._get_sequence_nr(), self._share))  # pyright: ignore[reportAttributeAccessIssue] # not in torch's stubs

    def _leave(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._share = None

    def _now(self) -> Tensor | None:
        """t / T of each sample, (n,) or (1,); None outside of the denoiser's forward."""
        if torch.compiler.is_compiling():
            return self._share
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return self._share
        self._masks = {}
        place = bisect_right(self._log, node._sequence_nr(), key=lambda row: row[0])
        if not place:
            raise StateError("a layer is computed anew for a forward of which nothing is known: more lie between")
        return self._log[place - 1][1]

    def acting(self, method: Method, batch: int) -> Tensor | None:
        """Which ranks of the method act, (1 or batch, ranks); None: all.

        Raises:
            StateError: the samples have times of their own, and the layer gets another number of samples.
        """
        share = self._now()
        if share is None:
            return None
        if len(share) not in (1, batch):
            if torch.compiler.is_compiling() or bool((share != share[0]).any()):
                raise StateError(f"{len(share)} samples have a time each, and a layer gets {batch}: it cannot be told")
            share = share[:1]
        if torch.compiler.is_compiling():
            return method.acting(share)
        key = method
        if key not in self._masks or len(self._masks[key]) != len(share):
            self._masks[key] = method.acting(share)
        return self._masks[key]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_share": None, "_log": deque(maxlen=_MOST), "_masks": {}}


def clock_of(root: nn.Module) -> Clock | None:
    """How a denoiser is told the time, where that is known; Sana's pipeline multiplies it by a field of the config."""
    kinds = [kind.__name__ for kind in type(root).__mro__]
    clock = next((CLOCKS[kind] for kind in kinds if kind in CLOCKS), None)
    factor = getattr(getattr(root, "config", None), "timestep_scale", 1.0)
    return None if clock is None else clock._replace(total=clock.total * factor)


def moment(root: nn.Module) -> Moment | None:
    """The one that a module has; None if it has none."""
    owners = (getattr(hook, "__self__", None) for hook in root._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Moment)), None)


def given(root: nn.Module, component: str) -> Moment | None:
    """The one that a module has, or gets now; None where it knows no time, and so has all ranks always.

    Raises:
        TargetError: it is a text encoder, or how it is told the time is not known.
    """
    if (there := moment(root)) is not None:
        return there
    if (clock := clock_of(root)) is not None:
        return Moment(root, clock)
    if component.startswith("text_encoder"):
        raise TargetError(f"{component} knows no timestep, which this adapter depends on; target the denoiser only")
    if {"timestep", "timesteps"} & {*inspect.signature(type(root).forward).parameters}:
        raise TargetError(
            f"how {type(root).__name__} is told its timestep is not known yet (known: {', '.join(sorted(CLOCKS))}); "
            "an adapter that depends on it cannot act there"
        )
    return None
