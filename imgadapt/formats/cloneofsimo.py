"""cloneofsimo's files: layers by their number in the order in which his code walked diffusers' SD1 (lora_diffusion).

`unet:7:up` is the up matrix of the eighth. Down blocks, up blocks, mid block; in each transformer block the
self-attention, the feed-forward's first layer, the cross-attention. The classes he walked stand in the metadata.
"""

import json
import re
from collections.abc import Mapping
from functools import cache

from torch import Tensor

from imgadapt.arch import architectures
from imgadapt.errors import FormatError
from imgadapt.formats import own, spelling
from imgadapt.formats.format import Format
from imgadapt.formats.layer_config import LONGEST_JSON

_KEY = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
_BLOCKS = ("down_blocks", "up_blocks", "mid_block")
_LAYERS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj")
_LAYERS_2 = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")


@cache
def _order(component: str) -> tuple[str, ...]:
    layers = next(a for a in architectures() if a.name == "sd1").layers
    own_layers = [name.partition(".")[2] for name in layers if name.startswith(f"{component}.")]
    if component == "text_encoder":
        blocks = sorted({int(name.split(".")[3]) for name in own_layers if ".layers." in name})
        return tuple(
            f"text_model.encoder.layers.{k}.self_attn.{p}"
            for k in blocks
            for p in ("k_proj", "v_proj", "q_proj", "out_proj")
        )
    stems = list(dict.fromkeys(name.partition(".attn1.")[0] for name in own_layers if ".attn1." in name))
    stems.sort(key=lambda stem: (_BLOCKS.index(stem.split(".")[0]), [int(n) for n in re.findall(r"\d+", stem)]))
    return tuple(f"{stem}.{layer}" for stem in stems for layer in (*_LAYERS, *_LAYERS_2))


def aliases(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Key -> what diffusers called the same tensor; empty where it is no such file.

    Raises:
        FormatError: he walked other classes of layers there, or there are more than SD1 has.
    """
    found = {key: match for key in tensors if (match := _KEY.fullmatch(key))}
    if not found:
        return {}
    walked = {"unet": {"CrossAttention", "Attention", "GEGLU"}, "text_encoder": {"CLIPAttention"}}
    renamed: dict[str, str] = {}
    classes = {component: _classes(component, metadata) for component in {match[1] for match in found.values()}}
    for key, match in found.items():
        component, number, end = match[1], match[2], match[3]
        order = _order(component)
        if classes[component] - walked[component] or len(number) > 4 or int(number) >= len(order):
            raise FormatError(
                f"{key}: layers are numbered over {', '.join(sorted(classes[component]))} of another model or version; "
                f"known is the order of {', '.join(sorted(walked[component]))} in SD1 ({len(order)} layers)"
            )
        renamed[key] = f"{component}.{order[int(number)]}.lora.{end}.weight"
    return renamed


def _classes(component: str, metadata: Mapping[str, str]) -> set[str]:
    """Of the layers that he walked."""
    said = metadata.get(component, "[]")
    try:
        if len(said) > LONGEST_JSON:
            raise ValueError("too long")
        return {str(name) for name in json.loads(said)}
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"the metadata '{component}' is no list of classes: {error}") from error


CLONEOFSIMO = Format(
    "cloneofsimo",
    "cloneofsimo's lora_diffusion; read only",
    {},
    spelling.own,
    (),
    own.nothing,
)
