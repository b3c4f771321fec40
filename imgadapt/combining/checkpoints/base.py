"""Base: the weights of a model in files, as layers by canonical names: a diffusers folder or a single file."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imgadapt.arch import Architecture
from imgadapt.combining.checkpoints.naming import DENOISERS, Naming, component_folders, plain, whole_file
from imgadapt.combining.checkpoints.shards import all_stored, weight_files
from imgadapt.errors import FormatError, ShapeError, StateError
from imgadapt.formats.splitting import scaled
from imgadapt.sites import Kind, Site
from imgadapt.stored import DTYPES, Stored

_EMBEDDINGS = ("token_embedding", "position_embedding", "shared", "embed_tokens", "relative_attention_bias")
_DEMO = Path(__file__).parents[2] / "demo" / "pipeline"
_SCALES = ("scale_weight", "weight_scale")
"""What ComfyUI's scaled float8 multiplies a weight by."""


@dataclass(frozen=True)
class Place:
    """Where a layer's rows are: `rows` of them from `start` are those from `first` of the tensor `key` of the base.
    turned: the tensor is the layer's transposed, whole.
    """

    key: str
    first: int
    start: int
    rows: int
    turned: bool = False


@dataclass(frozen=True)
class BaseLayer:
    """A layer of a base. site: as methods see it. scale: key of the number that stored values are multiplied by."""

    name: str
    site: Site
    weight: tuple[Place, ...]
    bias: tuple[Place, ...] = ()
    scale: str | None = None


class _Names(Collection[str]):
    """Layers' names; CLIP's are found with `text_model.` and without."""

    def __init__(self, layers: Mapping[str, BaseLayer]) -> None:
        self._layers = layers

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and plain(name) in self._layers

    def __iter__(self) -> Iterator[str]:
        return (layer.name for layer in self._layers.values())

    def __len__(self) -> int:
        return len(self._layers)


@dataclass(frozen=True, eq=False)
class BaseFile:
    """Files with the weights of a model. Only their headers are in memory; tensors are read when they are asked for.

    path: what was opened. files: each safetensors file of it that has weights of layers, and which component it is of
        ("": all there are). tensors: of those, by key (`unet.conv_in.weight`; in a single file, its own key).
    architecture: the table that knows the denoiser; None: none does.
    """

    path: Path
    files: Mapping[Path, str]
    tensors: Mapping[str, Stored] = field(repr=False)
    architecture: Architecture | None
    layers: Mapping[str, BaseLayer] = field(repr=False)
    """By `plain` name."""

    @property
    def names(self) -> Collection[str]:
        """Canonical names of all layers."""
        return _Names(self.layers)

    def layer(self, name: str) -> BaseLayer:
        """Raises StateError: there is none of this name."""
        found = self.layers.get(plain(name))
        if found is None:
            raise StateError(f"{self.path}: it has no layer {name}; `names` lists those it has")
        return found

    def site(self, name: str) -> Site:
        return self.layer(name).site

    def places(self, name: str) -> tuple[Place, ...]:
        """Where a layer's weight is."""
        return self.layer(name).weight

    def weight(self, name: str) -> tuple[Tensor, Site]:
        """A layer's weight in the dtype that it is stored in (fp32 where there is a scale), and its site.

        Raises:
            StateError: no such layer, or the file has changed or is gone.
            FormatError: its values are quantised.
        """
        layer = self.layer(name)
        value = self._read(layer.weight).reshape(layer.site.shape)
        if layer.scale is not None:
            value = value.float() * self.scale(layer)
        return value, layer.site

    def bias(self, name: str) -> Tensor | None:
        """(out,); None: the layer has none. Raises as `weight`."""
        layer = self.layer(name)
        return self._read(layer.bias) if layer.bias else None

    def scale(self, layer: BaseLayer) -> float:
        """What a layer's stored values are multiplied by.

        Raises:
            FormatError: it is not one number.
        """
        if layer.scale is None:
            return 1.0
        value = self.readable(layer.scale).read()
        if value.numel() != 1:
            raise FormatError(f"{layer.name}: scaled by {tuple(value.shape)} numbers; wanted one for the whole weight")
        return float(value)

    def _read(self, places: Sequence[Place]) -> Tensor:
        pieces: list[Tensor] = []
        for place in sorted(places, key=lambda place: place.start):
            tensor = self.readable(place.key)
            whole = place.turned or place.rows == tensor.shape[0]
            value = (tensor if whole else rows_in(tensor, place.first, place.rows)).read()
            pieces.append(value.t() if place.turned else value)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def readable(self, key: str) -> Stored:
        """Raises FormatError: a tensor's values are quantised."""
        tensor = self.tensors[key]
        if tensor.dtype not in DTYPES:
            raise FormatError(
                f"{tensor.file}: {key} is stored as {tensor.dtype}, quantised; wanted a base of floating-point weights"
            )
        return tensor


