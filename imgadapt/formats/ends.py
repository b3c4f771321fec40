"""Ends: what the tools write after a layer's name, and which tensor that is.

The tensors' names here are those of the methods where they mean the same; `meaning.py` makes the rest into them.
"""

import re
from typing import NamedTuple

from imgadapt.methods import METHODS


class End(NamedTuple):
    """tensor: its name. tail: what the end says of the layer's path (`processor.to_q_lora` is the layer `to_q`).
    piece: which part of the layer, where a tool splits one (kohya's `oft_blocks.1`).
    """

    tensor: str
    tail: str = ""
    piece: int | None = None


LYCORIS = {
    "lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid", "alpha": "alpha",
    "dora_scale": "magnitude",
    "hada_w1_a": "up_1", "hada_w1_b": "down_1", "hada_w2_a": "up_2", "hada_w2_b": "down_2",
    "hada_t1": "core_1", "hada_t2": "core_2",
    "lokr_w1": "w1", "lokr_w1_a": "w1_a", "lokr_w1_b": "w1_b",
    "lokr_w2": "w2", "lokr_w2_a": "w2_a", "lokr_w2_b": "w2_b", "lokr_t2": "t2",
    "oft_blocks": "blocks", "rescale": "rescale",
    "a1.weight": "a1", "a2.weight": "a2", "b1.weight": "b1", "b2.weight": "b2", "bm.weight": "bm",
    "weight": "vector", "on_input": "on_input",
    "diff": "diff", "diff_b": "diff_b", "w_norm": "w_norm", "b_norm": "b_norm",
    "q_layer.weight": "tlora_q", "p_layer.weight": "tlora_p", "lambda_layer": "tlora_lambda",
}  # fmt: skip
"""kohya's sd-scripts and LyCORIS (networks/lora.py; KohakuBlueleaf/LyCORIS modules/*.py)."""

PEFT = {
    "lora_A.weight": "down", "lora_B.weight": "up", "lora_B.bias": "lora_bias",
    "lora_embedding_A": "embedding_down", "lora_embedding_B": "embedding_up",
    "lora_magnitude_vector": "magnitude_out", "lora_magnitude_vector.weight": "magnitude_out",
    "oft_R.weight": "packed", "oft_R.scaled_oft": "scaled", "boft_R": "stages", "boft_s": "boft_s", "ia3_l": "ia3_l",
}  # fmt: skip
"""peft (tuners/*/layer.py), and OneTrainer's OFTv2, which is spelled alike."""

LEGACY = {
    "lora.down.weight": End("down"), "lora.up.weight": End("up"), "lora.alpha": End("alpha"),
    "lora_linear_layer.down.weight": End("down"), "lora_linear_layer.up.weight": End("up"),
    **{
        f"processor.{name}_lora.{end}.weight": End(end, f".{layer}")
        for name, layer in (
            ("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out.0"),
            ("add_k_proj", "add_k_proj"), ("add_v_proj", "add_v_proj"),
        )
        for end in ("down", "up")
    },
    **{
        f"{name}_lora.{end}.weight": End(end, f".{layer}")
        for name, layer in (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj"))
        for end in ("down", "up")
    },
}  # fmt: skip
"""diffusers before peft: attention processors, and `save_lora_weights` of its own training scripts."""

XLABS = {
    f"processor.{name}_lora{stream}.{end}.weight": End(end, f".{side}_attn.{name}")
    for name in ("qkv", "proj")
    for stream, side in ((1, "img"), (2, "txt"))
    for end in ("down", "up")
}
"""XLabs and USO (XLabs-AI/x-flux), beside Flux's own layer names."""

OTHERS = {
    **{f"oft_blocks.{k}": End("blocks", piece=k) for k in range(8)},  # kohya's split Flux layers
    "magnitude": End("magnitude_out"),  # ai-toolkit's DoRA
    "lora_A": End("down"), "lora_B": End("up"), "lora_down": End("down"), "lora_up": End("up"),
    "set_weight": End("set_weight"), "set_bias": End("set_bias"), "reshape_weight": End("reshape_weight"),
    "bias": End("set_bias"), "scale": End("set_norm"),
}  # fmt: skip

OF_METHODS = {
    end: End(end) for method in METHODS if method.peft is not None for end in (*method.peft.ends, *method.peft.beside)
}
"""peft's of the methods that say themselves how peft has them."""

BESIDE = frozenset(name for method in METHODS if method.peft is not None for name in method.peft.beside)
"""What peft has once for all layers of such a method."""

ENDS: dict[str, End] = {
    **OF_METHODS,
    **{end: End(tensor) for end, tensor in {**LYCORIS, **PEFT}.items()}, **LEGACY, **XLABS, **OTHERS,
}  # fmt: skip

THEIRS = frozenset(end for end in OF_METHODS if ENDS[end].tensor == end)
"""Ends of such a method alone: AdaLoRA's `lora_A` is LoRA's, too."""

_ADAPTER = re.compile(
    r"(?:(lora_[AB]|oft_R)\.(?!weight$|bias$|scaled_oft$)[^.]+(\.weight|\.bias|\.scaled_oft)"
    r"|(lora_embedding_[AB]|lora_magnitude_vector|hada_\w+|lokr_\w+|boft_[Rs]|ia3_l)\.(?!weight$)[^.]+(\.weight|))$"
)


def split(key: str) -> tuple[str, str, End] | None:
    """(layer as it is spelled, end, what the end says); None where no end is known."""
    if (found := _split(key)) is not None and found[1] != "weight":
        return found
    plain = _ADAPTER.sub(r"\1\2\3\4", key)  # peft's adapter names: `lora_A.default.weight`
    return _split(plain) if plain != key else _of_method(key) or found


def beside(key: str) -> str | None:
    """Which name of BESIDE a key is, with the number of one of several (`tinylora_v.2`); None if it is a layer's."""
    before, found, name = key.rpartition("base_model.")
    first, _, rest = name.partition(".")
    if not found or before.strip(".").count(".") or first not in BESIDE:
        return None
    numbers = [word for word in rest.split(".") if word.isdecimal()]
    return ".".join([first, *numbers]) if rest.count(".") <= 1 else None


def _of_method(key: str) -> tuple[str, str, End] | None:
    """The same of a key with an adapter's name in its end or behind it: `hra_u.default`."""
    words = key.split(".")
    for place in range(len(words) - 1, max(0, len(words) - 4), -1):
        found = _split(".".join([*words[:place], *words[place + 1 :]]))
        if found is not None and found[1] in THEIRS and words[place] not in ("weight", "bias"):
            return found
    return None


def _split(key: str) -> tuple[str, str, End] | None:
    words = key.split(".")
    for count in range(min(4, len(words) - 1), 0, -1):
        end = ".".join(words[-count:])
        if end in ENDS:
            return ".".join(words[:-count]) + ENDS[end].tail, end, ENDS[end]
    return None
