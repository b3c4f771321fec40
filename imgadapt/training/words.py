"""NewWord: a word that a base does not know, trained as vectors in its text encoders (textual inversion).

Textual inversion: arXiv 2208.01618; with an adapter (pivotal tuning): arXiv 2106.05744, diffusers' advanced scripts.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imgadapt import attaching, tokens
from imgadapt.embeddings import Embedding
from imgadapt.errors import ConfigError, first_few
from imgadapt.file import AdapterFile
from imgadapt.training import optimizers, recipe
from imgadapt.training.config import InversionConfig
from imgadapt.training.data import Example, has_words
from imgadapt.training.families import Family

NAME = "word"
"""Of what `attach` puts into the pipeline: beside the adapter, which is "default"."""

_ADAPTERS_OWN = (
    *("method", "rank", "alpha", "rank_stabilised", "targets", "methods", "ranks", "dropout", "rank_dropout"),
    *("start", "freeze_down", "nested_ranks", "module_dropout", "learning_rate", "learning_rates", "lora_plus"),
    *("pivot", "exports"),
)


def settled(config: InversionConfig) -> InversionConfig:
    """The config with the word as its trigger, and with a caption for pictures that have none.

    Raises:
        ConfigError: another trigger is given, or what only an adapter has, and none is trained.
    """
    if config.trigger not in (None, config.word):
        raise ConfigError(f"trigger is '{config.trigger}', and the word '{config.word}' is one: leave --trigger out")
    own_rate = optimizers.KINDS[config.optimizer].own_rate
    rated = not own_rate and "learning_rate" in config.model_fields_set
    names = [name for name in _ADAPTERS_OWN if rated or name != "learning_rate"]
    usual = {name: type(config).model_fields[name].default for name in names}
    if not config.adapter and (deaf := [name for name in names if getattr(config, name) != usual[name]]):
        hint = "; the word's own rate is --embedding-rate" if "learning_rate" in deaf else ""
        raise ConfigError(
            f"{first_few(deaf)}: for an adapter, and none is trained: give --adapter, or leave it out{hint}"
        )
    changes: dict[str, Any] = {"trigger": config.word}
    if config.caption is None and not has_words(config.folder):  # kohya's folder names are captions
        changes["caption"] = f"a photo of {config.word}"
    if not config.adapter:  # a picture that is shown without its caption teaches a word nothing
        if config.caption_dropout not in (0, type(config).model_fields["caption_dropout"].default):
            raise ConfigError("caption_dropout: a word alone learns nothing of pictures without it; give --adapter")
        changes["caption_dropout"] = 0.0
    return config.model_copy(update=changes)


@dataclass(frozen=True)
class _Place:
    """The word in one text encoder.

    kind: clip_l or clip_g. ids: its tokens (n,). vectors: (n, width), fp32. spread: the mean standard deviation of the
    vocabulary's vectors. take_off: of the hook.
    """

    component: str
    kind: str
    ids: Tensor
    vectors: nn.Parameter
    spread: float
    take_off: Callable[[], None]


class NewWord:
    """A new word in every CLIP text encoder of a pipeline; T5s read it as letters.

    Its vectors are parameters of their own, which a hook puts in the place of the rows that `attach` made. So no
    gradient reaches the vocabulary, and nothing of it need be restored after a step, whatever the optimiser does.

    Raises:
        ConfigError: the word is in the vocabulary already, `initial` is not, or the base has no CLIP.
    """

    def __init__(self, config: InversionConfig, family: Family) -> None:
        self.config, self.pipeline = config, family.pipeline
        pairs = {
            c: pair for c, pair in tokens._pairs(family.pipeline).items() if tokens._kind(c, pair[1])[:4] == "clip"
        }
        if not pairs:
            raise ConfigError("this base has no CLIP text encoder, and new words are for these only: train an adapter")
        for component, (tokenizer, _) in pairs.items():
            _check_free(config.word, component, tokenizer)
        weights = {c: tokens._embedding(encoder).weight.detach() for c, (_, encoder) in pairs.items()}
        start = {c: _start(config, pairs[c][0], weight) for c, weight in weights.items()}
        kinds = {component: tokens._kind(component, encoder) for component, (_, encoder) in pairs.items()}
        made = Embedding(config.word, {kinds[component]: vectors for component, vectors in start.items()})
        attaching.attach(family.pipeline, AdapterFile({}, embeddings={config.word: made}), name=NAME)
        self.tokens = tokens._tokens(config.word, config.vectors)
        self.places = [
            _place(family.pipeline, component, kinds[component], self.tokens, start[component], _spread(weight))
            for component, weight in weights.items()
        ]

    def rows(self) -> list[recipe.Tensor]:
        """What is trained, in the order of the text encoders."""
        return [recipe.Tensor(f"{p.component}.words", self.config.word, p.vectors) for p in self.places]

    def groups(self) -> list[dict[str, Any]]:
        """Its parameter group: without decay, and with an adapter beside it only until the pivot ("until", a step).

        To be put behind the adapter's: Prodigy goes by the rate of the first group, which must not stop.
        """
        config = self.config
        own_rate = optimizers.KINDS[config.optimizer].own_rate and "embedding_rate" not in config.model_fields_set
        rate = config.learning_rate if own_rate else config.embedding_rate
        until = {"until": max(1, round(config.pivot * config.steps))} if config.adapter else {}
        parameters = [place.vectors for place in self.places]
        return [{"params": parameters, "lr": rate, "peak": rate, "weight_decay": 0.0, **until}]

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Control the vectors' norms after each step of an optimiser, where the settings say so."""
        if self.config.norm_control:
            optimizer.register_step_post_hook(lambda *_: self.control())

    @torch.no_grad()
    def control(self) -> None:
        """Pull each vector's spread back to that of the vocabulary: e *= (std0 / std(e)) ** 0.1 (diffusers' advanced
        scripts). A word that is no longer trained stays as it is.
        """
        for place in self.places:
            spread = place.vectors.std(1, keepdim=True)
            if (
                place.vectors.requires_grad and spread.all()
            ):  # a vector of one number has none: leave it to the training
                place.vectors.mul_((place.spread / spread) ** 0.1)

    def ratios(self) -> Mapping[str, float]:
        """By text encoder: the mean spread of the word's vectors, as a multiple of the vocabulary's."""
        return {p.component: p.vectors.detach().std(1).mean().item() / p.spread for p in self.places}

    def embeddings(self) -> dict[str, Embedding]:
        """The word as it is now, for a file; its tensors are copies, on the CPU."""
        vectors = {place.kind: place.vectors.detach().cpu().clone() for place in self.places}
        form = (
            "diffusers" if len(vectors) == 1 else "bundled"
        )  # diffusers' has one tensor; this one holds the word itself
        return {self.config.word: Embedding(self.config.word, vectors, form=form)}

    def spelled(self, text: str) -> str:
        """A text with the word as the pipeline takes it: in its own case, and with all its tokens where the pipeline
        does not put them in itself (SD3's).
        """
        whole = self.config.word if hasattr(self.pipeline, "maybe_convert_prompt") else " ".join(self.tokens)
        word = re.escape(self.config.word)
        return re.sub(rf"{word}(?!_\d)(?! {word}_1)", lambda _: whole, text, flags=re.IGNORECASE)

    def put_into(self, examples: Sequence[Example]) -> list[Example]:
        """Pictures with their captions as the pipeline takes them.

        Raises:
            ConfigError: a text encoder does not take so many tokens, so that some of the word's vectors are cut off.
        """
        made = [replace(e, captions=tuple(self.spelled(text) for text in e.captions)) for e in examples]
        texts = list(dict.fromkeys(text for example in made for text in example.captions))
        for place in self.places:
            tokenizer = getattr(self.pipeline, tokens._TOKENIZERS[place.component])
            wanted = set(place.ids.tolist())
            if cut := [text for text in texts if not wanted <= set(_tokens_of(self.pipeline, tokenizer, text))]:
                raise ConfigError(
                    f"{len(cut)} of {len(texts)} captions do not have all {len(wanted)} vectors of "
                    f"'{self.config.word}' in the {tokenizer.model_max_length} tokens that {place.component} takes "
                    f"('{cut[0][:60]}'): shorten them, or lower --vectors"
                )
        return made

    def take_off(self) -> None:
        """Remove the hooks: the pipeline then has the word as it began, until it is detached."""
        for place in self.places:
            place.take_off()

    def __str__(self) -> str:
        wide = " and ".join(str(place.vectors.shape[1]) for place in self.places)
        until = self.groups()[0].get("until")
        trained = f", trained in the first {until} steps" if until and until < self.config.steps else ""
        return f"{self.config.word}: {len(self.tokens)} vectors, {wide} wide, from '{self.config.initial}'{trained}"