def rows_in(tensor: Stored, first: int, rows: int) -> Stored:
    """Rows of a stored tensor, which lie one after the other."""
    size = (tensor.end - tensor.start) // tensor.shape[0]
    start = tensor.start + first * size
    return replace(tensor, shape=(rows, *tensor.shape[1:]), start=start, end=start + rows * size)


def base_path(base: str | PathLike[str]) -> Path:
    """Where a base is that is called so: the text "demo" is the embedded one, as it is in trainings."""
    return _DEMO if base == "demo" else Path(base)


def open_base(path: str | PathLike[str]) -> BaseFile:
    """A base: a folder that diffusers wrote (sharded or not, of any variant), one component's folder, or a single file
    with the names of the model's own code or of diffusers', whole or the denoiser alone; or the text "demo".

    Raises:
        FormatError: there is none, it is not whole, or no table knows its layers.
    """
    path = base_path(path)
    folders = _component_folders(path)
    if folders:
        return _folder(path, folders)
    if path.is_file() and path.suffix != ".safetensors":
        raise FormatError(f"{path}: only .safetensors is read; write the checkpoint as that first (pickles run code)")
    files = weight_files(path) if path.is_dir() else [path]
    if not files:
        raise FormatError(
            f"{path}: no safetensors in it, nor in a folder unet/ or transformer/; wanted a diffusers base"
        )
    tensors = all_stored(files)
    modules = _modules(tensors)
    shapes = {module: tensors[own["weight"]].shape for module, own in modules.items()}
    naming = whole_file(shapes)
    if not naming.owners:
        raise FormatError(
            f"{path}: no table knows its {len(shapes)} layers; wanted a model's checkpoint, or a diffusers folder"
        )
    return BaseFile(path, dict.fromkeys(files, ""), tensors, naming.architecture, _layers(naming, modules, tensors))


def _folder(path: Path, folders: Mapping[str, Sequence[Path]]) -> BaseFile:
    by_component = {
        component: {f"{component}.{key}": one for key, one in all_stored(files).items()}
        for component, files in folders.items()
    }
    tensors = {key: one for own in by_component.values() for key, one in own.items()}
    modules = _modules(tensors)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {component: {} for component in folders}
    for module, own in modules.items():
        component, _, inner = module.partition(".")
        shapes[component][inner] = tensors[own["weight"]].shape
    naming = component_folders(shapes)
    files = {file: component for component, own in folders.items() for file in own}
    return BaseFile(path, files, tensors, naming.architecture, _layers(naming, modules, tensors))


def _component_folders(path: Path) -> dict[str, list[Path]]:
    """Component -> its weights' files."""
    if not path.is_dir():
        return {}
    wanted = (*DENOISERS, "text_encoder", "prior")
    names = sorted(one.name for one in path.iterdir() if one.is_dir() and one.name.startswith(wanted))
    names.sort(key=lambda name: not name.startswith(DENOISERS))
    found = {name: weight_files(path / name) for name in names}
    return {name: files for name, files in found.items() if files}


