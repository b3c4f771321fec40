"""Derive the layers of architectures from the models themselves, built from their configs on the meta device.

    python converters/derive_architecture.py              # all of them, into imgadapt/arch/*.json
    python converters/derive_architecture.py flux sd3

What the model's own code calls a layer comes from diffusers' checkpoint converters: tensors whose values say "row r of
module m" go in under the own names (converters/native_names.json: module -> rows), and are read back where they come
out, fused, split or swapped as they may be. For developers; the data is committed, and a test derives some of it anew.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from imgadapt.arch import canonical
from imgadapt.targets import layers

HERE = Path(__file__).parent
ARCH = HERE.parent / "imgadapt" / "arch"
_NOTHING = torch.full((1, 1), -1, dtype=torch.float64)  # for what a converter asks for and no layer has
_SHIFT = 2**20  # tag = module * _SHIFT + row, in float64, which holds it exactly

CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_H: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
}
CLIP_G: dict[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280,
}  # fmt: skip
T5_XXL: dict[str, Any] = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def _clip(config: Mapping[str, Any]) -> nn.Module:
    return CLIPTextModel(CLIPTextConfig(**config))


def _clip_projected(config: Mapping[str, Any]) -> nn.Module:
    return CLIPTextModelWithProjection(CLIPTextConfig(**config))


def _t5() -> nn.Module:
    return T5EncoderModel(T5Config(**T5_XXL))


_SD1 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
_REFINER = {
    "sample_size": 128, "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 4, "attention_head_dim": (6, 12, 24, 24), "cross_attention_dim": 1280,
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2560,
}  # fmt: skip
_SD3 = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "sample_size": 128,
    "pos_embed_max_size": 192,
}
_DUAL = {**_SD3, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)), "pos_embed_max_size": 384}
_LARGE = {**_SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
_TRIPLE: dict[str, Callable[[], nn.Module]] = {
    "text_encoder": lambda: _clip_projected({**CLIP_L, "projection_dim": 768}),
    "text_encoder_2": lambda: _clip_projected(CLIP_G),
    "text_encoder_3": _t5,
}
_FLUX_TEXT: dict[str, Callable[[], nn.Module]] = {"text_encoder": lambda: _clip(CLIP_L), "text_encoder_2": _t5}
_SDXL_TEXT: dict[str, Callable[[], nn.Module]] = {
    "text_encoder": lambda: _clip(CLIP_L),
    "text_encoder_2": lambda: _clip_projected(CLIP_G),
}
_KLEIN = {"guidance_embeds": False}  # sizes: Klein4BParams, Klein9BParams of flux2/model.py, black-forest-labs/flux2
_HIDREAM = {
    "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 16, "num_single_layers": 32,
    "attention_head_dim": 128, "num_attention_heads": 20, "caption_channels": [4096, 4096], "text_emb_dim": 2048,
    "num_routed_experts": 4, "num_activated_experts": 2, "axes_dims_rope": (64, 32, 32), "max_resolution": (128, 128),
    "llama_layers": list(range(48)),
}  # fmt: skip
_HUNYUAN = {
    "num_attention_heads": 16, "attention_head_dim": 88, "in_channels": 4, "patch_size": 2, "sample_size": 128,
    "hidden_size": 1408, "num_layers": 40, "mlp_ratio": 4.3637, "activation_fn": "gelu-approximate",
}  # fmt: skip
_WAN_5B = {"in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30}
_ANIMA = {
    "in_channels": 16, "num_attention_heads": 16, "attention_head_dim": 128, "num_layers": 28, "text_embed_dim": 1024,
    "adaln_lora_dim": 256, "concat_padding_mask": True, "extra_pos_embed_type": None,
}  # fmt: skip
_LUMINA = {
    "hidden_size": 2304, "num_layers": 26, "num_refiner_layers": 2, "num_attention_heads": 24, "num_kv_heads": 8,
    "cap_feat_dim": 2304,
}  # fmt: skip

Row = tuple[str, Mapping[str, Any], str | None, Mapping[str, Callable[[], nn.Module]]]
T5_ONLY: dict[str, Callable[[], nn.Module]] = {"text_encoder": _t5}
ARCHITECTURES: dict[str, Row] = {  # diffusers' class, config (rest: its defaults), converter, text encoders
    "sd1": ("UNet2DConditionModel", _SD1, None, {"text_encoder": lambda: _clip(CLIP_L)}),
    "sd2": (
        "UNet2DConditionModel",
        {**_SD1, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        None,
        {"text_encoder": lambda: _clip(CLIP_H)},
    ),
    "sdxl": ("UNet2DConditionModel", _SDXL, "ldm_unet", _SDXL_TEXT),
    "sdxl_refiner": ("UNet2DConditionModel", _REFINER, None, {"text_encoder_2": lambda: _clip_projected(CLIP_G)}),
    "kolors": (
        "UNet2DConditionModel",
        {
            **_SDXL,
            "encoder_hid_dim": 4096,
            "encoder_hid_dim_type": "text_proj",
            "projection_class_embeddings_input_dim": 5632,
        },
        "ldm_unet",
        {},
    ),
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}, "flux_transformer_checkpoint", _FLUX_TEXT),
    "flux2": ("Flux2Transformer2DModel", {}, "flux2_transformer_checkpoint", {}),
    "flux2_klein_4b": (
        "Flux2Transformer2DModel",
        {**_KLEIN, "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
        "flux2_transformer_checkpoint",
        {},
    ),
    "flux2_klein_9b": (
        "Flux2Transformer2DModel",
        {**_KLEIN, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
        "flux2_transformer_checkpoint",
        {},
    ),
    "sd3": ("SD3Transformer2DModel", _SD3, "sd3_transformer_checkpoint", _TRIPLE),
    "sd35_medium": ("SD3Transformer2DModel", _DUAL, "sd3_transformer_checkpoint", _TRIPLE),
    "sd35_large": ("SD3Transformer2DModel", _LARGE, "sd3_transformer_checkpoint", _TRIPLE),
    "zimage": ("ZImageTransformer2DModel", {}, "z_image_transformer_checkpoint", {}),
    "qwen": ("QwenImageTransformer2DModel", {}, None, {}),
    "chroma": ("ChromaTransformer2DModel", {}, "chroma_transformer_checkpoint", T5_ONLY),
    "wan": ("WanTransformer3DModel", {}, "wan_transformer", {}),
    "wan_1_3b": (
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        "wan_transformer",
        {},
    ),
    "wan_i2v": (  # Wan 2.1 with an image's embedding; 2.2's has the layers of "wan"
        "WanTransformer3DModel",
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        "wan_transformer",
        {},
    ),
    "wan22_5b": ("WanTransformer3DModel", _WAN_5B, "wan_transformer", {}),
    "anima": ("CosmosTransformer3DModel", _ANIMA, "cosmos_transformer_checkpoint", {}),
    "lumina2": ("Lumina2Transformer2DModel", _LUMINA, "lumina2", {}),
    "hidream": ("HiDreamImageTransformer2DModel", _HIDREAM, None, {}),
    "auraflow": ("AuraFlowTransformer2DModel", {}, "auraflow_transformer_checkpoint", {}),
    "ltx": ("LTXVideoTransformer3DModel", {}, "ltx_transformer_checkpoint", {}),
    "hunyuandit": ("HunyuanDiT2DModel", _HUNYUAN, None, {}),
    "hunyuanimage": ("HunyuanImageTransformer2DModel", {}, "hunyuan_video_transformer", {}),
    "pixart": ("PixArtTransformer2DModel", {}, None, T5_ONLY),
    "sana": ("SanaTransformer2DModel", {}, None, {}),
    "cogview4": ("CogView4Transformer2DModel", {}, None, {}),
}


def native(name: str, model: Any, converter: str) -> dict[str, list[list[Any]]]:
    """Module of diffusers -> [[module of the model's own code, first row, rows], ...].

    A third number in native_names.json is how many rows the converter, written for a sibling of the model, counts on.
    """
    listed = json.loads((HERE / "native_names.json").read_text("utf-8"))[name]
    real = {module: count for pattern, count, *_ in listed for module in _every(pattern)}
    rows = {module: counts[-1] for pattern, *counts in listed for module in _every(pattern)}
    names = list(rows)
    tagged: dict[str, Tensor] = {}
    for k, module in enumerate(names):
        tags = k * _SHIFT + torch.arange(rows[module], dtype=torch.float64)
        start = (
            "model.diffusion_model." if converter == "ldm_unet" else ""
        )  # by which it knows a checkpoint of all parts
        tagged[f"{start}{module}.weight"] = tags[:, None]
        tagged[f"{start}{module}.bias"] = tags.clone()
        tagged[f"{start}{module}.scale"] = tags.clone()  # what Flux and its kin call the weight of a norm
    convert = getattr(single_file_utils, f"convert_{converter}_to_diffusers", None) or getattr(
        single_file_utils, f"convert_{converter}_checkpoint"
    )
    converted = convert(_Forgiving(tagged), config=dict(model.config))
    found: dict[str, list[list[Any]]] = {}
    for key, tensor in converted.items():
        if not key.endswith(".weight") or not isinstance(tensor, Tensor):
            continue
        tags = tensor.reshape(len(tensor), -1)[:, 0].long()
        if bool((tags < 0).any()):
            continue
        runs: list[list[Any]] = []
        for tag in tags.tolist():
            module, row = names[tag // _SHIFT], tag % _SHIFT
            if runs and runs[-1][0] == module and runs[-1][1] + runs[-1][2] == row:
                runs[-1][2] += 1
            else:
                runs.append([module, row, 1])
        scaled = [[m, first * real[m] // rows[m], count * real[m] // rows[m]] for m, first, count in runs]
        found[key.removesuffix(".weight")] = scaled
    got = Counter(module for runs in found.values() for module, _, count in runs for _ in range(count))
    if lost := [module for module, count in real.items() if got[module] != count]:
        raise ValueError(f"{name}: not all rows of {len(lost)} modules came out of the converter, the first {lost[:3]}")
    return found


class _Forgiving(dict[str, Tensor]):
    """Converters ask for tensors that are no layers' weights (embeddings of positions, norms): a dummy for those."""

    def __missing__(self, key: str) -> Tensor:
        return _NOTHING.clone()

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, *(default or (_NOTHING.clone(),)))


def _every(pattern: str) -> list[str]:
    found = re.search(r"\{(\d+)-(\d+)\}", pattern)
    if found is None:
        return [pattern]
    return [pattern.replace(found[0], str(k)) for k in range(int(found[1]), int(found[2]) + 1)]


def derive(name: str) -> dict[str, Any]:
    """The contents of an architecture's file."""
    kind, config, converter, encoders = ARCHITECTURES[name]
    build: Any = getattr(diffusers, kind)  # annotated for one transformer layer a block
    with torch.device("meta"):
        model = build(**config)
        parts = {
            "unet" if kind.startswith("UNet") else "transformer": model,
            **{k: make() for k, make in encoders.items()},
        }
    denoiser = next(iter(parts))
    mapped = native(name, model, converter) if converter else {}
    rows: dict[str, list[tuple[str, list[int], Any]]] = {component: [] for component in parts}
    for layer in layers(parts):
        component, _, path = canonical(layer.name).partition(".")
        shape, own = list(layer.site.shape), mapped.get(path) if component == denoiser else None
        if own is not None and sum(count for *_, count in own) != shape[0]:
            raise ValueError(f"{name}: {path} has {shape[0]} rows, and {own} came out of the converter")
        if own == [[path, 0, shape[0]]]:
            own = None
        rows[component].append((path, shape, own))
    source = f"diffusers {diffusers.__version__} {kind}({json.dumps(config)})"
    if converter:
        source += f"; native names through loaders/single_file_utils.py, {converter}"
    return {"source": source, "components": {component: compressed(found) for component, found in rows.items()}}


def compressed(rows: Sequence[tuple[str, list[int], Any]]) -> list[list[Any]]:
    """Rows that differ in one number, counting up, as one with a range in its place."""
    forms: dict[str, list[tuple[int, int]]] = {}  # a row with a hole -> (number in it, place of the row)
    for place, (path, shape, own) in enumerate(rows):
        for spot in re.finditer(r"(?<=\.)\d+(?=\.|$)", path):
            holed = path[: spot.start()] + "{}" + path[spot.end() :]
            for natives in _holed(own, spot[0]):
                forms.setdefault(json.dumps([holed, shape, natives]), []).append((int(spot[0]), place))
    made: dict[int, list[Any]] = {}
    taken: set[int] = set()
    for form, members in sorted(forms.items(), key=lambda row: -len(row[1])):
        left = sorted((n, place) for n, place in members if place not in taken)
        numbers = [n for n, _ in left]
        if len(left) < 2 or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            continue
        holed, shape, natives = json.loads(form)
        made[min(place for _, place in left)] = [holed.replace("{}", f"{{{numbers[0]}-{numbers[-1]}}}"), shape, natives]
        taken |= {place for _, place in left}
    made |= {place: list(row) for place, row in enumerate(rows) if place not in taken}
    return [made[place] for place in sorted(made)]


def _holed(own: Any, number: str) -> list[Any]:
    """Native names with a hole where the number stands, in each way there is."""
    if own is None:
        return [None]
    spots = [[*re.finditer(rf"(?<=\.){number}(?=\.|$)", name)] for name, *_ in own]
    if any(not found for found in spots):
        return []
    most = max(map(len, spots))
    return [
        [
            [name[: (s := found[min(k, len(found) - 1)]).start()] + "{}" + name[s.end() :], *rest]
            for (name, *rest), found in zip(own, spots, strict=True)
        ]
        for k in range(most)
    ]


def written(data: Mapping[str, Any]) -> str:
    """JSON, a row a line."""
    parts = [
        f"{json.dumps(component)}: [\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"
        for component, rows in data["components"].items()
    ]
    return f'{{"source": {json.dumps(data["source"])},\n"components": {{\n' + ",\n".join(parts) + "\n}}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", choices=[[], *ARCHITECTURES])
    for name in parser.parse_args().name or ARCHITECTURES:
        text = written(derive(name))
        (ARCH / f"{name}.json").write_text(text, "utf-8")
        print(f"{name}: {len(text) / 1000:.0f} kB")
