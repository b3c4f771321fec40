"""SHiRA: few numbers of the weight, at random places, trained themselves (arXiv 2406.13175)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor

from imgadapt.errors import ConfigError, FormatError, ShapeError
from imgadapt.methods import sparse
from imgadapt.methods.base import Method, Peft, Tensors, Way, linear_only, positive
from imgadapt.sites import Site


@dataclass(frozen=True)
class SHiRA(Method):
    """delta, flattened (out, in * kernel), is `shira_weight` (n,) at n places, row by row, and zero elsewhere.

    rank: n = rank * (out + in * kernel), as many as a LoRA of it has; the largest that the layer has room for, if less.
        The change is of high rank.
    seed: of the places, drawn as peft's `random_mask` does; layers of one size have the same.
    entries: n, instead of the rank; what a file's tensors tell.
    listed: the places are those of `shira_indices` (2, 3, n), rows and columns, for files of peft, which mostly drew
        them without a seed. Each is three digits to the base 256, lowest first, which bf16 and fp16 hold exactly.

    Acts through the n places alone where they are at most a 96th of a linear layer or 1x1 convolution (`sparse.way`),
    else in the weight, whose whole gradient is then made, one product. Merging writes the n places. peft copies the
    weight in each forward, and has linear layers only.

    Raises:
        ConfigError: rank or entries below 1, a seed that is none, listed that is neither.
    """

    rank: int = 16
    seed: int = 0
    entries: int | None = None
    listed: bool = False

    name = "shira"
    rate_over_lora = 0.5
    tensors = ("shira_weight",)
    optional = ("shira_indices",)
    frozen = ("shira_indices",)

    def __post_init__(self) -> None:
        positive("rank", self.rank)
        sparse.check_seed(self.seed)
        if self.entries is not None:
            positive("entries", self.entries)
        if not isinstance(self.listed, bool):  # pyright: ignore[reportUnnecessaryIsInstance] # a file may say anything
            raise ConfigError(f"listed is {self.listed!r}; it must be True or False")

    def check(self, site: Site) -> str | None:
        if site.kind in self.kinds and site.rows + site.fan_in > math.prod(site.shape) and self.entries is None:
            return f"a {site.rows} x {site.fan_in} weight has fewer numbers than a LoRA of rank 1 would"
        return super().check(site)

    def at(self, site: Site) -> Self:
        size = math.prod(site.shape)
        if self.entries is not None:
            return replace(self, entries=min(self.entries, size))
        return replace(self, rank=max(1, min(self.rank, size // (site.rows + site.fan_in))))

    def count(self, site: Site) -> int:
        """n on this site."""
        return self.rank * (site.rows + site.fan_in) if self.entries is None else self.entries

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        n = self.count(site)
        return {"shira_weight": (n,), **({"shira_indices": (2, 3, n)} if self.listed else {})}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        made = {"shira_weight": torch.zeros(self.count(site))}
        if self.listed:
            made["shira_indices"] = _digits(_drawn(self.seed, site.rows, site.fan_in, self.count(site)))
        return made

    @property
    def constant_names(self) -> frozenset[str]:
        return frozenset() if self.listed else frozenset({"places"})

    def constants(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        if self.listed:
            return {}
        with torch.inference_mode(False):
            places = _places(self.seed, math.prod(site.shape), self.count(site))
            return {"places": places, **({} if self.way(site).dense else _entries(places, site.rows, site.fan_in))}

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        values, places = self._placed(t, site)
        flat = values.new_zeros(math.prod(site.shape)).index_put((places,), values, accumulate=True)
        return flat.view(site.shape)

    def accumulate(self, total: Tensor, t: Tensors, site: Site, weight: Tensor | None, gain: float) -> None:
        if not total.is_contiguous():
            return super().accumulate(total, t, site, weight, gain)
        values, places = self._placed(t, site)
        total.view(-1).index_add_(0, places, values.to(total.dtype), alpha=gain)
        return None

    def _placed(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """values (n,), and where they are in the flattened weight."""
        if self.listed:
            row, column = _undigited(t["shira_indices"])
            return t["shira_weight"], row * site.fan_in + column
        return t["shira_weight"], self.whole(t, site, None)["places"]

    def way(self, site: Site) -> Way:
        return Way() if self.listed else sparse.way(site, self.count(site))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        t = self.whole(t, site, weight)
        return sparse.operands(t["shira_weight"], t)

    def act(self, o: Tensors, site: Site, x: Tensor, y: Tensor | None, onto: Tensor | None) -> Tensor:
        return sparse.act(o, site, x, onto, sparse.Basis(site.fan_in), sparse.Basis(site.rows))

    def fits(self, t: Tensors, site: Site) -> str | None:
        if wrong := super().fits(t, site):
            return wrong
        size, n = math.prod(site.shape), self.count(site)
        if n > size:
            return f"shira_weight is of {n} numbers, and this layer has {size}"
        if self.listed and not t["shira_indices"].is_meta:
            digits = t["shira_indices"]
            row, column = _undigited(digits)
            small = bool(((digits >= 0) & (digits < 256) & (digits == digits.floor())).all())
            if not small or row.max() >= site.rows or column.max() >= site.fan_in:
                return f"shira_indices are no rows and columns of a {site.rows} x {site.fan_in} weight"
        return None

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        shape, listed = tuple(t["shira_weight"].shape), "shira_indices" in t
        if len(shape) != 1 or (listed and tuple(t["shira_indices"].shape) != (2, 3, *shape)):
            raise ShapeError(f"{', '.join(f'{n} {tuple(v.shape)}' for n, v in t.items())}: wanted (n,) and (2, 3, n)")
        return cls(entries=shape[0], listed=listed)


@lru_cache(maxsize=64)
def _places(seed: int, size: int, count: int) -> Tensor:
    return sparse.drawn(seed, size, count).sort().values


def _drawn(seed: int, rows: int, fan_in: int, count: int) -> Tensor:
    """Rows and columns, (2, n)."""
    places = _places(seed, rows * fan_in, count)
    return torch.stack((places // fan_in, places % fan_in))


def _digits(indices: Tensor) -> Tensor:
    """(2, n) as (2, 3, n), to the base 256."""
    return torch.stack([indices.long() // 256**k % 256 for k in range(3)], 1).float()


def _undigited(digits: Tensor) -> Tensor:
    low, middle, high = digits.long().unbind(1)
    return low + 256 * middle + 65536 * high


@lru_cache(maxsize=64)
def _entries(places: Tensor, rows: int, fan_in: int) -> dict[str, Tensor]:
    into, out = sparse.Basis(fan_in), sparse.Basis(rows)
    return sparse.indices(places // fan_in, places % fan_in, into, out)[1]


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple[Method, dict[str, Tensor]]:
    if "shira_indices" not in t:
        raise FormatError("shira_indices, the places of its numbers, are not there")
    places = t["shira_indices"].cpu()
    if places.shape != (2, len(t["shira_weight"])) or not bool(((places >= 0) & (places < 256**3)).all()):
        raise ShapeError(f"shira_indices, {tuple(places.shape)}, are no rows and columns of {len(t['shira_weight'])}")
    own = {"shira_weight": t["shira_weight"], "shira_indices": _digits(places)}
    made, seed = SHiRA.infer(own, None), config.get("random_seed")
    count = places.shape[1]
    if shape is None or len(shape) != 2 or seed is None or count > math.prod(shape) or count % sum(shape):
        return made, own
    seeded = SHiRA(count // sum(shape), seed)
    if not torch.equal(places.long(), _drawn(seed, shape[0], shape[1], count)):
        return made, own
    return seeded, {"shira_weight": own["shira_weight"]}


def _write(method: SHiRA, t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    linear_only(method, shape)
    count = len(t["shira_weight"])
    rank, rest = divmod(count, sum(shape))
    if rest:
        raise FormatError(f"peft's SHiRA has a multiple of {sum(shape)} numbers on this layer, and this has {count}")
    places = _undigited(t["shira_indices"]) if method.listed else _drawn(method.seed, shape[0], shape[1], count)
    made = {"shira_weight": t["shira_weight"], "shira_indices": places.to(torch.int32)}
    return made, {"r": rank, "random_seed": None if method.listed else method.seed}


SHiRA.peft = Peft("SHIRA", ("shira_weight", "shira_indices"), _read, _write)
