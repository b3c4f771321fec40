"""FourierFT: a change of the weight of few frequencies (arXiv 2405.03003)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from imgadapt.methods import sparse
from imgadapt.methods.base import Method, Peft, Tensors, Way, linear_only
from imgadapt.sites import Site


class Fourier(sparse.Basis):
    """Real and imaginary parts, in turn, of the frequencies 0 to size / 2."""

    @property
    def count(self) -> int:
        return 2 * (self.size // 2 + 1)

    def analyse(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # bf16 has no FFT
        return torch.view_as_real(torch.fft.rfft(wide)).flatten(1).t().contiguous()

    def synthesise(self, u: Tensor) -> Tensor:
        half = torch.view_as_complex(u.t().contiguous().unflatten(1, (-1, 2)))
        return torch.fft.irfft(half, self.size, norm="forward")

    def once(self, values: Tensor, rows: Tensor) -> Tensor:
        frequency = rows // 2  # irfft counts all but the first, and the last of an even size, twice
        return torch.where((frequency == 0) | (2 * frequency == self.size), values, values / 2)


@dataclass(frozen=True)
class FourierFT(sparse.Spectrum):
    """delta = Re(ifft2(S)), with S (out, in * kernel) zero but for n entries, the `spectrum` (n,).

    n_frequency: n; on layers of fewer numbers all of them.
    scaling: the delta is multiplied by it; ifft2 divides by the weight's size, hence so large a number.
    seed: of the places of the n entries (peft's `random_loc_seed`); layers of one size have the same.

    Acts on linear layers and 1x1 convolutions by an FFT of the input, n products and an FFT back, in fp32. Where n is
    too large for that to pay, and for larger kernels, whose inputs would have to be unfolded, one FFT builds the delta,
    which goes into the weight. peft, which has linear layers only, always builds it, and multiplies by it apart.

    Raises:
        ConfigError: n_frequency below 1, a scaling not above 0, a seed that is none.
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    seed: int = 777

    name = "fourierft"
    rate_over_lora = 0.78
    tensors = ("spectrum",)

    def constants(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        with torch.inference_mode(False):
            places = sparse.drawn(self.seed, math.prod(site.shape), self.n_frequency)
            return {"places": places, **({} if self.way(site).dense else _entries(places, site.rows, site.fan_in))}

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        t = self.whole(t, site, weight)
        wide = t["spectrum"].to(torch.promote_types(t["spectrum"].dtype, torch.float32))
        s = wide.new_zeros(math.prod(site.shape)).index_put((t["places"],), wide)
        return torch.fft.ifft2(s.view(site.rows, -1)).real.reshape(site.shape).to(t["spectrum"].dtype)

    def way(self, site: Site) -> Way:
        return sparse.way(site, 2 * self.n_frequency)

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        t = self.whole(t, site, weight)
        return sparse.operands(t["spectrum"][t["source"]] * t["sign"] / math.prod(site.shape), t)

    def act(self, o: Tensors, site: Site, x: Tensor, y: Tensor | None, onto: Tensor | None) -> Tensor:
        return sparse.act(o, site, x, onto, Fourier(site.fan_in), Fourier(site.rows))


@lru_cache(maxsize=64)
def _entries(places: Tensor, rows: int, fan_in: int) -> dict[str, Tensor]:
    """S as a real sparse matrix from and to real and imaginary parts: s exp(2πi (p j / out + q k / in)) of the real
    part wanted is that of the mirrored frequencies, with the conjugate of what they multiply where one was mirrored.
    """
    p, q = places // fan_in, places % fan_in
    high_p, high_q = p > rows // 2, q > fan_in // 2
    p, q = torch.where(high_p, rows - p, p), torch.where(high_q, fan_in - q, q)
    sign = torch.where(high_p == high_q, -1.0, 1.0)  # rfft has exp(-2πi q k / in)
    sign = torch.stack((sign.abs(), sign), 1).flatten()
    parts = torch.arange(2, device="cpu")
    places_of = torch.arange(len(places), device="cpu").repeat_interleave(2)
    order, made = sparse.indices(
        (2 * p[:, None] + parts).flatten(), (2 * q[:, None] + parts).flatten(), Fourier(fan_in), Fourier(rows)
    )
    return {"source": places_of[order], "sign": sign[order], **made}


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple[Method, dict[str, Tensor]]:
    made = FourierFT.infer({"spectrum": t["fourierft_spectrum"]}, config.get("scaling", 150.0))
    return replace(made, seed=config.get("random_loc_seed", 777)), {"spectrum": t["fourierft_spectrum"]}


def _write(method: FourierFT, t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    linear_only(method, shape)
    fields = {"n_frequency": method.n_frequency, "scaling": method.scaling, "random_loc_seed": method.seed}
    return {"fourierft_spectrum": t["spectrum"]}, fields


FourierFT.peft = Peft("FOURIERFT", ("fourierft_spectrum",), _read, _write)
