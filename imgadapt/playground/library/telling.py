"""Telling: what the metadata of an adapter says of its training, in words. All of it is from anyone: escape it."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, cast

from imgadapt.playground.library.cards import plain

_TAGS = 20
_FOLDERS = 8
_LONGEST = 500  # characters

Said = Callable[[Mapping[str, str]], str]
"""Of metadata, a value in words; "" where it says nothing."""


def training(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """(what, value), of what is said; keys of sd-scripts, which ours and LyCORIS write, too, of modelspec, of
    ai-toolkit and of OneTrainer.
    """
    rows = [(name, plain(said(metadata), _LONGEST)) for name, said in _ROWS]
    return [(name, value) for name, value in rows if value not in ("", "None", "null", "none")]


def _entry(*keys: str) -> Said:
    """The first of these that is said."""
    return lambda m: next((m[key] for key in keys if m.get(key, "").strip() not in ("", "None")), "")


def _epochs(m: Mapping[str, str]) -> str:
    of, at = _entry("ss_num_epochs")(m), _entry("ss_epoch")(m)
    return f"{at} of {of}" if of and at and of != at else of or at


def _steps(m: Mapping[str, str]) -> str:
    of, at = _entry("ss_max_train_steps")(m), _entry("ss_steps")(m)
    if of and at and of != at:
        return f"{at} of {of}"
    return of or at or str(_table(m.get("training_info", "")).get("step", ""))


def _rates(m: Mapping[str, str]) -> str:
    parts = {"": _entry("ss_learning_rate")(m), "U-Net": _entry("ss_unet_lr")(m), "text": _text_rate(m)}
    shown = [f"{name} {value}".strip() for name, value in parts.items() if value and (not name or value != parts[""])]
    return ", ".join(shown)


def _text_rate(m: Mapping[str, str]) -> str:
    return _entry("ss_text_encoder_lr", "ss_text_encoder1_lr")(m)


def _resolution(m: Mapping[str, str]) -> str:
    size = _entry("ss_resolution")(m) or _entry("modelspec.resolution")(m)
    numbers = [part for part in size.replace("x", ",").strip("() ").split(",") if part.strip().isdigit()]
    shown = " x ".join(number.strip() for number in numbers[:2]) if len(numbers) >= 2 else size
    buckets = _table(m.get("ss_bucket_info", "")).get("buckets")
    count = len(cast("dict[str, Any]", buckets)) if isinstance(buckets, dict) else 0
    return f"{shown}, {count} shapes" if count > 1 else shown


def _tags(m: Mapping[str, str]) -> str:
    counts = Counter[str]()
    for tags in _table(m.get("ss_tag_frequency", "")).values():
        for tag, count in cast("dict[str, Any]", tags).items() if isinstance(tags, dict) else ():
            if isinstance(count, int) and abs(count) < 2**31:
                counts[tag.strip()] += count
    return ", ".join(f"{tag} ({count})" for tag, count in counts.most_common(_TAGS))


def _folders(m: Mapping[str, str]) -> str:
    rows: list[str] = []
    for name, row in list(_table(m.get("ss_dataset_dirs", "")).items())[:_FOLDERS]:
        said = cast("dict[str, Any]", row) if isinstance(row, dict) else {}
        rows.append(f"{name}: {said.get('img_count', '?')} x {said.get('n_repeats', '?')}")
    return "; ".join(rows)


def _duration(m: Mapping[str, str]) -> str:
    try:
        seconds = float(m["ss_training_finished_at"]) - float(m["ss_training_started_at"])
    except (KeyError, ValueError):
        return ""
    if not 0 < seconds < 1e8:
        return ""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _network(m: Mapping[str, str]) -> str:
    module = _entry("ss_network_module")(m)
    sizes = [f"{word} {value}" for word, key in (("rank", "ss_network_dim"), ("alpha", "ss_network_alpha"))
             if (value := _entry(key)(m))]  # fmt: skip
    return ", ".join(part for part in (module, *sizes) if part)


def _trainer(m: Mapping[str, str]) -> str:
    if version := m.get("imgadapt_version"):
        return f"imgadapt {version}"
    software = _table(m.get("software", ""))
    if name := software.get("name"):
        return f"{name} {software.get('version', '')}"
    if "ot_revision" in m:
        return "OneTrainer"
    return f"sd-scripts {m.get('ss_sd_scripts_commit_hash', '')[:8]}" if "ss_network_module" in m else ""


def _table(text: str) -> dict[str, Any]:
    try:
        said: Any = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", said) if isinstance(said, dict) else {}


_ROWS: tuple[tuple[str, Said], ...] = (
    ("Title", _entry("modelspec.title", "ss_output_name", "name")),
    ("Author", _entry("modelspec.author")),
    ("Description", _entry("modelspec.description", "imgadapt_description")),
    ("How to use", _entry("modelspec.usage_hint")),
    ("Trigger", _entry("modelspec.trigger_phrase")),
    ("Licence", _entry("modelspec.license")),
    ("Date", _entry("modelspec.date")),
    ("Base", _entry("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")),
    ("Trained by", _trainer),
    ("Network", _network),
    ("Pictures", _entry("ss_num_train_images")),
    ("Regularisation pictures", lambda m: "" if m.get("ss_num_reg_images") == "0" else m.get("ss_num_reg_images", "")),
    ("Folders (pictures x repeats)", _folders),
    ("Resolution", _resolution),
    ("Epochs", _epochs),
    ("Steps", _steps),
    ("Batch size", _entry("ss_total_batch_size", "ss_batch_size_per_device")),
    ("Learning rate", _rates),
    ("Schedule", _entry("ss_lr_scheduler")),
    ("Optimiser", _entry("ss_optimizer")),
    ("Precision", _entry("ss_mixed_precision")),
    ("Min-SNR gamma", _entry("ss_min_snr_gamma")),
    ("Noise offset", _entry("ss_noise_offset")),
    ("Prediction", _entry("modelspec.prediction_type")),
    ("Clip skip", _entry("ss_clip_skip")),
    ("Seed", _entry("ss_seed")),
    ("Took", _duration),
    ("Comment", _entry("ss_training_comment")),
    ("Frequent tags", _tags),
)
