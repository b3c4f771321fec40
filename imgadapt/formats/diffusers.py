"""diffusers: dotted names with peft's spelling, alpha in the metadata (`save_lora_weights`, since 0.35).

`lora_adapter_metadata` is JSON: a peft `LoraConfig` per component, its keys prefixed `unet.`, `text_encoder.`.
Without it diffusers takes alpha = rank.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

from imgadapt.errors import FormatError
from imgadapt.formats.part import Part, Parts
from imgadapt.formats.table import Format, Settings
from imgadapt.methods import LoRA
from imgadapt.targets import DENOISERS, TEXT_ENCODERS

_KEY = "lora_adapter_metadata"


def _settings(metadata: Mapping[str, str], name: str) -> Settings:
    """alpha and rank stabilisation of one layer, as peft looks them up (`get_pattern_key`, first match wins)."""
    if _KEY not in metadata:
        return {}
    try:
        config: Any = json.loads(metadata[_KEY])
    except json.JSONDecodeError as error:
        raise FormatError(f"the metadata '{_KEY}' is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise FormatError(f"the metadata '{_KEY}' is {type(config).__name__}, wanted an object")
    fields = cast("dict[str, Any]", config)
    component, _, path = name.partition(".")
    alpha: Any = fields.get(f"{component}.lora_alpha")
    patterns: dict[str, Any] = fields.get(f"{component}.alpha_pattern") or {}
    bare = path.removeprefix("text_model.")
    for pattern, value in patterns.items():
        if any(re.match(rf"(.*\.)?({pattern})$", candidate) for candidate in (path, bare)):
            alpha = value
            break
    if alpha is None:
        return {}
    return {"alpha": float(alpha), "rank_stabilised": bool(fields.get(f"{component}.use_rslora", False))}


def _metadata(parts: Parts) -> dict[str, str]:
    config: dict[str, Any] = {}
    for component in dict.fromkeys(name.partition(".")[0] for name in parts):
        # peft matches live names; transformers 5.6 took CLIP's `text_model.` away, and a bare end matches both
        own = {
            name.partition(".")[2].removeprefix("text_model."): part
            for name, part in parts.items()
            if name.startswith(f"{component}.")
        }
        stabilised = all(_stabilised(part) for part in own.values())
        ranks = {path: part.tensors["down"].shape[0] for path, part in own.items()}
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
            "rank_pattern": {f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank},
            "alpha_pattern": {f"^{re.escape(path)}": a for path, a in alphas.items() if a != alpha},
            "target_modules": sorted(own),
        }
        config |= {f"{component}.{key}": value for key, value in fields.items()}
    return {_KEY: json.dumps(config, indent=2, sort_keys=True), "format": "pt"}


def _stabilised(part: Part) -> bool:
    return isinstance(part.method, LoRA) and part.method.rank_stabilised


DIFFUSERS = Format(
    name="diffusers",
    prefixes={component: f"{component}." for component in DENOISERS + TEXT_ENCODERS},
    separator=".",
    spelling={"lora": {"down": "lora_A.weight", "up": "lora_B.weight"}},
    alpha=None,
    settings=_settings,
    metadata=_metadata,
    own_metadata=(_KEY, "format"),
)
