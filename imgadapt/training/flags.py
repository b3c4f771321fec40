"""Settings from the command line and from TOML, and back to TOML."""

import argparse
import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic.fields import FieldInfo

from imgadapt import toml
from imgadapt.errors import ConfigError
from imgadapt.training.config import DreamBoothConfig, InversionConfig, TrainConfig

Config = TypeVar("Config", bound=TrainConfig)
_KINDS = (TrainConfig, DreamBoothConfig, InversionConfig)
_PATHS = ("folder", "output", "held_out", "cache", "class_folder")


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a TOML file; relative paths in it count from its folder.

    Raises:
        ConfigError: it is not there, or not TOML; see `toml.read`.
    """
    return checked(toml.read_file(path), path)


def checked(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Values of a TOML file at `path`: numbers are numbers, paths count from its folder.

    Raises:
        ConfigError: a setting that is a number is something else.
    """
    fields = {name: field for kind in _KINDS for name, field in kind.model_fields.items()}
    for key, value in values.items():
        field = fields.get(key)
        numeric = field is not None and {int, float} & {field.annotation, *get_args(field.annotation)}
        if numeric and isinstance(value, bool | str):
            raise ConfigError(f"{path}: '{key}' is {value!r}, wanted a number")
    base = values.get("base")
    if isinstance(base, str) and not Path(base).is_absolute() and _there(path.parent / base):
        values["base"] = str(path.parent / base)
    for key in _PATHS:
        if isinstance(values.get(key), str) and values[key]:
            values[key] = path.parent / values[key]
    if isinstance(models := values.get("score_with"), list):
        values["score_with"] = [path.parent / model if isinstance(model, str) else model for model in models]
    return values


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that nobody may look into
        return False


def write_toml(config: TrainConfig, why: Mapping[str, str] | None = None) -> str:
    """All settings of a config as TOML, each with its description, or with the reason for its value."""
    lines: list[str] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        comment = (why or {}).get(name) or field.description
        text = "" if value is None else _toml(value.absolute() if isinstance(value, Path) else value)
        lines.append(f"{'# ' if value is None else ''}{name} = {text}".rstrip() + f"  # {comment}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False).replace("\x7f", "\\u007f")


_ELSEWHERE = {  # what sd-scripts, diffusers' examples and ai-toolkit call it
    **dict.fromkeys(("lr", "unet-lr"), "--learning-rate"),
    **dict.fromkeys(("text-encoder-lr", "te-lr"), '--targets transformer text --learning-rates "text_encoder*=5e-5"'),
    **dict.fromkeys(("network-dim", "dim"), "--rank"), "network-alpha": "--alpha", "network-module": "--method",
    **dict.fromkeys(("max-train-steps", "max-train-epochs", "epochs", "num-train-epochs"), "--steps"),
    **dict.fromkeys(("train-data-dir", "instance-data-dir", "data-dir"), "the folder, without a flag"),
    **dict.fromkeys(("pretrained-model-name-or-path", "model", "model-name"), "--base"),
    **dict.fromkeys(("output-dir", "output-folder"), "--output"), **dict.fromkeys(("name", "output-name"), "--title"),
    **dict.fromkeys(("resume", "resume-from-checkpoint"), "the same command again, which goes on by itself"),
    "overwrite": "another --output, or its folder removed",
    **dict.fromkeys(("repeats", "num-repeats"), "a folder called N_concept in the one given"),
    "gradient-checkpointing": "--checkpointing", "gradient-accumulation-steps": "--pieces (of --batch-size)",
    "train-batch-size": "--batch-size (of the whole step)", "mixed-precision": "--precision",
    **dict.fromkeys(("save-every", "save-every-n-steps", "save-every-n-epochs", "checkpointing-steps"),
                    "--checkpoint-every to go on from, --evaluate-every for snapshots"),
    **dict.fromkeys(("token", "placeholder-token", "token-string"), "--word"),
    **dict.fromkeys(("initializer-token", "init-word"), "--initial"), "num-vectors": "--vectors",
    "instance-prompt": "--caption", "class-data-dir": "--class-folder", "num-class-images": "--class-count",
    "prior-loss-weight": "--preservation-weight", "with-prior-preservation": "--preservation classic",
    "lr-scheduler": "--schedule", "lr-warmup-steps": "--warmup-steps", "optimizer-type": "--optimizer",
    "snr-gamma": "--min-snr-gamma", "caption-dropout-rate": "--caption-dropout", "keep-tokens": "--keep-tags",
    "shuffle-caption": "--shuffle-tags", "blocks-to-swap": "--swap-blocks",
    "use-8bit-adam": "--optimizer adamw8bit", "validation-prompt": "--sample-prompts",
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """One that names the nearest flag."""

    def error(self, message: str) -> Any:
        if message.startswith("unrecognized arguments: "):
            given = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
            there = [flag for flag in self._option_string_actions if not flag.startswith("--no-")]
            other = _ELSEWHERE.get(given.lstrip("-").replace("_", "-"))
            near = get_close_matches(given[:60], there, n=1, cutoff=0.7)
            hint = f"here it is {other}" if other else f"did you mean {near[0]}?" if near else "--help lists them all"
            message = f"unknown flag {given}: {hint}"
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser(description: str, *kinds: type[TrainConfig]) -> argparse.ArgumentParser:
    """A command line with `FOLDER`, `--config FILE` and a flag for every field of the kinds of config."""
    made = _Parser(
        usage="%(prog)s [FOLDER] [--config FILE] [--SETTING VALUE ...]", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    made.add_argument("folder", nargs="?", type=Path, default=None, help=TrainConfig.model_fields["folder"].description)
    made.add_argument("--config", type=Path, help="TOML with any of these settings; flags win over it")
    for name, field in {name: field for kind in kinds for name, field in kind.model_fields.items()}.items():
        if name != "folder":
            _add_flag(made, name, field)
    return made


def _add_flag(made: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    default = "" if field.is_required() or field.default in (None, [], {}) else f" [{field.default}]"
    text = f"{field.description}{default}".replace("%", "%%")
    flag, origin = f"--{name.replace('_', '-')}", get_origin(field.annotation)
    if field.annotation is bool:
        made.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif origin is dict:
        made.add_argument(flag, nargs="*", default=None, help=text, metavar="NAME=VALUE", type=_pair)
    elif origin is list or origin is tuple:
        made.add_argument(flag, nargs="*", default=None, help=text, metavar=name.rpartition("_")[2].upper())
    else:
        made.add_argument(flag, default=None, help=text, metavar=name.rpartition("_")[2].upper())


def _pair(text: str) -> tuple[str, Any]:
    """`unet.*=16`: split at the first `=`, for methods have some in their brackets."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}': wanted NAME=VALUE")
    return name, {"true": True, "false": False}.get(value, value)


def from_arguments(args: argparse.Namespace, kind: type[Config]) -> Config:
    """The config that parsed flags, and the TOML they name, give.

    Raises:
        ConfigError: see `TrainConfig.of` and `read_toml`.
    """
    return kind.of(given(args, kind))


def given(args: argparse.Namespace, *kinds: type[TrainConfig]) -> dict[str, Any]:
    """What flags and TOML say, and nothing else.

    Raises:
        ConfigError: see `read_toml`.
    """
    values = read_toml(args.config) if args.config else {}
    fields = {name: field for kind in kinds for name, field in kind.model_fields.items()}
    flags = {key: value for key, value in vars(args).items() if key in fields and value is not None}
    pairs = {key: dict(value) for key, value in flags.items() if get_origin(fields[key].annotation) is dict}
    return {**values, **flags, **pairs}
