"""kohya sd-scripts: flattened names, alpha as a tensor (networks/lora.py of kohya-ss/sd-scripts)."""

from collections.abc import Mapping

from imgadapt.formats.part import Parts
from imgadapt.formats.table import Format, Settings


def _settings(metadata: Mapping[str, str], name: str) -> Settings:
    return {}  # all is in the tensors


def _metadata(parts: Parts, old: Mapping[str, str]) -> dict[str, str]:
    """What A1111 and ComfyUI's managers show; mixed ranks are summed up as the largest, as sd-scripts does."""
    ranks = [part.method.file_rank or 0 for part in parts.values()]
    alphas = [part.method.scale * rank for part, rank in zip(parts.values(), ranks, strict=True)]
    new = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": f"{alphas[ranks.index(max(ranks))]:g}",
    }
    still_true = _same(old, new, "ss_network_dim") and _same(old, new, "ss_network_alpha")
    return {key: old.get(key, value) for key, value in new.items()} if still_true else new


def _same(old: Mapping[str, str], new: Mapping[str, str], key: str) -> bool:
    """Whether both say the same number, `1.0` or `1`; sd-scripts' resizing writes `Dynamic`, which is none."""
    try:
        return float(old.get(key, "nan")) == float(new[key])
    except ValueError:
        return False


KOHYA = Format(
    name="kohya",
    prefixes={"unet": "lora_unet_", "text_encoder": "lora_te_"},
    separator="_",
    spelling={"lora": {"down": "lora_down.weight", "up": "lora_up.weight"}},
    also={},
    alpha="alpha",
    settings=_settings,
    metadata=_metadata,
    prefixes_of={"sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}},
    own_metadata=("ss_network_module", "ss_network_dim", "ss_network_alpha"),
)
