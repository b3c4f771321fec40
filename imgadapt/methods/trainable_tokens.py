"""Trainable tokens: the embeddings of some words of the vocabulary learn, and no others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from imgadapt.errors import ConfigError, FormatError, ShapeError
from imgadapt.methods.base import Method, Peft, Tensors, Way
from imgadapt.sites import Site

_MOST = 2**16  # tokens of one adapter; CLIP's vocabulary has 49,408


@dataclass(frozen=True)
class TrainableTokens(Method):
    """Columns of an embedding's weight (width, entries), those of `tokens`, change by `token_rows` (n, width)^T.

    tokens: ids of words that the tokenizer has already: `tokenizer("fox", add_special_tokens=False).input_ids`. (A new
        word is textual inversion's: `imgadapt textual_inversion`.) A number n: of n words that a file does not tell.
    values: `token_rows` are the embeddings themselves, and the change is what they differ by, as peft has it.

    Of token embeddings only, to be named by their ends: targets="token_embedding" (CLIP), "shared" (T5).
    Source: peft/tuners/trainable_tokens, which calls the values a delta.

    Raises:
        ConfigError: tokens that are no ids, or one twice.
    """

    tokens: tuple[int, ...] | int
    values: bool = False

    name = "trainable_tokens"
    tensors = ("token_rows",)
    kinds = ("embedding",)
    needs_weight = True

    def __post_init__(self) -> None:
        given: Any = self.tokens
        ids: list[Any] = [] if isinstance(given, int) else list(given) if isinstance(given, list | tuple) else [None]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType] # a file may say anything
        whole = [isinstance(k, int) and not isinstance(k, bool) and 0 <= k < 2**31 for k in ids]
        if isinstance(given, bool) or not all(whole) or not 1 <= self.count <= _MOST or len(set(ids)) < len(ids):
            raise ConfigError(f"tokens is {str(given)[:60]}; wanted ids of tokens, each once: (320, 1125)")
        if not isinstance(self.values, bool):  # pyright: ignore[reportUnnecessaryIsInstance] # a file may say anything
            raise ConfigError(f"values is {self.values!r}; it must be True or False")
        if ids:
            object.__setattr__(self, "tokens", tuple(ids))  # JSON has lists

    @property
    def count(self) -> int:
        """n."""
        return self.tokens if isinstance(self.tokens, int) else len(self.tokens)

    def check(self, site: Site) -> str | None:
        return super().check(site) or self._strange(site)

    def _strange(self, site: Site) -> str | None:
        if isinstance(self.tokens, int):
            return f"which {self.tokens} tokens they are is not told"
        largest = max(self.tokens)
        return f"token {largest} is beyond its {site.shape[1]} entries" if largest >= site.shape[1] else None

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"token_rows": (self.count, site.rows)}

    def init(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        if not self.values:
            return {"token_rows": torch.zeros(self.count, site.rows)}
        assert weight is not None
        return {"token_rows": weight.detach()[:, self._ids(weight)].t().float().contiguous()}

    def _ids(self, like: Tensor) -> Tensor:
        return torch.tensor(self.tokens, device=like.device)

    @property
    def constant_names(self) -> frozenset[str]:
        return frozenset({"ids"})

    def constants(self, site: Site, weight: Tensor | None) -> dict[str, Tensor]:
        return {"ids": torch.tensor(self.tokens)}

    def _change(self, t: Tensors, weight: Tensor | None) -> Tensor:
        """(n, width)."""
        if not self.values:
            return t["token_rows"]
        assert weight is not None
        ids = t["ids"] if "ids" in t else self._ids(weight)
        return t["token_rows"] - weight[:, ids.to(weight.device)].t().to(t["token_rows"])

    def delta(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensor:
        rows = self._change(t, weight)
        return rows.new_zeros(site.shape).index_copy(1, self._ids(rows), rows.t())

    def accumulate(self, total: Tensor, t: Tensors, site: Site, weight: Tensor | None, gain: float) -> None:
        rows = self._change(t, weight).to(total.dtype)
        total.index_add_(1, self._ids(total), rows.t(), alpha=gain)

    def way(self, site: Site) -> Way:
        return Way(act=True, input=True, weight=self.values, linear=("change",))

    def operands(self, t: Tensors, site: Site, weight: Tensor | None) -> Tensors:
        t = self.whole(t, site, weight)
        return {"change": self._change(t, weight), "ids": t["ids"]}

    def act(self, o: Tensors, site: Site, x: Tensor, y: Tensor | None, onto: Tensor | None) -> Tensor:
        hits = x[..., None] == o["ids"]
        there = hits.any(-1, keepdim=True)
        change = F.embedding(hits.int().argmax(-1), o["change"]) * there.to(o["change"].dtype)
        return change if onto is None else onto + change

    def fits(self, t: Tensors, site: Site) -> str | None:
        return super().fits(t, site) or (self._strange(site) if not isinstance(self.tokens, int) else None)

    @classmethod
    def infer(cls, t: Tensors, alpha: float | None) -> Self:
        if t["token_rows"].ndim != 2:
            raise ShapeError(f"token_rows is {tuple(t['token_rows'].shape)}, wanted (tokens, width)")
        return cls(len(t["token_rows"]))

    def pair(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        if self.values or isinstance(self.tokens, int):
            return None
        rows = t["token_rows"]
        return rows.t(), F.one_hot(self._ids(rows), site.shape[1]).to(rows.dtype)


def _read(t: Tensors, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple[Method, dict[str, Tensor]]:
    rows, said = t["trainable_tokens_delta"], config["token_indices"]
    if not isinstance(said, list) or rows.ndim != 2 or len(said) != len(rows):  # pyright: ignore[reportUnknownArgumentType]
        raise FormatError(f"token_indices and trainable_tokens_delta {tuple(rows.shape)} do not belong together")
    return TrainableTokens(tuple(said), values=True), {"token_rows": rows}  # pyright: ignore[reportUnknownArgumentType]


def _write(method: TrainableTokens, t: Tensors, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not method.values or isinstance(method.tokens, int):
        raise FormatError("peft has the embeddings themselves, and these are differences: train with values=True")
    return {"trainable_tokens_delta": t["token_rows"]}, {"token_indices": list(method.tokens)}


TrainableTokens.peft = Peft("TRAINABLE_TOKENS", ("trainable_tokens_delta",), _read, _write)
