"""P-tuning: tokens that a small network makes while they are trained (arXiv 2103.10385)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import LSTM
from torch.nn import functional as F

from imgadapt.errors import ConfigError
from imgadapt.methods.base import positive
from imgadapt.prompting.kind import Place, Prompting, Tensors

_WIDEST = 2**14


@dataclass(frozen=True)
class PTuning(Prompting):
    """tokens = head(embedding), as prompt tuning's then; `embedding` (n, width) and head are what is trained.

    encoder: "mlp": three layers with ReLU, `hidden` wide; "lstm": one layer both ways, `hidden` wide each, then two
        layers with ReLU between.
    A file has the tokens as they were made, which act, and the network, which goes on being trained (trainable=True).
    The last layer starts small, so that fresh tokens are as prompt tuning's.

    Source: arXiv 2103.10385; peft/tuners/p_tuning/model.py, whose files have the tokens alone.
    """

    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden: int = 128

    name: ClassVar[str] = "p_tuning"
    rate_over_lora: ClassVar[float] = 6.0
    shared: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("hidden", self.hidden)
        if self.hidden > _WIDEST:
            raise ConfigError(f"hidden is {self.hidden}; it must be {_WIDEST} or less")
        if self.encoder not in ("mlp", "lstm"):
            raise ConfigError(f"encoder is {self.encoder!r}; wanted 'mlp' or 'lstm'")

    def shapes(self, place: Place) -> Mapping[str, tuple[int, ...]]:
        return {"tokens": (self.tokens, place.context)}

    def making(self, place: Place) -> Mapping[str, tuple[int, ...]]:
        width, h = place.context, self.hidden
        found: dict[str, tuple[int, ...]] = {"embedding": (self.tokens, width)}
        if self.encoder == "lstm":
            for way in ("", "_reverse"):
                found |= {f"lstm_ih{way}": (4 * h, width), f"lstm_hh{way}": (4 * h, h)}
                found |= {f"lstm_ih_bias{way}": (4 * h,), f"lstm_hh_bias{way}": (4 * h,)}
        sizes = [(2 * h, 2 * h), (width, 2 * h)] if self.encoder == "lstm" else [(h, width), (h, h), (width, h)]
        for k, size in enumerate(sizes):
            found |= {f"head_{k}": size, f"head_{k}_bias": size[:1]}
        return found

    def init(self, place: Place) -> dict[str, Tensor]:
        shapes = self.making(place)
        made = {"embedding": torch.randn(shapes["embedding"])}
        for name, shape in list(shapes.items())[1:]:
            fan = self.hidden if name.startswith("lstm") else shapes[name.removesuffix("_bias")][1]
            made[name] = torch.empty(shape).uniform_(-1, 1) / math.sqrt(fan)  # as torch's own layers begin
        last = max(name for name in made if name.startswith("head_") and not name.endswith("_bias"))
        made[last] *= 0.1
        made[f"{last}_bias"] *= 0.1
        return made

    def made(self, t: Tensors) -> Tensors:
        x = t["embedding"]
        if self.encoder == "lstm":
            x = _both_ways(x, {name: tensor for name, tensor in t.items() if name.startswith("lstm")})
        heads = [name for name in t if name.startswith("head_") and not name.endswith("_bias")]
        for k, name in enumerate(sorted(heads)):
            x = F.linear(F.relu(x) if k else x, t[name], t[f"{name}_bias"])
        return {"tokens": x}


def _both_ways(x: Tensor, t: Tensors) -> Tensor:
    """An LSTM over (n, width), both ways: (n, 2 * hidden)."""
    with torch.device("meta"):
        lstm = LSTM(x.shape[1], t["lstm_hh"].shape[1], bidirectional=True, batch_first=True)
    spelled = {"ih": "weight_ih_l0", "hh": "weight_hh_l0", "ih_bias": "bias_ih_l0", "hh_bias": "bias_hh_l0"}
    own = {f"{theirs}{way}": t[f"lstm_{ours}{way}"] for ours, theirs in spelled.items() for way in ("", "_reverse")}
    return functional_call(lstm, own, (x[None],))[0][0]
