"""Keep: how much of each layer's change stays when it becomes low-rank factors."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from imgadapt.combining.lowrank import Spectrum
from imgadapt.combining.ranks import Choice, rank_of, ranks_for
from imgadapt.errors import ConfigError
from imgadapt.sites import Site

LAYER_RULES = ("ratio", "cumulative", "fro", "threshold")
_KEYS, _HEADER, _START = 5, 90, 1000
"""Where a file's header and metadata name a layer, at most; what they have of it each time beside its name, and in all
beside the layers, in bytes."""
_LEAN = {"kohya": 90, "lycoris": 90, "diffusers": 110, None: 110}
"""Formats (None: what `save` takes) that name a pair of factors three times, and what they have each time."""


@dataclass(frozen=True)
class Keep:
    """One of: `rank` of every layer (`rank_conv` of convolutions with a kernel above 1); `error`, `energy` or `size` of
    the whole, as `MergeRecipe` has them; a `rule` that gives each layer its own rank, by its singular values s:

    | rule         | kept                                                | kohya         | LyCORIS             |
    |--------------|-----------------------------------------------------|---------------|---------------------|
    | `ratio`      | s >= s_1 / bound                                    | sv_ratio      | ratio (1 / bound)   |
    | `cumulative` | the first whose sum is at least `bound` of all      | sv_cumulative | quantile            |
    | `fro`        | the first whose Frobenius norm is at least that     | sv_fro        |                     |
    | `threshold`  | s >= bound                                          |               | threshold           |

    These are the definitions to the letter. kohya's resize_lora.py adds one to a count that is already right, by all
    three methods, and LyCORIS' `quantile` keeps one fewer: it counts the sums that fall short.
    most: the highest rank that is given, whatever the rest says; then an error or energy may be missed.

    Raises:
        ConfigError: none of them or several, numbers out of their range.
    """

    rank: int | None = None
    rank_conv: int | None = None
    error: float | None = None
    energy: float | None = None
    size: float | None = None
    rule: str | None = None
    bound: float = 0.0
    most: int | None = None

    def __post_init__(self) -> None:
        ways = [name for name in ("rank", "error", "energy", "size", "rule") if getattr(self, name) is not None]
        if len(ways) != 1:
            came = f"there are {' and '.join(ways)}" if ways else "there is none"
            raise ConfigError(
                f"one of rank, error, energy, size and a rule says how much is kept (--rank, --error, --energy, "
                f"--size, --sv-ratio, --sv-cumulative, --sv-fro, --threshold); {came}"
            )
        for name in ("rank", "rank_conv", "most"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number, 1 or more")
        if self.rank_conv is not None and self.rank is None:
            raise ConfigError("rank_conv is of convolutions where a rank is given for the rest; give the rank, too")
        for name, most in (("error", 1.0), ("energy", 1.0), ("size", math.inf)):
            value: Any = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value <= most and math.isfinite(value)):
                range_ = "a number above 0" + f", {most:g} at most" * (most < 9)
                raise ConfigError(f"{name} is {value!r}; it must be {range_}")
        if self.rule is not None:
            if self.rule not in LAYER_RULES:
                raise ConfigError(f"no rule '{self.rule}'; there are: {', '.join(LAYER_RULES)}")
            least, most = (1.0, math.inf) if self.rule == "ratio" else (0.0, 1.0)
            most = math.inf if self.rule == "threshold" else most
            if not (least <= self.bound <= most and math.isfinite(self.bound)):
                range_ = f"from {least:g}" + f" to {most:g}" * (most < 9)
                raise ConfigError(f"the bound of {self.rule} is {self.bound!r}; it must be a number {range_}")

    @property
    def whole(self) -> bool:
        """Whether all layers must be measured before the first is cut."""
        return self.rank is None and self.rule is None

    def said(self) -> str:
        """As text: `rank 8`, `ratio 20, rank 16 at most`."""
        names = ("rank", "rank_conv", "error", "energy", "size")
        rows = [f"{name} {getattr(self, name):g}" for name in names if getattr(self, name) is not None]
        rows += [f"{self.rule} {self.bound:g}"] if self.rule else []
        return ", ".join(rows + ([f"rank {self.most} at most"] if self.most else []))

    def limit(self, site: Site) -> int | None:
        """The most of a layer that may be kept, where that is known beforehand; None: all."""
        own = self.rank_conv if self.rank_conv is not None and math.prod(site.kernel) > 1 else self.rank
        given = [n for n in (own, self.most) if n is not None]
        return min(given) if given else None

    def of(self, site: Site, values: Tensor) -> int:
        """A layer's rank by a rule of its own; values: its singular values, largest first."""
        assert self.rule is not None
        return min(rank_of(values, self.rule, self.bound), self.limit(site) or len(values))

    def shared(
        self, layers: Mapping[str, tuple[Site, Spectrum]], width: int, others: float, form: str | None = None
    ) -> dict[str, int]:
        """Ranks of all layers by an error, an energy or a size. width: bytes of a number; others: of all else that the
        file has, beside the names of these layers' tensors in its format.

        Raises:
            ConfigError: the file has more than `size` even so.
        """
        choices: dict[str, Choice] = {}
        for name, (site, found) in layers.items():
            most = self.limit(site) or len(found.values)
            outside = found.rest + float((found.values[most:] ** 2).sum())
            fixed = math.ceil(layer_bytes(name, form) / width)
            choices[name] = Choice(found.values[:most], site.rows + site.fan_in, outside, fixed)
        numbers = None
        if self.size is not None:
            numbers = int((self.size * 1e6 - others) / width)
            if numbers <= 0:
                raise ConfigError(f"size is {self.size:g} MB, and without any rank the file has {others / 1e6:.3g}")
        return ranks_for(choices, error=self.error, energy=self.energy, numbers=numbers)


def header_bytes(layers: Iterable[str], metadata: Mapping[str, str]) -> float:
    """What the header of a file takes, at most."""
    said = len(json.dumps(dict(metadata), ensure_ascii=False).encode())
    return _START + said + sum(layer_bytes(name, "other") for name in layers)


def layer_bytes(name: str, form: str | None = None) -> int:
    """What names and shapes of a layer's tensors take in a file's header, at most. form: the format's name; None: the
    one that `save` takes.
    """
    return 3 * (len(name) + _LEAN[form]) if form in _LEAN else _KEYS * (len(name) + _HEADER)
