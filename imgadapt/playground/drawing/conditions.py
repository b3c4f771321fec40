"""Texts: prompts as the base's text encoders see them, each encoded once, and what of them is not read."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from imgadapt.playground.drawing.stacks import Stack
from imgadapt.playground.requests import GenerateRequest
from imgadapt.training.families import Family

Embeds = Mapping[str, Tensor]
"""What a pipeline is called with instead of prompts."""
_KEPT = 64  # prompts


class Texts:
    """The encoded prompts of a base. counts: "encodes" is counted in it."""

    def __init__(self, family: Family, stack: Stack, counts: Counter[str]) -> None:
        self._family, self._stack, self._counts = family, stack, counts
        self._kept: OrderedDict[tuple[Any, ...], Embeds] = OrderedDict()
        self._encode, self.guided = _PIPELINES[type(family.pipeline).__name__]

    @torch.no_grad()
    def of(self, request: GenerateRequest) -> Embeds:
        """A request's prompts, as a batch of one."""
        guided = self.guides(request)
        key = request.prompt, request.negative if guided else None, self._stack.text_key(request.adapters)
        if key not in self._kept:
            self._stack.speak(request.adapters)
            self._counts["encodes"] += 1
            self._kept[key] = self._encode(self._family, request.prompt, request.negative, guided)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def together(self, requests: Sequence[GenerateRequest]) -> Embeds:
        """A batch's."""
        rows = [self.of(request) for request in requests]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def guides(self, request: GenerateRequest) -> bool:
        """Whether the negative prompt is read: without guidance it is not."""
        return self.guided and request.guidance is not None and request.guidance > 1

    def notes(self, request: GenerateRequest) -> list[str]:
        """What of the prompts is not read."""
        self._stack.say(request.adapters)
        made = [note for name in ("prompt", "negative") if (note := self._cut(name, getattr(request, name)))]
        if request.negative and not self.guides(request):
            why = "guidance is 1 or less" if self.guided else "this base has none"
            return [*made[:1], f"the negative prompt has no effect: {why}"]
        return made

    def _cut(self, name: str, text: str) -> str:
        """What the text encoder that reads the most does not read."""
        pipeline = self._family.pipeline
        own = {f"tokenizer{end}": pipeline.components.get(f"tokenizer{end}") for end in ("", "_2", "_3")}
        readers = [(self._limit(key, tokenizer), tokenizer) for key, tokenizer in own.items() if tokenizer is not None]
        limit, tokenizer = max(readers, key=lambda row: row[0])
        if hasattr(pipeline, "maybe_convert_prompt"):
            text = pipeline.maybe_convert_prompt(text, tokenizer)
        ids = tokenizer(text, truncation=False, verbose=False).input_ids
        if len(ids) <= limit:
            return ""
        ends = int(ids[0] == getattr(tokenizer, "bos_token_id", None))
        lost = tokenizer.decode(ids[limit - 1 : -1], skip_special_tokens=True).strip()
        return f"the {name} is longer than the {limit - 1 - ends} tokens that this base reads; not read: {lost[:300]}"

    def _limit(self, key: str, tokenizer: Any) -> int:
        """Tokens, marks of begin and end included."""
        longest = int(tokenizer.model_max_length)
        return min(longest, self._family.tokens) if "T5" in type(tokenizer).__name__ else longest


def _states(family: Family, prompt: str, negative: str, guided: bool) -> Embeds:
    pair = family.pipeline.encode_prompt(prompt, family.device, 1, guided, negative or None)
    return _named(("prompt_embeds", "negative_prompt_embeds"), pair)


def _pooled(family: Family, prompt: str, negative: str, guided: bool) -> Embeds:
    more = {} if len(family.encoders) < 3 and family.component == "unet" else {"prompt_2": None, "prompt_3": None}
    made = family.pipeline.encode_prompt(
        prompt=prompt,
        device=family.device,
        do_classifier_free_guidance=guided,
        negative_prompt=negative or None,
        **more,
    )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return _named(names, made)


def _flux(family: Family, prompt: str, negative: str, guided: bool) -> Embeds:
    made = family.pipeline.encode_prompt(prompt, None, device=family.device, max_sequence_length=family.tokens)
    return _named(("prompt_embeds", "pooled_prompt_embeds"), made[:2])


def _named(names: Sequence[str], values: Sequence[Tensor | None]) -> Embeds:
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


_PIPELINES: Mapping[str, tuple[Callable[[Family, str, str, bool], Embeds], bool]] = {
    "StableDiffusionPipeline": (_states, True),
    "StableDiffusionXLPipeline": (_pooled, True),
    "StableDiffusion3Pipeline": (_pooled, True),
    "FluxPipeline": (_flux, False),
}
"""How each encodes, and whether it is guided by a negative prompt."""
