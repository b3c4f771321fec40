"""kohya sd-scripts: flattened names, alpha as a tensor (networks/lora.py of kohya-ss/sd-scripts)."""

from collections.abc import Mapping

from imgadapt.formats.part import Parts
from imgadapt.formats.table import Format, Settings


def _settings(metadata: Mapping[str, str], name: str) -> Settings:
    return {}  # all is in the tensors


def _metadata(parts: Parts) -> dict[str, str]:
    """What A1111 and ComfyUI's managers show; mixed ranks are summed up as the largest, as sd-scripts does."""
    ranks = [part.tensors["down"].shape[0] for part in parts.values()]
    alphas = [part.method.scale * rank for part, rank in zip(parts.values(), ranks, strict=True)]
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": f"{alphas[ranks.index(max(ranks))]:g}",
    }


KOHYA = Format(
    name="kohya",
    prefixes={"unet": "lora_unet_", "text_encoder": "lora_te_"},
    separator="_",
    spelling={"lora": {"down": "lora_down.weight", "up": "lora_up.weight"}},
    alpha="alpha",
    settings=_settings,
    metadata=_metadata,
    own_metadata=("ss_network_module", "ss_network_dim", "ss_network_alpha"),
)
