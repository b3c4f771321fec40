"""Asking: the arguments of a command that merges, as a recipe."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

from imgadapt.combining.recipe import DTYPES, Entry, MergeRecipe, Setting
from imgadapt.combining.recipes import read_recipe
from imgadapt.combining.rules import RULES
from imgadapt.errors import ConfigError
from imgadapt.formats import FORMATS

_AMOUNTS = ("rank", "error", "energy", "size", "whole")
_PLAIN = ("rule", "space", *_AMOUNTS, "seed", "base", "dtype", "format")
OPTIONS = tuple(sorted({name for rule in RULES for name in rule.options}))
"""Options of any rule; each is a flag, too."""


def add_arguments(parser: argparse.ArgumentParser, *, adapter: bool = True) -> None:
    """adapter: whether one is written, which has a rank, a dtype and a format (and is not baked into a base)."""
    parser.add_argument(
        "inputs", nargs="*", metavar="FILE[:WEIGHT]", help="adapters of any tool with weights (1), or one recipe.toml"
    )
    rule = parser.add_argument_group("how they are merged")
    rule.add_argument(
        "--rule", help="a row of --list; default: weighted, the exact sum" + " (svd, with --rank)" * adapter
    )
    rule.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="a setting of the rule; or --NAME VALUE"
    )
    for name in OPTIONS:
        rule.add_argument(_flag(name), dest=f"option_{name}", metavar="VALUE", help=argparse.SUPPRESS)
    rule.add_argument("--space", choices=["delta", "core"], help="core: merge small matrices in the basis all share")
    rule.add_argument("--seed", type=int, help="of rules that draw lots")
    if adapter:
        amount = parser.add_argument_group("how much is kept (one of)")
        amount.add_argument("--rank", type=int, help="of every layer")
        amount.add_argument("--error", type=float, help="relative Frobenius error of the whole")
        amount.add_argument("--energy", type=float, help="part of the squared norm of the whole")
        amount.add_argument("--size", type=float, help="megabytes of the file")
        amount.add_argument(
            "--whole", action="store_true", default=None, help="of rules that look at elements: whole differences"
        )
    weights = parser.add_argument_group("weights of parts; for one input: INPUT is its number, name or name's stem")
    weights.add_argument("--te", action="append", default=[], metavar="[INPUT=]W", help="of the text encoders")
    weights.add_argument("--unet", action="append", default=[], metavar="[INPUT=]W", help="of the UNet or transformer")
    weights.add_argument(
        "--blocks", action="append", default=[], metavar="[INPUT=]LIST", help="a preset (OUTALL), 12, 17, 20, 26 or 61 "
        "numbers with commas, or '[INPUT:]BLOCK=W', of a block (IN04) or a glob over layers"
    )  # fmt: skip
    weights.add_argument(
        "--mask", action="append", default=[], metavar="[INPUT:]REGEX=W", help="of layers whose name matches"
    )
    if adapter:
        parser.add_argument("--base", help="the base (or demo), for DoRA, OFT and others that read its weights")
        parser.add_argument("--dtype", choices=DTYPES, help="of the tensors; default: the inputs', if it is one")
        parser.add_argument(
            "--format", choices=[form.name for form in FORMATS], help="default: the inputs', if it is one"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def recipe_of(args: argparse.Namespace) -> MergeRecipe:
    """What the arguments ask for; with a recipe's file, that with what else is asked for changed, and `args.output` the
    one that it names where none is given.

    Raises:
        ConfigError: see `MergeRecipe`, `read_recipe`; or arguments that are none.
    """
    given = {name: getattr(args, name, None) for name in _PLAIN}
    given = {
        name: str(value) if isinstance(value, Path) else value for name, value in given.items() if value is not None
    }
    recipe: MergeRecipe | None = None
    if any(name.lower().endswith(".toml") for name in args.inputs):
        if len(args.inputs) > 1:
            raise ConfigError(f"a recipe has its own inputs: give {args.inputs[0]} alone")
        recipe, output = read_recipe(Path(args.inputs[0]))
        if getattr(args, "output", None) is None:
            args.output = _inside(output, Path(args.inputs[0]))
        entries = list(recipe.inputs)
    else:
        entries = [entry_of(text) for text in args.inputs]
    if not entries:
        raise ConfigError("nothing to merge: name the adapters, as in A.safetensors:0.8 B.safetensors")
    labels = [_labels(str(entry.path), k) for k, entry in enumerate(entries, 1)]
    for flag, component in (("te", "te"), ("unet", "denoiser")):
        for text in getattr(args, flag):
            _set_component(entries, labels, text, f"--{flag}", component)
    for text in args.blocks:
        _set_blocks(entries, labels, text)
    for text in args.mask:
        which, regex, value = _part(labels, text, "--mask")
        for k in which:
            entries[k] = replace(entries[k], masks={**entries[k].masks, regex: value})
    settings: dict[str, Any] = {"inputs": tuple(entries), **given}
    asked = any(name in given for name in _AMOUNTS)
    if recipe is None:
        name = given.get("rule", "svd" if asked and not given.get("whole") else "weighted")
        settings |= {"rule": name, "options": _options(args, name)}
        return MergeRecipe(**settings)
    if asked:
        settings = {**dict.fromkeys(_AMOUNTS[:-1]), "whole": False, **settings}
    name = given.get("rule", recipe.rule)
    kept = recipe.options if name == recipe.rule else {}
    return replace(recipe, **settings, options={**kept, **_options(args, name)})


def entry_of(text: str) -> Entry:
    """`A.safetensors:-0.5`. A colon of a drive (`C:\\A.safetensors`) or of a name that there is begins no weight.

    Raises:
        ConfigError: a weight that is no number.
    """
    path, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists() or "\\" in tail or "/" in tail:
        return Entry(text)
    return Entry(path, _number(tail, f"the weight of {path or text}"))


def _number(text: str, what: str) -> float:
    if not _is_number(text):
        raise ConfigError(f"{what} is '{text}'; it must be a finite number")
    return float(text)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _labels(path: str, number: int) -> set[str]:
    name = PureWindowsPath(path).name
    return {str(number), path, name, PureWindowsPath(path).stem}


def _which(labels: Sequence[set[str]], label: str, flag: str) -> list[int]:
    """The input that a label means.

    Raises:
        ConfigError: none, or several.
    """
    found = [k for k, own in enumerate(labels) if label in own]
    if len(found) != 1:
        known = ", ".join(f"{k} ({max(own - {str(k)}, key=len)})" for k, own in enumerate(labels, 1))
        raise ConfigError(f"{flag}: '{label}' is {'no' if not found else 'more than one'} input; there are: {known}")
    return found


def _part(labels: Sequence[set[str]], text: str, flag: str) -> tuple[list[int], str, float]:
    """`[INPUT:]WHAT=W` -> which inputs (all of them where none is named), what, and the number."""
    left, equals, right = text.rpartition("=")
    if not equals or not left:
        raise ConfigError(f"{flag} {text}: wanted [INPUT:]{'REGEX' if flag == '--mask' else 'BLOCK'}=NUMBER")
    value = _number(right, f"{flag} {left}")
    for k in range(len(left)):
        if left[k] == ":" and any(left[:k] in own for own in labels):
            return _which(labels, left[:k], flag), left[k + 1 :], value
    return list(range(len(labels))), left, value


def _inside(output: Path | None, recipe: Path) -> Path | None:
    """Raises ConfigError: a recipe, which may be anyone's, would have something written outside of its folder."""
    folder = recipe.parent.resolve()
    if output is not None and folder not in output.resolve().parents:
        raise ConfigError(f"{recipe}: its output is {output}, outside of its folder; say where it goes with --output")
    return output


