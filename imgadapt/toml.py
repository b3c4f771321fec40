"""TOML from anyone, read within bounds: recipes come in files from the internet, and configs are passed on, too."""

import re
import tomllib
from pathlib import Path
from typing import Any

from imgadapt import reading
from imgadapt.errors import ConfigError

MOST_BYTES = 2**20
"""Of a text; those of this toolkit have some thousands."""
_DEEPEST = 32
_BEYOND = 2**63  # whole numbers have 64 bits in TOML
# a key of very many parts takes tomllib the square of them
_DEEP_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){33}""", re.ASCII)


def read_file(path: Path) -> dict[str, Any]:
    """The table that a file is.

    Raises:
        ConfigError: it cannot be read, has more than `MOST_BYTES`, is not UTF-8, or see `read`.
    """
    try:
        text = reading.read(path, MOST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start:,})") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); wanted a TOML file") from error
    return read(text, path)


def read(text: str, where: object) -> dict[str, Any]:
    """The table that a text is. where: for the error.

    Raises:
        ConfigError: it is not TOML, is nested deeply, is long, or has a whole number of more than 64 bits.
    """
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{where}: more than {MOST_BYTES:,} characters of TOML")
    if _DEEP_KEY.search(text):
        raise ConfigError(f"{where}: a key of more than {_DEEPEST} parts")
    try:
        table = tomllib.loads(text.replace("\r\n", "\n"))
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, dates that are none, deep nesting
        raise ConfigError(f"{where}: not TOML: {str(error)[:200]}") from error
    _check(table, where)
    return table


def _check(table: dict[str, Any], where: object) -> None:
    rows: list[Any] = [table]
    for _ in range(_DEEPEST):
        rows = [inner for row in rows for inner in (row.values() if isinstance(row, dict) else row)]
        if any(isinstance(row, int) and not -_BEYOND <= row < _BEYOND for row in rows):
            raise ConfigError(f"{where}: a whole number of more than 64 bits")
        rows = [row for row in rows if isinstance(row, dict | list)]
    if rows:
        raise ConfigError(f"{where}: nested more than {_DEEPEST} deep")
