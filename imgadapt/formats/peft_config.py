"""peft's configs in a file: `adapter_config.json` beside it, `peft_config` or diffusers' `lora_adapter_metadata` in it.

diffusers' is JSON of one `LoraConfig` for each component, its keys prefixed `unet.`, `text_encoder.`. Without it
diffusers takes alpha = rank.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

from imgadapt.errors import FormatError, first_few
from imgadapt.formats.part import Part, Parts
from imgadapt.targets import TEXT_ENCODERS

DIFFUSERS_KEY = "lora_adapter_metadata"
PEFT_KEY = "peft_config"


@lru_cache(maxsize=8)  # one file asks for every layer
def _config(key: str, text: str) -> dict[str, Any]:
    try:
        config: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the metadata '{key}' is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise FormatError(f"the metadata '{key}' is {type(config).__name__}, wanted an object")
    return cast("dict[str, Any]", config)


# a quantifier on a group that has a quantifier, or an alternative, inside: exponential in the length of a name
_NESTED = re.compile(r"\([^()]*[*+{|?][^()]*\)\s*[*+{]|\)\)\s*[*+{]|[*+}]\s*[*+{]|\\\d|\(\?P=")


@lru_cache(maxsize=32)
def _patterns(key: str, text: str, field: str) -> list[tuple[re.Pattern[str], Any]]:
    """Rows of an `alpha_pattern` or `rank_pattern`, as peft matches them (`get_pattern_key`: the first that does)."""
    patterns: Any = _config(key, text).get(field) or {}
    if not isinstance(patterns, dict):
        raise FormatError(f"'{field}' in the metadata '{key}' is {type(patterns).__name__}, wanted an object")
    if dangerous := [p for p in cast("dict[str, Any]", patterns) if _NESTED.search(p)]:
        raise FormatError(
            f"'{field}' in the metadata '{key}' repeats a repetition ({dangerous[0]!r}), which can take for ever"
        )
    try:
        return [(re.compile(rf"(.*\.)?({pattern})$"), v) for pattern, v in cast("dict[str, Any]", patterns).items()]
    except (re.error, RecursionError, OverflowError) as error:
        raise FormatError(f"'{field}' in the metadata '{key}' is not all regular expressions: {error}") from error


def config_of(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    """What a file's peft config says of one layer: its fields, with `r` and `alpha` as the patterns have them.

    name: canonical, or a fused layer's own. CLIP's `text_model.` may be there or not.

    Raises:
        FormatError: it is no config, or says what cannot be.
    """
    key = DIFFUSERS_KEY if DIFFUSERS_KEY in metadata else PEFT_KEY
    if key not in metadata:
        return {}
    component, _, path = name.partition(".")
    start = f"{component}." if key == DIFFUSERS_KEY else ""
    text = metadata[key]
    fields = {k.removeprefix(start): v for k, v in _config(key, text).items() if k.startswith(start)}
    paths = {path, path.removeprefix("text_model.")}

    def at(default: Any, pattern: str) -> Any:
        rows = _patterns(key, text, f"{start}{pattern}")
        return next((value for regex, value in rows if any(regex.match(p) for p in paths)), default)

    alpha = at(fields.get("lora_alpha", fields.get("alpha")), "alpha_pattern")
    feed_forward = fields.get("feedforward_modules") or []
    inside = [feed_forward] if isinstance(feed_forward, str) else feed_forward
    feeds = any(p == module or p.endswith(f".{module}") for module in inside for p in paths)
    return {**fields, "r": at(fields.get("r"), "rank_pattern"), "alpha": alpha, "feedforward": feeds} if fields else {}


def config_for(parts: Mapping[str, Part]) -> dict[str, Any]:
    """A config that says the ranks and alphas of layers, by their paths; of LoRA, DoRA, LoHa, LoKr, OFT, BOFT, IA3."""
    kind: Any = next(iter(parts.values())).method
    inner = getattr(kind, "inner", kind)
    fields: dict[str, Any] = {
        "peft_type": {"lora": "LORA", "dora": "LORA"}.get(kind.name, kind.name.upper()),
        "target_modules": sorted(parts),
    }
    if inner.name in ("oft", "boft", "ia3"):
        return {**fields, **_rotation_fields(kind, parts)}
    stabilised = all(getattr(getattr(p.method, "inner", p.method), "rank_stabilised", False) for p in parts.values())
    ranks = {path: (part.method.file_rank or 1) for path, part in parts.items()}
    alphas = {
        path: (_scale(part) * (math.sqrt(ranks[path]) if stabilised else ranks[path])) for path, part in parts.items()
    }
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    named = "lora_alpha" if inner.name == "lora" else "alpha"
    return {
        **fields,
        "r": rank,
        named: alpha,
        **({"use_rslora": stabilised, "use_dora": kind.name == "dora"} if inner.name == "lora" else {}),
        **({"lora_bias": True} if getattr(inner, "bias", False) else {}),
        "rank_pattern": {f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(path)}": a for path, a in alphas.items() if a != alpha},
    }


def _scale(part: Part) -> float:
    """alpha / rank: what DoRA has within."""
    return getattr(part.method, "inner", part.method).scale


def _rotation_fields(kind: Any, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Of methods that have no rank; peft has one setting for all layers.

    Raises:
        FormatError: they differ.
    """
    if kind.name == "ia3":
        return {
            "feedforward_modules": sorted(p for p, part in parts.items() if getattr(part.method, "axis", "") == "input")
        }
    if len(settings := {part.method for part in parts.values()}) > 1:
        raise FormatError(f"peft has one setting for a file, and this has {first_few([str(s) for s in settings])}")
    if kind.name == "boft":
        return {"boft_block_size": kind.block_size, "boft_n_butterfly_factor": kind.factors, "boft_block_num": 0}
    limit = {} if kind.constraint is None else {"coft": True, "eps": kind.constraint}
    neumann = {"use_cayley_neumann": bool(kind.neumann)}
    terms = {"num_cayley_neumann_terms": kind.neumann} if kind.neumann else {}
    return {"r": 0, "oft_block_size": kind.block_size, "block_share": kind.shared, **limit, **neumann, **terms}


