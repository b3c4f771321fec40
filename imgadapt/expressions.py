"""Expressions: a regular expression as a tree. What may be in one: see patterns.py."""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from imgadapt.errors import ConfigError

LONGEST = 1000
"""Characters of a pattern."""
_DEEPEST = 30
CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}
_CONTROLS = {"a": "\a", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_HEX = {"x": 2, "u": 4}
_GROUPS = {"?:": None, "?=": (True, False), "?!": (True, True), "?<=": (False, False), "?<!": (False, True)}


@dataclass(frozen=True)
class One:
    """A character. literal: which, where it is but one."""

    fits: Callable[[str], bool]
    literal: str = ""


@dataclass(frozen=True)
class Row:
    parts: Sequence["Node"]


@dataclass(frozen=True)
class Either:
    parts: Sequence["Node"]


@dataclass(frozen=True)
class Repeat:
    part: "Node"
    least: int
    most: int | None


@dataclass(frozen=True)
class At:
    """A place between characters: `^`, `$`, `A`, `Z`, `b`, `B`."""

    kind: str


@dataclass(frozen=True)
class Look:
    """What is, or is not, ahead; or behind, over so many characters."""

    part: "Node"
    ahead: bool
    negative: bool
    width: int


Node = One | Row | Either | Repeat | At | Look


def parsed(text: str) -> Node:
    """The tree of a regular expression.

    Raises:
        ConfigError: it is none, or has what is not read here; and where.
    """
    if len(text) > LONGEST:
        raise ConfigError(f"it has {len(text):,} characters; {LONGEST:,} are the most")
    small = text.startswith("(?i)")
    return _Parser(text.removeprefix("(?i)"), small).read()


class _Parser:
    def __init__(self, text: str, small: bool) -> None:
        self._text, self._at, self._small, self._depth = text, 0, small, 0

    def read(self) -> Node:
        node = self._either()
        if self._at < len(self._text):
            raise self._wrong("unbalanced )")
        return node

    def _wrong(self, why: str) -> ConfigError:
        return ConfigError(f"{why} at character {self._at + 1}")

    def _next(self, what: str = "") -> str:
        """The next sign, taken; only if it is `what`, where that is given."""
        found = self._text[self._at : self._at + max(1, len(what))]
        if what and found != what:
            return ""
        self._at += len(found)
        return found

    def _either(self) -> Node:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._wrong(f"brackets in each other more than {_DEEPEST} deep")
        rows = [self._row()]
        while self._next("|"):
            rows.append(self._row())
        self._depth -= 1
        return rows[0] if len(rows) == 1 else Either(rows)

    def _row(self) -> Node:
        parts: list[Node] = []
        while self._text[self._at : self._at + 1] not in ("", "|", ")"):
            part = self._one()
            if (bounds := self._bounds()) is not None:
                if isinstance(part, At | Look):
                    raise self._wrong("nothing to repeat")
                self._next("?")  # as few as possible is no other question
                part = Repeat(part, *bounds)
                if self._next("+") or self._bounds() is not None:
                    raise self._wrong("repeated twice, or without going back, which is not read here")
            parts.append(part)
        return parts[0] if len(parts) == 1 else Row(parts)

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._next(sign):
                return bounds
        body, brace, _ = self._text[self._at + 1 : self._at + 14].partition("}")
        first, comma, last = body.partition(",")
        numbers = all(not part or (part.isascii() and part.isdigit()) for part in (first, last))
        if self._text[self._at : self._at + 1] != "{" or not brace or not numbers or not (first or comma):
            return None
        self._at += len(body) + 2
        least = int(first or 0)
        most = (int(last) if last else None) if comma else least
        if most is not None and most < least:
            raise self._wrong("the least is more than the most")
        return least, most

    def _one(self) -> Node:
        sign = self._next()
        if sign == "(":
            return self._group()
        if sign == "[":
            return self._set()
        if sign == "\\":
            return self._escaped()
        if sign in "^$":
            return At(sign)
        if sign == ".":
            return One(lambda c: c != "\n")
        self._at -= 1
        if self._bounds() is not None:
            raise self._wrong("nothing to repeat")
        self._at += 1
        return self._letter(sign)

    def _letter(self, sign: str) -> One:
        if self._small:
            return One(lambda c: c == sign or c.lower() == sign.lower())
        return One(lambda c: c == sign, sign)

    def _group(self) -> Node:
        look = None
        if self._next("?P<"):
            name, end, _ = self._text[self._at :].partition(">")
            if not end or not name.isidentifier():
                raise self._wrong("a group's name is none")
            self._at += len(name) + 1
        elif self._text.startswith("?", self._at):
            kind = next((kind for kind in _GROUPS if self._next(kind)), None)
            if kind is None:
                raise self._wrong("a kind of group that is not read here")
            look = _GROUPS[kind]
        inner = self._either()
        if not self._next(")"):
            raise self._wrong("a ( without its )")
        if look is None:
            return Row([inner])
        width = 0 if look[0] else _width(inner)
        if width is None:
            raise self._wrong("what is looked for behind has no one length")
        return Look(inner, *look, width)

    def _escaped(self) -> Node:
        sign = self._next()
        if sign in "bBAZ" and sign:
            return At(sign)
        if sign.lower() in CLASSES:
            return One(_class(sign))
        return self._letter(self._character(sign))

    def _character(self, sign: str) -> str:
        """The character that one after a backslash stands for."""
        if sign in _CONTROLS:
            return _CONTROLS[sign]
        if sign in _HEX:
            digits = self._text[self._at : self._at + _HEX[sign]]
            if len(digits) < _HEX[sign] or not all(digit in string.hexdigits for digit in digits):
                raise self._wrong("a character's number is none")
            self._at += len(digits)
            return chr(int(digits, 16))
        if not sign or (sign.isascii() and sign.isalnum()):
            raise self._wrong(f"\\{sign} is not read here")
        return sign

    def _set(self) -> Node:
        negative, fits = bool(self._next("^")), list[Callable[[str], bool]]()
        while not (fits and self._next("]")):
            first, one = self._of_set()
            fits.append(one)
            if self._text.startswith("-", self._at) and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._next()
                last, _ = self._of_set()
                if not first or not last or first > last:
                    raise self._wrong("a range that is none")
                fits[-1] = _between(first, last)

        def inside(c: str) -> bool:
            letters = {c, c.lower(), c.upper()} if self._small else (c,)
            return any(fit(letter) for fit in fits for letter in letters) != negative

        return One(inside)

    def _of_set(self) -> tuple[str, Callable[[str], bool]]:
        """A character, "" where it is a class; and what it fits."""
        if not (sign := self._next()):
            raise self._wrong("a [ without its ]")
        if sign == "\\":
            sign = self._next()
            if sign and sign.lower() in CLASSES:
                return "", _class(sign)
            sign = "\b" if sign == "b" else self._character(sign)
        return sign, _between(sign, sign)


def _between(first: str, last: str) -> Callable[[str], bool]:
    return lambda c: first <= c <= last


def _class(sign: str) -> Callable[[str], bool]:
    fits, wanted = CLASSES[sign.lower()], sign.islower()
    return lambda c: fits(c) == wanted


def _width(node: Node) -> int | None:
    """How many characters it takes; None: it depends."""
    if isinstance(node, One):
        return 1
    if isinstance(node, Row | Either):
        widths = [_width(part) for part in node.parts]
        if None in widths or (isinstance(node, Either) and len(set(widths)) > 1):
            return None
        return sum(w or 0 for w in widths) if isinstance(node, Row) else widths[0]
    if isinstance(node, Repeat):
        width = _width(node.part)
        return width * node.least if width is not None and node.least == node.most else None
    return 0
