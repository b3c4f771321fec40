"""Settings that are text. Names and words are written into files at the end: what cannot be written is to be known at
the beginning.
"""

import json
import re
from pathlib import Path
from typing import Any

from imgadapt.errors import ConfigError

MOST_TEXT = 100_000
"""Characters of a setting."""
_NAME = 255  # bytes of a file's name, in usual file systems
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def check(name: str, value: Any) -> None:
    """Raises ConfigError: a setting has words or paths that nothing can be done with."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"'{name}' is {short(str(value))}, which is not UTF-8 and cannot be written into files; rename it"
        ) from error
    if len(text) > MOST_TEXT:
        raise ConfigError(f"'{name}' has {len(text):,} characters, wanted {MOST_TEXT:,} at most")
    for one in _texts(value):
        if _CONTROL.search(one):
            raise ConfigError(f"'{name}' is {short(one)}, with control characters in it; remove them")
    paths = value if isinstance(value, list) else [value]
    for path in [Path(one) for one in paths if isinstance(one, Path) or name == "base"]:
        if long := too_long(path):
            raise ConfigError(f"'{name}' is {short(str(path))}: {long}")


def too_long(path: Path) -> str | None:
    """What is wrong with a path that no file system takes."""
    most = max((len(part.encode("utf-8", "replace")) for part in path.parts), default=0)
    return f"a name of {most:,} bytes in it, and file systems take {_NAME}" if most > _NAME else None


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for one in pair for text in _texts(one)]
    if isinstance(value, list | tuple):
        return [text for one in value for text in _texts(one)]
    return [str(value)] if isinstance(value, str | Path) else []


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text):,} characters)"
