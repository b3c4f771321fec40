"""Attached: one learned prompt on one denoiser: what is trained, and its strengths."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from imgadapt.errors import ConfigError, StateError
from imgadapt.prompting.kind import Place, Prompting, Tensors
from imgadapt.slot import Strength


class Attached:
    """One adapter's tensors by place, and its strength at each attention that reads them (where text and picture attend
    together: at the denoiser).

    joint: whether text and picture attend together there. tensors: what acts; where the kind makes it (`making`) and it
    is trainable, what makes it, too.
    """

    def __init__(
        self,
        name: str,
        kind: Prompting,
        places: Mapping[str, Place],
        tensors: Mapping[str, Tensors],
        *,
        joint: bool,
        learns: bool,
    ) -> None:
        self.name, self.kind, self.places, self.joint = name, kind, places, joint
        self.strengths: dict[str, Strength] = {}
        self.parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._fixed: dict[str, Tensors] = {}  # what is not made anew, of a file that only acts
        self._made: dict[str, Tensors] = {}
        for key, t in tensors.items():
            making = kind.making(places[key])
            shapes = kind.shapes(places[key])
            made_anew = bool(making) and making.keys() <= t.keys() and (learns or not shapes.keys() <= t.keys())
            names = making if made_anew else shapes
            self.parameters[key] = {name: nn.Parameter(t[name].detach().clone(), learns) for name in names}
            rest = {} if made_anew else {name: t[name] for name in t.keys() & making.keys()}
            self._fixed[key] = rest

    def check(self, strengths: Mapping[str, Strength]) -> None:
        """Raises ConfigError where it cannot act at these strengths."""
        for strength in strengths.values():
            check_strength(self.kind, self.joint, strength)

    def prepare(self) -> None:
        """Make what attention reads, once a forward."""
        self._made = {key: self._at(key) for key in self.parameters}

    def _at(self, key: str) -> Tensors:
        own: Tensors = self.parameters[key]
        return own if own.keys() >= self.kind.shapes(self.places[key]).keys() else self.kind.made(own)

    def read(self, attention: str, like: Tensor) -> Tensors:
        """What that attention reads, on like's device and in its dtype."""
        key = attention if attention in self.parameters else attention.partition(".")[0]
        made = self._made.get(key) or self._at(key)
        return {name: tensor.to(like.device, like.dtype) for name, tensor in made.items()}

    def strength(self, attention: str) -> Strength:
        """0 where it has none."""
        return self.strengths.get(attention, 0.0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}  # of a graph, which is not copied

    def whole(self, key: str) -> dict[str, Tensor]:
        """All tensors of a place for a file: what acts, and what makes it."""
        every = {**self._at(key), **self.parameters[key], **self._fixed[key]}
        return {name: tensor.detach().cpu().clone() for name, tensor in every.items()}


def check_strength(kind: Prompting, joint: bool, strength: Strength) -> None:
    """Raises ConfigError where a kind cannot act at a strength."""
    if joint and (isinstance(strength, Tensor) or strength not in (0.0, 1.0)):
        raise ConfigError(
            f"{kind.name} at {strength!r}: attention of text and picture together takes no bias; wanted 0 or 1"
        )
    least = float(strength.min()) if isinstance(strength, Tensor) else strength
    if kind.appended and least < 0:
        raise ConfigError(f"{kind.name} at {least:g}: its strength is a share of attention; wanted 0 or more")


def spread_over(strength: Tensor, batch: int, name: str) -> Tensor:
    """Strengths (batch,) of strengths for as many samples, or for a half or a third of them (guidance).

    Raises:
        StateError: they are for another number.
    """
    if batch not in (len(strength), 2 * len(strength), 3 * len(strength)):
        raise StateError(
            f"{name} has weights for {len(strength)} samples, and this attention gets {batch}; it must be that number, "
            "or two or three times that (guidance)"
        )
    return strength.repeat(batch // len(strength))
