"""Settings of methods as JSON: what imgadapt's own files say of their layers."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from imgadapt.methods import METHODS, Method


def described(method: Method) -> dict[str, Any]:
    """A method's name and all its fields."""
    values = {field.name: getattr(method, field.name) for field in fields(method)}
    return {
        "method": method.name,
        **{name: described(value) if isinstance(value, Method) else value for name, value in values.items()},
    }


def made_of(row: Mapping[str, Any]) -> Method:
    """The method that `described` says.

    Raises:
        ValueError: there is none such, or a field is none of its own or of another type.
        ConfigError: as the method says.
    """
    kind, values = _values(row)
    return kind(**{name: made_of(value) if isinstance(value, dict) else value for name, value in values.items()})


def check(row: Mapping[str, Any]) -> None:
    """Raises ValueError where `made_of` does."""
    for value in _values(row)[1].values():
        if isinstance(value, dict):
            check(cast("dict[str, Any]", value))


def _values(row: Mapping[str, Any]) -> tuple[type[Method], dict[str, Any]]:
    kind = next((m for m in METHODS if m.name == row["method"]), None)
    if kind is None or not set(row) - {"method"} <= set(_types(kind)):
        raise ValueError(f"no method {row}")
    return kind, {name: _typed(name, value, _types(kind)[name]) for name, value in row.items() if name != "method"}


@cache
def _types(kind: type[Method]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _typed(name: str, value: Any, wanted: Any) -> Any:
    """The value as a field of that type has it: JSON's lists are tuples."""
    if not _is(value, wanted):
        said = getattr(wanted, "__name__", str(wanted)) if isinstance(wanted, type) else str(wanted)
        raise ValueError(f"{name} is {value!r}, wanted {said}")
    return _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, cast("list[Any]", value))) if isinstance(value, list) else value


def _is(value: Any, wanted: Any) -> bool:
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return any(_is(value, one) for one in inner)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if origin is tuple:
        row = cast("list[Any]", value) if isinstance(value, list) else None
        return row is not None and (
            all(_is(one, inner[0]) for one in row)
            if inner[1:] == (...,)
            else len(row) == len(inner) and all(map(_is, row, inner))
        )
    if isinstance(wanted, type) and issubclass(wanted, Method):
        return isinstance(value, dict)
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return wanted in (bool, str, NoneType) and isinstance(value, wanted)
