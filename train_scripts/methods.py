"""The methods that `--method` takes: their settings, the learning rate that suits them, and what each one does.

imgadapt methods                 # all, a line each
imgadapt methods lokr oft        # what they do, in formulas
imgadapt methods --json

The rate is in LoRA's, and `--learning-rate` is that by itself where it is not given. Which to take: docs/methods.md.
"""

import argparse
import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any, get_args

from imgadapt.cli import program
from imgadapt.errors import ConfigError
from imgadapt.methods import METHODS, DoRA
from imgadapt.prompting import KINDS
from imgadapt.training import spelling
from imgadapt.training.config import Start


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="some of them")
    parser.add_argument("--json", action="store_true", help="for scripts")
    args = parser.parse_args(argv)
    if starts := [name for name in args.names if name in get_args(Start)]:
        raise ConfigError(f"{starts[0]} is where LoRA starts: --start {starts[0]}; docs/training.md has them")
    kinds = [spelling.kind_of(name.partition("(")[0]) for name in args.names] or [*METHODS, *KINDS]
    if args.json:
        print(json.dumps({kind.name: _about(kind) for kind in kinds}, indent=1))
    elif args.names:
        print(
            "\n\n".join(f"{_called(kind)}\n{_rate(kind)}\n\n{inspect.cleandoc(kind.__doc__ or '')}" for kind in kinds)
        )
    else:
        wide = max(len(kind.name) for kind in kinds)
        for kind in kinds:
            print(
                f"{kind.name:{wide}}  rate x{kind.rate_over_lora:<6g}  {_called(kind).partition('(')[2][:-1]}".rstrip()
            )
        print("\nimgadapt methods NAME says what it does; docs/methods.md which to take.")


def _called(kind: type[spelling.Trained]) -> str:
    said = [
        "lora(rank=16)" if kind is DoRA and name == "inner" else f"{name}={value}" for name, value in _settings(kind)
    ]
    return f"{kind.name}({', '.join(said)})"


def _settings(kind: type[spelling.Trained]) -> list[tuple[str, Any]]:
    """Names and defaults; `...` where it must be given."""
    return [
        (one.name, "..." if one.default is MISSING and one.default_factory is MISSING else _default(one))
        for one in fields(kind)
    ]


def _default(one: Any) -> Any:
    value = one.default_factory() if one.default is MISSING else one.default
    return repr(value) if isinstance(value, str) else value


def _rate(kind: type[spelling.Trained]) -> str:
    return f"learning rate: {kind.rate_over_lora:g} times LoRA's"


def _about(kind: type[spelling.Trained]) -> dict[str, Any]:
    return {
        "settings": {name: str(value) for name, value in _settings(kind)},
        "rate_over_lora": kind.rate_over_lora,
        "about": inspect.cleandoc(kind.__doc__ or ""),
    }


if __name__ == "__main__":
    program(main, sys.argv[1:])
