"""The tools, a row each. What several have alike is read as the first of them that fits."""

from collections.abc import Mapping

from imgadapt.formats import kohya, of_peft, own, spelling
from imgadapt.formats.ends import LEGACY, LYCORIS, OF_METHODS, OTHERS, PEFT, XLABS
from imgadapt.formats.format import Format
from imgadapt.formats.layer_config import DIFFUSERS_KEY, PEFT_KEY
from imgadapt.formats.part import Parts
from imgadapt.formats.peft_config import diffusers_metadata, peft_metadata, still_true
from imgadapt.targets import DENOISERS, TEXT_ENCODERS

_DENOISER = ("unet", "transformer")
_KOHYA = {**dict.fromkeys(_DENOISER, "lora_unet_"), "text_encoder": "lora_te_"}
_PAIR = {**dict.fromkeys(_DENOISER, "lora_unet_"), "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_FLUX = {**_PAIR, "text_encoder_2": "lora_te3_"}
_TRIPLE = {**_PAIR, "text_encoder_3": "lora_te3_"}
_KOHYA_OF = {
    **dict.fromkeys(("sdxl", "sdxl_refiner", "kolors", "hunyuandit"), _PAIR),
    "flux": _FLUX,
    "chroma": {**_PAIR, "text_encoder": "lora_te3_"},
    **dict.fromkeys(("sd3", "sd35_medium", "sd35_large", "hidream"), _TRIPLE),
}
_DIFFUSERS_TRAINED = ("sd1", "sd2")
"""Of which kohya trains diffusers' own model."""
_DOTTED = {component: f"{component}." for component in (*DENOISERS, *TEXT_ENCODERS)}
_COMFY = {
    **dict.fromkeys((*_DENOISER, "transformer_2"), "diffusion_model."),
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
_T5 = "text_encoders.t5xxl.transformer."
_COMFY_OF = {"flux": {**_COMFY, "text_encoder_2": _T5}, "chroma": {**_COMFY, "text_encoder": _T5}}
_LORA_ENDS = ("lora_down.weight", "lora_up.weight", "alpha")
_NO_METADATA = own.nothing


def _diffusers(parts: Parts, old: Mapping[str, str]) -> dict[str, str]:
    if still_true(old, DIFFUSERS_KEY, parts):
        return {DIFFUSERS_KEY: old[DIFFUSERS_KEY], "format": old.get("format", "pt")}
    return diffusers_metadata(parts)


def _peft(parts: Parts, old: Mapping[str, str]) -> dict[str, str]:
    if still_true(old, PEFT_KEY, parts):
        return {PEFT_KEY: old[PEFT_KEY], "format": old.get("format", "pt")}
    return peft_metadata(parts)


KOHYA = Format(
    "kohya",
    "sd-scripts, musubi-tuner; A1111, Forge, ComfyUI read it",
    _KOHYA,
    spelling.kohya,
    _LORA_ENDS,
    kohya.metadata_for("networks.lora"),
    separator="_",
    native=True,
    except_for=_DIFFUSERS_TRAINED,
    prefixes_of=_KOHYA_OF,
    also_prefixes=("lora_unet__", "lora_te3_", "lora_prior_unet_", "lora_prior_te_"),
    own_metadata=(*kohya.OWN, *kohya.HASHES),
    claims=(("ss_network_module", "networks."),),
)
LYCORIS_KOHYA = Format(
    "lycoris",
    "LyCORIS in sd-scripts; A1111, Forge, ComfyUI read it",
    _KOHYA,
    spelling.lycoris,
    LYCORIS,
    kohya.metadata_for("lycoris.kohya"),
    separator="_",
    native=True,
    except_for=_DIFFUSERS_TRAINED,
    prefixes_of=_KOHYA_OF,
    own_metadata=(*kohya.OWN, *kohya.HASHES),
    claims=(("ss_network_module", "lycoris"),),
)
KOHYA_OFT = Format(
    "kohya-oft",
    "sd-scripts' networks.oft",
    dict.fromkeys(_DENOISER, "oft_unet_"),
    spelling.rotations,
    ("oft_blocks", *(f"oft_blocks.{k}" for k in range(8)), "alpha"),
    kohya.metadata_for("networks.oft"),
    separator="_",
    native=True,
    except_for=_DIFFUSERS_TRAINED,
    own_metadata=(*kohya.OWN, *kohya.HASHES),
)
LYCORIS_WRAPPER = Format(
    "lycoris-wrapper",
    "LyCORIS' create_lycoris, SimpleTuner",
    dict.fromkeys(_DENOISER, "lycoris_"),
    spelling.lycoris,
    LYCORIS,
    _NO_METADATA,
    separator="_",
    claims=(("lycoris_config", ""),),
)
ONETRAINER = Format(
    "onetrainer",
    "OneTrainer's own (legacy) format",
    {"unet": "lora_unet_", "transformer": "lora_transformer_", "text_encoder": "lora_te_"},
    spelling.lycoris,
    (*LYCORIS, "oft_R.weight", "oft_R.scaled_oft"),
    _NO_METADATA,
    separator="_",
    prefixes_of={
        name: {
            c: text.replace("lora_unet_", "lora_transformer_") if c == "transformer" else text
            for c, text in row.items()
        }
        for name, row in {**_KOHYA_OF, "flux": _PAIR}.items()
    },
    claims=(("ot_format", ""), ("ot_revision", ""), ("ot_config", "")),
)
DIFFUSERS = Format(
    "diffusers",
    "diffusers' save_lora_weights, SimpleTuner; diffusers and ComfyUI read it",
    _DOTTED,
    spelling.lora_only,
    (
        *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "lora_magnitude_vector.weight"),
        *(
            "alpha",
            "lora.down.weight",
            "lora.up.weight",
            "lora_linear_layer.down.weight",
            "lora_linear_layer.up.weight",
        ),
    ),
    _diffusers,
    key=spelling.peft_key,
    own_metadata=(DIFFUSERS_KEY, "format"),
    claims=((DIFFUSERS_KEY, ""),),
)
DIFFUSERS_LEGACY = Format(
    "diffusers-legacy",
    "diffusers before peft",
    _DOTTED,
    spelling.legacy,
    LEGACY,
    _NO_METADATA,
    also_prefixes=("",),
    key=spelling.legacy_key,
)
PEFT_FORMAT = Format(
    "peft",
    "peft's save_pretrained; one method and one component in a file",
    dict.fromkeys((*DENOISERS, *TEXT_ENCODERS, "model"), "base_model.model."),
    spelling.peft,
    (*PEFT, *OF_METHODS, *(end for end in LYCORIS if end.startswith(("hada", "lokr")))),
    _peft,
    key=spelling.peft_key,
    also_prefixes=tuple(f"{component}.base_model.model." for component in _DOTTED),
    own_metadata=(PEFT_KEY, "format"),
    claims=((PEFT_KEY, ""),),
    single=True,
    beside=of_peft.beside,
    sizes=of_peft.sizes,
)
AI_TOOLKIT = Format(
    "ai-toolkit",
    "ostris' ai-toolkit, diffusion-pipe: native names, peft's ends",
    _COMFY,
    spelling.toolkit,
    ("lora_A.weight", "lora_B.weight", "alpha", "magnitude", "diff", "diff_b", *(e for e in LYCORIS if "lokr" in e)),
    _NO_METADATA,
    native=True,
    except_for=("zimage",),
    prefixes_of=_COMFY_OF,
    also_prefixes=("transformer.", "model.diffusion_model."),
    claims=(("software", "ai-toolkit"),),
)
COMFYUI = Format(
    "comfyui",
    "ComfyUI's own, OneTrainer's comfy format",
    _COMFY,
    spelling.lycoris,
    (*LYCORIS, *OTHERS),
    _NO_METADATA,
    native=True,
    prefixes_of=_COMFY_OF,
    also_prefixes=("model.diffusion_model.",),
)
FAL = Format(
    "fal",
    "fal's Kontext trainer: peft's prefix before native names",
    dict.fromkeys(_DENOISER, "base_model.model."),
    spelling.toolkit,
    ("lora_A.weight", "lora_B.weight", "alpha"),
    _NO_METADATA,
    native=True,
)
XLABS_FORMAT = Format(
    "xlabs",
    "XLabs' x-flux, USO: attention of Flux's double blocks",
    dict.fromkeys(_DENOISER, ""),
    spelling.xlabs,
    XLABS,
    _NO_METADATA,
    native=True,
    key=spelling.xlabs_key,
)
BFL = Format(
    "bfl",
    "Black Forest Labs' control LoRAs: native names, no prefix",
    dict.fromkeys(_DENOISER, ""),
    spelling.toolkit,
    ("lora_A.weight", "lora_B.weight", "lora_B.bias", "scale", "alpha"),
    _NO_METADATA,
    native=True,
)

TOOLS: tuple[Format, ...] = (
    *(KOHYA, LYCORIS_KOHYA, KOHYA_OFT, LYCORIS_WRAPPER, ONETRAINER, DIFFUSERS_LEGACY, DIFFUSERS, PEFT_FORMAT),
    *(AI_TOOLKIT, COMFYUI, FAL, XLABS_FORMAT, BFL, own.OWN),
)
