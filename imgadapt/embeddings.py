"""Textual-inversion embeddings: vectors for new words, in every form that tools write them."""

import base64
import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imgadapt.errors import FormatError, first_few

Form = Literal["diffusers", "kohya", "pair", "bundled"]
KINDS = ("clip_l", "clip_g", "t5")
_BUNDLE = "bundle_emb."
_UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, OSError),
    *(IndexError, MemoryError),
)


@dataclass(frozen=True)
class Embedding:
    """A word and its vectors.

    vectors: text encoder ("clip_l", "clip_g", "t5", or "any": the one whose width it has) -> (n, width).
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
        FormatError: an embedding's tensor is no vector or matrix of numbers.
    """
    found: dict[str, Embedding] = {}
    bundles: dict[str, dict[str, str]] = {}
    for key in tensors:
        if key.startswith(_BUNDLE):
            token, kind = _bundled(key)
            bundles.setdefault(token, {})[kind] = key
    for token, keys in bundles.items():
        found[token] = _made(token, keys, tensors, "bundled")
    rest = [key for key in tensors if not key.startswith(_BUNDLE)]
    named = {*KINDS, *(f"{kind}_out" for kind in KINDS)}
    params = [key for key in rest if key.startswith("string_to_param.")]
    if rest == ["emb_params"]:
        found[stem] = _made(stem, {"any": "emb_params"}, tensors, "kohya")
    elif rest and set(rest) <= named:
        found[stem] = _made(stem, {key: key for key in rest}, tensors, "pair")
    elif len(params) == len(rest) == 1:
        token = metadata.get("name", stem)
        found[token] = _made(token, {"any": params[0]}, tensors, "diffusers")
    elif rest and len(rest) <= 64 and all("." not in key and tensors[key].ndim in (1, 2) for key in rest):
        found |= {key: _made(key, {"any": key}, tensors, "diffusers") for key in rest}
    else:  # cloneofsimo's, among layers
        found |= {key: _made(key, {"any": key}, tensors, "diffusers") for key in rest if metadata.get(key) == "<embed>"}
    return found, [key for embedding in found.values() for key in embedding.source]


def _bundled(key: str) -> tuple[str, str]:
    """`bundle_emb.word.clip_l` -> its word and what it is; A1111's ends in `string_to_param.*`."""
    path = key.removeprefix(_BUNDLE)
    if ".string_to_param." in path:
        return path.partition(".string_to_param.")[0], "any"
    token, _, kind = path.rpartition(".")
    if not token or kind.removesuffix("_out") not in KINDS:
        raise FormatError(f"{key}: wanted {_BUNDLE}<word>.clip_l, clip_g, t5 or string_to_param.*")
    return token, kind


def _made(token: str, keys: Mapping[str, str], tensors: Mapping[str, Tensor], form: Form) -> Embedding:
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
    """Tensors of embeddings by their keys; what came in the same form is written as it was. form None: its own.

    Raises:
        FormatError: the form has no place for all of it.
    """
    if form is None:
        form = next(iter(embeddings.values())).form
    made: dict[str, Tensor] = {}
    for token, embedding in embeddings.items():
        if embedding.form == form and embedding.source and token == embedding.token:
            made |= embedding.source
        elif form == "bundled":
            made |= {f"{_BUNDLE}{token}.{kind}": tensor for kind, tensor in _named(embedding).items()}
        elif form == "pair":
            made |= {key: tensor for key, tensor in _named(embedding).items() if key in KINDS or key.endswith("_out")}
        else:
            if len(embedding.vectors) != 1 or embedding.outputs:
                kinds = ", ".join(_named(embedding))
                raise FormatError(f"the {form} form has one tensor for a word, and {token} has {kinds}")
            made["emb_params" if form == "kohya" else token] = next(iter(embedding.vectors.values()))
    if len(made) < len(embeddings) or (form in ("kohya", "pair") and len(embeddings) > 1):
        raise FormatError(f"the {form} form has no place for {len(embeddings)} words: {first_few(list(embeddings))}")
    return made


def _named(embedding: Embedding) -> dict[str, Tensor]:
    vectors = {"string_to_param.*" if kind == "any" else kind: tensor for kind, tensor in embedding.vectors.items()}
    return {**vectors, **{f"{kind}_out": tensor for kind, tensor in embedding.outputs.items()}}


def read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors under dotted keys, the rest as text) of a .pt, .bin or .ckpt that holds data only, or of a picture
    in which A1111 wrote an embedding.

    Raises:
        FormatError: it is neither; a pickle that wants to run code is never loaded.
    """
    if path.suffix.lower() in (".png", ".webp"):
        content: Any = _in_picture(path)
    else:
        try:
            with torch.serialization.safe_globals([nn.ParameterDict]):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            said = str(error).splitlines()[0] if str(error) else repr(error)
            raise FormatError(f"{path}: not a file of tensors that is safe to load ({said})") from error
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for key, value in _flat(content, ""):
        if isinstance(value, Tensor):
            tensors[key.removeprefix("state_dict.")] = value.detach()
        elif isinstance(value, str | int | float | bool):
            metadata[key] = str(value)
    return tensors, metadata


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping | nn.ParameterDict):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple) and not key:
        for inner in value:
            yield from _flat(inner, "")
    else:
        yield key, value


def _in_picture(path: Path) -> Any:
    """What A1111 wrote into a picture: base64 of JSON, in its text `sd-ti-embedding` (modules/textual_inversion)."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            text = picture.info.get("sd-ti-embedding")
        if not isinstance(text, str):
            raise FormatError(f"{path}: a picture without an embedding in its text (those in pixels are not read)")
        return json.loads(base64.b64decode(text), object_hook=_tensor)
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise FormatError(f"{path}: no embedding can be read from this picture ({error})") from error


def _tensor(row: dict[str, Any]) -> Any:
    return torch.tensor(row["TORCHTENSOR"]) if "TORCHTENSOR" in row else row
