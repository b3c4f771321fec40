"""Routed: a router on a denoiser, and the adapters whose strengths it tells; route, unroute."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imgadapt import live
from imgadapt import targets as where
from imgadapt.arch import canonical
from imgadapt.errors import ConfigError, ShapeError, StateError, TargetError, first_few
from imgadapt.layer import AdapterLayer
from imgadapt.moment import CLOCKS, Clock, clock_of
from imgadapt.routing.arrow import prototype
from imgadapt.routing.files import RouterFile
from imgadapt.routing.router import Router, Seen, Sizes
from imgadapt.slot import Slot, Strength

_HELD = "_imgadapt_router"


class Routed:
    """A router that is on a denoiser; `parameters()` are what is trained, `training` is the router's mode.

    adapters: in the order of the strengths. layers: canonical names, in the model's order. told: the strengths of the
    last forward, (batch, layers or 1, adapters), for whoever wants to look; a router by layer has none.
    """

    def __init__(self, root: nn.Module, component: str, adapters: Sequence[str], rows: Sequence["Row"]) -> None:
        self.root, self.rows, self.component, self.adapters = root, list(rows), component, list(adapters)
        self.training = False
        self.layers = list(dict.fromkeys(canonical(name) for name, _, _ in rows))
        self.told: Tensor | None = None
        self._told_later = torch.ones(1)
        self._before: dict[Slot, Strength] = {slot: slot.weight for _, _, slot in rows}
        self._handles: list[Any] = []
        clock = clock_of(root)
        if clock is None:
            name = type(root).__name__
            raise TargetError(f"how {name} is told its time is not known; known are {', '.join(sorted(CLOCKS))}")
        self.clock: Clock = clock

    def begin(self, router: Router, tensors: dict[str, Tensor], sizes: Sizes) -> None:
        """Act from now on.

        Raises:
            ShapeError: tensors of other sizes.
        """
        wanted = router.shapes(sizes)
        for name in sorted({*wanted, *tensors}):
            got, shape = tuple(tensors[name].shape) if name in tensors else "missing", wanted.get(name, "none")
            if got != shape:
                raise ShapeError(
                    f"the router's {name} is {got}, wanted {shape}: is it for other adapters or another base?"
                )
        device = next(self.root.parameters()).device
        self.router, self.sizes = router, sizes
        self.tensors = {name: nn.Parameter(tensor.to(device, torch.float32)) for name, tensor in tensors.items()}
        for _, _, slot in self.rows:
            slot.set(self._told_later)
        if router.by_layer:
            for name, layer in {name: layer for name, layer, _ in self.rows}.items():
                own = {slot.name: slot for other, _, slot in self.rows if other == name}
                self._handles.append(layer.register_forward_pre_hook(_Asking(self, layer, own)))
        # before the hook that puts learned tokens there: it is the text that is read
        self._handles.append(self.root.register_forward_pre_hook(self._tell, prepend=True, with_kwargs=True))

    def _tell(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for _, layer, slot in self.rows:
            if layer.slot(slot.name) is not slot:
                raise StateError(f"adapter '{slot.name}' is routed, and was detached: unroute the model first")
            if slot.weight is not self._told_later:
                raise StateError(f"adapter '{slot.name}' is routed, and its strength was set: unroute the model first")
        if self.router.by_layer:
            return
        seen = self._seen(args, kwargs)
        told = self.router.strengths(self.tensors, self.sizes, seen, training=self.training)
        self.told = told.detach()
        place = {name: k if told.shape[1] > 1 else 0 for k, name in enumerate(self.layers)}
        for name, _, slot in self.rows:
            slot.route(told[:, place[canonical(name)], self.adapters.index(slot.name)])

    def _seen(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Seen:
        names = list(inspect.signature(type(self.root).forward).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        noisy, context, time = given[names[0]], given.get("encoder_hidden_states"), given[self.clock.argument]
        share = torch.as_tensor(time, device=noisy.device).detach().float().reshape(-1) / self.clock.total
        share = (1 - share if self.clock.backwards else share).expand(len(noisy))
        if context is None:
            raise StateError("a router reads encoder_hidden_states, and this forward has none")
        return Seen(share, context.detach().float().mean(1))

    def parameters(self) -> list[nn.Parameter]:
        """What is trained; nothing of Arrow."""
        return list(self.tensors.values())

    def end(self) -> None:
        """Act no more; adapters have the strengths from before, or those that were set meanwhile."""
        for handle in self._handles:
            handle.remove()
        for slot, weight in self._before.items():
            if slot.weight is self._told_later:
                slot.set(weight)

    def file(self) -> RouterFile:
        """The router as a file in memory; its tensors are copies, on the CPU."""
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in self.tensors.items()}
        return RouterFile(self.router, tensors, tuple(self.adapters), tuple(self.layers))


Row = tuple[str, AdapterLayer, Slot]


class _Asking:
    """A layer's hook: its input tells the strengths of its adapters."""

    def __init__(self, routed: Routed, layer: AdapterLayer, own: dict[str, Slot]) -> None:
        self.routed, self.own = routed, own
        self.conv = layer.site.kind == "conv"
        self._look(layer)

    def _look(self, layer: AdapterLayer) -> None:
        """Learn the adapters' prototypes."""
        self.stamp, site, routed, own = self._stamp(), layer.site, self.routed, self.own
        if site.kind not in ("linear", "conv") or site.groups > 1:
            raise TargetError(f"{routed.router.name} asks inputs of linear layers and convolutions; one is {site.kind}")
        weight = layer.pristine() if any(slot.method.needs_weight for slot in own.values()) else None
        found = {name: prototype(slot, site, weight) for name, slot in own.items()}
        zero = torch.zeros(site.shape[1])
        device = next(layer.parameters()).device
        self.prototypes = torch.stack([found.get(name, zero).cpu() for name in routed.adapters]).to(device)
        self.there = torch.tensor([name in own for name in routed.adapters], device=device)

    def _stamp(self) -> list[int]:
        """Another one when an adapter was filled anew; what waits elsewhere (offloading) was not."""
        every = [t for slot in self.own.values() for t in slot.parameters()]
        return [] if any(t.is_meta or t.is_inference() for t in every) else [t._version for t in every]

    def __call__(self, layer: Any, args: tuple[Any, ...]) -> None:
        if self.stamp != (now := self._stamp()) and now:
            self._look(layer)
        with torch.no_grad():
            x = args[0].float()
            x = x.flatten(2).mean(2) if self.conv else x.reshape(len(x), -1, x.shape[-1]).mean(1)
            told = self.routed.router.of_input(self.prototypes.to(x.device), self.there.to(x.device), x)
        for k, name in enumerate(self.routed.adapters):
            if name in self.own:
                self.own[name].route(told[:, k])


