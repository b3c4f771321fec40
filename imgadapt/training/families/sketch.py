"""Sketches of bases: their families without weights, from config files, so that a training can be planned before it
is run, and before the base is downloaded."""

import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from imgadapt import demo
from imgadapt.errors import ConfigError, MissingExtra
from imgadapt.targets import DENOISERS, TEXT_ENCODERS
from imgadapt.training.families import hub, single_file
from imgadapt.training.families.family import Family
from imgadapt.training.families.load import family_of

BASES = Path(__file__).with_name("bases.json")
"""Configs of the hub's bases that have names (see `hub.NAMES`), parts that they share once. Schedulers are any with the
base's own betas or shifts, which is all that a family takes from them."""

_SINGLE = {"v1": "sd1", "v2": "sd2", "xl_base": "sdxl", "flux-dev": "flux"}  # diffusers' names, where not ours


@dataclass(frozen=True)
class Blueprint:
    """What a base is made of. pipeline: class; parts: component -> (class, config); tokenizers: component -> (class,
    folder), where there are files."""

    pipeline: str
    parts: Mapping[str, tuple[str, Mapping[str, Any]]]
    tokenizers: Mapping[str, tuple[str, Path]] = field(default_factory=dict[str, tuple[str, Path]])


def sketch(base: str, dtype: torch.dtype = torch.float32) -> Family:
    """The family of a base whose modules are on "meta", in `dtype` but for the autoencoder: shapes, and no weights.

    base: as for `load`; a name that is not on this machine is sketched from configs that imgadapt brings, without
        tokenizers. The family's own device is the CPU, so that a step can be simulated (see training/memory.py).

    Raises:
        ConfigError: there is no such base, its configs cannot be read, or its kind is not one that imgadapt trains.
        MissingExtra: diffusers is not installed.
    """
    plan = blueprint(base)
    family_class = family_of(base, plan.pipeline)
    try:
        pipeline = _pipeline(plan, dtype)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{base}: its configs make no {plan.pipeline}: {error}") from error
    made = family_class(pipeline, torch.device("meta"), dtype)
    made.device = torch.device("cpu")
    return made


def blueprint(base: str) -> Blueprint:
    """What a base is made of, from config files; of a single file, from its keys.

    Raises:
        ConfigError: see `sketch`.
    """
    path = Path(base).expanduser()
    if base == "demo":
        return _of_folder(base, demo.PIPELINE)
    if path.is_dir():
        return _of_folder(base, path)
    if path.is_file():
        kind = single_file.kind_of(path, single_file.shapes(path))
        return blueprint(_SINGLE.get(kind, kind))
    try:
        return _of_folder(base, hub.folder(base))
    except ConfigError:
        if base not in hub.NAMES:
            raise
        return _of_name(base)


def tokenizer_of(family: Family) -> tuple[Callable[[str], int], int] | None:
    """How many tokens a text has, those at its ends included, and how many the base reads: of the text encoder that
    reads most (T5, where there is one). None where the base's tokenizers are not on this machine."""
    found: list[tuple[Any, int]] = []
    for name, encoder in family.encoders.items():
        tokenizer = family.pipeline.components.get(name.replace("text_encoder", "tokenizer"))
        if tokenizer is None:
            return None
        found.append((tokenizer, length(family, encoder)))
    if not found:
        return None
    tokenizer, limit = max(found, key=lambda row: row[1])
    return lambda text: len(tokenizer(text, truncation=False, verbose=False).input_ids), limit


def length(family: Family, encoder: nn.Module) -> int:
    """Tokens, padding included, that a text encoder is given."""
    config: Any = encoder.config
    own = getattr(config, "max_position_embeddings", None)  # CLIP's; T5 has no end of its own
    return int(own) if own else family.tokens


def _of_name(base: str) -> Blueprint:
    told = json.loads(BASES.read_text("utf-8"))
    pipeline, rows = told["bases"][base]
    parts = {name: (told["parts"][part][0], {**told["parts"][part][1], **own}) for name, (part, own) in rows.items()}
    return Blueprint(pipeline, parts)


def _of_folder(base: str, folder: Path) -> Blueprint:
    try:
        index = _json(folder / "model_index.json")
        rows = {name: row[1] for name, row in index.items() if isinstance(row, list) and len(row) == 2 and row[1]}
        parts: dict[str, tuple[str, Mapping[str, Any]]] = {}
        for name in (*DENOISERS, *TEXT_ENCODERS, "vae", "scheduler"):
            if name in rows:
                file = "scheduler_config.json" if name == "scheduler" else "config.json"
                parts[name] = (rows[name], _json(folder / name / file))
        tokenizers = {
            n: (k, folder / n) for n, k in rows.items() if n.startswith("tokenizer") and (folder / n).is_dir()
        }
        return Blueprint(index["_class_name"], parts, tokenizers)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"base {base}: {folder} is not whole: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(path.read_text("utf-8")))


def _pipeline(plan: Blueprint, dtype: torch.dtype) -> Any:
    try:
        import diffusers
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtra("diffusers", "diffusers") from error
    parts: dict[str, Any] = {}
    with demo._quietly(diffusers.utils.logging), demo._quietly(transformers.utils.logging):
        for name, (kind, config) in plan.parts.items():
            if name == "scheduler":
                parts[name] = getattr(diffusers, kind).from_config(dict(config))
            elif name in TEXT_ENCODERS:
                parts[name] = _encoder(getattr(transformers, kind), config, dtype)
            else:
                with _made_in(torch.float32 if name == "vae" else dtype):
                    parts[name] = getattr(diffusers, kind).from_config(dict(config))
        for name, (kind, folder) in plan.tokenizers.items():
            parts[name] = getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
        made = getattr(diffusers, plan.pipeline)
        for name, parameter in inspect.signature(made).parameters.items():
            if parameter.default is inspect.Parameter.empty:
                parts.setdefault(name, None)  # tokenizers, safety checkers
        options = {"requires_safety_checker": False, "add_watermarker": False}
        return made(**parts, **{k: v for k, v in options.items() if k in inspect.signature(made).parameters})


def _encoder(kind: Any, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    with _made_in(dtype):
        made = kind(kind.config_class.from_dict(dict(config)))
    if dtype == torch.float16:  # as transformers loads T5
        for name, parameter in made.named_parameters():
            if set(name.split(".")) & set(made._keep_in_fp32_modules or ()):
                parameter.data = parameter.data.float()
    return made


@contextmanager
def _made_in(dtype: torch.dtype) -> Any:
    """Within it modules are made on "meta", and in a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)
