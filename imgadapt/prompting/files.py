"""Learned prompts in files: our own form, and peft's prompt_embeddings.

Ours: `prompts.PLACE.NAME` for each tensor, and in the metadata `imgadapt_prompts`, JSON of the kind and its fields.
peft's: one tensor (n, width), `prompt_embeddings`, and a config with `peft_type` PROMPT_TUNING or P_TUNING
(peft/utils/save_and_load.py). It has no name for a denoiser: it is `unet`, unless the width is that of SD3 and Flux.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from torch import Tensor

from imgadapt.errors import ConfigError, FormatError, first_few
from imgadapt.formats.layer_config import LONGEST_JSON, PEFT_KEY
from imgadapt.prompting import KINDS
from imgadapt.prompting.kind import Prompting, Prompts
from imgadapt.prompting.tokens import PromptTuning
from imgadapt.prompting.tuned import PTuning

KEY = "imgadapt_prompts"
_START = "prompts."
_PEFT = "prompt_embeddings"
_T5 = 4096  # the width of T5-XXL's texts, which SD3 and Flux read
_PEFT_TYPES: Mapping[str, type[Prompting]] = {"PROMPT_TUNING": PromptTuning, "P_TUNING": PTuning}


def read_prompts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[Prompts | None, list[str]]:
    """(the learned prompt of a file, keys that it is made of).

    Raises:
        FormatError: they are not what imgadapt or peft write.
    """
    if list(tensors) == [_PEFT]:
        return _of_peft(tensors[_PEFT], metadata), [_PEFT]
    keys = [key for key in tensors if key.startswith(_START)]
    if not keys:
        return None, []
    kind = _kind(metadata.get(KEY, ""))
    found: dict[str, dict[str, Tensor]] = {}
    for key in keys:
        place, _, name = key.removeprefix(_START).rpartition(".")
        found.setdefault(place, {})[name] = tensors[key]
    for place, own in found.items():
        if not place or any(tensor.ndim not in (1, 2) or not tensor.is_floating_point() for tensor in own.values()):
            raise FormatError(f"{_START}{place}: wanted vectors and matrices of numbers, {first_few(list(own))}")
        if any(len(own[name]) != kind.tokens for name in own.keys() & {"tokens", "keys", "values", "prompt"}):
            raise FormatError(f"{_START}{place}: its tensors are not of {kind.tokens} tokens, as '{KEY}' says")
    return Prompts(kind, found), keys


def _kind(text: str) -> Prompting:
    try:
        told: Any = json.loads(text if len(text) <= LONGEST_JSON else "")
        kind = next(kind for kind in KINDS if kind.name == told["kind"])
        own = {field.name: field.type for field in fields(kind)}
        given = {name: value for name, value in told.items() if name != "kind"}
        if given.keys() - own.keys():
            raise FormatError(f"the metadata '{KEY}' has {first_few(sorted(given.keys() - own.keys()))}, not known")
        return kind(**given)
    except (ValueError, TypeError, KeyError, StopIteration, RecursionError, ConfigError) as error:
        raise FormatError(f"the metadata '{KEY}' is not what imgadapt writes: {error!r}") from error


def _of_peft(tensor: Tensor, metadata: Mapping[str, str]) -> Prompts:
    try:
        config: Any = json.loads(metadata.get(PEFT_KEY, "{}"))
        said = config.get("peft_type", "PROMPT_TUNING")
    except (ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"the metadata '{PEFT_KEY}' is no config: {error!r}") from error
    if not isinstance(said, str) or said not in _PEFT_TYPES:
        raise FormatError(
            f"peft's {said!r}: one table for all layers of a language model; a denoiser's have widths of their own. "
            f"Read are {', '.join(_PEFT_TYPES)}"
        )
    if tensor.ndim != 2 or not tensor.is_floating_point() or 0 in tensor.shape:
        raise FormatError(f"{_PEFT} is {tuple(tensor.shape)} of {tensor.dtype}; wanted (tokens, width)")
    component = "transformer" if tensor.shape[1] == _T5 else "unet"
    try:
        return Prompts(PromptTuning(len(tensor)), {component: {"tokens": tensor}})
    except ConfigError as error:
        raise FormatError(f"{_PEFT}: {error}") from error


def write_prompts(prompts: Prompts, form: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by key, metadata) in `imgadapt`'s form or in `peft`'s.

    Raises:
        FormatError: the form has no word for it.
    """
    if form == "imgadapt":
        told = {"kind": prompts.kind.name, **asdict(prompts.kind)}
        made = {f"{_START}{p}.{n}": t for p, own in prompts.tensors.items() for n, t in own.items()}
        return made, {KEY: json.dumps(told, sort_keys=True)}
    if form != "peft" or not prompts.kind.shared:
        why = " (of learned prompts, peft's tables have place for prompt_tuning and p_tuning)" if form == "peft" else ""
        raise FormatError(f"{form} has no word for {prompts.kind.name}{why}; wanted format='imgadapt'")
    (own,) = prompts.tensors.values()
    kind, width = prompts.kind, own["tokens"].shape[1]
    peft_type = next(name for name, theirs in _PEFT_TYPES.items() if isinstance(kind, theirs))
    config: dict[str, Any] = {"peft_type": peft_type, "num_virtual_tokens": kind.tokens, "token_dim": width}
    config |= {"num_transformer_submodules": 1, "inference_mode": True}
    if isinstance(kind, PTuning):
        config |= {"encoder_hidden_size": kind.hidden, "encoder_reparameterization_type": kind.encoder.upper()}
        config |= {"encoder_num_layers": 1} if kind.encoder == "lstm" else {}
    return {_PEFT: own["tokens"]}, {PEFT_KEY: json.dumps(config)}