def _set_component(entries: list[Entry], labels: Sequence[set[str]], text: str, flag: str, component: str) -> None:
    label, equals, right = text.rpartition("=")
    value = _number(right, flag)
    for k in _which(labels, label, flag) if equals else range(len(entries)):
        entries[k] = replace(entries[k], components={**entries[k].components, component: value})


def _set_blocks(entries: list[Entry], labels: Sequence[set[str]], text: str) -> None:
    label, equals, right = text.rpartition("=")
    if not equals or any(label in own for own in labels):
        for k in _which(labels, label, "--blocks") if equals else range(len(entries)):
            if not isinstance(entries[k].blocks, str):
                raise ConfigError(f"--blocks {text}: {entries[k].path} has weights of single blocks already")
            entries[k] = replace(entries[k], blocks=right if equals else text)
        return
    if not _is_number(right):
        _which(labels, label, "--blocks")
    which, block, value = _part(labels, text, "--blocks")
    for k in which:
        before = entries[k].blocks
        if isinstance(before, str) and before:
            raise ConfigError(f"--blocks {text}: {entries[k].path} has a list of block weights already")
        entries[k] = replace(entries[k], blocks={**(before if not isinstance(before, str) else {}), block: value})


def _options(args: argparse.Namespace, rule: str) -> dict[str, Setting]:
    """Settings of the rule, in the types that it has them in; those that it has not are left for it to refuse."""
    texts = {name: getattr(args, f"option_{name}") for name in OPTIONS}
    texts = {name: text for name, text in texts.items() if text is not None}
    for text in args.option:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--option {text}: wanted NAME=VALUE, as density=0.3")
        texts[name.replace("-", "_")] = value
    known = next((row.options for row in RULES if row.name == rule), {})
    return {name: _setting(name, text, known[name].default) if name in known else text for name, text in texts.items()}


def _setting(name: str, text: str, default: Setting) -> Setting:
    """In the type of the default; a text that is none of it, for the rule to refuse."""
    if isinstance(default, bool):
        return _truth(text)
    return text if isinstance(default, str) else _number(text, name)


def _truth(text: str) -> bool | str:
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(text.lower(), text)