def route(model: Any, router: Router | RouterFile, *names: str) -> Routed:
    """Let a router tell the strengths of attached adapters (all of them when none is named), in the denoiser.

    What it returns has what is trained: `parameters()`; see `training.routes`. A saved one is put on adapters in the
    order that it was trained with, whatever they are called now. `unroute` ends it.

    Raises:
        StateError: a name is not on the model, an adapter is merged, or a router is there already.
        ConfigError: fewer than two adapters, or another number than the router's.
        TargetError: they are not on a denoiser whose time is known. ShapeError: the router is for other layers.
    """
    parts = where.components(model)
    if routed(model) is not None:
        raise StateError("a router is on this model already: unroute it first")
    rows = live.slots(model, *names)
    every = list(names) or list(dict.fromkeys(slot.name for _, _, slot in rows))
    wanted = len(router.adapters) if isinstance(router, RouterFile) else max(2, len(every))
    if len(every) != wanted:
        raise ConfigError(f"there are {len(every)} adapters to route ({first_few(every)}); wanted {wanted}")
    rows = [row for row in rows if row[0].partition(".")[0] in where.DENOISERS or len(parts) == 1]
    components = {name.partition(".")[0] for name, _, _ in rows}
    if len(components) != 1 or {slot.name for _, _, slot in rows} != set(every):
        raise TargetError(f"{first_few(every)} are not all on layers of one denoiser")
    if any(layer.merged or layer.site.kind == "fused" for _, layer, _ in rows):
        raise StateError("strengths of each sample cannot be merged, nor act on a fused projection: unmerge first")
    (component,) = components
    root = parts[component]
    made = Routed(root, component, every, rows)
    kind = router.router if isinstance(router, RouterFile) else router
    sizes = Sizes(len(every), len(made.layers), _width(root))
    if isinstance(router, RouterFile) and list(router.layers) != made.layers:
        raise ShapeError(
            f"the router is for {len(router.layers)} layers, and these adapters have {len(made.layers)}, others"
        )
    try:
        made.begin(kind, dict(router.tensors) if isinstance(router, RouterFile) else kind.init(sizes), sizes)
    except BaseException:
        made.end()
        raise
    root.__dict__[_HELD] = made
    return made


def _width(root: Any) -> int:
    """Of the texts that a denoiser reads, before it projects them; 0 where its config does not say."""
    config: Any = getattr(root, "config", {})
    projected = ("encoder_hid_dim", "caption_channels", "text_embed_dim", "text_dim", "cap_feat_dim")
    found = [config.get(name) for name in (*projected, "joint_attention_dim", "cross_attention_dim")]
    return next((width for width in found if isinstance(width, int)), 0)


def routed(model: Any) -> Routed | None:
    """The router that is on a model; None if there is none."""
    return next((p.__dict__[_HELD] for p in where.components(model).values() if _HELD in p.__dict__), None)


def unroute(model: Any) -> None:
    """Take the router off; adapters have their strengths from before.

    Raises:
        StateError: there is none.
    """
    there = routed(model)
    if there is None:
        raise StateError("no router is on this model")
    there.end()
    del there.root.__dict__[_HELD]
