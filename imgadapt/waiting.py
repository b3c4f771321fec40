"""Waiting: where the own weights of merged layers are, while they are in a checkpoint and not in memory."""

from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from torch import nn

from imgadapt.errors import StateError, first_few
from imgadapt.layer import AdapterLayer
from imgadapt.stored import Stored, in_parallel, stored

Places = str | PathLike[str] | Mapping[str, str | PathLike[str]]
"""A checkpoint, or one for each component."""


def waiting(originals: Places, layers: Sequence[tuple[str, AdapterLayer]]) -> dict[str, Stored]:
    """Layer -> its weight in the checkpoint, which is this very weight."""
    components = list(dict.fromkeys(name.partition(".")[0] for name, _ in layers))
    if isinstance(originals, Mapping):
        places = {component: Path(originals[component]) for component in components if component in originals}
    else:
        root = Path(originals)
        places = {c: root / c if (root / c).is_dir() else root for c in components}
    if missing := [component for component in components if component not in places]:
        raise StateError(f"originals= says nothing of {first_few(missing)}: give each component its file or folder")
    files = {component: stored(place) for component, place in places.items()}
    kept = {name: _where(files, name, layer) for name, layer in layers}

    def other(row: tuple[str, AdapterLayer]) -> bool:
        return not kept[row[0]].matches(row[1]._parameters[row[1].site.parameter])  # pyright: ignore[reportArgumentType] # a layer's parameter is there

    if wrong := [name for (name, _), is_other in zip(layers, in_parallel(other, layers), strict=True) if is_other]:
        raise StateError(f"{kept[wrong[0]].file} has other weights for {len(wrong)} layers: {first_few(wrong)}")
    return kept


def untied(parts: Mapping[str, nn.Module], layers: Sequence[tuple[str, AdapterLayer]]) -> None:
    """Raises StateError where a weight that would change in place is another layer's, too."""
    modules = {id(module): module for part in parts.values() for module in part.modules()}
    uses = Counter(id(p) for module in modules.values() for p in module._parameters.values() if p is not None)
    if tied := [name for name, layer in layers if uses[id(layer._parameters[layer.site.parameter])] > 1]:
        raise StateError(f"{first_few(tied)} share their weight with other layers: merge without originals=")


def _where(files: Mapping[str, Mapping[str, Stored]], name: str, layer: AdapterLayer) -> Stored:
    component, _, path = name.partition(".")
    key = f"{path.removesuffix('.in_proj') if layer.site.kind == 'fused' else path}.{layer.site.parameter}"
    found = files[component].get(key) or files[component].get(f"text_model.{key}")
    if found is None:
        raise StateError(f"the checkpoint of {component} has no {key}; it has {first_few(list(files[component]))}")
    return found
