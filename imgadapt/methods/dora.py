"""DoRA: direction and magnitude apart, over any additive method (arXiv 2402.09353)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from imgadapt.errors import ConfigError
from imgadapt.methods.base import Method, Tensors, Way
from imgadapt.methods.lora import LoRA
from imgadapt.sites import Site


@dataclass(frozen=True)
class DoRA(Method):
    """W' = magnitude * V / ‖V‖ with V = W + inner's scale * inner's delta.

    axis "output": a norm and a `magnitude` (out,) for each output, as the paper, peft and LyCORIS' `wd_on_out` have it.
    axis "input": for each input channel, (in / groups,): the norm is over outputs and kernel (LyCORIS without it).
    inner: LoRA, LoHa, LoKr, whose alpha / rank is applied within V, or Full, whose change of the bias is added too.

    The norm is a constant to the gradient (section 4.3 of the paper). Strength interpolates: W + strength * (W' - W).
    The norm comes from W and the low-rank factors, without W + delta, where inner is a low-rank pair.

    Raises:
        ConfigError: inner is not additive, or an axis that is neither.
    """

    inner: Method = LoRA()  # noqa: RUF009  frozen, so one for all
    axis: Literal["output", "input"] = "output"

    name = "dora"
    tensors = ("magnitude",)
    needs_weight = True

    def __post_init__(self) -> None:
        inner: Any = self.inner  # a file's metadata may say anything
        if not isinstance(inner, Method) or inner.needs_weight or not inner.merges or inner.scale == 0:
            raise ConfigError(f"DoRA({self.inner}): it works over additive methods: LoRA, LoHa, LoKr, Full")
        if self.axis not in ("output", "input"):
            raise ConfigError(f"axis is {self.axis!r}; it must be 'output' (peft) or 'input' (LyCORIS' default)")
        for name in ("frozen", "common"):
            object.__setattr__(self, name, getattr(self.inner, name))

    @property
    def ranked(self) -> dict[str, int]:
        return dict(self.inner.ranked)

    @property
    def cut(self) -> dict[str, int]:
        return dict(self.inner.cut)

    @property
    def file_rank(self) -> int | None:
        return self.inner.file_rank

    @property
    def file_alpha(self) -> float | None:
        return self.inner.file_alpha

    def check(self, site: Site) -> str | None:
        if self.axis == "input" and site.kind == "embedding":
            return "its inputs are token ids, which have no channels; use axis='output'"
        return super().check(site) or self.inner.check(site)

    def at(self, site: Site) -> Self:
        return replace(self, inner=self.inner.at(site))

    def resized(self, rank: int) -> Self:
        return replace(self, inner=self.inner.resized(rank))

    def unscaled(self) -> Self:
        return replace(self, inner=self.inner.unscaled())

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {**self.inner.shapes(site), "magnitude": (site.shape[0 if self.axis == "output" else 1],)}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        assert weight is not None
        return {**self.inner.init(site, weight), "magnitude": self._norm(weight.float())}

    def settled(
        self, t: Tensors, weight: Callable[[], Tensor], bias: Callable[[], Tensor | None]
    ) -> tuple[Method, Tensors]:
        own = {name: tensor for name, tensor in t.items() if name != "magnitude"}
        inner, made = self.inner.settled(own, weight, bias)
        same = inner is self.inner and made is own
        return (self, t) if same else (replace(self, inner=inner), {**t, **made})

    @property
    def constant_names(self) -> frozenset[str]:
        return self.inner.constant_names

    def constants(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        return self.inner.constants(site, weight)

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        assert weight is not None
        whole = weight + self.inner.scale * self.inner.delta(t, site, weight)
        c = t["magnitude"] / self._norm(whole.detach())
        return whole * self._along(c, whole) - weight

    def bias_delta(self, t: Tensors) -> Tensor | None:
        bias = self.inner.bias_delta(t)
        return None if bias is None else self.inner.scale * bias

    def way(self, site: Site) -> Way:
        inner = self.inner.way(site)
        if inner.dense or inner.bias or (inner.pair and inner.act):  # of which a part alone would be in the norm
            return Way()
        if self.axis == "output":
            linear = ("less", "up", "bias") if inner.pair else ("less", "times")
            return Way(pair=inner.pair, act=True, input=not inner.pair, output=True, weight=True, linear=linear)
        plain = inner.pair and site.kind in ("linear", "conv")
        return Way(pair=True, turn=True, weight=True, linear=("less", "up", "bias")) if plain else Way()

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        """`less` = c - 1 with c = magnitude / norm; inner's operands with c and its scale in them, or c as `times`."""
        assert weight is not None
        o, s = self.inner.operands(t, site, weight), self.inner.scale
        with torch.no_grad():
            pair = (o["up"] * s, o["down"]) if self.inner.way(site).pair else None
            norm = (
                self._norm_of_sum(weight, *pair) if pair else self._norm(weight + s * self.inner.delta(t, site, weight))
            )
        c = t["magnitude"] / norm
        if pair is None:
            return {**o, "less": c - 1, "times": c * s}
        up, down, bias = o["up"] * s, o["down"], {"bias": o["bias"] * s} if "bias" in o else {}
        if self.axis == "output":
            return {"up": up * c[:, None], "down": down, "less": c - 1, **bias}
        return {"up": up, "down": down * self._along(c, down), "less": c - 1, **bias}

    def turn(self, o: Tensors, site: Site, x: Tensor, onto: Tensor | None) -> Tensor:
        less = site.along(o["less"].repeat(site.groups))
        return x * less if onto is None else torch.addcmul(onto, x, less)

    def act(self, o: Tensors, site: Site, x: Tensor, y: Tensor | None, onto: Tensor | None) -> Tensor:
        assert y is not None
        less = site.along(o["less"])
        change = y * less if onto is None else torch.addcmul(onto, y, less)
        if "times" in o:
            change = torch.addcmul(change, self.inner.act(o, site, x, None, None), site.along(o["times"]))
        return change

    def _along(self, c: Tensor, weight: Tensor) -> Tensor:
        axis = 0 if self.axis == "output" else 1
        return c.reshape([-1 if d == axis else 1 for d in range(weight.ndim)])

    def _norm(self, weight: Tensor) -> Tensor:
        """Of each output's, or input's, part of the weight; at least the smallest number, so that 0 / 0 is 0."""
        axis = 0 if self.axis == "output" else 1
        over = [d for d in range(weight.ndim) if d != axis]
        norm = torch.linalg.vector_norm(weight, dim=over, dtype=torch.promote_types(weight.dtype, torch.float32))
        return norm.clamp(min=torch.finfo(norm.dtype).tiny)

    def _norm_of_sum(self, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """‖W + up @ down‖ without the sum: ‖W‖² + 2⟨W, up @ down⟩ + ‖up @ down‖², one product of W with the factors."""
        base = self._norm(weight)
        if self.axis == "output":
            flat = down.flatten(1)
            cross = ((weight.flatten(1) @ flat.t().to(weight.dtype)).to(up.dtype) * up).sum(1)
            square = ((up @ (flat @ flat.t())) * up).sum(1)
        else:
            rows = (up.t().to(weight.dtype) @ weight.flatten(1)).to(up.dtype).view(down.shape)
            over = [0, *range(2, down.ndim)]
            cross = (rows * down).sum(over)
            square = (((up.t() @ up) @ down.flatten(1)).view(down.shape) * down).sum(over)
        relative = (
            base * (1 + (2 * cross + square) / base.square()).clamp(min=0).sqrt()
        )  # exactly the base's when fresh
        vanishing = torch.hypot(
            base, square.clamp(min=0).sqrt()
        )  # of rows that are zero, as zero-initialised layers' are
        total = torch.where(base.square() > torch.finfo(base.dtype).tiny, relative, vanishing)
        return total.clamp(min=torch.finfo(total.dtype).tiny)

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        from imgadapt.methods import METHODS  # the list is made of this class, too

        own = {name: tensor for name, tensor in t.items() if name != "magnitude"}
        inner = next(m for m in METHODS if m.recognises(set(own)))
        return cls(inner.infer(own, alpha))

    @classmethod
    def recognises(cls, names: set[str]) -> bool:
        from imgadapt.methods import METHODS

        own = names - {"magnitude"}
        return "magnitude" in names and any(
            m.recognises(own) and m.merges and not m.needs_weight for m in METHODS if m is not cls
        )

    def fits(self, t: Tensors, site: Site) -> str | None:
        if wrong := self.inner.fits({k: v for k, v in t.items() if k != "magnitude"}, site):
            return wrong
        wanted = self.shapes(site)["magnitude"]
        found = tuple(t["magnitude"].shape) if "magnitude" in t else None
        return None if found == wanted else f"magnitude is {found}, this layer takes {wanted} (axis={self.axis!r})"
