"""VB-LoRA: both factors put together of vectors from one bank that all layers share (arXiv 2405.15179)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from imgadapt.errors import ConfigError, FormatError, ShapeError
from imgadapt.methods.base import Method, Peft, Tensors, Way, above_zero, linear_only, positive
from imgadapt.methods.lora import too_large
from imgadapt.sites import Site

_UNCHOSEN = 100.0
"""How far below those of the chosen the logits are that a file leaves out."""


@dataclass(frozen=True)
class VBLoRA(Method):
    """delta = up @ down, each cut into pieces of vector_length numbers: of up's columns and down's rows. A piece is the
    mean of the `topk` vectors of vblora_bank (num_vectors, vector_length) whose logits are largest, weighed by the
    softmax of these. vblora_down is (rank, pieces, num_vectors), vblora_up (pieces, rank, num_vectors).

    vector_length: a layer that it does not divide takes the largest length below that divides both it and the layer,
        with a bank of that length, and is refused if that is 1.
    init_bound, init_std: of the bank, uniform within the bound, and of the logits.

    When fresh, the bank's vectors are pairs of opposites, and up's pieces means of such pairs: zero, with a gradient
    for the bank and for the logits. These want higher rates than LoRA: the paper's are 1e-3 for the bank, 1e-2 for
    logits. Of a file that has the chosen logits only (peft's save_only_topk_weights) the others are far below.
    peft (tuners/vblora/layer.py) has linear layers only, and its fresh change is not zero.

    Raises:
        ConfigError: a size below 1, topk above num_vectors, init_bound or init_std not above 0.
    """

    rank: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    init_bound: float = 0.02
    init_std: float = 0.1

    name = "vblora"
    rate_over_lora = 2.5
    fresh_only = ("init_bound", "init_std")
    tensors = ("vblora_bank", "vblora_down", "vblora_up")
    common = ("vblora_bank",)

    def __post_init__(self) -> None:
        for name in ("rank", "num_vectors", "vector_length", "topk"):
            positive(name, getattr(self, name))
        for name in ("init_bound", "init_std"):
            above_zero(name, getattr(self, name), "the default")
        if self.topk > self.num_vectors:
            raise ConfigError(f"topk is {self.topk}, and there are {self.num_vectors} vectors")

    @property
    def file_rank(self) -> int:
        return self.rank

    @property
    def ranked(self) -> dict[str, int]:
        return {}  # a rank is left out where its piece is, and no logit says that

    def check(self, site: Site) -> str | None:
        if wrong := super().check(site) or too_large(self.rank, site):
            return wrong
        if self._length(site) == 1 < self.vector_length:
            return f"no length up to vector_length {self.vector_length} divides its {site.rows} x {site.fan_in} weight"
        return None

    def _length(self, site: Site) -> int:
        return math.gcd(self.vector_length, site.rows, site.fan_in)

    def at(self, site: Site) -> Self:
        return replace(self, vector_length=self._length(site))

    def resized(self, rank: int) -> Self:
        return self  # no logits make a row of zeros

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        count, length = self.num_vectors, self.vector_length
        return {
            "vblora_bank": (count, length),
            "vblora_down": (self.rank, site.fan_in // length, count),
            "vblora_up": (site.rows // length, self.rank, count),
        }

    def fits(self, t: Tensors, site: Site) -> str | None:
        if site.rows % self.vector_length or site.fan_in % self.vector_length:
            return f"pieces of {self.vector_length} do not divide its {site.rows} x {site.fan_in} weight"
        return super().fits(t, site)

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        if self.topk % 2:
            raise ConfigError(f"topk is {self.topk}; a fresh one, which is zero by pairs of vectors, needs an even one")
        made = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        bank, down, up = made.values()
        pairs = self.num_vectors // 2
        nn.init.uniform_(bank[: 2 * pairs : 2], -self.init_bound, self.init_bound)
        bank[1::2] = -bank[: 2 * pairs : 2]
        nn.init.normal_(down, 0, self.init_std)
        logits = torch.randn(*up.shape[:2], pairs) * self.init_std
        best = logits.topk(self.topk // 2, -1).indices
        logits.scatter_add_(-1, best, torch.full(best.shape, 0.1 * self.init_std))  # so that none ties with another
        up.fill_(-10 * self.init_std)[..., : 2 * pairs] = logits.repeat_interleave(2, -1)
        return made

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        up, down = self._pair(t)
        return (up @ down).reshape(site.shape)

    def way(self, site: Site) -> Way:
        return Way(pair=True, linear=("up",))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        up, down = self._pair(t)
        return {"up": up, "down": down.reshape(self.rank, *site.shape[1:])}

    def pair(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        return self._pair(t)

    def _pair(self, t: Tensors) -> tuple[Tensor, Tensor]:
        """up (out, rank), down (rank, in)."""
        up, down = (self._mixed(t[name], t["vblora_bank"]) for name in ("vblora_up", "vblora_down"))
        return up.transpose(1, 2).flatten(0, 1), down.flatten(1)

    def _mixed(self, logits: Tensor, bank: Tensor) -> Tensor:
        """(..., vector_length) of logits (..., num_vectors)."""
        values, chosen = logits.topk(self.topk, -1)
        weights = values.softmax(-1)
        if self.topk % 2 == 0:  # vectors that follow one another meet first, which opposites must to be zero
            chosen, order = chosen.sort(-1)
            weights = weights.gather(-1, order).unflatten(-1, (-1, 2))
            chosen = chosen.unflatten(-1, (-1, 2))
        mixed = (weights[..., None] * bank[chosen]).sum(-2)
        return mixed.sum(-2) if self.topk % 2 == 0 else mixed

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        bank, down, up = (t[name] for name in cls.tensors)
        if bank.ndim != 2 or down.ndim != 3 or up.ndim != 3 or len({len(bank), down.shape[2], up.shape[2]}) > 1:
            raise ShapeError(
                f"vblora_bank is {tuple(bank.shape)}, vblora_down {tuple(down.shape)}, vblora_up {tuple(up.shape)}; "
                "wanted (vectors, length), (rank, pieces, vectors), (pieces, rank, vectors)"
            )
        if len(down) != up.shape[1]:
            raise ShapeError(f"vblora_down is of rank {len(down)}, vblora_up of rank {up.shape[1]}")
        return cls(len(down), len(bank), bank.shape[1], min(2, len(bank)))


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple[Method, dict[str, Tensor]]:
    bank = t["vblora_vector_bank"]
    own = {
        "vblora_bank": bank,
        "vblora_down": _logits(t, "vblora_logits_A"),
        "vblora_up": _logits(t, "vblora_logits_B"),
    }
    return replace(VBLoRA.infer(own, None), topk=config.get("topk", 2)), own


def _logits(t: Tensors, name: str) -> Tensor:
    """Whole ones, or those of which a file has the largest: their places, and the weights of all but the last."""
    if name in t:
        return t[name]
    places, weights, bank = t[f"{name}_topk_indices"], t[f"{name}_topk_weights"].float(), t["vblora_vector_bank"]
    if places.is_floating_point() or places.ndim != 3 or weights.shape != (*places.shape[:2], places.shape[2] - 1):
        raise FormatError(f"{name} has places {tuple(places.shape)} ({places.dtype}), weights {tuple(weights.shape)}")
    places = places.long()
    if not (int(places.min()) >= 0 and int(places.max()) < len(bank)) or (places.sort(-1).values.diff() == 0).any():
        raise FormatError(f"{name} chooses a vector twice, or one that is not among the {len(bank)}")
    if math.prod(places.shape[:2]) * len(bank) > 2**30:
        raise FormatError(f"{name} would be of {math.prod(places.shape[:2]) * len(bank):,} numbers")
    weights = torch.cat((weights, 1 - weights.sum(-1, keepdim=True)), -1)
    chosen = weights.clamp(min=torch.finfo(torch.float32).tiny).log()  # peft's log of the last may be that of -6e-8
    others = (chosen.amin(-1, keepdim=True) - _UNCHOSEN).expand(*places.shape[:2], len(bank))
    return others.scatter(-1, places, chosen)


def _write(method: VBLoRA, t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    linear_only(method, shape)
    config = {
        "r": method.rank,
        "num_vectors": method.num_vectors,
        "vector_length": method.vector_length,
        "topk": method.topk,
    }
    tensors = {"vblora_logits_A": t["vblora_down"], "vblora_logits_B": t["vblora_up"]}
    return {**tensors, "vblora_vector_bank": t["vblora_bank"]}, config


VBLoRA.peft = Peft(
    "VBLORA",
    tuple(f"vblora_logits_{side}{end}" for side in "AB" for end in ("", "_topk_indices", "_topk_weights")),
    _read,
    _write,
    beside=("vblora_vector_bank",),
)
