"""Numbers: lists of them as people write them, exact in decimals and bounded before they are written out.

`0, 0.5, 1`; ranges `0:1:0.25` (start:stop:step, both ends where the step meets them), `1..5`; SwarmUI's
`1, 2, .., 10`; webui's `0-1 (+0.25)` and `0-1 [5]` (so many, from end to end).
"""

import re
from collections.abc import Callable
from decimal import Decimal

from imgadapt.errors import ConfigError

_NUMBER = r"[+-]?(?:\d{1,18}(?:\.\d{0,12})?|\.\d{1,12})"
_PATTERNS = {
    name: re.compile(pattern.replace("N", f"({_NUMBER})").replace(" ", r"\s*"), re.ASCII)
    for name, pattern in {
        "number": "N",
        "range": "N : N : N",
        "dots": r"N \.\.\.? N",
        "step": r"N - N \( N \)",
        "count": r"N - N \[ (\d{1,9}) \]",
    }.items()
}
_ON = re.compile(r"\.\.\.?", re.ASCII)


def listed(text: str, most: int) -> list[Decimal]:
    """The numbers of a text.

    Raises:
        ConfigError: what cannot be read; more than `most`.
    """
    words = [word.strip() for word in re.split(r"[,;\n]", text) if word.strip()]
    made: list[Decimal] = []
    for place, word in enumerate(words):
        if _ON.fullmatch(word):
            after = words[place + 1] if place + 1 < len(words) else ""
            made += _went_on(made, after, most)
        else:
            made += _one(word, most)
        if len(made) > most:
            raise ConfigError(f"more than {most:,} values; that is the most")
    if not made:
        raise ConfigError("no values; write some, as 0, 0.5, 1 or 0:1:0.25")
    return made


def plain(value: Decimal) -> str:
    """`0.50` -> `0.5`; never with an exponent."""
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text


def _one(word: str, most: int) -> list[Decimal]:
    """What one word between commas means."""
    for name, pattern in _PATTERNS.items():
        if found := pattern.fullmatch(word):
            return _READERS[name]([Decimal(number) for number in found.groups()], most)
    raise ConfigError(f"'{_short(word)}' is no number and no range; write 0.5, 0:1:0.25 or 1..5")


def _went_on(made: list[Decimal], after: str, most: int) -> list[Decimal]:
    """What `..` stands for between two numbers, without them; the step is that of the two before, or 1."""
    if not made or not _PATTERNS["number"].fullmatch(after):
        raise ConfigError("'..' stands between numbers, as in 1, 2, .., 10")
    end = Decimal(after)
    step = made[-1] - made[-2] if len(made) > 1 else Decimal(1 if end >= made[-1] else -1)
    whole = _range([made[-1], end, step], most)
    return [value for value in whole[1:] if value != end]


def _range(numbers: list[Decimal], most: int) -> list[Decimal]:
    start, stop, step = numbers
    said = f"{plain(start)} to {plain(stop)} by {plain(step)}"
    if step == 0 or (stop - start) * step < 0:
        raise ConfigError(f"{said} never gets there; the step must lead from the first to the second")
    count = int((stop - start) / step) + 1
    if count > most:
        raise ConfigError(f"{said} has {count:,} values; {most:,} are the most")
    return [start + k * step for k in range(count)]


def _dots(numbers: list[Decimal], most: int) -> list[Decimal]:
    start, stop = numbers
    return _range([start, stop, Decimal(1 if stop >= start else -1)], most)


def _spread(numbers: list[Decimal], most: int) -> list[Decimal]:
    start, stop, count = numbers[0], numbers[1], int(numbers[2])
    if not 1 <= count <= most:
        raise ConfigError(f"{count:,} values are asked for; 1 to {most:,} can be had")
    if count == 1:
        return [start]
    return [round(start + (stop - start) * k / (count - 1), 6) for k in range(count)]


_READERS: dict[str, Callable[[list[Decimal], int], list[Decimal]]] = {
    "number": lambda numbers, most: numbers,
    "range": _range,
    "dots": _dots,
    "step": lambda numbers, most: _range(numbers, most),
    "count": _spread,
}


def _short(word: str) -> str:
    return word if len(word) <= 40 else f"{word[:37]}..."
