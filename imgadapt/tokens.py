"""New words in a pipeline's tokenizers and text encoders: putting embeddings there, and taking them out again.

The tokenizers and token embeddings that a pipeline had are kept, and put back when the last word goes; each change is
made from them anew, so that words may come and go in any order.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from imgadapt.embeddings import Embedding
from imgadapt.errors import FormatError, ShapeError, StateError, TargetError, first_few
from imgadapt.layer import AdapterLayer

_HELD = "_imgadapt_words"
_PAIRS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"), ("tokenizer_3", "text_encoder_3"))


@dataclass
class _Words:
    """A pipeline's words: what it had before, and the vectors of each adapter by component and word."""

    tokenizers: dict[str, Any] = field(default_factory=dict[str, Any])
    weights: dict[str, nn.Parameter] = field(default_factory=dict[str, nn.Parameter])
    by_name: dict[str, dict[str, dict[str, Tensor]]] = field(default_factory=dict[str, dict[str, dict[str, Tensor]]])
    embeddings: dict[str, Mapping[str, Embedding]] = field(default_factory=dict[str, Mapping[str, Embedding]])


def names(model: Any) -> list[str]:
    """Adapters of a pipeline that brought words."""
    held: _Words | None = getattr(model, _HELD, None)
    return list(held.by_name) if held else []


def embeddings(model: Any, name: str) -> Mapping[str, Embedding]:
    """The words that an adapter brought, as they came."""
    held: _Words | None = getattr(model, _HELD, None)
    return held.embeddings.get(name, {}) if held else {}


def add(model: Any, brought: Mapping[str, Embedding], name: str) -> None:
    """Put words into a pipeline. Vectors beyond a word's first become `word_1`, `word_2`, ..., as diffusers has it: its
    pipelines put them into a prompt in which the word stands.

    Raises:
        TargetError: it is no pipeline with tokenizers, or has no text encoder of that width.
        StateError: a word is there already, or an adapter is on the token embedding.
        FormatError: vectors are not finite, or are OneTrainer's outputs. The pipeline is left as it was in all cases.
    """
    pairs = dict(_pairs(model))
    if not pairs:
        raise TargetError(
            f"the file brings words ({first_few(list(brought))}), which need a pipeline's tokenizers: attach it to the "
            "pipeline"
        )
    rows: dict[str, dict[str, Tensor]] = {}
    for word, embedding in brought.items():
        if embedding.outputs:
            raise FormatError(f"{word}: it replaces what a text encoder puts out, for which pipelines have no place")
        for kind, vectors in embedding.vectors.items():
            if not torch.isfinite(vectors.float()).all():
                raise FormatError(f"{word}: NaN or infinity in its vectors; the training that made it diverged")
            component = _component(model, pairs, word, kind, vectors)
            rows.setdefault(component, {})[word] = vectors.detach().clone()
    for component, own in rows.items():
        vocabulary = pairs[component][0].get_vocab()
        if taken := [token for word, v in own.items() for token in _tokens(word, len(v)) if token in vocabulary]:
            raise StateError(f"{component}'s tokenizer has {first_few(taken)} already: rename the file's word")
        if isinstance(_embedding(pairs[component][1]), AdapterLayer):
            raise StateError(f"{component}: an adapter is on its token embedding; attach the file with words first")
    held: _Words = getattr(model, _HELD, None) or _Words()
    before = dict(held.by_name)
    try:
        held.by_name[name], held.embeddings[name] = rows, dict(brought)
        setattr(model, _HELD, held)
        _rebuild(model, held)
    except BaseException:
        held.by_name = before
        held.embeddings.pop(name, None)
        _rebuild(model, held)
        raise


def remove(model: Any, gone: Sequence[str]) -> None:
    """Take an adapter's words out; with the last, tokenizers and embeddings are the very ones from before.

    Raises:
        StateError: an adapter is on a token embedding meanwhile.
    """
    held: _Words | None = getattr(model, _HELD, None)
    if held is None or not set(gone) & held.by_name.keys():
        return
    for component, (_, encoder) in _pairs(model):
        if component in held.weights and isinstance(_embedding(encoder), AdapterLayer):
            raise StateError(f"{component}: an adapter is on its token embedding; detach that first")
    held.by_name = {name: rows for name, rows in held.by_name.items() if name not in gone}
    held.embeddings = {name: rows for name, rows in held.embeddings.items() if name not in gone}
    _rebuild(model, held)


def _rebuild(model: Any, held: _Words) -> None:
    """Tokenizers and token embeddings: those from before, and all words that are held."""
    for (tokenizer_name, component), (_, encoder) in _named_pairs(model):
        added = {word: v for rows in held.by_name.values() for word, v in rows.get(component, {}).items()}
        module: Any = _embedding(encoder)
        if component not in held.weights:
            if not added:
                continue
            held.tokenizers[component], held.weights[component] = getattr(model, tokenizer_name), module.weight
        tokenizer, weight = held.tokenizers[component], held.weights[component]
        if added:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.add_tokens([token for word, v in added.items() for token in _tokens(word, len(v))])
            current: Tensor = module.weight
            more = torch.cat([v.to(current.device, weight.dtype) for v in added.values()])
            ids = tokenizer.convert_tokens_to_ids(
                [token for word, v in added.items() for token in _tokens(word, len(v))]
            )
            whole = weight.new_zeros(max(len(weight), max(ids) + 1), weight.shape[1], device=current.device)
            whole[: len(weight)] = weight.detach().to(current.device)
            whole[ids] = more
            weight = nn.Parameter(whole, requires_grad=weight.requires_grad)
        module.weight, module.num_embeddings = weight, len(weight)
        setattr(model, tokenizer_name, tokenizer)
        if not added:
            del held.tokenizers[component], held.weights[component]
    if not held.by_name:
        delattr(model, _HELD)


def _tokens(word: str, count: int) -> list[str]:
    return [word, *(f"{word}_{k}" for k in range(1, count))]


def _pairs(model: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for (_, component), pair in _named_pairs(model):
        yield component, pair


def _named_pairs(model: Any) -> Iterator[tuple[tuple[str, str], tuple[Any, Any]]]:
    """((tokenizer's name, component), (tokenizer, text encoder)) of a pipeline."""
    for tokenizer_name, component in _PAIRS:
        tokenizer, encoder = getattr(model, tokenizer_name, None), getattr(model, component, None)
        if tokenizer is not None and isinstance(encoder, nn.Module):
            yield (tokenizer_name, component), (tokenizer, encoder)


def _embedding(encoder: Any) -> Any:
    return encoder.get_input_embeddings()


def _component(model: Any, pairs: Mapping[str, tuple[Any, Any]], word: str, kind: str, vectors: Tensor) -> str:
    """The text encoder that vectors are for: by name where the file has one, and by width."""
    widths = {component: _embedding(encoder).weight.shape[1] for component, (_, encoder) in pairs.items()}
    kinds = {component: _kind(component, encoder) for component, (_, encoder) in pairs.items()}
    fits = [c for c, width in widths.items() if width == vectors.shape[1] and kind in ("any", kinds[c])]
    if not fits:
        have = ", ".join(f"{c} {widths[c]} wide ({kinds[c]})" for c in pairs)
        raise ShapeError(
            f"{word}: {kind} is {vectors.shape[1]} wide; this pipeline has {have}; is it for another base?"
        )
    return fits[0]


def _kind(component: str, encoder: Any) -> str:
    if "T5" in type(encoder).__name__:
        return "t5"
    return "clip_g" if component == "text_encoder_2" else "clip_l"
