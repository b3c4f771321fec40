"""peft's configs in a file: `adapter_config.json` beside it, `peft_config` or diffusers' `lora_adapter_metadata` in it.

diffusers' is JSON of one `LoraConfig` for each component, its keys prefixed `unet.`, `text_encoder.`. Without it
diffusers takes alpha = rank.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from imgadapt.errors import FormatError, first_few
from imgadapt.formats import of_peft
from imgadapt.formats.layer_config import DIFFUSERS_KEY, PATTERNS, PEFT_KEY, LayerConfig
from imgadapt.formats.part import Part, Parts
from imgadapt.methods.lokr import split
from imgadapt.targets import TEXT_ENCODERS


def _modules(paths: Collection[str]) -> list[str] | str:
    """Paths as peft finds modules: it takes each of a list as an end, which one without a dot may be of others."""
    if all("." in path for path in paths):
        return sorted(paths)
    return f"^({'|'.join(re.escape(path) for path in sorted(paths))})$"


def config_for(parts: Mapping[str, Part]) -> dict[str, Any]:
    """A config that says the ranks and alphas of layers, by their paths; of LoRA, DoRA, LoHa, LoKr, OFT, BOFT, IA3, and
    what other methods say for themselves.
    """
    kind: Any = next(iter(parts.values())).method
    if kind.peft is not None:
        return {"peft_type": kind.peft.type, "target_modules": _modules(parts), **of_peft.config_for(parts)}
    inner = getattr(kind, "inner", kind)
    fields: dict[str, Any] = {
        "peft_type": {"lora": "LORA", "dora": "LORA"}.get(kind.name, kind.name.upper()),
        "target_modules": _modules(parts),
    }
    if inner.name in ("oft", "boft", "ia3"):
        return {**fields, **_rotation_fields(kind, parts)}
    stabilised = all(getattr(getattr(p.method, "inner", p.method), "rank_stabilised", False) for p in parts.values())
    ranks = {path: part.method.file_rank or _enough(part) for path, part in parts.items()}
    if len({getattr(getattr(p.method, "inner", p.method), "bias", False) for p in parts.values()}) > 1:
        raise FormatError("peft has a bias in all LoRA layers of a file or in none, and this has it in some")
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
        **(_factor_fields(parts) if inner.name in ("loha", "lokr") else {}),
        "rank_pattern": {f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(path)}": a for path, a in alphas.items() if a != alpha},
    }


def _enough(part: Part) -> int:
    """The least rank at which peft gives LoKr a full second factor, of which it tells nothing else."""
    return (max(part.tensors["w2"].shape[:2]) + 1) // 2 if "w2" in part.tensors else 1


def _factor_fields(parts: Mapping[str, Part]) -> dict[str, Any]:
    """What makes peft's LoHa and LoKr layers of the sizes that these have.

    Raises:
        FormatError: no one setting does (peft's rules: tuners/lokr/layer.py, update_layer).
    """
    rows = [part.tensors for part in parts.values()]
    tucker = any({"t2", "core_1"} & t.keys() for t in rows)
    if "up_1" in rows[0]:
        return {"use_effective_conv2d": tucker}
    both = any("w1_a" in t for t in rows)
    sizes = [_sizes(part) for part in parts.values()]
    tried = [-1, *range(2, 1 + max(n for pair in sizes for side in pair for n in side))]
    fits = [
        f for f in tried if all(_split(a * c, f) == (a, c) and _split(b * e, f) == (b, e) for (a, c), (b, e) in sizes)
    ]
    ranks = [part.method.file_rank or _enough(part) for part in parts.values()]
    rules = all(
        (("w1_a" in t) == (both and r < max(a, b) / 2)) and (("w2" in t) == (r >= max(c, e) / 2))
        for t, r, ((a, c), (b, e)) in zip(rows, ranks, sizes, strict=True)
    )
    if not fits or not rules:
        raise FormatError("peft has one factor and one rule for all LoKr layers of a file, which these do not follow")
    return {"decompose_both": both, "decompose_factor": fits[0], "use_effective_conv2d": tucker}


def _split(size: int, factor: int) -> tuple[int, int]:
    """As peft does: a factor that divides the size comes first, however large (tuners/lokr/layer.py, factorization)."""
    return (factor, size // factor) if factor > 0 and size % factor == 0 else split(size, factor)


def _sizes(part: Part) -> tuple[tuple[int, int], tuple[int, int]]:
    """LoKr's (a, c) and (b, e): out = a * c, in = b * e."""
    t = part.tensors
    a, b = (t["w1"] if "w1" in t else t["w1_a"]).shape[0], (t["w1"] if "w1" in t else t["w1_b"]).shape[1]
    if "w2" in t:
        return (a, t["w2"].shape[0]), (b, t["w2"].shape[1])
    if "t2" in t:
        return (a, t["w2_a"].shape[1]), (b, t["w2_b"].shape[1])
    kernel = math.prod(part.shape[2:]) if part.shape is not None else 1
    return (a, t["w2_a"].shape[0]), (b, t["w2_b"].shape[1] // kernel)


def _scale(part: Part) -> float:
    """alpha / rank: what DoRA has within."""
    return getattr(part.method, "inner", part.method).scale


def _rotation_fields(kind: Any, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Of methods that have no rank; peft has one setting for all layers.

    Raises:
        FormatError: they differ.
    """
    if kind.name == "ia3":
        inside = [path for path, part in parts.items() if getattr(part.method, "axis", "") == "input"]
        return {"feedforward_modules": f"^({'|'.join(re.escape(path) for path in sorted(inside))})$" if inside else []}
    if len(settings := dict.fromkeys(part.method for part in parts.values())) > 1:
        said = first_few([str(one) for one in settings])
        raise FormatError(f"peft has one setting for a file, and this has {said}{_one_size(list(settings))}")
    if kind.name == "boft":
        return {"boft_block_size": kind.block_size, "boft_n_butterfly_factor": kind.factors, "boft_block_num": 0}
    limit = {} if kind.constraint is None else {"coft": True, "eps": kind.constraint}
    neumann = {"use_cayley_neumann": bool(kind.neumann)}
    terms = {"num_cayley_neumann_terms": kind.neumann} if kind.neumann else {}
    return {"r": 0, "oft_block_size": kind.block_size, "block_share": kind.shared, **limit, **neumann, **terms}


def _one_size(settings: Sequence[Any]) -> str:
    """What to train with, where they differ in the size of their blocks alone; "": that would not help."""
    alike = len({replace(one, block_size=settings[0].block_size) for one in settings}) == 1
    return of_peft.fitting_all(settings, "block_size") if alike else ""


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
            _bare_patterns(made, own)
        config |= {f"{component}.{key}": value for key, value in made.items()}
    return {DIFFUSERS_KEY: json.dumps(config, indent=2, sort_keys=True), "format": "pt"}


def peft_metadata(parts: Parts) -> dict[str, str]:
    """`peft_config` of one component's layers."""
    own = {name.partition(".")[2].removeprefix("text_model."): part for name, part in parts.items()}
    made = config_for(own)
    if next(iter(parts)).partition(".")[0] in TEXT_ENCODERS:
        _bare_patterns(made, own)
    return {PEFT_KEY: json.dumps(made, sort_keys=True), "format": "pt"}


def _bare_patterns(config: dict[str, Any], paths: Collection[str]) -> None:
    """Names that match with CLIP's `text_model.` before them, too."""
    config["target_modules"] = sorted(paths)
    for field in PATTERNS:
        if field in config:
            config[field] = {pattern.removeprefix("^"): value for pattern, value in config[field].items()}


def still_true(metadata: Mapping[str, str], key: str, parts: Parts) -> bool:
    """Whether the config that a file came with (which has more fields than ours) describes these layers."""
    if key not in metadata:
        return False
    components = {name.partition(".")[0] for name in parts}
    try:
        config = LayerConfig({key: metadata[key]})
        for name, part in parts.items():
            said = config.of(name)
            rank: Any = said.get("r")
            alpha: Any = said.get("alpha")
            stabilised = said.get("use_rslora") is True
            if part.method.file_rank is None or rank != part.method.file_rank or alpha is None:
                return False
            if not math.isclose(float(alpha) / (math.sqrt(rank) if stabilised else rank), _scale(part), rel_tol=1e-12):
                return False
    except (FormatError, TypeError, ValueError, OverflowError, ZeroDivisionError):
        return False
    return key != DIFFUSERS_KEY or config.components == components
