"""What a merged file has from its inputs besides layers: words, trigger words, titles, what their bases are."""

import json
from collections.abc import Iterable, Mapping, Sequence

import torch

from imgadapt.combining.layers import Input
from imgadapt.embeddings import Embedding
from imgadapt.errors import ConfigError
from imgadapt.summary import trigger_words

_SHARED = (
    *("ss_base_model_version", "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_v2", "ss_clip_skip"),
    *("modelspec.architecture", "modelspec.implementation", "modelspec.prediction_type", "modelspec.resolution"),
    *("modelspec.encoder_layer", "modelspec.timestep_range"),
)
"""What is true of the merged file where all inputs that say it say the same. (Ranks, hashes, dates, pictures, steps and
settings of their trainings are not.)"""
_UNITED = ("modelspec.author", "modelspec.license")
"""What holds for each of them, and so all of it for the merged file."""


def united_words(inputs: Sequence[Input]) -> dict[str, Embedding]:
    """The embeddings of all inputs.

    Raises:
        ConfigError: two have one word with different vectors.
    """
    made: dict[str, Embedding] = {}
    owners: dict[str, str] = {}
    for one in inputs:
        for token, embedding in one.file.embeddings.items():
            if token in made and not _same(made[token], embedding):
                raise ConfigError(
                    f"{owners[token]} and {one.name} both have the word '{token}', with different vectors; "
                    f"rename it in one of them, or take the word out of one"
                )
            made.setdefault(token, embedding)
            owners.setdefault(token, one.name)
    return dict(sorted(made.items()))


def _same(one: Embedding, other: Embedding) -> bool:
    pairs = ((one.vectors, other.vectors), (one.outputs, other.outputs))
    return all(a.keys() == b.keys() and all(torch.equal(a[k].float(), b[k].float()) for k in a) for a, b in pairs)


def inherited(inputs: Sequence[Input], weights: Sequence[float]) -> dict[str, str]:
    """Metadata of a merged file, less the recipe.

    weights: the entries' own. The trigger words are those of inputs that are added (whose weight is above 0).
    """
    rows: list[dict[str, object]] = [
        {"name": one.name, "weight": weight, "sha256": one.digest} for one, weight in zip(inputs, weights, strict=True)
    ]
    known = [one.file.metadata for one in inputs]
    words = [trigger_words(data) for data, weight in zip(known, weights, strict=True) if weight > 0]
    titles = [title_of(one) for one in inputs]
    signed = [f"{'-' if weight < 0 else '+'} {title}" for title, weight in zip(titles, weights, strict=True) if weight]
    made = {
        "merged_from": json.dumps(rows, ensure_ascii=False),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": " ".join(signed).removeprefix("+ "),
        "modelspec.merged_from": ", ".join(titles),  # as sd-scripts' sai_model_spec.build_merged_from
        "modelspec.trigger_phrase": _united(word for own in words for word in own),
    }
    made |= {key: _united(data.get(key, "") for data in known) for key in _UNITED}
    for key in _SHARED:
        said = {data[key] for data in known if key in data}
        made |= {key: said.pop()} if len(said) == 1 else {}
    return {key: value for key, value in made.items() if value}


def title_of(one: Input) -> str:
    data: Mapping[str, str] = one.file.metadata
    return data.get("modelspec.title") or data.get("ss_output_name") or one.name.removesuffix(".safetensors")


def _united(texts: Iterable[str]) -> str:
    """Each once, in their order, with commas between: `ohwx, a style`."""
    return ", ".join(dict.fromkeys(part for text in texts if (part := text.strip())))
