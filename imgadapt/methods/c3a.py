"""C3A: a change of the weight made of circulant blocks (arXiv 2407.19342)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd import Function

from imgadapt.errors import ShapeError
from imgadapt.methods.base import Method, Peft, Tensors, Way, linear_only, positive
from imgadapt.sites import Site


@dataclass(frozen=True)
class C3A(Method):
    """delta[i b + k, j b + l] = kernel[i, j, (l - k) mod b] / inputs, with `c3a_kernel` (out / b, in / groups / b, b,
    *kernel): in every position of the kernel blocks of b x b, each of b numbers and of full rank.

    block_size: b. A layer takes the largest at or below it that divides both its inputs and outputs (of a group), and
        is refused if that is 1. Larger blocks are fewer numbers.

    Acts by FFTs over the channels of each block, which make of it one product of blocks for each frequency: in a
    convolution of one group for each. The FFTs are in fp32. Below b = 7, where that is no cheaper than the gradient of
    a delta, and on embeddings, the delta goes into the weight. peft has linear layers only (tuners/c3a/layer.py); of
    its adapters together, the second reads what the first put out.

    Raises:
        ConfigError: block_size below 1.
    """

    block_size: int = 256

    name = "c3a"
    rate_over_lora = 40.0
    tensors = ("c3a_kernel",)

    def __post_init__(self) -> None:
        positive("block_size", self.block_size)

    def check(self, site: Site) -> str | None:
        if reason := super().check(site):
            return reason
        if self.block_size == 1 or _divisor(site, self.block_size) > 1:
            return None
        sizes = f"{site.shape[1]} inputs and {site.rows // site.groups} outputs"
        return f"no block of 2 to {self.block_size} divides both its {sizes}{' of a group' * (site.groups > 1)}"

    def at(self, site: Site) -> Self:
        return replace(self, block_size=_divisor(site, self.block_size))

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        b = self.block_size
        return {"c3a_kernel": (site.rows // b, site.shape[1] // b, b, *site.kernel)}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        b = self.block_size
        k = torch.arange(b, device=t["c3a_kernel"].device)
        whole = t["c3a_kernel"][:, :, (k - k[:, None]) % b]  # (out / b, in / b, b, b, *kernel)
        return whole.transpose(1, 2).reshape(site.shape) / site.fan_in

    def way(self, site: Site) -> Way:
        # four real products for a complex one, forward and both gradients, against the gradient of the delta
        cheap = site.kind in ("linear", "conv") and 12 * self._frequencies <= self.block_size**2
        return Way(act=True, input=True, linear=("values",)) if cheap else Way()

    @property
    def _frequencies(self) -> int:
        return self.block_size // 2 + 1

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        """The conjugate spectra of the blocks as real matrices, rows and columns real and imaginary in turn: `values`
        (groups * frequencies * 2 out blocks, 2 in blocks, *kernel).
        """
        kernel = t["c3a_kernel"] / site.fan_in
        real, imaginary = torch.view_as_real(torch.fft.rfft(kernel, dim=2)).unbind(-1)
        both = torch.stack((torch.stack((real, imaginary)), torch.stack((-imaginary, real))))
        both = both.unflatten(2, (site.groups, -1))  # (2, 2, groups, out blocks, in blocks, frequencies, *kernel)
        both = both.permute(2, 5, 3, 0, 4, 1, *range(6, both.ndim))
        return {"values": both.flatten(4, 5).flatten(0, 3)}

    def act(self, o: Tensors, site: Site, x: Tensor, y: Tensor | None, onto: Tensor | None) -> Tensor:
        b, f, values = self.block_size, self._frequencies, o["values"]
        dtype = torch.promote_types(x.dtype, torch.float32)
        if site.kind == "linear":
            spectra = torch.view_as_real(_rfft(x.reshape(-1, site.fan_in // b, b), 2))
            spectra = spectra.flatten(1).t().contiguous().to(values.dtype)
            spectra = spectra.unflatten(0, (-1, f, 2)).transpose(0, 1).flatten(1, 2)  # (f, 2 in blocks, tokens)
            made = torch.bmm(values.unflatten(0, (f, -1)), spectra).unflatten(1, (-1, 2)).transpose(0, 1)
            made = made.flatten(0, 2).t().contiguous().to(dtype)
            half = torch.view_as_complex(made.unflatten(1, (-1, f, 2)))
            change = torch.fft.irfft(half, b).view(*x.shape[:-1], site.rows)
        else:
            inner = tuple(range(4, x.ndim + 2))
            spectra = torch.view_as_real(_rfft(x.unflatten(1, (site.groups, -1, b)), 3))
            spectra = spectra.permute(0, 1, 3, 2, x.ndim + 2, *inner).flatten(1, 4)
            apart = replace(site, shape=tuple(values.shape), groups=site.groups * f)
            made = apart.op(spectra.to(values.dtype), values).to(dtype)
            made = made.unflatten(1, (site.groups, f, -1, 2)).permute(0, 1, 3, 2, *(k + 1 for k in inner), 4)
            change = torch.fft.irfft(torch.view_as_complex(made.contiguous()), b, dim=3).flatten(1, 3)
        return change.to(values.dtype) if onto is None else onto + change.to(onto.dtype)

    def fits(self, t: Tensors, site: Site) -> str | None:
        b = self.block_size
        if site.kind in self.kinds and (site.shape[1] % b or site.rows // site.groups % b):
            return f"blocks of {b} do not divide a {site.rows // site.groups} x {site.shape[1]} weight"
        return super().fits(t, site)

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        if t["c3a_kernel"].ndim < 3:
            raise ShapeError(f"c3a_kernel is {tuple(t['c3a_kernel'].shape)}, wanted (out / b, in / b, b, *kernel)")
        return cls(t["c3a_kernel"].shape[2])


def _rfft(x: Tensor, dim: int) -> Tensor:
    """torch.fft.rfft in fp32 or better: bf16 has none."""
    if torch.compiler.is_compiling():  # see sparse.act
        return torch.fft.rfft(x.to(torch.promote_types(x.dtype, torch.float32)), dim=dim)
    made: Any = _Spectrum.apply(x, dim)
    return made


class _Spectrum(Function):
    """It keeps nothing; torch's own keeps the wide input, for its size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim, ctx.size, ctx.dtype = dim, x.shape[dim], x.dtype
        return torch.fft.rfft(x.to(torch.promote_types(x.dtype, torch.float32)), dim=dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        half, dim, size = grads[0].clone(), ctx.dim, ctx.size
        half.narrow(dim, 1, (size - 1) // 2).mul_(0.5)  # irfft counts these twice
        return torch.fft.irfft(half, size, dim=dim, norm="forward").to(ctx.dtype), None


def _divisor(site: Site, most: int) -> int:
    common = math.gcd(site.rows // site.groups, site.shape[1])
    return next(b for b in range(min(most, common), 0, -1) if common % b == 0)


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple[Method, dict[str, Tensor]]:
    return C3A.infer(t, None), {"c3a_kernel": t["c3a_kernel"]}


def _write(method: C3A, t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    linear_only(method, shape)
    return {"c3a_kernel": t["c3a_kernel"]}, {"block_size": method.block_size}


C3A.peft = Peft("C3A", ("c3a_kernel",), _read, _write)