def diffusers_metadata(parts: Parts) -> dict[str, str]:
    """`lora_adapter_metadata` of LoRA layers by their canonical names."""
    config: dict[str, Any] = {}
    for component in dict.fromkeys(name.partition(".")[0] for name in parts):
        # peft matches live names; transformers 5.6 took CLIP's `text_model.` away, and a bare end matches both.
        # In a denoiser only the whole name will do: Flux has `proj_out` and `single_transformer_blocks.0.proj_out`
        own = {
            name.partition(".")[2].removeprefix("text_model."): part
            for name, part in parts.items()
            if name.startswith(f"{component}.")
        }
        made = config_for(own)
        if component in TEXT_ENCODERS:
            for field in ("rank_pattern", "alpha_pattern"):
                made[field] = {pattern.removeprefix("^"): value for pattern, value in made[field].items()}
        config |= {f"{component}.{key}": value for key, value in made.items()}
    return {DIFFUSERS_KEY: json.dumps(config, indent=2, sort_keys=True), "format": "pt"}


def peft_metadata(parts: Parts) -> dict[str, str]:
    """`peft_config` of one component's layers."""
    own = {name.partition(".")[2].removeprefix("text_model."): part for name, part in parts.items()}
    return {PEFT_KEY: json.dumps(config_for(own), sort_keys=True), "format": "pt"}


def still_true(metadata: Mapping[str, str], key: str, parts: Parts) -> bool:
    """Whether the config that a file came with (which has more fields than ours) describes these layers."""
    if key not in metadata:
        return False
    components = {name.partition(".")[0] for name in parts}
    try:
        for name, part in parts.items():
            said = config_of({key: metadata[key]}, name)
            rank: Any = said.get("r")
            alpha: Any = said.get("alpha")
            stabilised = said.get("use_rslora") is True
            if part.method.file_rank is None or rank != part.method.file_rank or alpha is None:
                return False
            if not math.isclose(float(alpha) / (math.sqrt(rank) if stabilised else rank), _scale(part), rel_tol=1e-12):
                return False
        said_components = {field.partition(".")[0] for field in _config(key, metadata[key])}
    except (FormatError, TypeError, ValueError, OverflowError, ZeroDivisionError):
        return False
    return key != DIFFUSERS_KEY or said_components == components
