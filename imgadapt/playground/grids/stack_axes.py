"""Axes that are about the stack of adapters: which, how strong, on which blocks, merged how, from which checkpoint."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from imgadapt.combining.rules import RULES
from imgadapt.errors import ConfigError
from imgadapt.playground.grids.axis import Axis, Change, Rule, Value, changed, numbers, short, words
from imgadapt.playground.grids.ranges import listed, plain
from imgadapt.playground.library.library import Card, Library
from imgadapt.playground.requests import STRONGEST, GenerateRequest, Use

_LISTED = re.compile(r"(?:([A-Za-z]\w*)\s*[:=]\s*)?\[?([-+\d.,\s]+)\]?", re.ASCII)


def adapters(axis: Axis, common: GenerateRequest, library: Library, most: int) -> list[Value]:
    model = _in_stack(axis, common)
    there = {use.adapter: use for use in common.adapters}
    made: list[Value] = []
    for word in _split(axis.values, lambda text: _card(text, library) is not None):
        uses = [] if word.casefold() == "none" else _stack(word, library, there, model)
        label = " + ".join(_named(use, library, model or there.get(use.adapter)) for use in uses) or "none"
        made.append(_exchanged(label, axis.adapter, uses))
    return made


def _stack(word: str, library: Library, there: Mapping[str, Use], model: Use | None) -> list[Use]:
    """`a+b:0.8` -> uses, with the settings that the stack has for them, or those of the one they replace."""
    pieces = [word] if _card(word, library) else [piece.strip() for piece in word.split("+") if piece.strip()]
    uses: list[Use] = []
    for piece in pieces:
        name, weight = piece, None
        if _card(piece, library) is None and (found := re.fullmatch(r"(.+):([-+]?[\d.]{1,20})", piece, re.ASCII)):
            name, weight = found[1].strip(), _weight(found[2])
        card = _card(name, library) or library.named(name)  # which says what there is
        settings = model or there.get(card.id)
        about: dict[str, Any] = settings.model_dump() if settings else {"weight": card.weight}
        about |= {"adapter": card.id} | ({} if weight is None else {"weight": weight, "text": None})
        uses.append(Use.of(about))
    if len({use.adapter for use in uses}) < len(uses):
        raise ConfigError(f"'{short(word)}' has an adapter twice")
    return uses


def _weight(text: str) -> float:
    (value,) = listed(text, 1)
    if abs(value) > STRONGEST:
        raise ConfigError(f"weight {plain(value)}: it is a number from {-STRONGEST:g} to {STRONGEST:g}")
    return float(value) + 0.0


def _named(use: Use, library: Library, usual: Use | None) -> str:
    name = library.get(use.adapter).name
    return name if use.weight == (usual.weight if usual else 1.0) else f"{name}:{use.weight:g}"


def _exchanged(label: str, which: str | None, uses: Sequence[Use]) -> Value:
    instead = None if which is None else (which, frozenset(use.adapter for use in uses))
    return Value(label, _replaced(which, uses), instead=instead)


def _replaced(which: str | None, uses: Sequence[Use]) -> Change:
    """These instead of the stack, or instead of one of it."""

    def change(request: GenerateRequest) -> GenerateRequest:
        if which is None:
            return changed(request, adapters=tuple(uses))
        stack = [new for use in request.adapters for new in (uses if use.adapter == which else [use])]
        return changed(request, adapters=tuple(stack))

    return change


def weights(axis: Axis, common: GenerateRequest, library: Library, most: int) -> list[Value]:
    _in_stack(axis, common)
    rows = numbers(axis, most, "weight", -STRONGEST, STRONGEST)
    return [_of_each(f"weight {label}", axis.adapter, _weighing(value)) for label, value in rows]


def _weighing(value: float) -> Callable[[Use], Use]:
    def weigh(use: Use) -> Use:
        """At another weight; one that differs on text encoders keeps its share of it."""
        text = use.text if use.text is None or use.weight == 0 else use.text * value / use.weight + 0.0
        if text is not None and abs(text) > STRONGEST:
            raise ConfigError(f"weight {value:g} takes the text encoders' to {text:g}; {STRONGEST:g} is the most")
        return use.model_copy(update={"weight": value, "text": text})

    return weigh


def blocks(axis: Axis, common: GenerateRequest, library: Library, most: int) -> list[Value]:
    _in_stack(axis, common)
    made: list[Value] = []
    for word in (word.strip() for word in re.split(r"[;\n]", axis.values)):
        found = _LISTED.fullmatch(word)
        said = re.sub(r"\s", "", found[2]) if found else word
        label = (found[1] if found else None) or said
        if word:
            made.append(_of_each(short(label), axis.adapter, _blocked(said)))
    return made


def _blocked(said: str) -> Callable[[Use], Use]:
    return lambda use: Use.of({**use.model_dump(), "blocks": said})


def _of_each(label: str, which: str | None, what: Callable[[Use], Use]) -> Value:
    return Value(label, each(None if which is None else {which}, what), each=what)


def each(which: Collection[str] | None, what: Callable[[Use], Use]) -> Change:
    """The change of these adapters in a stack; None: of all."""

    def change(request: GenerateRequest) -> GenerateRequest:
        stack = tuple(what(use) if which is None or use.adapter in which else use for use in request.adapters)
        return request.model_copy(update={"adapters": stack})

    return change


def rules(axis: Axis, common: GenerateRequest, library: Library, most: int) -> list[Value]:
    known = {rule.name: rule for rule in RULES}
    made: list[Value] = []
    for word in words(axis.values):
        name, *settings = word.split()
        if name == "live":
            made.append(Value("live stack", lambda request: request))
            continue
        if name not in known:
            raise ConfigError(f"no rule '{short(name)}'; there are: live, {', '.join(known)}")
        options = dict(_option(text) for text in settings)
        known[name].checked(options)
        made.append(Value(" ".join([name, *settings]), lambda request: request, Rule(name, options)))
    return made


def _option(text: str) -> tuple[str, float | str | bool]:
    """`density=0.3` -> its name and value."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"'{short(text)}' is no option of a rule; write density=0.3")
    if value.casefold() in ("true", "false"):
        return name, value.casefold() == "true"
    try:
        return name, float(value)
    except ValueError:
        return name, value


