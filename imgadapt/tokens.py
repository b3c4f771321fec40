"""New words in a pipeline's tokenizers and text encoders: putting embeddings there, and taking them out again.

The tokenizers and token embeddings that a pipeline had are kept, and put back when the last word goes; each change is
made from them anew, so that words may come and go in any order. Words have no strength: a prompt names them or not.
"""

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from imgadapt.embeddings import Embedding
from imgadapt.errors import FormatError, ShapeError, StateError, TargetError, first_few
from imgadapt.layer import AdapterLayer

_HELD = "_imgadapt_words"
_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
_HIGHEST = 2  # an eos_token_id of CLIP's configs that means: the highest token of the prompt
_BASES = {768: "SD1, SDXL, SD3 or Flux", 1024: "SD2", 1280: "SDXL or SD3", 2304: "Sana", 4096: "SD3 or Flux"}


@dataclass(frozen=True)
class _Before:
    """A tokenizer and its text encoder as they were.

    ends: modules that pool at the end of a prompt (see `_pooling`). size: rows and tokens of what stands there now.
    """

    tokenizer: Any
    weight: nn.Parameter
    vocabulary: int | None
    ends: Sequence[Any]
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class _Words:
    """A pipeline's words: what it had before, and the vectors of each adapter by component and word."""

    before: Mapping[str, _Before] = field(default_factory=dict[str, _Before])
    by_name: Mapping[str, Mapping[str, Mapping[str, Tensor]]] = field(default_factory=dict[str, Any])
    embeddings: Mapping[str, Mapping[str, Embedding]] = field(default_factory=dict[str, Mapping[str, Embedding]])

    def of(self, component: str) -> dict[str, Tensor]:
        return {word: rows for own in self.by_name.values() for word, rows in own.get(component, {}).items()}


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
    pipelines put them into a prompt in which the word stands. A pipeline that does not is warned of.

    Pipelines that were made of this one's components before do not know the words.

    Raises:
        TargetError: it is no pipeline with tokenizers.
        ShapeError: it has no text encoder of that kind and width.
        StateError: a word is there already, or an adapter is on the token embedding, or its weights are not there.
        FormatError: vectors are not finite, or are OneTrainer's outputs. The pipeline is left as it was in all cases.
    """
    pairs = _pairs(model)
    if not pairs:
        raise TargetError(
            f"the file brings words ({first_few(list(brought))}), which need a pipeline's tokenizers: attach it to the "
            "pipeline"
        )
    rows: dict[str, dict[str, Tensor]] = {}
    for word, embedding in brought.items():
        _check_word(word, embedding)
        for kind, vectors in embedding.vectors.items():
            component = _component(pairs, word, kind, vectors)
            if word in rows.setdefault(component, {}):
                raise FormatError(f"{word}: {', '.join(embedding.vectors)} are all for {component}")
            rows[component][word] = vectors.detach().clone()
    held: _Words = getattr(model, _HELD, None) or _Words()
    for component, own in rows.items():
        tokenizer, encoder = pairs[component]
        _check_encoder(held, component, tokenizer, encoder)
        _check_free(component, tokenizer, own, held.of(component))
    _rebuild(model, _Words(held.before, {**held.by_name, name: rows}, {**held.embeddings, name: dict(brought)}))
    several = [word for own in rows.values() for word, vectors in own.items() if len(vectors) > 1]
    if several and not hasattr(model, "maybe_convert_prompt"):
        all_of = " ".join(_tokens(several[0], max(len(own.get(several[0], ())) for own in rows.values())))
        warnings.warn(
            f"{type(model).__name__} takes a word of a prompt for one vector: write '{all_of}' for '{several[0]}'",
            stacklevel=2,
        )


def _check_word(word: str, embedding: Embedding) -> None:
    if word != word.strip() or not word:
        raise FormatError(f"{word!r} is no word for a prompt; give the file's embeddings others as keys")
    if embedding.outputs:
        raise FormatError(f"{word}: it replaces what a text encoder puts out, for which pipelines have no place")
    if not embedding.vectors:
        raise FormatError(f"{word}: it has no vectors")
    for kind, vectors in embedding.vectors.items():
        if vectors.ndim != 2 or not vectors.is_floating_point() or not len(vectors):
            raise FormatError(f"{word}: {kind} is {tuple(vectors.shape)} of {vectors.dtype}; wanted (vectors, width)")
        if not torch.isfinite(vectors.float()).all():
            raise FormatError(f"{word}: NaN or infinity in its vectors; the training that made it diverged")


def _check_encoder(held: _Words, component: str, tokenizer: Any, encoder: Any) -> None:
    """Raises StateError where the token embedding cannot be exchanged."""
    module = _embedding(encoder)
    if _adapted(encoder):
        raise StateError(f"{component}: an adapter is on its token embedding; attach the file with words first")
    if module.weight.is_meta:
        raise StateError(
            f"{component}: its token embedding is offloaded; attach and detach words before "
            "enable_sequential_cpu_offload (enable_model_cpu_offload is no hindrance)"
        )
    before = held.before.get(component)
    if before is None:
        if hasattr(module, _HELD):
            raise StateError(f"{component}: another pipeline has put words into it; detach them there first")
    elif before.size != (len(module.weight), len(tokenizer)):
        raise StateError(
            f"{component}: its words were changed by something else meanwhile (load_textual_inversion?), from "
            f"{before.size[1]} to {len(tokenizer)} tokens; undo that first"
        )


def _check_free(component: str, tokenizer: Any, own: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> None:
    """Raises StateError where a token is taken, or would be read as one more vector of another word."""
    vocabulary = tokenizer.get_vocab()
    fresh = [token for word, rows in own.items() for token in _tokens(word, len(rows))]
    taken = [token for k, token in enumerate(fresh) if token in vocabulary or token in fresh[:k]]
    every = {word: len(rows) for word, rows in (*there.items(), *own.items())}
    known = {*fresh, *(token for word, rows in there.items() for token in _tokens(word, len(rows)))}
    taken += [f"{word}_{count}" for word, count in every.items() if f"{word}_{count}" in known]
    if taken:
        word = next(iter(own))
        raise StateError(
            f"{component}'s tokenizer has {first_few(taken)} already: give the word another name, "
            f"dataclasses.replace(file, embeddings={{'<new>': file.embeddings[{word!r}]}})"
        )


def check_removal(model: Any, gone: Collection[str]) -> None:
    """Raises StateError where `remove` could not, once all other parts of these adapters are off."""
    held: _Words | None = getattr(model, _HELD, None)
    if held is None or not held.by_name.keys() & set(gone):
        return
    for component, (tokenizer, encoder) in _pairs(model).items():
        if component not in held.before:
            continue
        if stay := [slot.name for layer in _adapted(encoder) for slot in layer if slot.name not in gone]:
            raise StateError(f"{component}: adapter '{stay[0]}' is on its token embedding; detach that, too")
        if not _adapted(encoder):
            _check_encoder(held, component, tokenizer, encoder)


def remove(model: Any, gone: Sequence[str]) -> None:
    """Take adapters' words out; with the last, tokenizers and embeddings are the very ones from before.

    Raises:
        StateError: an adapter is on a token embedding meanwhile, or something else has changed the words.
    """
    held: _Words | None = getattr(model, _HELD, None)
    if held is None or not set(gone) & held.by_name.keys():
        return
    check_removal(model, gone)
    by_name = {name: rows for name, rows in held.by_name.items() if name not in gone}
    _rebuild(model, replace(held, by_name=by_name, embeddings={name: held.embeddings[name] for name in by_name}))


def _rebuild(model: Any, held: _Words) -> None:
    """Tokenizers and token embeddings: those from before, and all words that are held. All are made before any is put
    into the pipeline.
    """
    made: dict[str, tuple[_Before, Any, nn.Parameter]] = {}
    for component, (tokenizer, encoder) in _pairs(model).items():
        added, before = held.of(component), held.before.get(component)
        if added or before:
            current = _embedding(encoder).weight
            vocabulary = getattr(getattr(encoder, "config", None), "vocab_size", None)
            before = before or _Before(tokenizer, current, vocabulary, _pooling(encoder, tokenizer))
            made[component] = before, *_grown(before, added, current)
    standing: dict[str, _Before] = {}
    for component, (before, tokenizer, weight) in made.items():
        encoder, grown = getattr(model, component), weight is not before.weight
        _put(encoder, weight, len(weight) if grown else before.vocabulary)
        for module in before.ends:
            module.eos_token_id = before.tokenizer.eos_token_id if grown else _HIGHEST
        setattr(model, _TOKENIZERS[component], tokenizer)
        if grown:
            standing[component] = replace(before, size=(len(weight), len(tokenizer)))
            setattr(_embedding(encoder), _HELD, True)
        else:
            vars(_embedding(encoder)).pop(_HELD, None)
    if held.by_name:
        setattr(model, _HELD, replace(held, before=standing))
    else:
        vars(model).pop(_HELD, None)


@torch.no_grad()
def _grown(before: _Before, added: Mapping[str, Tensor], current: nn.Parameter) -> tuple[Any, nn.Parameter]:
    """The tokenizer and the weight from before with words; they themselves if there is none, the weight where the
    model has gone meanwhile (`.to`).
    """
    weight = before.weight
    if not added:
        if (weight.device, weight.dtype) != (current.device, current.dtype):
            weight.data = weight.data.to(current.device, current.dtype)
        return before.tokenizer, weight
    tokenizer = copy.deepcopy(before.tokenizer)
    tokens = [token for word, rows in added.items() for token in _tokens(word, len(rows))]
    tokenizer.add_tokens(tokens)
    ids: list[int] = tokenizer.convert_tokens_to_ids(tokens)
    if len(set(ids)) < len(tokens) or min(ids) < len(before.tokenizer):
        raise StateError(f"the tokenizer does not take {first_few(tokens)} for words of their own: give them others")
    whole = torch.zeros(max(len(weight), max(ids) + 1), weight.shape[1], dtype=current.dtype, device=current.device)
    whole[: len(weight)] = weight.to(current.device, current.dtype)
    whole[ids] = torch.cat([rows.to(current.device, current.dtype) for rows in added.values()])
    return tokenizer, nn.Parameter(whole, requires_grad=current.requires_grad)


def _put(encoder: Any, weight: nn.Parameter, vocabulary: Any) -> None:
    """A token embedding's weight, at all places it is tied to (T5's `shared` and `encoder.embed_tokens`)."""
    current = _embedding(encoder).weight
    for module in encoder.modules():
        for name, parameter in module._parameters.items():
            if parameter is current:
                module._parameters[name] = weight
                if isinstance(module, nn.Embedding):
                    module.num_embeddings = len(weight)
    if vocabulary is not None:
        encoder.config.vocab_size = vocabulary


def _pooling(encoder: Any, tokenizer: Any) -> list[Any]:
    """Modules that take a prompt's highest token for its end: transformers does so where a CLIP's eos_token_id is 2, as
    SDXL's configs say (modeling_clip.py). A word would be taken for it, so they are told the real one meanwhile, which
    is the highest without words.
    """
    if getattr(tokenizer, "eos_token_id", None) != len(tokenizer) - 1:
        return []
    return [module for module in encoder.modules() if getattr(module, "eos_token_id", None) == _HIGHEST]


def _adapted(encoder: Any) -> list[AdapterLayer]:
    """Adapters' wrappers on the token embedding, wherever it stands."""
    shape = tuple(_embedding(encoder).weight.shape)[::-1]
    wrappers = [module for module in encoder.modules() if isinstance(module, AdapterLayer)]
    return [layer for layer in wrappers if layer.site.kind == "embedding" and layer.site.shape == shape]