def _tokens_of(pipeline: Any, tokenizer: Any, text: str) -> list[int]:
    """The tokens of a prompt that a text encoder sees, as diffusers' pipelines make them."""
    convert = getattr(pipeline, "maybe_convert_prompt", None)
    prompt = convert(text, tokenizer) if convert else text
    return tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids


def _place(pipeline: Any, component: str, kind: str, names: Sequence[str], start: Tensor, spread: float) -> _Place:
    encoder, tokenizer = getattr(pipeline, component), getattr(pipeline, tokens._TOKENIZERS[component])
    module = tokens._embedding(encoder)
    vectors = nn.Parameter(start.to(module.weight.device).clone())
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(names)), device=module.weight.device)

    def put_in(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> Tensor:
        hits = given[0].to(ids.device)[..., None] == ids
        if not hits.any():
            return made
        rows = F.embedding(hits.int().argmax(-1), vectors).to(made.dtype)
        return torch.where(hits.any(-1, keepdim=True), rows, made)

    return _Place(component, kind, ids, vectors, spread, module.register_forward_hook(put_in).remove)


def _check_free(word: str, component: str, tokenizer: Any) -> None:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    taken = [name for name in (word, word.lower()) if name in tokenizer.get_vocab()]
    if taken or (len(ids) == 1 and ids[0] != tokenizer.unk_token_id):
        raise ConfigError(
            f"word '{word}' is in {component}'s vocabulary already; choose a new one: --word '<my-{word}>'"
        )


def _start(config: InversionConfig, tokenizer: Any, weight: Tensor) -> Tensor:
    """The vectors of `initial`'s tokens, (vectors, width) fp32: each repeated where there are more vectors, means of
    neighbours where there are fewer.
    """
    ids = tokenizer(config.initial, add_special_tokens=False).input_ids
    if not ids or tokenizer.unk_token_id in ids:
        raise ConfigError(
            f"initial is '{config.initial}', for which this base has no tokens; name what the word is like: "
            "--initial dog"
        )
    known, count = weight[ids].float(), config.vectors
    first = [k * len(ids) // count for k in range(count)]
    last = [max(first[k] + 1, (k + 1) * len(ids) // count) for k in range(count)]
    return torch.stack([known[a:b].mean(0) for a, b in zip(first, last, strict=True)])


def _spread(weight: Tensor) -> float:
    return torch.stack([rows.float().std(1).sum() for rows in weight.split(4096)]).sum().item() / len(weight)
