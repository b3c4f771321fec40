"""Methods as settings spell them: `lora`, `lokr(factor=8)`, `dora(loha(rank=4))`."""

import ast
import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any

from imgadapt import prompting
from imgadapt.errors import ConfigError, first_few
from imgadapt.methods import METHODS, DoRA, LoRA, Method
from imgadapt.prompting import Prompting

Trained = Method | Prompting

_SHOWN = 200  # characters of what cannot be read
_KINDS: Mapping[str, type[Trained]] = {kind.name: kind for kind in (*METHODS, *prompting.KINDS)}


def _squeezed(name: str) -> str:
    """T-LoRA, t_lora and tlora are one."""
    return re.sub(r"[-_ ]", "", name).lower()


_SQUEEZED: Mapping[str, str] = {_squeezed(name): name for name in _KINDS}


def kind_of(name: str) -> type[Trained]:
    """The method of this name.

    Raises:
        ConfigError: there is none; the nearest is named.
    """
    found = _KINDS.get(_SQUEEZED.get(_squeezed(name), name))
    if found is None:
        near = get_close_matches(name, _KINDS, n=1)
        raise ConfigError(
            f"no method '{name}'" + (f", did you mean '{near[0]}'?" if near else f"; there are: {', '.join(_KINDS)}")
        )
    return found


def method(text: str, defaults: Mapping[str, Any]) -> Trained:
    """What `lora`, `lokr(factor=8)`, `dora(loha(rank=4))` or `prompt_tuning(tokens=8)` says.

    defaults: rank, alpha and the like, for methods that have such a field and are not told otherwise.

    Raises:
        ConfigError: no such method or field, or a value that it does not take.
    """
    head, bracket, rest = text.strip().partition("(")
    called = _SQUEEZED.get(_squeezed(head), head)  # Python reads no name with a dash in it
    try:
        return _made(ast.parse(called + bracket + rest, mode="eval").body, defaults)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:  # as Python's parser raises them
        raise ConfigError(f"method '{text[:_SHOWN]}' is not NAME or NAME(field=value, ...): {error}") from error


def _made(node: ast.AST, defaults: Mapping[str, Any]) -> Trained:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])  # pyright: ignore[reportArgumentType] # checked next
    if not isinstance(call.func, ast.Name) or any(word.arg is None for word in call.keywords):
        raise ValueError("wanted a name, and fields by name")
    name = call.func.id.lower()
    kind = kind_of(name)
    known = [field.name for field in fields(kind)]
    if kind is DoRA:
        if len(call.args) > 1 or any(word.arg == "inner" for word in call.keywords):
            raise ConfigError("dora takes one method in its brackets, and fields by name: dora(loha(rank=4))")
        inner = _made(call.args[0], defaults) if call.args else LoRA(**_fitting(LoRA, defaults))
        values: dict[str, Any] = {"inner": inner}
    elif call.args:
        raise ValueError(f"{name} takes its fields by name: {', '.join(known)}")
    else:
        values = _fitting(kind, defaults)
    for word in call.keywords:
        if word.arg not in known:
            raise ConfigError(f"{name} has no field '{word.arg}'; it has: {', '.join(known)}")
        try:
            named = {"true": True, "false": False}.get(getattr(word.value, "id", ""))  # as TOML spells them
            values[word.arg] = ast.literal_eval(word.value) if named is None else named
        except ValueError:
            said = ast.unparse(word.value)
            raise ConfigError(
                f"{name}: {word.arg} is {said}; wanted a number, true or false, or text in quotes"
            ) from None
    bare = [field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING]
    if lacking := [one for one in bare if one not in values]:
        raise ConfigError(f"{name} needs {first_few(lacking)}: {name}({lacking[0]}=...)")
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}") from error


def _fitting(kind: type[Trained], defaults: Mapping[str, Any]) -> dict[str, Any]:
    own = inspect.signature(kind).parameters
    return {name: value for name, value in defaults.items() if name in own and value is not None}


def innermost(method: Trained) -> Trained:
    """What DoRA is over; others as they are."""
    return method.inner if isinstance(method, DoRA) else method