def _tokens(word: str, count: int) -> list[str]:
    return [word, *(f"{word}_{k}" for k in range(1, count))]


def _pairs(model: Any) -> dict[str, tuple[Any, Any]]:
    """Component -> (tokenizer, text encoder) of a pipeline."""
    found = {c: (getattr(model, name, None), getattr(model, c, None)) for c, name in _TOKENIZERS.items()}
    return {c: pair for c, pair in found.items() if pair[0] is not None and isinstance(pair[1], nn.Module)}


def _embedding(encoder: Any) -> Any:
    return encoder.get_input_embeddings()


def _component(pairs: Mapping[str, tuple[Any, Any]], word: str, kind: str, vectors: Tensor) -> str:
    """The text encoder that vectors are for: by kind where the file has one, and by width."""
    widths = {component: _embedding(encoder).weight.shape[1] for component, (_, encoder) in pairs.items()}
    kinds = {component: _kind(component, encoder) for component, (_, encoder) in pairs.items()}
    fits = [c for c, width in widths.items() if width == vectors.shape[1] and kind in ("any", kinds[c])]
    if not fits:
        have = ", ".join(f"{c} {widths[c]} wide ({kinds[c]})" for c in pairs)
        raise ShapeError(
            f"{word}: {kind} is {vectors.shape[1]} wide; this pipeline has {have}; is it for "
            f"{_BASES.get(vectors.shape[1], 'another base')}?"
        )
    return fits[0]


def _kind(component: str, encoder: Any) -> str:
    """Which of `embeddings.KINDS` a text encoder is. SDXL's and SD3's second is CLIP-G; HunyuanVideo's, CLIP-L, has no
    projection.
    """
    name = type(encoder).__name__
    other = next((kind for word, kind in (("T5", "t5"), ("Llama", "llama"), ("Gemma", "gemma")) if word in name), None)
    return other or ("clip_g" if component == "text_encoder_2" and "WithProjection" in name else "clip_l")
