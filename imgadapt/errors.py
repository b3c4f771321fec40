"""Every error that imgadapt raises on purpose.

ImgadaptError
├── TargetError      no layer matches, or a method cannot act on one that does
├── StateError       the model is not in the state that the call needs (name taken, NaN in a merge, ...)
├── FormatError      a file is not an adapter, or not one that this table reads
│   └── ShapeError   a tensor does not fit the layer it is for
├── ConfigError      a setting is unknown, of the wrong type or out of range
├── DataError        a picture, caption or folder cannot be used
├── TrainingError    a training cannot go on: NaN, nothing learnt, a run with other settings
│   └── Interrupted  it was told to stop (Ctrl-C, SIGTERM); its state is saved
├── OutputError      a file cannot be written; the old one is untouched
└── MissingExtra     an optional dependency is not installed
"""

import unicodedata
from collections.abc import Sequence

_LONGEST = 4000
"""Characters of a message; a file's names may have millions."""


class ImgadaptError(Exception):
    """Base of all errors of imgadapt. Its text is fit for a terminal and a page, whatever of a file it repeats."""

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
        return "\n".join(map(printable, text.split("\n")))


def printable(text: str) -> str:
    """A text as one line, of which is escaped what moves a cursor, turns a line round or is half a character."""
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(c: str) -> str:
    harmless = c.isprintable() or unicodedata.category(c) == "Zs"
    return c if harmless else c.encode("unicode_escape").decode()


class TargetError(ImgadaptError):
    """No layer matches, or a method cannot act on one that does."""


class StateError(ImgadaptError):
    """The model is not in the state that the call needs."""


class FormatError(ImgadaptError):
    """A file is not an adapter, or holds keys that no table knows."""


class ShapeError(FormatError):
    """A tensor does not fit the layer it is for."""


class ConfigError(ImgadaptError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(ImgadaptError):
    """A picture, a caption or a folder cannot be used."""


class TrainingError(ImgadaptError):
    """A training cannot go on: NaN, nothing learnt, a run with other settings in the way."""


class Interrupted(TrainingError):
    """The run was told to stop (Ctrl-C, SIGTERM); its state is saved and the same command goes on from it.

    number: the signal's.
    """

    def __init__(self, text: str, number: int = 2) -> None:
        super().__init__(text)
        self.number = number


class OutputError(ImgadaptError):
    """A file cannot be written; what was there before is untouched."""


class MissingExtra(ImgadaptError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs {package}: pip install 'imgadapt[{extra}]'")


def first_few(names: Sequence[str], count: int = 3) -> str:
    """`a, b, c and 7 more`: how errors list many names."""
    shown = ", ".join(names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"


def shortened(text: str, most: int = 60) -> str:
    """A name from a file as a message may show it: one line, without what moves a terminal's cursor, not too long."""
    shown = "".join(c if c.isprintable() else "?" for c in text[: most + 1])
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."
