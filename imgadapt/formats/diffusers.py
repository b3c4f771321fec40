"""diffusers: dotted names with peft's spelling, alpha in the metadata (`save_lora_weights`, since 0.35).

`lora_adapter_metadata` is JSON: a peft `LoraConfig` per component, its keys prefixed `unet.`, `text_encoder.`.
Without it diffusers takes alpha = rank.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

from imgadapt.errors import ConfigError, FormatError
from imgadapt.formats.part import Part, Parts
from imgadapt.formats.table import Format, Settings
from imgadapt.methods import LoRA
from imgadapt.targets import DENOISERS, TEXT_ENCODERS

_KEY = "lora_adapter_metadata"


@lru_cache(maxsize=8)  # one file asks for every layer
def _config(text: str) -> dict[str, Any]:
    try:
        config: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the metadata '{_KEY}' is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise FormatError(f"the metadata '{_KEY}' is {type(config).__name__}, wanted an object")
    return cast("dict[str, Any]", config)


# a quantifier on a group that has a quantifier, or an alternative, inside: exponential in the length of a name
_NESTED = re.compile(r"\([^()]*[*+{|?][^()]*\)\s*[*+{]|\)\)\s*[*+{]|[*+}]\s*[*+{]|\\\d|\(\?P=")


@lru_cache(maxsize=32)
def _patterns(text: str, field: str) -> list[tuple[re.Pattern[str], Any]]:
    """Rows of an `alpha_pattern` or `rank_pattern`, as peft matches them (`get_pattern_key`: the first that does)."""
    patterns: Any = _config(text).get(field) or {}
    if not isinstance(patterns, dict):
        raise FormatError(f"'{field}' in the metadata '{_KEY}' is {type(patterns).__name__}, wanted an object")
    if dangerous := [p for p in cast("dict[str, Any]", patterns) if _NESTED.search(p)]:
        raise FormatError(
            f"'{field}' in the metadata '{_KEY}' repeats a repetition ({dangerous[0]!r}), which can take for ever"
        )
    try:
        return [(re.compile(rf"(.*\.)?({pattern})$"), v) for pattern, v in cast("dict[str, Any]", patterns).items()]
    except (re.error, RecursionError, OverflowError) as error:
        raise FormatError(f"'{field}' in the metadata '{_KEY}' is not all regular expressions: {error}") from error


def _look_up(text: str, name: str, default: str, pattern: str) -> Any:
    """What a peft config says of one layer; None if nothing. CLIP's `text_model.` may be there or not."""
    component, _, path = name.partition(".")
    spellings = {path, path.removeprefix("text_model.")}
    rows = _patterns(text, f"{component}.{pattern}")
    found = (value for regex, value in rows if any(regex.match(spelling) for spelling in spellings))
    return next(found, _config(text).get(f"{component}.{default}"))


def _settings(metadata: Mapping[str, str], name: str) -> Settings:
    """alpha and rank stabilisation of one layer."""
    if _KEY not in metadata:
        return {}
    alpha = _look_up(metadata[_KEY], name, "lora_alpha", "alpha_pattern")
    if alpha is None:
        return {}
    stabilised = _config(metadata[_KEY]).get(f"{name.partition('.')[0]}.use_rslora", False)
    return {"alpha": float(alpha), "rank_stabilised": bool(stabilised)}


def _metadata(parts: Parts, old: Mapping[str, str]) -> dict[str, str]:
    if _still_true(old, parts):
        return {_KEY: old[_KEY], "format": old.get("format", "pt")}
    config: dict[str, Any] = {}
    for component in dict.fromkeys(name.partition(".")[0] for name in parts):
        # peft matches live names; transformers 5.6 took CLIP's `text_model.` away, and a bare end matches both.
        # In a denoiser only the whole name will do: Flux has `proj_out` and `single_transformer_blocks.0.proj_out`
        start = "" if component in TEXT_ENCODERS else "^"
        own = {
            name.partition(".")[2].removeprefix("text_model."): part
            for name, part in parts.items()
            if name.startswith(f"{component}.")
        }
        stabilised = all(_stabilised(part) for part in own.values())
        ranks = {path: (part.method.file_rank or 0) for path, part in own.items()}
        alphas = {
            path: part.method.scale * (math.sqrt(ranks[path]) if stabilised else ranks[path])
            for path, part in own.items()
        }
        rank = Counter(ranks.values()).most_common(1)[0][0]
        alpha = Counter(alphas.values()).most_common(1)[0][0]
        fields = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "use_rslora": stabilised,
            "rank_pattern": {f"{start}{re.escape(path)}": r for path, r in ranks.items() if r != rank},
            "alpha_pattern": {f"{start}{re.escape(path)}": a for path, a in alphas.items() if a != alpha},
            "target_modules": sorted(own),
        }
        config |= {f"{component}.{key}": value for key, value in fields.items()}
    return {_KEY: json.dumps(config, indent=2, sort_keys=True), "format": "pt"}


def _still_true(metadata: Mapping[str, str], parts: Parts) -> bool:
    """Whether the config that a file came with (which has more fields than ours) describes these layers."""
    if _KEY not in metadata:
        return False
    try:
        said = {name: replace(part.method, **_settings(metadata, name)) for name, part in parts.items()}
        ranks = {name: _look_up(metadata[_KEY], name, "r", "rank_pattern") for name in parts}
        components = {field.partition(".")[0] for field in _config(metadata[_KEY])}
    except (FormatError, ConfigError, TypeError, ValueError, OverflowError):
        return False
    return components == {name.partition(".")[0] for name in parts} and all(
        said[name].scale == part.method.scale and ranks[name] == (part.method.file_rank or 0)
        for name, part in parts.items()
    )


def _stabilised(part: Part) -> bool:
    return isinstance(part.method, LoRA) and part.method.rank_stabilised


DIFFUSERS = Format(
    name="diffusers",
    prefixes={component: f"{component}." for component in DENOISERS + TEXT_ENCODERS},
    separator=".",
    spelling={"lora": {"down": "lora_A.weight", "up": "lora_B.weight"}},
    also={  # `convert_state_dict_to_diffusers`, which diffusers' own training scripts call: q, k, v and out only
        "lora.down.weight": "down",
        "lora.up.weight": "up",
        "lora_linear_layer.down.weight": "down",
        "lora_linear_layer.up.weight": "up",
    },
    alpha=None,
    settings=_settings,
    metadata=_metadata,
    own_metadata=(_KEY, "format"),
)
