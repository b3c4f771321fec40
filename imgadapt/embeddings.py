"""Textual-inversion embeddings: vectors for new words, in every form that tools write them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from imgadapt.errors import FormatError, first_few

Form = Literal["a1111", "diffusers", "kohya", "pair", "bundled"]
KINDS = ("clip_l", "clip_g", "t5", "llama", "gemma")
_ONE = ("emb_params", "emp_params")  # the second is OneTrainer's for SD1: StableDiffusionEmbeddingSaver.py, 1e927f0
_BUNDLE = "bundle_emb."
_NAMES = {f"{name}{end}": f"{kind}{end}" for end in ("", "_out") for name, kind in (
    *((kind, kind) for kind in KINDS), *((one, "any") for one in _ONE))}  # fmt: skip
_LAYER = re.compile(r"\w+:\d+:\w+|\d+")  # cloneofsimo's, and the numbers of a list


@dataclass(frozen=True)
class Embedding:
    """A word and its vectors.

    vectors: text encoder (one of KINDS, or "any": the one whose width it has) -> (n, width).
    outputs: the same for vectors that OneTrainer puts in the place of a text encoder's outputs. They are kept and
        written back; attaching such an embedding is refused, for no diffusers pipeline has a place for them.
    source: the tensors as a file had them, under their keys there; form: which of the forms that was.
    """

    token: str
    vectors: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    source: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    form: Form = "diffusers"


def read_embeddings(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], stem: str
) -> tuple[dict[str, Embedding], list[str]]:
    """(word -> embedding, keys that they are made of). stem: the file's name, the word where a form has none.

    Raises:
        FormatError: an embedding's tensor is no vector or matrix of numbers, or there are two for one place.
    """
    found: dict[str, Embedding] = {}
    bundles: dict[str, dict[str, str]] = {}
    for key in tensors:
        if key.startswith(_BUNDLE):
            token, kind = _bundled(key)
            if kind in bundles.setdefault(token, {}):
                raise FormatError(f"{key} and {bundles[token][kind]} are both '{token}' for one text encoder")
            bundles[token][kind] = key
    for token, keys in bundles.items():
        found[token] = _made(token, keys, tensors, "bundled")
    for embedding in _unbundled([key for key in tensors if not key.startswith(_BUNDLE)], tensors, metadata, stem):
        if embedding.token in found:
            raise FormatError(f"{first_few(list(embedding.source))}: '{embedding.token}' is bundled in the file, too")
        found[embedding.token] = embedding
    return found, [key for embedding in found.values() for key in embedding.source]


def _unbundled(
    keys: list[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], stem: str
) -> list[Embedding]:
    """The embeddings of a file of nothing else; of cloneofsimo's, those that its metadata tells from layers."""
    if any(metadata.get(key) == "<embed>" for key in keys):
        return [_made(key, {"any": key}, tensors, "diffusers") for key in keys if metadata.get(key) == "<embed>"]
    params = [key for key in keys if key.startswith("string_to_param.")]
    if params and all(key.startswith(("string_to_param.", "string_to_token.")) for key in keys):
        if len(params) > 1:
            raise FormatError(f"{len(params)} words in A1111's form, which has one: {first_few(params)}")
        made = _made(metadata.get("name", stem), {"any": params[0]}, tensors, "a1111")
        return [Embedding(made.token, made.vectors, source={key: tensors[key] for key in keys}, form="a1111")]
    if keys and set(keys) <= _NAMES.keys() and (kinds := {_NAMES[key]: key for key in keys}):
        if len(kinds) < len(keys):
            raise FormatError(f"{first_few(keys)}: two of these are for one text encoder")
        return [_made(stem, kinds, tensors, "kohya" if keys == [_ONE[0]] else "pair")]
    if keys and _are_words(keys, tensors):
        return [_made(key, {"any": key}, tensors, "diffusers") for key in keys]
    return []


def _are_words(keys: list[str], tensors: Mapping[str, Tensor]) -> bool:
    """Whether all keys of a file are words: by their brackets, or because no layer is called so; of one width."""
    if all(key.startswith("<") and key.endswith(">") for key in keys):
        return True
    plain = {"weight", "bias"}.isdisjoint(keys) and all(
        "." not in key and not _LAYER.fullmatch(key) and tensors[key].ndim in (1, 2) for key in keys
    )
    return plain and len(keys) <= 64 and len({tensors[key].shape[-1] for key in keys}) == 1