def _modules(tensors: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
    """Module -> its keys: `weight`, and `bias` and `scale` where it has them."""
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        module, _, end = key.rpartition(".")
        kinds: dict[str, tuple[str, str]] = {
            "weight": (module, "weight"), "bias": (module, "bias"), **dict.fromkeys(_SCALES, (module, "scale")),
            "in_proj_weight": (f"{module}.in_proj", "weight"), "in_proj_bias": (f"{module}.in_proj", "bias"),
            "positional_embedding": (key, "weight"), "text_projection": (key, "weight"),
        }  # fmt: skip
        if end == "scale" and f"{module}.weight" not in tensors:  # what Flux calls the weight of a norm
            kinds["scale"] = (module, "weight")
        if end in kinds:
            module, kind = kinds[end]
            found.setdefault(module, {})[kind] = key
    return {module: own for module, own in found.items() if "weight" in own and tensors[own["weight"]].shape}


def _layers(
    naming: Naming, modules: Mapping[str, Mapping[str, str]], tensors: Mapping[str, Stored]
) -> dict[str, BaseLayer]:
    """By `plain` name.

    Raises:
        ShapeError: a fused layer's rows do not divide as the table's do.
    """
    weights: dict[str, list[Place]] = {}
    biases: dict[str, list[Place]] = {}
    scales: dict[str, str] = {}
    for module, own in naming.owners.items():
        keys = modules[module]
        shape = tensors[keys["weight"]].shape
        for s in _fitted(module, own, shape, naming.architecture):
            rows = s.rows or shape[0]
            turned = not s.rows and _turned(module, s.layer, len(shape))
            weights.setdefault(s.layer, []).append(Place(keys["weight"], s.first, s.start, rows, turned))
            if "bias" in keys:
                biases.setdefault(s.layer, []).append(Place(keys["bias"], s.first, s.start, rows))
            if "scale" in keys:
                scales[s.layer] = keys["scale"]
    made: dict[str, BaseLayer] = {}
    for name, places in weights.items():
        shape = tensors[places[0].key].shape
        shape = (shape[1], shape[0]) if places[0].turned else (sum(p.rows for p in places), *shape[1:])
        site = Site(shape, _kind(name, places[0], len(shape)), bias="bias" if name in biases else None)
        made[plain(name)] = BaseLayer(name, site, tuple(places), tuple(biases.get(name, ())), scales.get(name))
    return made


def _fitted(
    module: str, own: Sequence[Any], shape: tuple[int, ...], architecture: Architecture | None
) -> Sequence[Any]:
    """The slices of a module of this shape: a model of another width has as many of its rows to each layer."""
    total = max((s.first + s.rows for s in own), default=0)
    if len(own) < 2 or total == shape[0] or architecture is None:
        return own if len(own) > 1 else [replace(s, rows=0) for s in own]
    table = architecture.shapes[own[0].layer][1:]
    fitted = scaled(own, total, shape[0])
    if fitted is None or total * math.prod(shape[1:]) != shape[0] * math.prod(table):
        raise ShapeError(f"{module} is {shape}; which rows are which layer is known of ({total}, {table}) only")
    return fitted


def _turned(module: str, layer: str, dimensions: int) -> bool:
    """Whether a module has a layer's weight transposed: a lookup's table, and open_clip's projection."""
    projection = layer.endswith(".text_projection") and module.rpartition(".")[0].endswith(".model")
    return dimensions == 2 and (layer.rpartition(".")[2] in _EMBEDDINGS or projection)


def _kind(name: str, place: Place, dimensions: int) -> Kind:
    if place.turned and name.rpartition(".")[2] in _EMBEDDINGS:
        return "embedding"
    return "conv" if dimensions > 2 else "linear" if dimensions == 2 else "norm"
