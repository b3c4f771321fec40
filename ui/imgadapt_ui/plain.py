"""Plain: results as the API's JSON. Ids and addresses go out; paths and owners do not."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from imgadapt.playground.converting import Converted
from imgadapt.playground.grids.grids import Grid
from imgadapt.playground.library.library import Card
from imgadapt.playground.pictures.album import Picture

_KEPT_BACK = {"owner", "path", "record"}


def plain(value: Any) -> Any:
    """JSON of a result: a dataclass is a table, what is not finite is null."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return {**_fields(value), **_more(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | int) or value is None:
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain(inner) for inner in value]  # pyright: ignore[reportUnknownVariableType]
    raise TypeError(f"{type(value).__name__} is not for clients")


def _fields(value: Any) -> dict[str, Any]:
    """A dataclass's fields, without those that are not told (they are not in its repr either)."""
    told = {one.name: getattr(value, one.name) for one in fields(value) if one.repr and one.name not in _KEPT_BACK}
    return {name: plain(one) for name, one in told.items() if not isinstance(one, Path | bytes)}


def _more(value: Any) -> dict[str, Any]:
    """Where what a client may fetch is."""
    match value:
        case Picture():
            return {"url": f"/pictures/{value.id}", "record": plain(value.record)}
        case Card():
            preview = f"/cards/{value.id}/preview" if value.preview else None
            return {"url": f"/cards/{value.id}/file", "preview": preview}
        case Converted():
            return {"url": f"/converted/{value.id}"}
        case Grid():
            return {"url": f"/grids/{value.id}/export"}
        case _:
            return {}