def _bundled(key: str) -> tuple[str, str]:
    """`bundle_emb.word.clip_l` -> its word and what it is; A1111's ends in `string_to_param.*`."""
    path = key.removeprefix(_BUNDLE)
    if ".string_to_param." in path:
        return path.partition(".string_to_param.")[0], "any"
    token, _, name = path.rpartition(".")
    if not token or name not in _NAMES:
        raise FormatError(f"{key}: wanted {_BUNDLE}<word>.{', '.join(KINDS)} or string_to_param.*")
    return token, _NAMES[name]


def _made(token: str, keys: Mapping[str, str], tensors: Mapping[str, Tensor], form: Form) -> Embedding:
    if not token:
        raise FormatError("an embedding of a word without a letter")
    vectors: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for kind, key in keys.items():
        tensor = tensors[key]
        if tensor.ndim not in (1, 2) or not tensor.is_floating_point() or 0 in tensor.shape:
            raise FormatError(
                f"{key} is {tuple(tensor.shape)} of {tensor.dtype}; an embedding is (vectors, width) of numbers"
            )
        rows = tensor if tensor.ndim == 2 else tensor[None]
        (outputs if kind.endswith("_out") else vectors)[kind.removesuffix("_out")] = rows
    return Embedding(token, vectors, outputs, {key: tensors[key] for key in keys.values()}, form)


def write_embeddings(embeddings: Mapping[str, Embedding], form: Form | None) -> dict[str, Tensor]:
    """Tensors of embeddings by their keys; what came in the same form is written as it was.

    form: "diffusers" (a word's tensor under the word), "kohya" (emb_params; SDXL's pair is clip_l and clip_g), "pair"
        (OneTrainer's: a tensor for each text encoder), "bundled" (among an adapter's layers); None: its own, and
        "diffusers" for A1111's.

    Raises:
        FormatError: the form has no place for all of it, or is A1111's.
    """
    if form == "a1111":
        raise FormatError("A1111's own form is a pickle, which imgadapt never writes; A1111 reads 'kohya', too")
    made: dict[str, Tensor] = {}
    for token, embedding in embeddings.items():
        wanted = form or ("diffusers" if embedding.form == "a1111" else embedding.form)
        places = {tensor.data_ptr() for tensor in embedding.source.values()}
        same = all(v.data_ptr() in places for v in (*embedding.vectors.values(), *embedding.outputs.values()))
        as_it_was = embedding.form == wanted and embedding.source and token == embedding.token and same
        rows = embedding.source if as_it_was else _written(token, embedding, wanted)
        if twice := sorted(made.keys() & rows.keys()):
            raise FormatError(
                f"the {wanted} form has one place {twice[0]}, and there are {len(embeddings)} words "
                f"({first_few(list(embeddings))}): write each to a file of its own"
            )
        made |= rows
    if len(embeddings) > 1 and made.keys() & _NAMES.keys():
        raise FormatError(f"{first_few(list(embeddings))}: a file of {first_few(sorted(made))} holds one word")
    return made


def _written(token: str, embedding: Embedding, form: Form) -> dict[str, Tensor]:
    named = {**embedding.vectors, **{f"{kind}_out": tensor for kind, tensor in embedding.outputs.items()}}
    if form == "bundled":
        names = {"any": "string_to_param.*", "any_out": f"{_ONE[1]}_out"}
        return {f"{_BUNDLE}{token}.{names.get(kind, kind)}": tensor for kind, tensor in named.items()}
    if form == "pair":
        names = {"any": _ONE[1], "any_out": f"{_ONE[1]}_out"}
        return {names.get(kind, kind): tensor for kind, tensor in named.items()}
    if form == "kohya" and named.keys() == {"clip_l", "clip_g"}:
        return named
    if len(embedding.vectors) != 1 or embedding.outputs:
        raise FormatError(
            f"the {form} form has one tensor for a word, and {token} has {', '.join(named)}; OneTrainer's holds all"
        )
    return {_ONE[0] if form == "kohya" else token: next(iter(embedding.vectors.values()))}
