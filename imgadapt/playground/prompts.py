"""Prompts: the `<lora:name:weight>` tags in them.

`<lora:name>`, `<lora:name:weight>`, `<lora:name:weight:text>`, where `text` is the text encoders' weight (SwarmUI's
order; A1111 has the text encoders' first, see `te_first`), and by name, in any order: `unet=`, `te=`, and
sd-webui-lora-block-weight's `lbw=` (a preset or numbers), `start=`, `stop=`, `step=a-b`. `<lyco:` is the same.
Names are looked up among those of a library: one with slashes or dots in it is a name as well, never a path.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imgadapt.errors import ConfigError
from imgadapt.playground.requests import STRONGEST, Use
from imgadapt.playground.settings import Limits

_OPENS = re.compile(r"<(?:lora|lyco):", re.IGNORECASE | re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})(?:[eE][+-]?[0-9]{1,3})?")
_STEP = re.compile(r"[0-9]{1,6}")
_UNSAID = re.compile(r"[<>:\r\n]+")
_LONGEST = 1200
"""Characters of a tag; a list of 200 blocks fits."""


@dataclass(frozen=True)
class Tag:
    """What a tag says; see `Use` for what is meant."""

    name: str
    weight: float = 1.0
    text: float | None = None
    blocks: str = ""
    start: int = 0
    stop: int | None = None

    def use(self, adapter: str) -> Use:
        """The tag as an adapter of a stack, with the id that its name has in the library.

        Raises:
            ConfigError: its steps are out of range.
        """
        about = {
            "weight": self.weight,
            "text": self.text,
            "blocks": self.blocks,
            "start": self.start,
            "stop": self.stop,
        }
        try:
            return Use.of({"adapter": adapter, **about})
        except ConfigError as error:
            raise ConfigError(f"<lora:{_short(self.name)}>: {error}") from None


@dataclass(frozen=True)
class Parsed:
    """prompt: without its tags. tags: in the order of coming, each name once."""

    prompt: str
    tags: tuple[Tag, ...] = ()


def parse(text: str, *, te_first: bool = False) -> Parsed:
    """A prompt and its tags; the text of one that has none is not touched. te_first: two numbers are the text encoders'
    weight and then the denoiser's, as A1111 has them.

    Raises:
        ConfigError: a tag that does not end, has no name, a bad number, or is there twice; more than `Limits.adapters`.
    """
    pieces, tags, at = list[str](), dict[str, Tag](), 0
    while opening := _OPENS.search(text, at):
        end = text.find(">", opening.end(), opening.end() + _LONGEST)
        body = text[opening.end() : end] if end >= 0 else "<"
        if "<" in body or "\n" in body:
            raise ConfigError(
                f"the tag {_short(text[opening.start() : opening.start() + 40])} does not end; it lacks a >"
            )
        tag = _tag(body, te_first)
        if tag.name.casefold() in tags:
            raise ConfigError(f"<lora:{_short(tag.name)}> is in the prompt twice; give it one weight")
        if len(tags) == Limits.adapters:
            raise ConfigError(f"the prompt has more than {Limits.adapters} <lora:...> tags")
        tags[tag.name.casefold()] = tag
        pieces.append(text[at : opening.start()])
        at = end + 1
    if not tags:
        return Parsed(text)
    return Parsed(_joined([*pieces, text[at:]]), tuple(tags.values()))


def spell(uses: Sequence[Use], names: Mapping[str, str]) -> str:
    """The tags of a stack, as `parse` reads them and A1111 does, too; names: an adapter's id -> its name."""
    return " ".join(_spelled(use, names[use.adapter]) for use in uses)


def _spelled(use: Use, name: str) -> str:
    fields = [_UNSAID.sub("_", name)]
    fields += [_plain(use.weight)] if use.text is None else [f"te={_plain(use.text)}", f"unet={_plain(use.weight)}"]
    fields += [f"lbw={use.blocks}"] if use.blocks and not _UNSAID.search(use.blocks) else []
    fields += [f"start={use.start}"] if use.start else []
    fields += [f"stop={use.stop}"] if use.stop is not None else []
    return f"<lora:{':'.join(fields)}>"


def _tag(body: str, te_first: bool) -> Tag:
    name, *fields = (field.strip() for field in body.split(":"))
    if len(name) > 1 and name[0] == name[-1] == '"':
        name = name[1:-1].strip()
    if not name:
        raise ConfigError("a <lora:...> tag has no name")
    where = f"<lora:{_short(name)}>"
    said: dict[str, Any] = {}
    numbers = list[float]()
    for field in fields:
        key, equals, value = field.partition("=")
        if not equals:
            numbers.append(_weight(field, where))
        elif (reader := _FIELDS.get(key.strip().casefold())) is None:
            raise ConfigError(f"{where} has {_short(key)}=; known are {', '.join(f'{known}=' for known in _FIELDS)}")
        else:
            said = {**said, **reader(value.strip(), where)}
    if len(numbers) > 2:
        raise ConfigError(f"{where} has {len(numbers)} numbers; it takes a weight, and one for text encoders")
    if len(numbers) == 2 and te_first:
        numbers.reverse()
    if numbers:
        said = {"weight": numbers[0], **said}
    if len(numbers) == 2:
        said = {"text": numbers[1], **said}
    return Tag(name, **said)


def _weight(text: str, where: str) -> float:
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{where}: {_short(text)!r} is not a weight; write a number such as 0.8")
    if abs(value) > STRONGEST:
        raise ConfigError(f"{where}: weight {value:g} is out of range; it goes from {-STRONGEST:g} to {STRONGEST:g}")
    return value


def _step(text: str, where: str) -> int:
    if not _STEP.fullmatch(text):
        raise ConfigError(f"{where}: {_short(text)!r} is not a step; write a whole number, 0 or more")
    return int(text)


def _range(text: str, where: str) -> dict[str, int]:
    first, _, last = text.partition("-")
    return {"start": _step(first.strip(), where), "stop": _step(last.strip(), where)}


_FIELDS: Mapping[str, Callable[[str, str], Mapping[str, Any]]] = {
    "unet": lambda text, where: {"weight": _weight(text, where)},
    "te": lambda text, where: {"text": _weight(text, where)},
    "lbw": lambda text, _: {"blocks": text},
    "start": lambda text, where: {"start": _step(text, where)},
    "stop": lambda text, where: {"stop": _step(text, where)},
    "step": _range,
}


def _joined(pieces: Sequence[str]) -> str:
    """What is around tags, without the blanks and the second comma that they leave."""
    parts = list[str]()
    for piece in pieces:
        before = next((part for part in reversed(parts) if part), "")
        kept = piece.lstrip(" \t") if parts else piece
        if kept.startswith(",") and (not before or before.endswith((",", "\n"))):
            kept = kept[1:].lstrip(" \t")
        if kept.rstrip(" \t") and before and not before.endswith("\n") and kept[0] not in ",.;:!?)]\n":
            parts.append(" ")
        parts.append(kept.rstrip(" \t"))
    return "".join(parts).strip(" \t") if parts else ""


def _plain(value: float) -> str:
    return repr(int(value)) if value == int(value) else repr(value)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
