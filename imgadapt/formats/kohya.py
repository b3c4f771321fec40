"""The metadata that kohya's sd-scripts write, and LyCORIS."""

from collections.abc import Callable, Mapping

from imgadapt.formats.part import Parts

OWN = ("ss_network_module", "ss_network_dim", "ss_network_alpha")
HASHES = ("sshs_model_hash", "sshs_legacy_hash")
"""They are of the tensors, so whoever writes the file adds them (`file.py`)."""
BASES: Mapping[str, tuple[str, str, str]] = {
    "sd1": ("stable-diffusion-v1", "sd_v1", "https://github.com/Stability-AI/generative-models"),
    "sd2": ("stable-diffusion-v2-768-v", "sd_v2", "https://github.com/Stability-AI/generative-models"),
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "https://github.com/Stability-AI/generative-models"),
    "sd3": ("stable-diffusion-3", "sd3", "https://github.com/Stability-AI/generative-models"),
    "sd35_medium": ("stable-diffusion-3", "sd3", "https://github.com/Stability-AI/generative-models"),
    "sd35_large": ("stable-diffusion-3", "sd3", "https://github.com/Stability-AI/generative-models"),
    "flux": ("flux-1-dev", "flux1", "https://github.com/black-forest-labs/flux"),
}
"""Architecture -> modelspec's name, `ss_base_model_version`, which A1111 tells bases apart by, implementation."""


def metadata_for(module: str) -> Callable[[Parts, Mapping[str, str]], dict[str, str]]:
    """What A1111 and ComfyUI's managers show; mixed ranks are summed up as the largest, as sd-scripts does."""

    def metadata(parts: Parts, old: Mapping[str, str]) -> dict[str, str]:
        ranks = [part.method.file_rank or 0 for part in parts.values()]
        alphas = [(part.method.file_alpha or 0.0) for part in parts.values()]
        new = {
            "ss_network_module": module,
            "ss_network_dim": str(max(ranks)),
            "ss_network_alpha": f"{alphas[ranks.index(max(ranks))]:g}",
        }
        still_true = _same(old, new, "ss_network_dim") and _same(old, new, "ss_network_alpha")
        return {key: old.get(key, value) for key, value in new.items()} if still_true else new

    return metadata


def _same(old: Mapping[str, str], new: Mapping[str, str], key: str) -> bool:
    """Whether both say the same number, `1.0` or `1`; sd-scripts' resizing writes `Dynamic`, which is none."""
    try:
        return float(old.get(key, "nan")) == float(new[key])
    except ValueError:
        return False
