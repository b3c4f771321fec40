"""Patterns: regular expressions that come from anyone, as those of Python's `re`, searched for within seconds.

`re` can take for ever. The package `regex` stops in time, and means the same by what both of them read.
"""

import math
import re
import time
from dataclasses import dataclass
from typing import Any

import regex

from imgadapt.errors import ConfigError

_LONGEST, _LONGEST_NAME = 1000, 10_000
_LARGEST = 10_000  # characters, were the least of all repetitions written out: some MB, compiled
_AMBIGUOUS = re.compile(r"\{(?![0-9]+(,[0-9]*)?\}|,[0-9]*\})|\[\^?\]?[^]]*(\[|--|&&|~~|\|\|)")
"""What `regex` has a meaning for and `re` has not, yet."""


@dataclass
class Budget:
    """How many more seconds of a processor searches may take, all in all."""

    seconds: float = 1.0

    def take(self, seconds: float) -> None:
        """Raises ConfigError: they are used up."""
        self.seconds -= seconds
        if self.seconds <= 0:
            raise ConfigError("it takes too long over so many names; make it simpler")


class Pattern:
    """A regular expression. Raises ConfigError: it is none, too large, or one that may mean two things."""

    def __init__(self, text: str, budget: Budget | None = None) -> None:
        self._budget = budget or Budget()
        if len(text) > _LONGEST:
            raise ConfigError(f"it has {len(text):,} characters; {_LONGEST:,} are the most")
        plain = re.sub(r"\\.", "__", text, flags=re.DOTALL)
        if found := _AMBIGUOUS.search(plain):
            sign = plain[found.end() - 1]
            raise ConfigError(f"the {sign} at position {found.end() - 1} may mean two things; write \\{sign}")
        if len(text) * math.prod(int(least) or 1 for least in re.findall(r"\{([0-9]+)", plain)) > _LARGEST:
            raise ConfigError("it is too large, its repetitions written out")
        try:
            re.compile(text)
            self._made: Any = regex.compile(text, regex.VERSION0, cache_pattern=False)
        except (re.error, regex.error, OverflowError, RecursionError) as error:
            raise ConfigError(str(error)) from error

    def search(self, text: str) -> bool:
        """Whether it is anywhere in a text. Raises ConfigError: the budget is used up, or no name is as long."""
        if len(text) > _LONGEST_NAME:
            raise ConfigError(f"it is looked for in a name of {len(text):,} characters; {_LONGEST_NAME:,} are the most")
        self._budget.take(0)
        began = time.thread_time()
        try:
            found = self._made.search(text, timeout=self._budget.seconds) is not None
        except (TimeoutError, MemoryError):
            found, self._budget.seconds = False, 0
        self._budget.take(time.thread_time() - began)
        return found
