"""Patterns: regular expressions that come from anyone, searched for in time that the text's length bounds.

Python's `re` tries every way in turn, and `(a+)+$` has 2^n of them in n letters; here each (state, place) is tried
once. Patterns have what those of `re` have, save what cannot be had so (references to groups, conditions, atomic
groups) and flags other than a `(?i)` at the start.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from imgadapt.errors import ConfigError
from imgadapt.expressions import CLASSES, At, Either, Look, Node, One, Repeat, Row, parsed

_STATES = 1000
_FIRST = 16  # states that are looked at for the first character


@dataclass
class Steps:
    """How many more steps searches may take, all in all; some million a second."""

    left: int = 2_000_000

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise ConfigError("it takes too long over so many names; make it simpler")


class Pattern:
    """A regular expression, for `search`.

    Raises:
        ConfigError: it is none, has what cannot be had here, or is too large.
    """

    def __init__(self, text: str, steps: Steps | None = None) -> None:
        self._steps = steps or Steps()
        self._literal, self._program = _made(text)
        self._first = _first(self._program)

    def search(self, text: str) -> bool:
        """Whether it is anywhere in a text.

        Raises:
            ConfigError: the steps are used up.
        """
        if self._literal is not None:
            self._steps.take(1)
            return self._literal in text
        places = range(len(text) + 1)
        if self._first is not None:
            places = [k for k, c in enumerate(text) if any(fits(c) for fits in self._first)]
        return _Search(self._program, text, self._steps).at(places)


@lru_cache(256)
def _made(text: str) -> "tuple[str | None, Sequence[_Code]]":
    """A pattern's literal, or else its states."""
    tree = parsed(text)
    literal = _literal(tree)
    return literal, () if literal is not None else _Compiler().compiled(tree)


def _literal(node: Node) -> str | None:
    """The text that a pattern without any sign is."""
    rows = [node] if isinstance(node, One) else node.parts if isinstance(node, Row) else None
    if rows is None or not all(isinstance(row, One) and row.literal for row in rows):
        return None
    return "".join(row.literal for row in rows if isinstance(row, One))


_Code = tuple[str, "Callable[[str], bool] | At | Look | None", tuple[int, ...]]
"""What a state asks for ("one", "at", "look"; "go" nothing; "end": it is found), and the states after it."""


class _Compiler:
    """States of a nondeterministic automaton; a part's are before those that it leads to."""

    def __init__(self) -> None:
        self._made: list[_Code] = []

    def compiled(self, node: Node) -> Sequence[_Code]:
        """The states; the last is the first of all."""
        start = self._of(node, self._add("end", None))
        self._add("go", None, start)
        return self._made

    def _add(self, kind: str, asked: "Callable[[str], bool] | At | Look | None", *after: int) -> int:
        if len(self._made) >= _STATES:
            raise ConfigError("it is too large, its repetitions written out")
        self._made.append((kind, asked, after))
        return len(self._made) - 1

    def _of(self, node: Node, after: int) -> int:
        """The first state of a part that leads to `after`."""
        if isinstance(node, One):
            return self._add("one", node.fits, after)
        if isinstance(node, At):
            return self._add("at", node, after)
        if isinstance(node, Look):
            return self._add("look", node, after, self._of(node.part, self._add("end", None)))
        if isinstance(node, Either):
            return self._add("go", None, *(self._of(part, after) for part in node.parts))
        if isinstance(node, Row):
            for part in reversed(node.parts):
                after = self._of(part, after)
            return after
        return self._repeated(node, after)

    def _repeated(self, node: Repeat, after: int) -> int:
        if node.most is None:
            loop = self._add("go", None)
            self._made[loop] = ("go", None, (self._of(node.part, loop), after))
            start = loop
        else:
            start = after
            for _ in range(node.most - node.least):
                start = self._add("go", None, self._of(node.part, start), after)
        for _ in range(node.least):
            start = self._of(node.part, start)
        return start


def _first(program: Sequence[_Code]) -> list[Callable[[str], bool]] | None:
    """What the first character may be; None: that is not known, or it need not have one."""
    found: list[Callable[[str], bool]] = []
    stack = [len(program) - 1] if program else []
    for _ in range(_FIRST):
        if not stack:
            return found
        kind, asked, after = program[stack.pop()]
        if kind == "one":
            found.append(asked)  # pyright: ignore[reportArgumentType]
        elif kind == "go":
            stack += after
        else:
            return None
    return None


class _Search:
    """One search: what was tried is not tried again."""

    def __init__(self, program: Sequence[_Code], text: str, steps: Steps) -> None:
        self._program, self._text, self._steps = program, text, steps
        self._known: dict[tuple[int, int], bool] = {}  # of what is looked for ahead and behind

    def at(self, places: Iterable[int]) -> bool:
        """Whether it is found at one of these."""
        tried: set[int] = set()
        return any(self._reaches(len(self._program) - 1, place, tried) for place in places)

    def _reaches(self, state: int, place: int, tried: set[int]) -> bool:
        """Whether an end is reached. tried: (state, place) as one number, of those that lead to none."""
        program, text, states, before = self._program, self._text, len(self._program), len(tried)
        stack, reached = [place * states + state], False
        while stack and len(tried) - before <= self._steps.left:
            at = stack.pop()
            if at in tried:
                continue
            tried.add(at)
            place, state = divmod(at, states)
            kind, asked, after = program[state]
            if kind == "one":
                if place < len(text) and asked(text[place]):  # pyright: ignore[reportCallIssue, reportOptionalCall]
                    stack.append((place + 1) * states + after[0])
            elif kind == "go":
                stack += [place * states + state for state in after]
            elif kind == "end":
                reached = True
                break
            elif self._there(asked, after, place):
                stack.append(place * states + after[0])
        self._steps.take(len(tried) - before)
        return reached

    def _there(self, asked: object, after: tuple[int, ...], place: int) -> bool:
        if isinstance(asked, Look):
            begin = place if asked.ahead else place - asked.width
            if (after[1], begin) not in self._known:
                self._known[after[1], begin] = begin >= 0 and self._reaches(after[1], begin, set())
            return self._known[after[1], begin] != asked.negative
        assert isinstance(asked, At)
        text, end = self._text, len(self._text)
        if asked.kind in "^A":
            return place == 0
        if asked.kind in "$Z":
            return place == end or (asked.kind == "$" and place == end - 1 and text[place] == "\n")
        word = [0 <= k < end and CLASSES["w"](text[k]) for k in (place - 1, place)]
        return (word[0] != word[1]) == (asked.kind == "b") and end > 0  # as `re` before Python 3.14
