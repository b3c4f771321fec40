"""Recipes as text: TOML, read strictly and written the same way each time.

imgadapt = "0.1.0"          # the version that wrote it
rule = "ties"
rank = 16

[options]
density = 0.3

[[inputs]]
path = "style.safetensors"
weight = 0.8
sha256 = "5f1c..."
blocks = "OUTALL"
components = { te = 0.5 }
masks = { 'attn2\\.to_v' = 0.0 }
"""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from difflib import get_close_matches
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from imgadapt import toml
from imgadapt.combining.recipe import Entry, MergeRecipe, no_nul
from imgadapt.errors import ConfigError, FormatError

KEY = "imgadapt_recipe"
"""Of a file's metadata: the recipe it was made by."""
_VERSION, _OUTPUT = "imgadapt", "output"
_TEXTS = ("rule", "space", "base", "base_sha256", "dtype", "format")
_NUMBERS = ("error", "energy", "size")
_WHOLE = ("rank", "seed")
_MOST, _MOST_CHARACTERS = 500, 50_000
_OF_ENTRY = tuple(field.name for field in fields(Entry))


def to_toml(recipe: MergeRecipe, version: str = "") -> str:
    """A recipe as TOML, without what is as it is by default. version: of imgadapt."""
    lines = [f"{_VERSION} = {_value(version)}"] if version else []
    for field in fields(MergeRecipe):
        value = getattr(recipe, field.name)
        if field.name not in ("inputs", "options") and (value != field.default or field.name == "rule"):
            lines.append(f"{field.name} = {_value(value)}")
    if recipe.options:
        lines += ["", "[options]", *(f"{_key(name)} = {_value(v)}" for name, v in sorted(recipe.options.items()))]
    for entry in recipe.inputs:
        lines += ["", "[[inputs]]"]
        for field in fields(Entry):
            value = getattr(entry, field.name)
            default = field.default if field.default_factory is MISSING else {}
            if value != default or field.name in ("path", "weight"):
                lines.append(f"{field.name} = {_value(value)}")
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        rows: Mapping[str, Any] = value  # pyright: ignore[reportUnknownVariableType] # of a recipe
        return "{ " + ", ".join(f"{_key(name)} = {_value(inner)}" for name, inner in sorted(rows.items())) + " }"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if name.isascii() and name.replace("_", "a").replace("-", "a").isalnum() else _value(name)


def from_toml(text: str, where: object = "the recipe") -> MergeRecipe:
    """The recipe that a TOML text is.

    Raises:
        ConfigError: it is not TOML, has an unknown key or a value of another type, or is no recipe (see `MergeRecipe`).
    """
    return _recipe_of(toml.read(text, where), where)


def _recipe_of(table: Mapping[str, Any], where: object) -> MergeRecipe:
    data = dict(table)
    data.pop(_VERSION, None)
    _known(data, [*(field.name for field in fields(MergeRecipe)), _OUTPUT], where)
    _typed(output := data.pop(_OUTPUT, ""), str, "text", f"{where}: {_OUTPUT}")
    no_nul(output)
    for kinds, names, wanted in (
        (str, _TEXTS, "text"),
        (int | float, _NUMBERS, "a number"),
        (int, _WHOLE, "a whole number"),
        (bool, ("whole",), "true or false"),
        (dict, ("options",), "a table"),
        (list, ("inputs",), "[[inputs]] tables"),
    ):
        for name in (name for name in names if name in data):
            _typed(data[name], kinds, wanted, f"{where}: {name}")
    if "inputs" not in data:
        raise ConfigError(f"{where}: no [[inputs]]; each has a path, and most have a weight")
    _check_few(data["inputs"], where)
    data["inputs"] = tuple(_entry(row, f"{where}: input {k}") for k, row in enumerate(data["inputs"], 1))
    return MergeRecipe(**data)


