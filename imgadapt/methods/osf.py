"""OSF: the weight's smallest singular directions trained, away from the largest (arXiv 2504.07097, as peft has it)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from imgadapt.errors import FormatError, ShapeError
from imgadapt.methods.base import Method, Peft, Tensors, Way, linear_only, positive
from imgadapt.sites import Site


@dataclass(frozen=True)
class OSF(Method):
    """delta = U diag(s) V - U_0 diag(s_0) V_0, which start from the weight's `rank` smallest singular values.

    `osf_u` (out, rank), `osf_s` (rank,), `osf_v` (rank, in / groups, *kernel), and what they start from, which stays:
    `osf_u_0`, `osf_s_0`, `osf_v_0`.

    rank: of what is trained; peft's `effective_rank`, of what is kept, is min(out, inputs) - rank, half of it there.

    The gradients of U and V have nothing along the singular vectors that are kept (huggingface/peft tuners/osf, whose
    hooks project them; what an optimiser makes of them may have). On the weight's smaller side products with U_0, or
    V_0, do that; on the larger with the vectors kept, which are as large as W, and which no file has. peft's files are
    without the starts, too: an SVD of the base gives them again, and signs cancel.

    Raises:
        ConfigError: rank below 1.
    """

    rank: int = 16

    name = "osf"
    rate_over_lora = 1.4
    tensors = ("osf_u", "osf_s", "osf_v")
    optional = ("osf_u_0", "osf_s_0", "osf_v_0")
    frozen = ("osf_u_0", "osf_s_0", "osf_v_0")
    needs_weight = True

    def __post_init__(self) -> None:
        positive("rank", self.rank)

    def check(self, site: Site) -> str | None:
        size = min(site.rows, site.fan_in)
        too_many = f"rank {self.rank} leaves none of its {size} singular directions as it is"
        return super().check(site) or (too_many if self.rank >= size else None)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        own = {"osf_u": (site.rows, self.rank), "osf_s": (self.rank,), "osf_v": (self.rank, *site.shape[1:])}
        return {**own, **{f"{name}_0": shape for name, shape in own.items()}}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        assert weight is not None
        start = {name: tensor.cpu() for name, tensor in self._start(weight).items()}
        return {**{name.removesuffix("_0"): tensor.clone() for name, tensor in start.items()}, **start}

    def settled(
        self, t: Tensors, weight: Callable[[], Tensor], bias: Callable[[], Tensor | None]
    ) -> tuple[Method, Tensors]:
        if t.keys() & set(self.frozen):
            return self, t
        own = weight()
        if own.ndim < 2:
            return self, t  # `fits` says what is wrong
        if self.rank >= min(own.flatten(1).shape):
            raise ShapeError(f"its rank is {self.rank}, and this layer's weight {tuple(own.shape)}")
        return self, {**t, **{name: tensor.to(t["osf_u"].device) for name, tensor in self._start(own).items()}}

    def _start(self, weight: Tensor) -> dict[str, Tensor]:
        u, s, v = _svd(weight)
        u, s, v = u[:, -self.rank :].contiguous(), s[-self.rank :], v[-self.rank :].contiguous()
        return {"osf_u_0": u, "osf_s_0": s, "osf_v_0": v.view(-1, *weight.shape[1:])}

    @property
    def constant_names(self) -> frozenset[str]:
        return frozenset(("osf_high",))

    def constants(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        """The vectors kept of the larger side, as rows; of a square weight none."""
        assert weight is not None
        if site.rows == site.fan_in:
            return {"osf_high": weight.new_zeros((0, site.rows), dtype=torch.float32)}
        u, _, v = _svd(weight)
        high = u[:, : -self.rank].t() if site.rows > site.fan_in else v[: -self.rank]
        return {"osf_high": high.contiguous()}

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        up, down = self._pair(t)
        return (up @ down.flatten(1)).reshape(site.shape)

    def way(self, site: Site) -> Way:
        return Way(pair=True, linear=("up",))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        if "osf_high" in t:
            tall, wide = site.rows > site.fan_in, site.rows < site.fan_in
            u = _away(t["osf_u"].t(), t["osf_u_0"].t(), t["osf_high"] if tall else None).t()
            v = _away(t["osf_v"].flatten(1), t["osf_v_0"].flatten(1), t["osf_high"] if wide else None)
            t = {**t, "osf_u": u, "osf_v": v.view_as(t["osf_v"])}
        up, down = self._pair(t)
        return {"up": up, "down": down}

    def pair(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        if not set(self.frozen) <= t.keys():
            return None
        up, down = self._pair(t)
        return up, down.flatten(1)

    def _pair(self, t: Tensors) -> tuple[Tensor, Tensor]:
        """up (out, 2 * rank), down (2 * rank, in / groups, *kernel): nothing, to the bit, at the start."""
        now, start = t["osf_u"] * t["osf_s"], t["osf_u_0"] * t["osf_s_0"]
        return torch.cat((now, now - start), 1), torch.cat((t["osf_v"] - t["osf_v_0"], t["osf_v_0"]))

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        u, s, v = (tuple(t[name].shape) for name in cls.tensors)
        if len(s) != 1 or len(u) != 2 or len(v) < 2 or not u[1] == s[0] == v[0]:
            raise ShapeError(f"osf_u is {u}, osf_s {s} and osf_v {v}: their ranks differ")
        return cls(rank=s[0])


def _svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.linalg.svd(weight.detach().flatten(1).float(), full_matrices=False)
    return u, s, v


def _away(rows: Tensor, start: Tensor, high: Tensor | None) -> Tensor:
    """The very rows, whose gradient has nothing along `high`; None: nothing but what is along `start`."""
    still = rows.detach()
    moved = rows - still
    along = start if high is None else high
    part = (moved @ along.t()) @ along
    return still + (part if high is None else moved - part)


_NAMES = {f"osf_svd_params.{name}": f"osf_{name[0].lower()}" for name in ("U_low", "S_low", "V_low")}


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple[Method, dict[str, Tensor]]:
    if set(t) != set(_NAMES):
        raise FormatError(f"it has {', '.join(sorted(t))}; wanted {', '.join(_NAMES)}")
    made = {_NAMES[name]: tensor for name, tensor in t.items()}
    return OSF.infer(made, None), made


def _write(method: OSF, t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    linear_only(method, shape)
    return {name: t[own] for name, own in _NAMES.items()}, {"effective_rank": min(shape) - method.rank}


OSF.peft = Peft("OSF", tuple(_NAMES), _read, _write)
