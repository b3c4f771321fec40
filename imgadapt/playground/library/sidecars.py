"""Sidecars: what other tools put beside an adapter: its preview, and what its maker says of it."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from imgadapt.errors import DataError
from imgadapt.playground.decoding import decoded
from imgadapt.playground.library.cards import plain

PREVIEWS = (".preview.png", ".png", ".jpg", ".jpeg", ".webp", ".preview.jpg", ".preview.jpeg", ".preview.webp")
"""A1111's first, then what ComfyUI's LoRA Manager and others take."""
TEXTS = (".json", ".metadata.json", ".civitai.info")
"""A1111's user metadata, LoRA Manager's, the Civitai helper's; what the first says holds."""
_MOST = 2**20  # bytes of a text
_PICTURE = 32 * 2**20  # bytes
_WORDS = 20


@dataclass(frozen=True)
class Said:
    """What the texts beside a file say. weight: None: nothing."""

    weight: float | None = None
    trigger: Sequence[str] = ()
    notes: str = ""


def texts_of(stem: str, beside: Mapping[str, str]) -> list[str]:
    """Names of the texts beside a file. beside: lower-case name -> name, of its folder."""
    return [beside[name] for end in TEXTS if (name := f"{stem}{end}".lower()) in beside]


def preview_of(stem: str, beside: Mapping[str, str]) -> str | None:
    """The name of the picture beside a file."""
    return next((beside[name] for end in PREVIEWS if (name := f"{stem}{end}".lower()) in beside), None)


def said_in(paths: Sequence[Path]) -> Said:
    """What they say; those that are broken or too large say nothing."""
    rows = [row for path in paths if (row := _table(path))]
    weights = [weight for row in rows if (weight := _weight(row.get("preferred weight"))) is not None]
    words = next((words for row in rows if (words := _trigger(row))), [])
    notes = next((text for row in rows for key in ("description", "notes") if (text := _text(row.get(key)))), "")
    return Said(weights[0] if weights else None, words, notes)


def _table(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > _MOST:
            return {}
        said: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", said) if isinstance(said, dict) else {}


def _weight(value: Any) -> float | None:
    """A1111 writes 0 where nothing was chosen."""
    try:
        number = float(value) if not isinstance(value, bool) else 0.0
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number and math.isfinite(number) and abs(number) <= 10 else None


def _trigger(row: Mapping[str, Any]) -> list[str]:
    if text := _text(row.get("activation text")):
        return [text]
    inner: Any = row.get("civitai")
    table = cast("dict[str, Any]", inner) if isinstance(inner, dict) else row
    words: Any = table.get("trainedWords")
    listed = cast("list[Any]", words) if isinstance(words, list) else []
    return [text for word in listed[:_WORDS] if (text := _text(word))]


def _text(value: Any) -> str:
    return plain(value, 1000) if isinstance(value, str) else ""


def thumbnail(data: bytes, side: int, most_pixels: int) -> bytes:
    """A picture as WebP of at most `side` x `side` pixels; it is sized up before it is decoded.

    Raises:
        DataError: it is no picture, is broken, or has too many pixels.
    """
    small = decoded(data, most_pixels)
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=85)
    return file.getvalue()


def picture_bytes(path: Path) -> bytes:
    """Of a picture's file.

    Raises:
        DataError: it is gone, is no plain file, or is too large.
    """
    try:
        if not path.is_file() or path.stat().st_size > _PICTURE:
            raise DataError("no plain file, or one of more than 32 MB")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from error
