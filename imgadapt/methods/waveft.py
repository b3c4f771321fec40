"""WaveFT: a change of the weight of few wavelets (arXiv 2505.12532)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from imgadapt.errors import ConfigError, FormatError
from imgadapt.methods import sparse
from imgadapt.methods.base import Method, Peft, Tensors, Way, linear_only
from imgadapt.sites import Site


@dataclass(frozen=True)
class Wavelets(sparse.Basis):
    """One level of an orthogonal wavelet: the coarse half of the coefficients, then the fine one.

    low: its filter, of even length L. There are size + L - 2 coefficients, made even, and what reaches beyond is cut.
    """

    low: tuple[float, ...]

    @property
    def count(self) -> int:
        return (self.size + len(self.low) - 1) // 2 * 2

    @property
    def high(self) -> tuple[float, ...]:
        return tuple((-1) ** k * value for k, value in enumerate(reversed(self.low)))

    def analyse(self, x: Tensor) -> Tensor:
        cut = len(self.low) - 2
        wide = F.pad(x, (cut, self.count - self.size)).t().contiguous()
        shifted = [wide[k : k + self.count : 2] for k in range(cut + 2)]
        return torch.cat([_weighed(shifted, self.low), _weighed(shifted, self.high)])

    def synthesise(self, u: Tensor) -> Tensor:
        cut, halves = len(self.low) - 2, u.chunk(2)
        wide = u.new_zeros(self.count + cut, u.shape[1])
        for k, weights in enumerate(zip(self.low, self.high, strict=True)):
            wide[k : k + self.count : 2] += _weighed(list(halves), weights)
        return wide[cut : cut + self.size].t()


def _weighed(tensors: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total.add(tensor, alpha=weight)
    return total


def daubechies(order: int) -> tuple[float, ...]:
    """The low-pass filter of 2 * order numbers with as many vanishing moments as it can have, of least phase: the
    polynomial of Daubechies (1988) with its roots in the unit circle, and sum √2.
    """
    y = np.roots([math.comb(order - 1 + k, k) for k in reversed(range(order))])
    z = 1 - 2 * y + 2 * np.sqrt(y * y - y + 0j)
    z = np.where(np.abs(z) < 1, z, 1 / z)
    made = np.poly(np.concatenate([z, np.full(order, -1.0)])).real
    return tuple(float(value) for value in made * math.sqrt(2) / made.sum())


WAVELETS = {f"db{order}": daubechies(order) for order in range(1, 11)}
"""Name -> low-pass filter."""


@dataclass(frozen=True)
class WaveFT(sparse.Spectrum):
    """delta, flattened (out, in * kernel), is one level of the inverse wavelet transform of a matrix that is zero save
    n entries, the `waveft_spectrum` (n,).

    n_frequency: n; on layers of fewer numbers all of them.
    scaling: the delta is multiplied by it (peft's 25 was found for SDXL).
    wavelet: "db1" (Haar) to "db10"; None: the entries are the delta's own (peft's `use_idwt=False`).
    seed: of the places of the n entries (peft's `random_loc_seed`); layers of one size have the same.

    The matrix is padded by the filter's length less 2, and its fine rows of coarse columns stand where other tools
    have coarse rows of fine columns, as in huggingface/peft tuners/waveft (waverec2d.py). Acts on linear layers and 1x1
    convolutions by a transform of the input, n products and one back; else in the weight, as FourierFT.

    Raises:
        ConfigError: n_frequency below 1, a scaling not above 0, a seed or a wavelet that is none.
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet: str | None = "db1"
    seed: int = 777

    name = "waveft"
    rate_over_lora = 0.055
    tensors = ("waveft_spectrum",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wavelet is not None and self.wavelet not in WAVELETS:
            raise ConfigError(f"wavelet is {self.wavelet!r}; there are {', '.join(WAVELETS)} and None")

    def constants(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        with torch.inference_mode(False):
            places = sparse.drawn(self.seed, math.prod(site.shape), self.n_frequency)
            made = _entries(places, *self._bases(site))
            return {"places": made["places"]} if self.way(site).dense else made

    def _bases(self, site: Site) -> tuple[sparse.Basis, sparse.Basis]:
        """Of the inputs, and of the outputs."""
        if self.wavelet is None:
            return sparse.Basis(site.fan_in), sparse.Basis(site.rows)
        low = WAVELETS[self.wavelet]
        return Wavelets(site.fan_in, low), Wavelets(site.rows, low)

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        t = self.whole(t, site, weight)
        into, out = self._bases(site)
        s = t["waveft_spectrum"].new_zeros(out.count * into.count).index_put((t["places"],), t["waveft_spectrum"])
        return into.synthesise(out.synthesise(s.view(out.count, -1))).reshape(site.shape)

    def way(self, site: Site) -> Way:
        return sparse.way(site, self.n_frequency)

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        t = self.whole(t, site, weight)
        return sparse.operands(t["waveft_spectrum"][t["source"]], t)

    def act(self, o: Tensors, site: Site, x: Tensor, y: Tensor | None, onto: Tensor | None) -> Tensor:
        return sparse.act(o, site, x, onto, *self._bases(site))


@lru_cache(maxsize=64)
def _entries(places: Tensor, into: sparse.Basis, out: sparse.Basis) -> dict[str, Tensor]:
    """Where the entries are in the matrix of coefficients: amid the padding, with two of its quarters in exchange."""
    p, q = places // into.size + (out.count - out.size) // 2, places % into.size + (into.count - into.size) // 2
    if isinstance(into, Wavelets):
        fine_p, fine_q = p >= out.count // 2, q >= into.count // 2
        p = p + (fine_q.long() - fine_p.long()) * (out.count // 2)
        q = q + (fine_p.long() - fine_q.long()) * (into.count // 2)
    order, made = sparse.indices(p, q, into, out)
    return {"places": p * into.count + q, "source": order, **made}


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple[Method, dict[str, Tensor]]:
    own = {"waveft_spectrum": t["waveft_spectrum"]}
    made, wavelet = WaveFT.infer(own, config.get("scaling", 25.0)), config.get("wavelet_family", "db1")
    if config.get("use_idwt", True) is False:
        wavelet = None
    elif wavelet not in WAVELETS:
        raise FormatError(f"wavelet_family is {wavelet!r}; imgadapt has {', '.join(WAVELETS)}")
    return replace(made, wavelet=wavelet, seed=config.get("random_loc_seed", 777)), own


def _write(method: WaveFT, t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    linear_only(method, shape)
    fields = {
        "n_frequency": method.n_frequency,
        "scaling": method.scaling,
        "random_loc_seed": method.seed,
        "wavelet_family": method.wavelet or "db1",
        "use_idwt": method.wavelet is not None,
    }
    return {"waveft_spectrum": t["waveft_spectrum"]}, fields


WaveFT.peft = Peft("WAVEFT", ("waveft_spectrum",), _read, _write)
