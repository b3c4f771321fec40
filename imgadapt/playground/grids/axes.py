"""Axes: from text to changes of a request."""

import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from imgadapt.errors import ConfigError
from imgadapt.playground import prompts
from imgadapt.playground.grids import stack_axes
from imgadapt.playground.grids.axis import Axis, Change, Value, changed, numbers, short, words
from imgadapt.playground.library.library import Library
from imgadapt.playground.requests import GenerateRequest
from imgadapt.playground.samplers import SAMPLERS
from imgadapt.playground.settings import Limits


def values(axis: Axis, common: GenerateRequest, library: Library, most: int) -> list[Value]:
    """The places of an axis; `common` has no tags in its prompt any more.

    Raises:
        ConfigError: which axis, and what of it cannot be read; more than `most`.
    """
    try:
        made = _READERS[axis.kind](axis, common, library, most)
        if not made:
            raise ConfigError("no values")
        if len(made) > most:
            raise ConfigError(f"{len(made):,} values; {most:,} are the most")
    except ConfigError as error:
        raise ConfigError(f"{axis.kind}: {error}") from None
    return made


def untagged(request: GenerateRequest, library: Library) -> GenerateRequest:
    """The request with the adapters of its prompt's `<lora:...>` tags in its stack, and without the tags.

    Raises:
        ConfigError: a tag that cannot be read, an adapter that is not there, or twice.
    """
    said = prompts.parse(request.prompt)
    if not said.tags:
        return request
    uses = [tag.use(library.named(tag.name).id) for tag in said.tags]
    return changed(request, prompt=said.prompt, adapters=(*request.adapters, *uses))


def _setting(name: str, value: Any) -> Change:
    return lambda request: changed(request, **{name: value})


def _steps(axis: Axis, common: GenerateRequest, library: Library, most: int) -> list[Value]:
    rows = numbers(axis, most, "steps", 1, Limits.steps, whole=True)
    return [Value(f"{label} steps", _setting("steps", value)) for label, value in rows]


def _guidance(axis: Axis, common: GenerateRequest, library: Library, most: int) -> list[Value]:
    return [
        Value(f"guidance {label}", _setting("guidance", value))
        for label, value in numbers(axis, most, "guidance", 0, 50)
    ]


def _seeds(axis: Axis, common: GenerateRequest, library: Library, most: int) -> list[Value]:
    if found := re.fullmatch(r"\s*random\s+(\d{1,6})\s*", axis.values, re.ASCII | re.IGNORECASE):
        if int(found[1]) > most:
            raise ConfigError(f"{int(found[1]):,} values; {most:,} are the most")
        rows = [(str(seed), seed) for seed in (secrets.randbelow(2**32) for _ in range(int(found[1])))]
    else:
        rows = numbers(axis, most, "seed", 0, 2**53 - 1, whole=True)
    return [Value(f"seed {label}", _setting("seed", value)) for label, value in rows]


def _samplers(axis: Axis, common: GenerateRequest, library: Library, most: int) -> list[Value]:
    known = {name.casefold(): name for name in SAMPLERS}
    made: list[Value] = []
    for word in words(axis.values):
        if word.casefold() not in known:
            raise ConfigError(f"no sampler '{short(word)}'; there are: {', '.join(SAMPLERS)}")
        name = known[word.casefold()]
        made.append(Value(name, _setting("sampler", name)))
    return made


def _prompts(axis: Axis, common: GenerateRequest, library: Library, most: int) -> list[Value]:
    made: list[Value] = []
    for line in (line.strip() for line in axis.values.split("\n")):
        old, arrow, new = (part.strip() for part in f"{line} ".partition(" -> "))
        if arrow and old not in common.prompt:
            raise ConfigError(f"'{short(old)}' is not in the prompt, so nothing can be put in its place")
        said = common.prompt.replace(old, new) if arrow else line
        if line:
            made.append(Value(new or f"without {old}" if arrow else line, _prompt(said, library)))
    return made


def _prompt(said: str, library: Library) -> Change:
    return lambda request: untagged(changed(request, prompt=said), library)


_READERS: Mapping[str, Callable[[Axis, GenerateRequest, Library, int], list[Value]]] = {
    "adapter": stack_axes.adapters,
    "weight": stack_axes.weights,
    "seed": _seeds,
    "prompt": _prompts,
    "blocks": stack_axes.blocks,
    "rule": stack_axes.rules,
    "checkpoint": stack_axes.checkpoints,
    "steps": _steps,
    "guidance": _guidance,
    "sampler": _samplers,
}
