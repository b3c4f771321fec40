"""What a trained file says of itself: kohya's `ss_*`, which A1111 and ComfyUI's managers show, and modelspec.

Keys: sd-scripts' train_network.py; modelspec: https://github.com/Stability-AI/ModelSpec (1.0.0). No date is written:
the same training gives the same bytes.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from imgadapt import __version__
from imgadapt.formats.kohya import BASES
from imgadapt.training.config import TrainConfig
from imgadapt.training.data import Example
from imgadapt.training.material import Material

_PERSONAL = ("folder", "output", "base", "cache", "held_out", "class_folder", "caption", "trigger", "class_prompt",
             "sample_prompts", "title", "word", "initial")  # fmt: skip


def metadata(
    config: TrainConfig, identity: Mapping[str, str], material: Material, architecture: str | None
) -> dict[str, str]:
    """The metadata of a config's file; with `private`, none of it says a word, a name or a path of the user's."""
    examples = list(dict.fromkeys(view.example for view in material.views))
    settings = {key: value for key, value in identity.items() if not (config.private and key in _PERSONAL)}
    spec, version, source = BASES.get(architecture or "", ("", "", ""))
    title = "adapter" if config.private else config.title or config.output.resolve().name
    side = max(config.resolution or [material.family.native])
    sizes = Counter(view.size for view in material.views)
    prediction = material.family.schedule.prediction
    rows = {
        "imgadapt_version": __version__,  # "imgadapt" itself is what our own format keeps there
        "imgadapt_settings": json.dumps(settings, sort_keys=True),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{spec}/lora" if spec else "",
        "modelspec.implementation": source,
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}.get(prediction, ""),
        "modelspec.trigger_phrase": "" if config.private else config.trigger or "",
        "ss_base_model_version": version,
        "ss_output_name": title,
        "ss_seed": str(config.seed),
        "ss_max_train_steps": str(config.steps),
        "ss_num_epochs": str(round(material.order.epochs(config.steps))),
        "ss_num_train_images": str(sum(example.repeats for example in examples)),
        "ss_total_batch_size": str(config.batch_size),
        "ss_learning_rate": str(config.learning_rate),
        "ss_lr_scheduler": config.schedule,
        "ss_lr_warmup_steps": str(config.warmup_steps),
        "ss_optimizer": config.optimizer,
        "ss_mixed_precision": {"fp32": "no"}.get(config.precision, config.precision),
        "ss_gradient_checkpointing": str(config.checkpointing),
        "ss_caption_dropout_rate": str(config.caption_dropout),
        "ss_shuffle_caption": str(config.shuffle_tags),
        "ss_keep_tokens": str(config.keep_tags),
        "ss_noise_offset": str(config.noise_offset or None),
        "ss_min_snr_gamma": str(config.min_snr_gamma),
        "ss_zero_terminal_snr": str(config.zero_terminal_snr),
        "ss_network_dropout": str(config.dropout or None),
        "ss_resolution": f"({side}, {side})",
        "ss_enable_bucket": str(config.buckets),
        "ss_bucket_info": json.dumps(
            {
                "buckets": {
                    k: {"resolution": list(size), "count": n} for k, (size, n) in enumerate(sorted(sizes.items()))
                }
            }
        ),
        "ss_v2": str(architecture == "sd2"),
    }
    if not config.private:
        rows |= {
            "ss_sd_model_name": Path(config.base).name,
            "ss_dataset_dirs": json.dumps(_folders(config, examples)),
            "ss_tag_frequency": json.dumps({config.folder.name: _tags(examples)}),
        }
    return {key: value for key, value in rows.items() if value not in ("", "None")}


def _folders(config: TrainConfig, examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for example in examples:
        name = example.path.parent.name if example.concept else config.folder.name
        row = found.setdefault(name, {"n_repeats": example.repeats, "img_count": 0})
        row["img_count"] += 1
    return found


def _tags(examples: Sequence[Example]) -> dict[str, int]:
    tags = (tag.strip() for example in examples for tag in example.captions[0].split(","))
    return dict(sorted(Counter(tag for tag in tags if tag).items(), key=lambda row: (-row[1], row[0])))
