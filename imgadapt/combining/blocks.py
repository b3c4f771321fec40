"""Blocks of denoisers as block weights name them: BASE, IN00 ... OUT11 of UNets; CLIP, T5, IN, D00, S00, OUT of Flux.

Lengths of lists, names and presets: hako-mikan/sd-webui-lora-block-weight 04b986c, scripts/lora_block_weight.py
(BLOCKID12 ... BLOCKIDFLUX, DEF_WEIGHT_PRESET), whose lists for UNets kohya's networks/svd_merge_lora.py (077f6a4) has,
too. Its presets are of SD1's 17 blocks. SDXL's here have the same shallow and deep halves as in
https://civitai.com/articles/2322 (S: IN04, IN05, OUT03-05; D: IN07, IN08, OUT00-02). Where BASE stands alone for what
the tools have no number for: time and label embeddings are IN00 (as kohya has it), the last norm and convolution are of
the last OUT block.
"""

import re
from collections.abc import Mapping

from imgadapt.combining.checkpoints.naming import ldm
from imgadapt.targets import TEXT_ENCODERS

_UNET = ("BASE IN01-02 IN04-05 IN07-08 M00 OUT03-11", "BASE IN00-11 M00 OUT00-11")
LISTS: Mapping[str, tuple[str, ...]] = {
    "sd1": _UNET,
    "sd2": _UNET,
    "sdxl": ("BASE IN04-05 IN07-08 M00 OUT00-05", "BASE IN00-08 M00 OUT00-08"),
    "flux": ("CLIP T5 IN D00-18 S00-37 OUT",),
}
"""Architecture -> the blocks that lists of numbers are for, in their order."""

_SD1 = {
    "INS": "BASE IN01-02 IN04",
    "IND": "BASE IN05 IN07-08",
    "INALL": "BASE IN01-02 IN04-05 IN07-08",
    "MIDD": "BASE IN05 IN07-08 M00 OUT03-06",
    "OUTD": "BASE OUT03-06",
    "OUTS": "BASE OUT07-11",
    "OUTALL": "BASE OUT03-11",
}
_SDXL = {
    "INS": "BASE IN04-05",
    "IND": "BASE IN07-08",
    "INALL": "BASE IN04-05 IN07-08",
    "MIDD": "BASE IN07-08 M00 OUT00-02",
    "OUTD": "BASE OUT00-02",
    "OUTS": "BASE OUT03-05",
    "OUTALL": "BASE OUT00-05",
}
PRESETS: Mapping[str, Mapping[str, str]] = {"sd1": _SD1, "sd2": _SD1, "sdxl": _SDXL}
"""Architecture -> preset -> the blocks that keep their weight; all others are 0 (`to26` of the same script)."""
CONSTANT: Mapping[str, float] = {"NONE": 0.0, "ALL": 1.0, "FLUXALL": 1.0, "ALL0.5": 0.5}
"""Presets of all architectures: one number for every layer."""


def expanded(text: str) -> tuple[str, ...]:
    """`IN04-05 M00` -> IN04, IN05, M00."""
    made: list[str] = []
    for word in text.split():
        found = re.fullmatch(r"([A-Z]+)(\d+)-(\d+)", word)
        made += [word] if found is None else [f"{found[1]}{n:02}" for n in range(int(found[2]), int(found[3]) + 1)]
    return tuple(made)


def block_of(layer: str, architecture: str) -> str | None:
    """The block of a layer (its canonical name); None where no list has a place for it."""
    component, _, path = layer.partition(".")
    if architecture == "flux":
        return {"text_encoder": "CLIP", "text_encoder_2": "T5"}.get(component) or _of_flux(path)
    if architecture not in LISTS:
        return None
    if component in TEXT_ENCODERS:
        return "BASE"
    room, _, rest = (ldm(path, ()) or "").partition(".")
    if room in ("input_blocks", "output_blocks"):
        return f"{room.partition('put')[0].upper()}{int(rest.partition('.')[0]):02}"
    last = expanded(LISTS[architecture][-1])[-1]
    return {"time_embed": "IN00", "label_emb": "IN00", "middle_block": "M00", "out": last}.get(room)


def _of_flux(path: str) -> str | None:
    found = re.match(r"(single_)?transformer_blocks\.(\d+)\.", path)
    if found is not None:
        return f"{'S' if found[1] else 'D'}{int(found[2]):02}"
    room = path.partition(".")[0]
    outer = {
        "x_embedder": "IN",
        "context_embedder": "IN",
        "time_text_embed": "IN",
        "norm_out": "OUT",
        "proj_out": "OUT",
    }
    return outer.get(room)
