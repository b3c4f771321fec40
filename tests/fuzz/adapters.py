"""Adapters in every tool's spelling, a little wrong: what is read of one is all, and stays the same when written."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as bytes_of
from torch import Tensor

import imgadapt
from imgadapt.arch import architectures
from imgadapt.errors import FormatError, ImgadaptError
from imgadapt.file import AdapterFile
from imgadapt.formats import FORMATS, Part, Writer
from imgadapt.formats.ends import ENDS
from imgadapt.formats.names import PREFIXES
from imgadapt.formats.writing import difference
from imgadapt.playground.library.cards import Reader
from imgadapt.summary import summary
from tests.fuzz.files import placed, scratch
from tests.fuzz.target import Target

_ARCHITECTURES = {a.name: a for a in architectures()}
_SMALLER = 64  # times, layers are than the real ones
_DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
_VALUES = (0.0, 1.0, -1.0, math.nan, math.inf, 1e38, 65504.0, 1e-40)
_DIMS = (0, 1, 2, 3, 5, 64)
Shape = tuple[int, ...]


class Choices:
    """Choices that bytes make; when they are spent, the first of everything."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def below(self, most: int) -> int:
        size = 1 if most <= 256 else 2
        taken = self._data[self._place : self._place + size]
        self._place += size
        return int.from_bytes(taken, "little") % most

    def of(self, rows: Sequence[Any]) -> Any:
        return rows[self.below(len(rows))]


