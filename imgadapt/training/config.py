"""TrainConfig: every setting of a training, from TOML and flags, strict."""

import argparse
import json
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from imgadapt.errors import ConfigError


class TrainConfig(BaseModel):
    """What to train on what; each field is a TOML key and a flag (`learning_rate`, `--learning-rate`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    folder: Path = Field(description="pictures, each with its caption in a .txt or .caption file of its name")
    base: str = Field("demo", description="'demo', a diffusers folder, or a checkpoint file whose configs are cached")
    output: Path = Field(Path("adapter_out"), description="folder for adapter.safetensors, checkpoints, log, samples")
    steps: int = Field(1000, ge=1, description="optimiser steps")
    seed: int = Field(0, ge=0, lt=2**63, description="the same seed gives the same file on the same machine")

    rank: int = Field(16, ge=1, description="rank of the LoRA")
    alpha: float | None = Field(None, gt=0, description="the change is scaled by alpha / rank; rank when not given")
    rank_stabilised: bool = Field(False, description="scale by alpha / sqrt(rank) (rsLoRA)")
    targets: list[str] = Field(["transformer"], description="presets and globs of layers; '!glob' leaves out")

    learning_rate: float = Field(1e-4, gt=0, description="AdamW's peak rate")
    warmup_steps: int = Field(20, ge=0, description="steps from 0 to the peak; then a cosine to 0")
    weight_decay: float = Field(1e-3, ge=0, description="AdamW's")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    batch_size: int = Field(4, ge=1, description="pictures a step")
    min_snr_gamma: float | None = Field(None, gt=0, description="min-SNR weighting (5 is usual); off when not given")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the frozen base; the adapter is fp32")

    resolution: int | None = Field(None, ge=8, description="pixels of the square crop; the base's own when not given")
    flip: bool = Field(False, description="train on mirror images, too")
    caption: str | None = Field(None, description="for pictures that have no caption file")
    caption_dropout: float = Field(0.05, ge=0, le=1, description="share of pictures trained without caption")

    held_out: Path | None = Field(None, description="pictures never trained on; their loss is measured")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints; the last two are kept")
    sample_prompts: list[str] = Field([], description="drawn at the end (and at checkpoints, see sample_every)")
    sample_every: int | None = Field(None, ge=1, description="steps between samples; only at the end when not given")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """A config of these values.

        Raises:
            ConfigError: a key is unknown (the nearest is named), lacking, of the wrong type or out of range.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(row, list(cls.model_fields)) for row in error.errors())) from error

    def identity(self, fingerprint: Mapping[str, str]) -> dict[str, str]:
        """What decides the result, as text: settings (but for paths and what is only watched) and fingerprints."""
        watched = {"folder", "output", "base", "held_out", "checkpoint_every", "sample_prompts", "sample_every"}
        watched |= {"caption", "resolution"}  # in the fingerprints, as what they come to
        settings = self.model_dump(mode="json", exclude=watched)
        return {**{key: json.dumps(value) for key, value in settings.items()}, **fingerprint}


def _explain(row: Any, known: Sequence[str]) -> str:
    key = ".".join(str(part) for part in row["loc"])
    if row["type"] == "extra_forbidden":
        near = get_close_matches(key, known, n=1)
        return f"unknown key '{key}'" + (f", did you mean '{near[0]}'?" if near else f"; there are: {', '.join(known)}")
    if row["type"] == "missing":
        return f"'{key}' is not given"
    return f"'{key}' is {row['input']!r}: {row['msg'][0].lower()}{row['msg'][1:]}"


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a TOML file; relative paths in it count from its folder.

    Raises:
        ConfigError: it is not there, or not TOML.
    """
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    for key in ("steps", "seed", "rank", "batch_size", "alpha", "learning_rate"):
        if isinstance(values.get(key), bool | str):
            raise ConfigError(f"{path}: '{key}' is {values[key]!r}, wanted a number")
    for key in ("folder", "output", "held_out"):
        if isinstance(values.get(key), str):
            values[key] = path.parent / values[key]
    return values


def parser(description: str) -> argparse.ArgumentParser:
    """A command line with `FOLDER`, `--config FILE` and a flag for every field of TrainConfig."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("folder", nargs="?", type=Path, default=None, help=TrainConfig.model_fields["folder"].description)
    made.add_argument("--config", type=Path, help="TOML with any of these settings; flags win over it")
    for name, field in TrainConfig.model_fields.items():
        if name != "folder":
            _add_flag(made, name, field)
    return made


def _add_flag(made: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    default = "" if field.default in (None, []) else f" [{field.default}]"
    text = f"{field.description}{default}".replace("%", "%%")
    flag = f"--{name.replace('_', '-')}"
    if field.annotation is bool:
        made.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif get_origin(field.annotation) is list:
        made.add_argument(flag, nargs="*", default=None, help=text, metavar="TEXT")
    else:
        made.add_argument(flag, default=None, help=text, metavar=name.rpartition("_")[2].upper())


def from_arguments(args: argparse.Namespace) -> TrainConfig:
    """The config that parsed flags, and the TOML they name, give.

    Raises:
        ConfigError: see `TrainConfig.of` and `read_toml`.
    """
    values = read_toml(args.config) if args.config else {}
    flags = {key: value for key, value in vars(args).items() if key in TrainConfig.model_fields and value is not None}
    return TrainConfig.of({**values, **flags})