def checkpoints(axis: Axis, common: GenerateRequest, library: Library, most: int) -> list[Value]:
    model = _in_stack(axis, common)
    if model is None and len(common.adapters) == 1:
        model = common.adapters[0]
    if model is None:
        raise ConfigError("of which adapter of the stack? choose one that a training wrote")
    own = library.get(model.adapter)
    siblings = sorted((card for card in library.cards(folder=own.folder) if card.folder == own.folder), key=_by_step)
    if axis.values.strip().casefold() == "all":
        chosen = [card for card in siblings if not card.fault]
    else:
        chosen = [_sibling(word, siblings, own) for word in words(axis.values)]
    return [_exchanged(_leaf(card), model.adapter, [model.model_copy(update={"adapter": card.id})]) for card in chosen]


def _sibling(word: str, siblings: Sequence[Card], own: Card) -> Card:
    """A card of the same run, by its name, the end of it, or the number of its step."""
    wanted = word.casefold()
    for card in siblings:
        leaf = _leaf(card).casefold()
        if wanted in (card.id, card.name.casefold(), leaf) or (wanted.isdecimal() and _step(leaf) == int(wanted)):
            return card
    raise ConfigError(
        f"no checkpoint '{short(word)}' beside {own.name}; there are: {', '.join(_leaf(card) for card in siblings)}"
    )


def _leaf(card: Card) -> str:
    return re.split(r"[/\\]", card.name)[-1]


def _step(leaf: str) -> int | None:
    found = re.search(r"(\d{1,12})$", leaf, re.ASCII)
    return int(found[1]) if found else None


def _by_step(card: Card) -> tuple[bool, int, str]:
    """Snapshots by step, then what has no number (the trained adapter itself)."""
    step = _step(_leaf(card))
    return step is None, step or 0, card.name


def _in_stack(axis: Axis, common: GenerateRequest) -> Use | None:
    """The adapter that the axis is about.

    Raises:
        ConfigError: the stack does not have it.
    """
    found = next((use for use in common.adapters if use.adapter == axis.adapter), None)
    if axis.adapter is not None and found is None:
        raise ConfigError("the adapter that it is about is not in the stack; put it there, or leave it open")
    return found


def _card(text: str, library: Library) -> Card | None:
    """The adapter of an id or a name; None: there is none."""
    for look in (library.get, library.named):
        try:
            return look(text)
        except ConfigError:
            continue
    return None


def _split(text: str, known: Callable[[str], bool]) -> Iterable[str]:
    """Words between commas and line ends; a whole line that is known is one, whatever is in it."""
    for line in (line.strip() for line in text.split("\n")):
        yield from [line] if line and known(line) else words(line)
