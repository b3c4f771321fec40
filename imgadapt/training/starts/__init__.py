"""Where LoRA starts: from zero when nothing is said; or from the weight, from what its layer reads, from gradients, or
from what quantising took.

All change nothing when fresh, to the bit, save LoftQ's, whose change is what it is for.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from imgadapt.arch import canonical
from imgadapt.file import AdapterFile
from imgadapt.formats import Part
from imgadapt.training.config import Start
from imgadapt.training.starts.gradients import lora_ga
from imgadapt.training.starts.inputs import corda, eva
from imgadapt.training.starts.place import Place, places
from imgadapt.training.starts.shown import Show, gradients, moments, stratified
from imgadapt.training.starts.weights import loftq, lost, olora, orthogonal, pissa

ANCHORED: tuple[Start, ...] = ("pissa", "olora", "corda", "lora_ga")
"""Those that are Anchored and not LoRA."""
SHOWN: tuple[Start, ...] = ("eva", "corda", "lora_ga")
"""Those that look at data."""
_OF_WEIGHTS: Mapping[str, Callable[[Place], Part]] = {"pissa": pissa, "olora": olora, "orthogonal": orthogonal}
_OF_DATA: Mapping[str, Callable[[Sequence[Place], Show], dict[str, Part]]] = {
    "eva": eva,
    "corda": corda,
    "lora_ga": lora_ga,
}


def made(
    model: Any,
    start: Start,
    *,
    name: str = "default",
    seed: int = 0,
    show: Show | None = None,
    originals: Mapping[str, Tensor] | None = None,
) -> tuple[AdapterFile, str]:
    """(the start of an adapter that is on a model, what there is to say of it); the model stays as it is.

    show: what the base is shown, for those of `SHOWN`. originals: layer -> its weight before it was quantised, for
    "loftq".

    Raises:
        ConfigError: see `places`, `eva`, `corda`, `lora_ga`.
        StateError: a weight cannot be read.
    """
    found = places(model, name=name, seed=seed)
    said = ""
    if start in _OF_DATA:
        assert show is not None
        parts = _OF_DATA[start](found, show)
        if start == "eva":
            ranks = [part.method.file_rank or 0 for part in parts.values()]
            said = f"ranks from {min(ranks)} to {max(ranks)}, in {len(parts)} of {len(found)} layers"
    elif start == "loftq":
        held = originals or {}
        parts = {place.name: loftq(place, held.get(place.name)) for place in found}
        rows = [lost(p, parts[p.name], held[p.name]) for p in found if p.name in held]
        before, after = (sum(row[k] for row in rows) / max(1, len(rows)) for k in (0, 1))
        said = f"what quantising took of {len(rows)} layers: {before:.2%} of the weight, now {after:.2%}"
    else:
        parts = {place.name: _OF_WEIGHTS[start](place) for place in found}
    return AdapterFile({canonical(layer): part for layer, part in parts.items()}), said


__all__ = [
    "ANCHORED", "SHOWN", "Place", "Show", "Start", "corda", "eva", "gradients", "loftq", "lora_ga",
    "lost", "made", "moments", "olora", "orthogonal", "pissa", "places", "stratified",
]  # fmt: skip
