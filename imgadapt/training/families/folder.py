"""A base's folder as anyone may have made it: looked at before diffusers makes anything of what it says."""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from imgadapt import reading
from imgadapt.combining.checkpoints.shards import shards, weight_files
from imgadapt.errors import ConfigError, first_few
from imgadapt.header import header_of

INDEX = "model_index.json"
_HALF = "fp16"
_OTHERS = (INDEX, "adapter_config.json")
"""What leads diffusers and transformers from a part's folder to other places."""
_MOST_BYTES = 2**20  # of a config
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
"""Whose classes a pipeline is made of; the last is diffusers' own, for the safety checker."""
_LIMITS = (("layers|blocks|depth", 1000), ("max_size", 512), ("sample_size", 2048), ("", 2**24))
"""Of numbers in configs, by words in their names: models' are far below, and memory goes by them, not by the size
of the files."""
_MOST_ENTRIES = 1000  # of a list
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check(folder: Path) -> None:
    """Read its configs, and the headers of its weights.

    Raises:
        ConfigError: it asks for code that is not diffusers' or transformers', for more layers or larger ones than any
            model has, or its weights are pickles.
        FormatError: weights are not whole, or an index of shards names what is not beside it.
    """
    for name, library in _components(folder):
        part = folder / name
        if library not in _LIBRARIES:
            raise ConfigError(
                f"{folder / INDEX}: {name} is of {library!r}, which is code; wanted diffusers or transformers"
            )
        for path in (part / "config.json", part / "scheduler_config.json"):
            if path.is_file():
                _check_sizes(path, read(path))
        if nested := [other for other in _OTHERS if (part / other).exists()]:
            raise ConfigError(f"{part / nested[0]}: a pipeline or an adapter within a base, which none of them has")
        _check_weights(part, variant(folder))


def variant(folder: Path) -> str:
    """Of its weights, which are loaded: "fp16" where the denoiser has no others; else "", the plain ones."""
    weights = [*folder.glob("unet/*.safetensors"), *folder.glob("transformer/*.safetensors")]
    return _HALF if weights and all(f".{_HALF}" in file.name for file in weights) else ""


def check_whole(pipeline: Any, folder: Path | None) -> None:
    """Of a pipeline that was loaded, of a folder or of one file: whether all weights came. diffusers leaves those that
    are not in its files without values, transformers gives them random ones.

    Raises:
        ConfigError: some did not.
    """
    for name, module in pipeline.components.items():
        if not isinstance(module, nn.Module):
            continue
        lost = [key for key, weight in module.named_parameters() if weight.is_meta]
        if folder is not None and type(module).__module__.startswith("transformers"):
            headers = map(header_of, weight_files(folder / name, variant(folder)))
            lost += _unheld(module, {_plain(key) for header in headers for key in header.rows})
        if lost:
            raise ConfigError(
                f"{name} is not whole: {len(lost)} of its weights are in no file, {first_few(lost)}; are its files all "
                "there, and of this base?"
            )


def _unheld(module: nn.Module, held: Collection[str]) -> list[str]:
    """Parameters that are not held under any of their names."""
    names: dict[int, list[str]] = {}
    for key, weight in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(key)
    return [own[0] for own in names.values() if not any(_plain(key) in held for key in own)]


def _plain(key: str) -> str:
    """Without CLIP's `text_model.`, which versions of transformers have or have not."""
    return key.removeprefix("text_model.")


def pipeline_class(folder: Path) -> str:
    """What its index says that it is.

    Raises:
        ConfigError: there is no index, or it does not say.
    """
    said = read(folder / INDEX).get("_class_name")
    if not isinstance(said, str):
        raise ConfigError(f"{folder / INDEX} does not say of which class it is")
    return said


def read(path: Path) -> Mapping[str, Any]:
    """A config.

    Raises:
        ConfigError: it cannot be read, is larger than any, or is no table in JSON.
    """
    try:
        found: Any = json.loads(reading.read(path, _MOST_BYTES))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); wanted a model's config") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}), which diffusers writes") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is no table, but {type(found).__name__}")
    return found  # pyright: ignore[reportUnknownVariableType] # of anything


def _components(folder: Path) -> Iterator[tuple[str, str]]:
    """(folder's name, library) of all parts that the index has; of other entries diffusers makes nothing."""
    for name, said in read(folder / INDEX).items():
        if name.startswith("_") or not isinstance(said, list | str) or len(said) != 2 or said[0] is None:  # pyright: ignore[reportUnknownArgumentType]
            continue
        if not re.fullmatch(r"\w+", name):
            raise ConfigError(f"{folder / INDEX}: {name[:80]!r} is no name of a folder in it")
        yield name, str(said[0])[:80]  # pyright: ignore[reportUnknownArgumentType]


def _check_sizes(path: Path, value: Any, name: str = "") -> None:
    if isinstance(value, dict):
        for key, inner in value.items():  # pyright: ignore[reportUnknownVariableType]
            _check_sizes(path, inner, str(key))  # pyright: ignore[reportUnknownArgumentType]
    elif isinstance(value, list):
        if len(value) > _MOST_ENTRIES:  # pyright: ignore[reportUnknownArgumentType]
            raise ConfigError(f"{path}: {name[:80]} has {len(value):,} entries; no model's has more than {_MOST_ENTRIES:,}")  # pyright: ignore[reportUnknownArgumentType]  # fmt: skip  # noqa: E501
        for inner in value:  # pyright: ignore[reportUnknownVariableType]
            _check_sizes(path, inner, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        most = next(limit for words, limit in _LIMITS if re.search(words, name))
        if most < abs(value) < math.inf:  # schedulers have -Infinity
            raise ConfigError(f"{path}: {name[:80]} is {str(value)[:40]}; no model's is above {most:,}")


def _check_weights(part: Path, wanted: str) -> None:
    if not part.is_dir():
        return
    for index in part.glob("*.safetensors*.json"):
        shards(index)
    files = weight_files(part, wanted)
    for file in files:
        header_of(file)
    pickled = sorted(path.name for pattern in _PICKLES for path in part.glob(pattern))
    if pickled and not files and (part / "config.json").is_file():
        raise ConfigError(
            f"{part}: its weights are pickles ({first_few(pickled)}), which can hold code, and are not read; wanted "
            ".safetensors (docs/training.md says how to make them)"
        )
