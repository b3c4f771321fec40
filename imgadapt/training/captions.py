"""Captions: the wordings that files hold, and which one a picture is shown with the n-th time."""

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import torch

from imgadapt.errors import ConfigError, DataError, first_few
from imgadapt.reading import read
from imgadapt.training.noise import generator, number

if TYPE_CHECKING:  # data.py reads captions with this module
    from imgadapt.training.data import Example

COLUMNS = ("text", "caption", "prompt")
MOST_WORDINGS = 64
PLACEHOLDER = "[trigger]"
SEPARATOR = "|||"
MOST_TEXT = 2**20
"""Bytes of a caption file."""
MOST_TABLE = 2**28
"""Of a metadata.jsonl or metadata.csv."""
_UNSAID = re.compile(r"[\x00-\x08\x0e-\x1b\x7f\ud800-\udfff]")  # and no space
_WILDCARD = re.compile(r"\{([^{}|]*(?:\|[^{}|]*)+)\}")


@dataclass(frozen=True)
class Wording:
    """How captions vary from one time to the next.

    Tags are what commas part. keep: so many first tags stay in front and are never dropped; in a caption with `|||`
        (kohya's keep_tokens_separator) all before it stays instead, and all after a second one stays at the end.
    tag_dropout, dropout: chance that one tag, or the whole caption, is left out.
    variants: how many shuffles, or draws of tags, of each wording exist, so that the states of all can be cached.

    Raises:
        ConfigError: a value is out of range.
    """

    shuffle: bool = False
    keep: int = 1
    tag_dropout: float = 0.0
    dropout: float = 0.0
    variants: int = 8

    def __post_init__(self) -> None:
        for name in ("tag_dropout", "dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"'{name}' is {getattr(self, name)}, wanted a chance between 0 and 1")
        if self.keep < 0:
            raise ConfigError(f"'keep' is {self.keep}, wanted 0 tags or more")
        if self.variants < 1:
            raise ConfigError(f"'variants' is {self.variants}, wanted 1 or more")

    @property
    def varies(self) -> bool:
        """Whether one wording has several variants."""
        return self.shuffle or self.tag_dropout > 0


def caption(captions: Sequence[str], wording: Wording, seed: int, digest: str, place: int) -> str:
    """The text that a picture is shown with: a function of its arguments, so that a resumed run sees the same.

    Wordings take turns: each comes once in every `len(captions)` places, in a new order each round.

    captions: the wordings of the picture. digest: of the picture. place: how often it has been seen before.
    """
    if wording.dropout and torch.rand((), generator=generator(seed, digest, place, "dropout")).item() < wording.dropout:
        return ""
    turn, at = divmod(place, len(captions))
    which = int(torch.randperm(len(captions), generator=generator(seed, digest, turn, "wording"))[at])
    variant = number(seed, digest, place, "variant") % wording.variants
    return _variant(captions[which], wording, seed, digest, which, variant)


def plain(text: str) -> str:
    """A wording as it is shown when nothing varies: without `|||`."""
    return _variant(text, Wording(), 0, "", 0, 0)


def every(example: "Example", wording: Wording, seed: int) -> list[str]:
    """All texts that `caption` can give for a picture, each once; at most variants x wordings and the empty one."""
    variants = range(wording.variants if wording.varies else 1)
    texts = [
        _variant(text, wording, seed, example.digest, which, variant)
        for (which, text), variant in product(enumerate(example.captions), variants)
    ]
    return list(dict.fromkeys([*texts, ""] if wording.dropout else texts))


def _variant(text: str, wording: Wording, seed: int, digest: str, which: int, variant: int) -> str:
    if not wording.varies and SEPARATOR not in text:
        return text
    front, middle, end = _parts(text, wording.keep)
    draws = generator(seed, digest, which, variant, "tags")
    if wording.tag_dropout:
        stays = torch.rand(len(middle), generator=draws) >= wording.tag_dropout
        middle = [tag for tag, stay in zip(middle, stays.tolist(), strict=True) if stay]
    if wording.shuffle:
        middle = [middle[k] for k in torch.randperm(len(middle), generator=draws).tolist()]
    return ", ".join([*front, *middle, *end])


def _parts(text: str, keep: int) -> tuple[list[str], list[str], list[str]]:
    """Tags that stay in front, that may move or go, and that stay at the end."""
    front, *rest = (_tags(part) for part in text.split(SEPARATOR))
    if not rest:
        return front[:keep], front[keep:], []
    return front, rest[0], [tag for tags in rest[1:] for tag in tags]


def _tags(text: str) -> list[str]:
    return [tag for tag in (part.strip() for part in text.split(",")) if tag]


# --- what files say


def wordings(lines: Sequence[str], where: object) -> list[str]:
    """The wordings of some lines, each once: one a line, and one for each choice of `{red|blue}`.

    where: file, for the error.

    Raises:
        DataError: there are more than 64, or one has control characters or half a character in it, which are no text.
    """
    if odd := next((found for line in lines if (found := _UNSAID.search(line))), None):
        near = odd.string[max(0, odd.start() - 20) : odd.start() + 20]
        remedy = "is it UTF-16? save it as UTF-8" if odd[0] == "\0" else "remove them"
        raise DataError(f"{where}: {near!r} has characters that are no text; {remedy}")
    split = [_WILDCARD.split(line) for line in lines if line.strip()]
    options = [[part.split("|") if k % 2 else [part] for k, part in enumerate(parts)] for parts in split]
    if (count := sum(math.prod(map(len, line)) for line in options)) > MOST_WORDINGS:
        raise DataError(
            f"{where}: {count} wordings of one picture, wanted {MOST_WORDINGS} at most; use fewer lines, "
            "or fewer {a|b} choices in a line"
        )
    texts = (" ".join("".join(choice).split()) for line in options for choice in product(*line))
    return [text for text in dict.fromkeys(texts) if text]


def beside(files: Sequence[Path], row: Sequence[str] = (), table: str = "") -> list[str]:
    """The wordings of a picture, of which its caption files, and its row of a table, must say the same.

    Raises:
        DataError: a file is not UTF-8 text, or two sources say different things.
    """
    sources = {table: list(row)} if row else {}
    sources |= {str(file): texts for file in files if (texts := wordings(text(file).splitlines(), file))}
    (first, said), *others = list(sources.items()) or [("", [])]
    for other, texts in others:
        if set(texts) != set(said):
            a, b = ([x for x in one if x not in two] or one for one, two in ((said, texts), (texts, said)))
            said_a, said_b = repr(a[0][:80]), repr(b[0][:80])
            raise DataError(f"{first} says {said_a} and {other} says {said_b} of one picture; remove one of them")
    return said


def text(file: Path, most: int = MOST_TEXT) -> str:
    """The text of a file. most: bytes.

    Raises:
        DataError: it cannot be read, is longer, or is not UTF-8.
    """
    try:
        return read(file, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        why = f"{error.reason} at byte {error.start:,}"
        raise DataError(f"{file}: not UTF-8 text ({why}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error


def table(file: Path) -> dict[str, list[str]]:
    """Wordings by picture, of a metadata.jsonl or metadata.csv as Hugging Face's imagefolder reads it.

    Names are relative to the table, parted by `/`. A picture with several rows has all their wordings.

    Raises:
        DataError: a row cannot be read, names no picture or one outside the folder, or has two different texts.
    """
    said: dict[str, list[str]] = {}
    for where, row in _rows(file):
        name = row.get("file_name")
        if not isinstance(name, str) or not name.strip():
            there = first_few([str(column)[:40] for column in row], 10)
            raise DataError(f"{where}: wanted 'file_name', the picture's name, among {there}")
        # as Windows reads it, so that a drive or a backslash does not get out either
        path = PureWindowsPath(name)
        if path.anchor or ".." in path.parts or not path.name:
            raise DataError(
                f"{where}: {name[:200]!r} is not inside the folder; move the picture there and name it from there"
            )
        said.setdefault(path.as_posix(), []).extend(_texts(row, where))
    return {name: wordings(list(dict.fromkeys(lines)), f"{file}: {name}") for name, lines in said.items()}


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = io.StringIO(text(file, MOST_TABLE), newline="")  # not splitlines: U+2028 may stand inside a text
    if file.suffix.lower() == ".csv":
        reader = csv.DictReader(lines, strict=True)
        try:
            columns = list(reader.fieldnames or ())
            if len(set(columns)) < len(columns):
                raise DataError(f"{file}:1: two columns of one name among {first_few(columns, 10)}; remove one")
            for row in reader:
                if None in row:
                    raise DataError(
                        f"{file}:{reader.line_num}: more values than columns; put texts with commas in quotes"
                    )
                yield f"{file}:{reader.line_num}", row
        except csv.Error as error:
            raise DataError(f"{file}:{reader.line_num}: not CSV ({error})") from error
        return
    for number_of_line, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}:{number_of_line}"
        try:
            row = json.loads(line, object_pairs_hook=_once)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({str(error)[:100]}); wanted one object a line") from error
        except RecursionError as error:
            raise DataError(f"{where}: nested too deeply; wanted a name and a text") from error
        if not isinstance(row, dict):
            raise DataError(f'{where}: wanted an object, {{"file_name": ..., "text": ...}}, not {line[:80]!r}')
        yield where, row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of JSON, in which the last of two values of one name would win unsaid."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name comes twice")
    return made


def _texts(row: dict[str, Any], where: str) -> list[str]:
    """The text, or list of texts, of a row; none when its column is empty or not there."""
    said = {column: row[column] for column in COLUMNS if row.get(column)}
    for column, value in said.items():
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(x, str) for x in value)):
            raise DataError(f"{where}: {column!r} is {repr(value)[:80]}, wanted a text or a list of texts")
    values = [value.splitlines() if isinstance(value, str) else value for value in said.values()]
    if any(value != values[0] for value in values):
        raise DataError(f"{where}: {' and '.join(map(repr, said))} say different things; remove one of them")
    return values[0] if values else []


def with_trigger(text: str, trigger: str | None, where: object) -> str:
    """`[trigger]` replaced by the trigger; a trigger that is nowhere in the text is put before it.

    Raises:
        DataError: the text has `[trigger]` and there is none.
    """
    if trigger is None:
        if PLACEHOLDER in text:
            raise DataError(f"{where}: the caption says {PLACEHOLDER}, and no trigger is given: --trigger ohwx")
        return text
    text = text.replace(PLACEHOLDER, trigger)
    return text if says(text, trigger) else f"{trigger}, {text}" if text else trigger


def says(text: str, trigger: str) -> bool:
    """Whether a text has the trigger, as whole words, in whatever case."""
    return re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text, re.IGNORECASE) is not None
