"""What is in an adapter file, in words and numbers: for `imgadapt show`, and whoever wants to know."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from imgadapt.file import AdapterFile, is_finite
from imgadapt.formats import Part
from imgadapt.formats.layer_config import PEFT_KEY
from imgadapt.sites import Site

NO_CONFIG = "peft's file without its adapter_config.json: alpha is not known and taken as the rank; keep them together"
_TAGS = 10
_LONGEST = 2**23  # characters of tags; real files have 5 million at most
_WIDE = 512  # rank of a pair above which its norm is not worked out


@dataclass(frozen=True)
class Row:
    """One layer: method, rank and alpha (None: it has none), shapes of its tensors, and the Frobenius norm of
    scale * delta (None: that depends on the base's weights, or was not asked for).
    """

    layer: str
    method: str
    rank: int | None
    alpha: float | None
    scale: float
    norm: float | None
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Summary:
    """What is in a file. blocks: the norms of layers summed up (the root of the sum of squares) by block.
    broken: layers and words with NaN or infinity; none, where no tensors were read.
    """

    format: str | None
    base: str | None
    rows: list[Row]
    numbers: int
    dtypes: list[str]
    words: list[str]
    trigger: list[str]
    blocks: Mapping[str, float]
    metadata: Mapping[str, str]
    unknown: Mapping[str, str]
    broken: list[str]

    def as_json(self) -> str:
        return json.dumps(_finite(asdict(self)), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]  # pyright: ignore[reportUnknownVariableType]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(file: AdapterFile, *, norms: bool = True) -> Summary:
    """What a file has. norms: whether its tensors are read for them."""
    rows = [_row(name, part, norms) for name, part in file.parts.items()]
    learned = file.prompts.tensors if file.prompts else {}
    if file.prompts:
        rows += [_prompt_row(name, file.prompts.kind.name, t) for name, t in learned.items()]
    own = {
        **{f"<{word}>": list(one.source.values()) for word, one in file.embeddings.items()},
        **{name: list(part.tensors.values()) for name, part in file.parts.items()},
        **{f"prompt {name}": list(t.values()) for name, t in learned.items()},
    }
    tensors = [tensor for some in own.values() for tensor in some]
    broken = [name for name, some in own.items() if norms and not all(map(is_finite, some))]
    blocks: dict[str, float] = {}
    for row in rows:
        if row.norm is not None:
            blocks[block_of(row.layer)] = (blocks.get(block_of(row.layer), 0.0) ** 2 + row.norm**2) ** 0.5
    return Summary(
        file.format,
        file.architecture,
        rows,
        sum(tensor.numel() for tensor in tensors),
        sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        list(file.embeddings),
        trigger_words(file.metadata),
        blocks,
        file.metadata,
        file.unknown,
        broken,
    )


def alpha_unsaid(file: AdapterFile) -> bool:
    """Whether it is peft's weights without peft's config, which alone has alpha."""
    return file.format == "peft" and PEFT_KEY not in file.metadata


def block_of(layer: str) -> str:
    """`unet.down_blocks.1.attentions.0.proj_in` -> `unet.down_blocks.1`: up to the first number, and that."""
    found = re.match(r"[^.]+(\.[A-Za-z_]+)*?\.\d+", layer)
    return found[0] if found else ".".join(layer.split(".")[:2])


def _row(name: str, part: Part, norms: bool) -> Row:
    method = part.method
    shapes = {key: tuple(tensor.shape) for key, tensor in part.tensors.items()}
    norm = norm_of(part) if norms else None
    return Row(name, method.name, method.file_rank, method.file_alpha, method.scale, norm, shapes)


def _prompt_row(place: str, kind: str, t: Mapping[str, Tensor]) -> Row:
    return Row(place, kind, None, None, 1.0, None, {key: tuple(tensor.shape) for key, tensor in t.items()})


@torch.no_grad()
def norm_of(part: Part) -> float | None:
    """Frobenius norm of scale * delta, from the factors alone; None where it depends on the weight, or is too wide."""
    method, t = part.method, {key: tensor.float() for key, tensor in part.tensors.items()}
    if method.needs_weight or not method.merges:
        return None
    if "w2" in t:
        first = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
        return method.scale * float(first.norm() * t["w2"].norm())
    if method.name in ("full", "norm"):
        return float(next(iter(t.values())).norm())
    narrow, site = method.file_rank is not None and method.file_rank**2 <= _WIDE, _site(part)
    pair = method.pair(t, site) if narrow and site is not None else None
    if method.name == "lora" and "mid" not in t:
        pair = t["up"].flatten(1), t["down"].flatten(1)
    if pair is None or pair[0].shape[1] > _WIDE:
        return None
    up, down = pair
    return method.scale * float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())


def _site(part: Part) -> Site | None:
    """A site of the size that the factors have, flattened where they do not tell the kernel; None: they tell none."""
    t = part.tensors
    if part.shape is not None:
        site = Site.of_shape(part.shape, part.method.kinds)
        return site if part.method.fits(t, site) is None else None
    if "mid" in t:
        return Site((t["up"].shape[0], t["down"].shape[1], *t["mid"].shape[2:]), "conv")
    if "core_1" in t:
        return Site((t["up_1"].shape[1], t["down_1"].shape[1], *t["core_1"].shape[2:]), "conv")
    if "up_1" in t:
        return Site((t["up_1"].shape[0], t["down_1"].shape[1]), "linear")
    if "w2_a" in t:
        first = t["w1"].shape if "w1" in t else (t["w1_a"].shape[0], t["w1_b"].shape[1])
        rows = first[0] * t["w2_a"].shape[1 if "t2" in t else 0]
        kernel = t["t2"].shape[2:] if "t2" in t else ()
        return Site((rows, first[1] * t["w2_b"].shape[1], *kernel), "conv" if kernel else "linear")
    if part.method.name != "lora":
        return None
    return Site((t["up"].shape[0], *t["down"].shape[1:]), "conv" if t["down"].ndim > 2 else "linear")


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """What its maker says brings it out; where nothing is said, the tags that most of its pictures had (sd-scripts'
    `ss_tag_frequency`).
    """
    for key in ("modelspec.trigger_phrase", "trigger_words", "ss_trigger_words", "modelspec.trigger_words"):
        if said := metadata.get(key, "").strip():
            return [said]
    said = metadata.get("ss_tag_frequency", "{}")
    try:
        tables: Any = json.loads(said if len(said) <= _LONGEST else "{}")
        counts = Counter[str]()
        for tags in tables.values():
            for tag, count in tags.items():
                counts[str(tag).strip()] += int(count)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return []
    return [tag for tag, _ in counts.most_common(_TAGS)]


def misfits(file: AdapterFile, shape_of: Callable[[str], tuple[int, ...] | None]) -> dict[str, str]:
    """Layer -> why it would not go on a model whose layers have these weights; None: it has no layer of that name."""
    found: dict[str, str] = {}
    for name, part in file.parts.items():
        shape = shape_of(name)
        if shape is None:
            found[name] = "no such layer"
            continue
        if wrong := part.method.fits(part.tensors, Site.of_shape(shape, part.method.kinds)):
            found[name] = wrong
    return found