def _check_few(rows: Sequence[Any], where: object) -> None:
    """Each mask, and each block, is looked for in all layers."""
    tables = [row.get(name) for row in rows if isinstance(row, dict) for name in ("masks", "blocks")]  # pyright: ignore[reportUnknownMemberType] # checked later
    said: list[str] = [key for table in tables if isinstance(table, dict) for key in table]
    for count, what, most in (
        (len(rows), "inputs", _MOST),
        (len(said), "masks and blocks", _MOST),
        (sum(map(len, said)), "characters of masks and blocks", _MOST_CHARACTERS),
    ):
        if count > most:
            raise ConfigError(f"{where}: {count:,} {what}; {most:,} are the most")


def _entry(row: Any, where: str) -> Entry:
    _typed(row, dict, "a table", where)
    _known(row, _OF_ENTRY, where)
    if "path" not in row:
        raise ConfigError(f"{where}: no path")
    for name in (name for name in ("path", "sha256") if name in row):
        _typed(row[name], str, "text", f"{where}: {name}")
    for name in (name for name in ("components", "masks") if name in row):
        _typed(row[name], dict, "a table of numbers", f"{where}: {name}")
    if isinstance(numbers := row.get("blocks"), list):  # pyright: ignore[reportUnknownVariableType] # checked here
        row = {**row, "blocks": ",".join(map(str, numbers))}  # pyright: ignore[reportUnknownArgumentType] # and later
    _typed(row.get("blocks", ""), str | dict, "a preset's name, a list of numbers or a table", f"{where}: blocks")
    return Entry(**row)


def _typed(value: Any, kinds: Any, wanted: str, where: str) -> None:
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise ConfigError(f"{where} is {value!r}; wanted {wanted}")


def _known(row: Mapping[str, Any], names: Collection[str], where: object) -> None:
    for name in row:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f", did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"{where}: unknown key '{name}'{hint}; there are: {', '.join(names)}")


def read_recipe(path: Path) -> tuple[MergeRecipe, Path | None]:
    """A recipe from a file, and the output that it names; relative paths in it start at its folder.

    Raises:
        ConfigError: see `from_toml`; or it cannot be read.
    """
    table = toml.read_file(path)
    recipe = _moved(_recipe_of(table, path), lambda name: os.path.normpath(path.parent / name))
    output: Any = table.get(_OUTPUT)
    return recipe, None if output is None else path.parent / output


def text_for(recipe: MergeRecipe, path: Path, version: str) -> str:
    """What a recipe's file at `path` says: relative paths start at its folder."""
    return to_toml(_moved(recipe, lambda name: _relative(name, path.parent)), version)


def _moved(recipe: MergeRecipe, move: Any) -> MergeRecipe:
    """The same with its relative paths moved."""

    def moved(name: str) -> str:
        return name if Path(name).is_absolute() else move(name)

    inputs = tuple(replace(entry, path=moved(str(entry.path))) for entry in recipe.inputs)
    base = recipe.base if recipe.base in (None, "demo") else moved(recipe.base)
    base = "./demo" if base == "demo" != recipe.base else base  # a folder of that name, and not the embedded base
    return replace(recipe, inputs=inputs, base=base)


def _relative(name: str, folder: Path) -> str:
    try:
        return os.path.relpath(name, folder)
    except ValueError:  # another drive
        return os.path.abspath(name)


def public(name: str) -> str:
    """A path as a file may tell it to others: of an absolute one, its last name only."""
    absolute = PurePath(name).is_absolute() or PureWindowsPath(name).is_absolute()
    return PureWindowsPath(name).name if "\\" in name and absolute else PurePath(name).name if absolute else name


def recipe_in(metadata: Mapping[str, str], where: object) -> tuple[MergeRecipe, str]:
    """The recipe that a file was made by, and the version of imgadapt that wrote it.

    Raises:
        FormatError: it has none.
    """
    text = metadata.get(KEY)
    if text is None:
        raise FormatError(f"{where} has no recipe in its metadata; was it made by `imgadapt merge`?")
    said = f"the recipe in {where}"
    table = toml.read(text, said)
    return _recipe_of(table, said), str(table.get(_VERSION, ""))