@cache
def _names(architecture: str) -> tuple[tuple[str, Shape], ...]:
    """Some of its layers, of both namings, with shapes."""
    one = _ARCHITECTURES[architecture]
    names = [*one.layers[:: max(1, len(one.layers) // 24)], *list(one.native)[:: max(1, len(one.native) // 24)]]
    found: list[tuple[str, Shape]] = []
    for name in names:
        shape = one.shape_of(name)
        shape = shape if shape is not None else (one.native_rows[name], 3072)
        found.append((name, tuple(max(1, n // _SMALLER) if n >= _SMALLER else n for n in shape)))
    return tuple(found)


def _ones(shape: Shape) -> Shape:
    return (1,) * (len(shape) - 2)


def _processors(rank: int, inputs: int, outputs: int, *names: str) -> dict[str, Shape]:
    sizes = {"down": (rank, inputs), "up": (outputs, rank)}
    return {f"processor.{name}.{end}.weight": size for name in names for end, size in sizes.items()}


_METHODS: tuple[Callable[[Shape, int], dict[str, Shape]], ...] = (
    lambda s, r: {"lora_down.weight": (r, *s[1:]), "lora_up.weight": (s[0], r, *_ones(s)), "alpha": ()},
    lambda s, r: {"lora_down.weight": (r, *s[1:]), "lora_up.weight": (s[0], r, *_ones(s)), "dora_scale": (s[0], 1)},
    lambda s, r: {"lora_down.weight": (r, s[-1], 1, 1), "lora_mid.weight": (r, r, 3, 3),
                  "lora_up.weight": (s[0], r, 1, 1)},
    lambda s, r: {"lora_A.weight": (r, *s[1:]), "lora_B.weight": (s[0], r, *_ones(s))},
    lambda s, r: {"lora_A.weight": (r, *s[1:]), "lora_B.weight": (s[0], r, *_ones(s)), "lora_magnitude_vector": s[:1]},
    lambda s, r: {"lora_A.default.weight": (r, *s[1:]), "lora_B.default.weight": (s[0], r), "lora_B.bias": s[:1]},
    lambda s, r: {"lora_embedding_A": (r, s[-1]), "lora_embedding_B": (s[0], r)},
    lambda s, r: {"hada_w1_a": (s[0], r), "hada_w1_b": (r, *s[1:2]), "hada_w2_a": (s[0], r), "hada_w2_b": (r, *s[1:2])},
    lambda s, r: {"hada_t1": (r, r, 3, 3), "hada_t2": (r, r, 3, 3), "hada_w1_a": (r, s[0]), "hada_w1_b": (r, *s[1:2]),
                  "hada_w2_a": (r, s[0]), "hada_w2_b": (r, *s[1:2])},
    lambda s, r: {"lokr_w1": (2, 2), "lokr_w2": (s[0] // 2, *(n // 2 for n in s[1:2])), "alpha": ()},
    lambda s, r: {"lokr_w1": (1, 1), "lokr_w2_a": (s[0], r), "lokr_w2_b": (r, *s[1:2]), "alpha": ()},
    lambda s, r: {"lokr_w1_a": (2, r), "lokr_w1_b": (r, 2), "lokr_w2_a": (r, s[0]), "lokr_w2_b": (r, 4),
                  "lokr_t2": (r, r, 3, 3)},
    lambda s, r: {"oft_blocks": (max(1, s[0] // 4), 4, 4), "alpha": ()},
    lambda s, r: {"oft_blocks": (2, max(1, s[0] // 4), 4, 4), "rescale": (s[0], *(1 for _ in s[1:])), "alpha": ()},
    lambda s, r: {"oft_blocks.0": (1, 4, 4), "oft_blocks.1": (1, 4, 4), "oft_blocks.2": (1, 4, 4), "alpha": ()},
    lambda s, r: {"oft_R.weight": (max(1, s[-1] // 4), 6)},
    lambda s, r: {"oft_R.weight": (1, 6), "oft_R.scaled_oft": (1,)},
    lambda s, r: {"boft_R": (2, max(1, s[-1] // 4), 4, 4), "boft_s": (s[0], 1)},
    lambda s, r: {"a1.weight": (r, *s[1:2]), "a2.weight": (s[0], r), "b1.weight": (s[0], r), "b2.weight": (r, *s[1:2])},
    lambda s, r: {"ia3_l": (s[0], 1)},
    lambda s, r: {"ia3_l": (1, s[-1])},
    lambda s, r: {"weight": s[:1], "on_input": ()},
    lambda s, r: {"diff": s, "diff_b": s[:1]},
    lambda s, r: {"w_norm": s[:1], "b_norm": s[:1]},
    lambda s, r: {"lora.down.weight": (r, *s[1:]), "lora.up.weight": (s[0], r), "lora.alpha": ()},
    lambda s, r: _processors(r, 48, 144, "qkv_lora1", "proj_lora2"),
    lambda s, r: _processors(r, 5, 5, "to_q_lora", "to_out_lora"),
    lambda s, r: {"lora_A": (r, *s[1:]), "lora_B": (s[0], r), "magnitude": s[:1]},
    lambda s, r: {"set_weight": s}, lambda s, r: {"scale": s[:1]},
    lambda s, r: {"lora_A.weight": (r, *s[1:]), "reshape_weight": (2,)},
)  # fmt: skip
_WORDS: tuple[dict[str, Shape], ...] = (
    {"emb_params": (2, 8)}, {"clip_l": (2, 8), "clip_g": (2, 12)}, {"emp_params": (1, 8), "emp_params_out": (1, 8)},
    {"bundle_emb.word.clip_l": (2, 8), "bundle_emb.word.clip_g": (1, 12)}, {"bundle_emb.a.b.string_to_param.*": (1, 8)},
    {"<cat>": (1, 8), "<dog>": (2, 8)}, {"string_to_param.*": (1, 8), "string_to_token.*": ()}, {"word": (8,)},
    {"unet:0:up": (5, 2), "unet:0:down": (2, 5)}, {"text_encoder:3:up": (12, 1), "text_encoder:3:down": (1, 12)},
)  # fmt: skip
_METADATA: tuple[dict[str, str], ...] = (
    {}, {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "1"},
    {"ss_network_module": "lycoris.kohya", "sshs_model_hash": "0x12"}, {"lycoris_config": "{}"},
    {"ot_format": "legacy"},
    {"format": "pt", "modelspec.architecture": "flux-1-dev/lora"}, {"<cat>": "<embed>", "unet": '["CrossAttention"]'},
    {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 4, "transformer.lora_alpha": 1, "transformer.r": 2}'},
    {"peft_config": '{"r": 2, "lora_alpha": 8, "peft_type": "LORA"}'}, {"peft_config": '{"alpha": 3, "r": 2}'},
    {"peft_config": '{"r": 2, "alpha": 8, "use_rslora": true, "coft": true, "eps": 1e-3, "use_cayley_neumann": true}'},
)  # fmt: skip


def _filled(shape: Shape, start: int) -> Tensor:
    """Numbers that no two layers share."""
    count = math.prod(shape)
    return ((torch.arange(count) * 7 + start) % 17 / 8 - 1).reshape(shape)


def made(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that bytes describe."""
    choices = Choices(data)
    tensors: dict[str, Tensor] = {}
    architecture = choices.of(("sd1", "sdxl", "flux", *sorted(_ARCHITECTURES)))
    method, mixed, prefix, said = choices.of(_METHODS), choices.below(4) == 1, choices.below(64), choices.of(_METADATA)
    for _ in range(1 + choices.below(5)):
        name, shape = choices.of(_names(architecture))
        component, _, path = name.partition(".")
        fitting = [p for p in PREFIXES if component in p.components]
        before = fitting[prefix % len(fitting)]
        method = choices.of(_METHODS) if mixed else method
        stem = before.text + path.replace(".", before.separator)
        for end, size in method(shape, 1 + prefix % 3).items():
            tensors[f"{stem}.{end}"] = _filled(size, len(tensors)) if size else torch.tensor(1.0 + prefix % 3)
    if choices.below(8) == 1:
        tensors |= {key: _filled(size, 3) for key, size in choices.of(_WORDS).items()}
    if choices.below(16) == 1:
        tensors = {key: _filled(size, 3) for key, size in choices.of(_WORDS).items()}
    for _ in range(choices.below(5)):
        _spoil(tensors, choices)
    return tensors, dict(said)


def _spoil(tensors: dict[str, Tensor], choices: Choices) -> None:
    """Make one thing wrong."""
    if not tensors:
        return
    key = choices.of(list(tensors))
    tensor, what = tensors[key], choices.below(10)
    if what == 1:
        del tensors[key]
    elif what == 2:
        tensors[f"{key.rpartition('.')[0]}.{choices.of(list(ENDS))}"] = tensors.pop(key)
    elif what == 3:
        tensors[choices.of(PREFIXES).text + key] = tensor.clone()
    elif what == 4 and tensor.ndim:
        shape = list(tensor.shape)
        shape[choices.below(len(shape))] = choices.of(_DIMS)
        tensors[key] = _filled(tuple(shape), 5)
    elif what == 5:
        tensors[key] = (
            tensor[None].clone()
            if choices.below(2) or not tensor.ndim
            else tensor[..., 0].clone()
            if tensor.shape[-1]
            else tensor
        )
    elif what == 6:
        tensors[key] = tensor.to(choices.of(_DTYPES))
    elif what == 7:
        value = choices.of(_VALUES)
        if tensor.is_floating_point() and tensor.numel():
            tensors[key] = (
                tensor.double().index_fill(0, torch.tensor([0]), value).to(tensor.dtype)
                if tensor.ndim
                else torch.tensor(value)
            )
    elif what == 8:
        place = choices.below(len(key) + 1)
        tensors[key[:place] + chr(32 + choices.below(95)) + key[place + choices.below(2) :]] = tensors.pop(key)
    elif what == 9:
        tensors[f"{key}.{choices.of(('default', 'weight', 'alpha', '0', 'lora_A'))}"] = tensor.clone()


def _read_and_write(data: bytes) -> None:
    tensors, metadata = made(data)
    path = placed(bytes_of({k: t.contiguous().clone() for k, t in tensors.items()}, metadata or None), "x.safetensors")
    card = Reader().read(path)
    assert "cannot be read (" not in card.fault, card.fault
    file = imgadapt.load(path, strict=False)
    _account(file, set(tensors))
    try:
        strict = imgadapt.load(path)
        assert not file.unknown, f"strict, and yet it takes {file.unknown}"
        _same(file, strict)
    except FormatError:
        assert file.unknown, "strict=True refuses what strict=False takes whole"
    json.loads(summary(file).as_json())
    if any(not bool(torch.isfinite(t.float()).all()) for t in tensors.values()):
        return
    plain = AdapterFile(file.parts, file.metadata, file.format, file.architecture, {}, file.embeddings)
    _same(plain, imgadapt.load(imgadapt.save(plain, _beside("own"))))
    form = FORMATS[(len(data) + sum(data)) % len(FORMATS)]
    lost = (
        [step for step in imgadapt.plan(plain, form.name) if step.loss in ("dense", "impossible")] if file.parts else []
    )
    try:
        saved = imgadapt.save(plain, _beside("other"), format=form.name)
    except ImgadaptError as error:
        if not lost and not file.embeddings:
            raise AssertionError(f"planned as {form.name}, and yet not saved") from error
        return
    assert not lost, f"saved as {form.name}, and yet it cannot be: {lost}"
    _same(plain, imgadapt.load(saved), form.name)


def _beside(folder: str) -> Path:
    """A file of the same name, which may be a word."""
    (scratch() / folder).mkdir(exist_ok=True)
    return scratch() / folder / "x.safetensors"


def _account(file: AdapterFile, keys: set[str]) -> None:
    """Every key of the file is in what was read of it, or in what was not."""
    read = {key for part in file.parts.values() if part.source for key in part.source.tensors}
    read |= {key for embedding in file.embeddings.values() for key in embedding.source}
    assert read <= keys, f"of no file: {read - keys}"
    assert not read & set(file.unknown), f"read, and unknown: {read & set(file.unknown)}"
    assert keys <= read | set(file.unknown), f"lost: {keys - read - set(file.unknown)}"


def _same(one: AdapterFile, other: AdapterFile, format: str = "") -> None:
    """Whether two files make the same changes."""
    tokens = list(one.embeddings), list(other.embeddings)
    assert tokens[0] == tokens[1] or (format and len(tokens[0]) == len(tokens[1])), (
        tokens
    )  # kohya has none but the name
    for embedding, again in zip(one.embeddings.values(), other.embeddings.values(), strict=True):
        mine, theirs = [*embedding.vectors.values()], [*again.vectors.values()]
        assert len(mine) == len(theirs)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    if any(part.slices for file in (one, other) for part in file.parts.values()):
        return  # of a fused layer, which formats have under different names
    if one.architecture != other.architecture:
        return  # a layer or two, whose names there are another model's, too
    more = {name: part for name, part in other.parts.items() if name not in one.parts}
    assert one.parts.keys() <= other.parts.keys(), f"{format}: {sorted(one.parts)} became {sorted(other.parts)}"
    for name, part in more.items():
        changes = (_delta(other, name, part) or part.tensors).values()
        assert all(not tensor.any() for tensor in changes), f"{format}: {sorted(one.parts)}, and now {name}, too"
    for name, part in one.parts.items():
        again = other.parts[name]
        if part.method == again.method and all(
            torch.equal(t, again.tensors[k]) for k, t in part.tensors.items() if k in again.tensors
        ):
            assert part.tensors.keys() == again.tensors.keys()
            continue
        assert part.method.needs_weight == again.method.needs_weight, f"{format}: {part.method} became {again.method}"
        mine, theirs = _delta(one, name, part), _delta(other, name, again)
        if mine is None or theirs is None or part.method.needs_weight:
            continue
        for key in mine.keys() | theirs.keys():
            a, b = (x.get(key, torch.zeros(())).flatten().double() for x in (mine, theirs))
            if not bool(torch.isfinite(a).all()):
                continue
            error = float((a - b).norm())
            assert error <= 1e-2 * float(a.norm()) + 1e-6, (
                f"{format}: {name}.{key} differs by {error} of {a.norm()}: {part.method}, {again.method}"
            )


def _delta(file: AdapterFile, name: str, part: Part) -> dict[str, Tensor] | None:
    if part.method.needs_weight:
        return None
    architecture = _ARCHITECTURES.get(file.architecture or "")
    shape = Writer(FORMATS[0], architecture, ())._shape(name, part)
    return None if shape is None else dict(difference(part, shape).tensors)


def _seeds() -> Iterator[bytes]:
    for architecture in range(3):
        for method in range(len(_METHODS)):
            yield bytes([architecture, method, 0, (5 * method + architecture) % 64, 0, 2, method, 0, 3, 9, 0, 0])
    for words in range(len(_WORDS)):
        yield bytes([0, 0, 0, 1, 0, 0, 0, 1, words, 0, 0])
        yield bytes([0, 0, 0, 1, 0, 0, 0, 0, 1, words, 0])


TARGETS = (Target("adapters", _read_and_write, _seeds),)
