"""The settings of a training: each is a TOML key and a flag; unknown ones are errors."""

import json
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from imgadapt.errors import ConfigError
from imgadapt.training import rates, texts
from imgadapt.training.report import scores

Precision = Literal["fp32", "bf16", "fp16"]
Start = Literal["pissa", "olora", "orthogonal", "eva", "corda", "lora_ga", "loftq"]
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adafactor", "lion", "schedule-free", "came")
_NO_CAPTION = "trained without caption"
_SAID = 5  # errors at once
# far beyond what is of use, and near enough that nothing overflows or takes forever
_STEPS, _COUNT, _RANK, _SIDES, _FEW = 10**8, 10_000, 100_000, 16_384, 64
_LARGE, _RATE, _SPREAD = 1e6, 1e3, 100.0
_Rank = Annotated[int, Field(ge=1, le=_RANK)]
_Rate = Annotated[float, Field(gt=0, le=_RATE)]
_Number = Annotated[float, Field(ge=-1e12, le=1e12)]
_Side = Annotated[int, Field(ge=1, le=_SIDES)]
_Strength = Annotated[float, Field(ge=-_SPREAD, le=_SPREAD)]


class TrainConfig(BaseModel):
    """What to train on what; each field is a TOML key and a flag (`learning_rate`, `--learning-rate`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # what
    folder: Path = Field(description="pictures with captions: fox.png and fox.txt, N_concept folders, metadata.jsonl")
    base: str = Field("demo", description="demo, sd1, sdxl, sd3, flux, ...; a diffusers folder; or a checkpoint file")
    output: Path = Field(Path("adapter_out"), description="folder for the adapter, checkpoints, log, samples, report")
    cache: Path | None = Field(None, description="folder of latents and text states; OUTPUT/cache when not given")
    steps: int = Field(1000, ge=1, le=_STEPS, description="optimiser steps")
    seed: int = Field(0, ge=0, lt=2**63, description="the same seed gives the same file on the same machine")

    # the adapter
    method: str = Field("lora", description="one of docs/methods.md, in small letters: lora, dora, lokr, oft, vera, ...; a prompt of docs/prompting.md; or with fields: lokr(factor=8)")  # fmt: skip  # noqa: E501
    rank: int | None = Field(None, ge=1, le=_RANK, description="the method's rank; its own default when not given")
    alpha: float | None = Field(
        None, gt=0, le=_LARGE, description="the change is scaled by alpha / rank; rank when not given"
    )
    rank_stabilised: bool = Field(False, description="scale by alpha / sqrt(rank) (rsLoRA)")
    targets: list[str] = Field(["transformer"], description="presets and globs of layers; '!glob' leaves out; 'text': encoders")  # fmt: skip  # noqa: E501
    methods: dict[str, str] = Field({}, description="targets that have a method of their own: convolution=lokr(rank=4)")
    ranks: dict[str, _Rank] = Field({}, description="targets that have a rank of their own: unet.mid_block.*=32")
    start: Start | None = Field(None, description="where LoRA starts instead of at zero: pissa, olora, orthogonal, eva, corda, lora_ga, loftq")  # fmt: skip  # noqa: E501
    start_samples: int = Field(
        64, ge=1, le=_COUNT, description="pictures, each at its own time, that eva, corda and lora_ga look at first"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the input that the adapter does not see")
    rank_dropout: float = Field(0.0, ge=0, lt=1, description="share of the ranks left out")
    module_dropout: float = Field(0.0, ge=0, lt=1, description="how often a layer goes without the adapter")
    freeze_down: bool = Field(False, description="LoRA-FA: lora's down stays as it began, which takes less memory")
    nested_ranks: Literal["all", "last"] | None = Field(None, description="DyLoRA: a step has only the first ranks, a number drawn anew; all of these learn, or the last")  # fmt: skip  # noqa: E501
    target_rank: int | None = Field(None, ge=1, le=_RANK, description="adalora: ranks that a layer keeps, on the average; two thirds when not given")  # fmt: skip  # noqa: E501
    budget_phases: tuple[float, float] = Field((0.1, 0.5), description="adalora: shares of the steps before ranks are taken, and after")  # fmt: skip  # noqa: E501
    budget_every: int = Field(10, ge=1, le=_STEPS, description="adalora: steps between two allotments of the ranks")
    orthogonality: float = Field(0.1, ge=0, le=_LARGE, description="adalora: weight of the penalty that keeps vectors orthonormal")  # fmt: skip  # noqa: E501

    # optimisation
    optimizer: Literal[OPTIMIZERS] = Field("adamw", description=", ".join(OPTIMIZERS))  # pyright: ignore[reportInvalidTypeForm]
    optimizer_options: dict[str, _Number | bool] = Field({}, description="further arguments of it: d_coef=2 weight_lr_power=1")  # fmt: skip  # noqa: E501
    learning_rate: float = Field(1e-4, gt=0, le=_RATE, description="peak rate (1 for prodigy); when not given 1e-4 for LoRA, and for others what that is to them")  # fmt: skip  # noqa: E501
    learning_rates: dict[str, _Rate] = Field(
        {}, description="rates of targets, or of their tensors: text_encoder*=5e-5 *.vblora_bank=1e-3"
    )
    lora_plus: float | None = Field(
        None, gt=0, le=_LARGE, description="tensors that start at zero (up, B) learn this much faster"
    )
    schedule: Literal["cosine", "linear", "constant", "restarts"] = Field("cosine", description="of the rate, after warm-up")  # fmt: skip  # noqa: E501
    restarts: int = Field(3, ge=1, le=_STEPS, description="cycles of the schedule 'restarts'")
    warmup_steps: int = Field(20, ge=0, le=_STEPS, description="steps from 0 to the peak; at most a tenth of all when not given")  # fmt: skip  # noqa: E501
    weight_decay: float = Field(1e-3, ge=0, le=_RATE, description="the optimiser's")
    max_grad_norm: float = Field(1.0, gt=0, le=1e12, description="gradients are clipped to this norm")
    batch_size: int = Field(4, ge=1, le=_COUNT, description="pictures a step, over all processes and pieces")
    pieces: int = Field(
        1, ge=1, le=_COUNT, description="in how many pieces a process computes its share (gradient accumulation)"
    )
    ema: float | None = Field(None, ge=0, lt=1, description="decay of a running mean, which becomes the adapter")
    precision: Precision = Field("fp32", description="of the frozen base: fp32, bf16 or fp16; the adapter is fp32")
    quantise: Literal["nf4", "int8"] | None = Field(None, description="the base's linear layers: nf4 or int8")
    checkpointing: bool = Field(False, description="compute activations twice instead of keeping them")
    swap_blocks: int = Field(
        0, ge=0, le=_COUNT, description="so many of the denoiser's blocks wait in RAM; with checkpointing"
    )
    shard: bool = Field(False, description="split the frozen base over the processes (FSDP2)")
    compile: bool = Field(False, description="torch.compile the denoiser")

    # the objective
    prediction: Literal["epsilon", "v_prediction"] | None = Field(None, description="what the base predicts, where its config is wrong")  # fmt: skip  # noqa: E501
    min_snr_gamma: float | None = Field(
        None, gt=0, le=_LARGE, description="min-SNR weighting (5 is usual); off when not given"
    )
    debiased: bool = Field(False, description="debiased weighting, instead of min-SNR")
    huber: Literal["constant", "exponential", "snr"] | None = Field(None, description="pseudo-Huber loss, and its schedule")  # fmt: skip  # noqa: E501
    huber_c: float = Field(0.1, gt=0, le=_LARGE, description="where the Huber loss turns from square to linear")
    noise_offset: float = Field(0.0, ge=0, le=_SPREAD, description="0.05 at most; for bases that predict noise")
    pyramid_noise: float = Field(0.0, ge=0, lt=1, description="discount of noise at lower resolutions (0.3 is usual)")
    input_perturbation: float = Field(
        0.0, ge=0, le=_SPREAD, description="more noise in the input than in the target (0.1 is usual)"
    )
    zero_terminal_snr: bool = Field(False, description="rescale the noise schedule; for velocity")
    timesteps: Literal["uniform", "logit_normal", "mode"] | None = Field(None, description="distribution; the base's own when not given")  # fmt: skip  # noqa: E501
    logit_mean: float = Field(0.0, ge=-_SPREAD, le=_SPREAD, description="of logit_normal")
    logit_spread: float = Field(1.0, gt=0, le=_SPREAD, description="of logit_normal")
    mode_scale: float = Field(1.29, ge=-_SPREAD, le=_SPREAD, description="of mode")
    shift: float | None = Field(None, gt=0, le=_LARGE, description="towards noise; the base's own when not given")
    timestep_range: tuple[float, float] = Field((0.0, 1.0), description="share of the noise levels that is trained")

    # pictures and captions
    resolution: list[_Side] = Field(
        [], max_length=_FEW, description="pixels of a square of the same area, or several; the base's own"
    )
    buckets: bool = Field(True, description="keep the shapes of pictures; else squares")
    crop: Literal["centre", "random", "pad"] = Field("centre", description="what is cut to fit a bucket")
    crops: int = Field(4, ge=1, le=_COUNT, description="how many random crops of a picture there are")
    flip: bool = Field(False, description="train on mirror images, too")
    mask: Literal["none", "alpha", "file"] = Field("none", description="train inside of the alpha channel or NAME-mask.png only")  # fmt: skip  # noqa: E501
    unmasked_weight: float = Field(0.0, ge=0, le=1, description="how much the rest counts")
    caption: str | None = Field(None, description="for pictures that have no caption")
    trigger: str | None = Field(None, description="word in every caption: ohwx")
    caption_dropout: float = Field(0.05, ge=0, le=1, description=f"share of pictures {_NO_CAPTION}")
    shuffle_tags: bool = Field(False, description="tags between commas come in any order")
    keep_tags: int = Field(1, ge=0, le=_COUNT, description="of which the first ones stay in front")
    tag_dropout: float = Field(0.0, ge=0, lt=1, description="share of the tags left out")
    caption_variants: int = Field(8, ge=1, le=_COUNT, description="shuffled wordings of a caption")

    # watching
    held_out: Path | None = Field(None, description="pictures never trained on; their loss picks the best checkpoint")
    held_out_count: int = Field(
        0, ge=0, le=_STEPS, description="or: how many of the folder's are kept out of the training"
    )
    evaluate_every: int | None = Field(None, ge=1, le=_STEPS, description="steps between evaluations; a fifth of all, 50 at least")  # fmt: skip  # noqa: E501
    checkpoint_every: int = Field(100, ge=1, le=_STEPS, description="steps between checkpoints; the last two are kept")
    sample_prompts: list[str] = Field([], description="drawn for the report; OUTPUT/prompts.txt may be edited meanwhile")  # fmt: skip  # noqa: E501
    sample_every: int | None = Field(
        None, ge=1, le=_STEPS, description="steps between samples; at the end only when not given"
    )
    log_with: list[Literal["tensorboard", "wandb"]] = Field(["tensorboard"], description="tensorboard, wandb")
    report: bool = Field(True, description="write OUTPUT/report.html")
    strengths: list[_Strength] = Field([0.5, 1.0], max_length=_FEW, description="of the adapter in the report's grid")
    score_with: list[Path] = Field([], description="folders of CLIP and DINOv2 models, for scores of those pictures")

    # the file
    title: str | None = Field(None, description="the adapter's name in its metadata; that of OUTPUT when not given")
    formats: list[str] = Field([], description="formats to write; what diffusers and kohya's tools read when not given")
    save_precision: Precision = Field("fp32", description="of the written tensors; fp16 is half the size")
    exports: dict[str, str] = Field({}, description="further files of a part of the layers: style=b-lora-style")
    private: bool = Field(False, description="no captions, names or paths in the file's metadata")

    WATCHED: ClassVar[frozenset[str]] = frozenset({
        *("folder", "output", "base", "cache", "held_out", "checkpoint_every", "evaluate_every", "log_with", "report"),
        *("sample_prompts", "sample_every", "strengths", "score_with", "title", "formats", "exports"),
        *("private", "save_precision"),
        *("caption", "trigger", "resolution", "buckets", "class_folder"),  # in the fingerprints, as what they come to
        # another way to the same numbers, but for their last bits
        *("pieces", "checkpointing", "compile", "shard", "swap_blocks"),
    })  # fmt: skip

    @model_validator(mode="after")
    def _of_others(self) -> Self:
        """What follows from other settings, where it was not given; it is not among `model_fields_set`."""
        if "learning_rate" not in self.model_fields_set:
            try:
                object.__setattr__(
                    self, "learning_rate", float(f"{self.learning_rate * rates.over_lora(vars(self))[0]:.6g}")
                )
            except ConfigError:  # which is said where the method is made
                return self
        if "warmup_steps" not in self.model_fields_set:
            object.__setattr__(self, "warmup_steps", min(self.warmup_steps, self.steps // 10))
        return self

    @field_validator("learning_rates", "ranks", "optimizer_options", "methods", mode="after")
    @classmethod
    def _named(cls, value: dict[str, Any]) -> dict[str, Any]:
        if any(not key for key in value):
            raise ValueError("wanted NAME=VALUE")
        return value

    @field_validator("folder", "base", "output", "cache", "held_out", "class_folder", mode="before", check_fields=False)
    @classmethod
    def _a_place(cls, value: Any) -> Any:
        if value == "":  # to Python it is the folder where one is
            raise ValueError("wanted a path; the folder where you are is .")
        return value

    @field_validator("score_with", mode="after")
    @classmethod
    def _models(cls, value: list[Path]) -> list[Path]:
        for folder in value:
            if long := texts.too_long(folder):
                raise ValueError(long)
            scores.kind(folder)
        return [folder.absolute() for folder in value]

    @field_validator("timestep_range", mode="after")
    @classmethod
    def _rising(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError("wanted two numbers in [0, 1], the first below the second")
        return value

    @field_validator("budget_phases", mode="after")
    @classmethod
    def _parts(cls, value: tuple[float, float]) -> tuple[float, float]:
        if min(value) < 0 or sum(value) >= 1:
            raise ValueError("wanted two shares of the steps, 0 or more, that are less than 1 together")
        return value

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """A config of these values.

        Raises:
            ConfigError: a key is unknown (the nearest is named), lacking, of the wrong type or out of range; or it is
                set, and would have no effect without another one.
        """
        try:
            made = cls(**values)
        except ValidationError as error:
            rows = error.errors()
            said = "; ".join(_explain(row, list(cls.model_fields)) for row in rows[:_SAID])
            raise ConfigError(said + (f"; and {len(rows) - _SAID} more" if len(rows) > _SAID else "")) from error
        for name, value in made:
            texts.check(name, value)
        idle = [(name, needs) for names, needs, has in _NEEDS for name in names if made._is_set(name) and not has(made)]
        if idle:
            raise ConfigError("; ".join(f"'{name}' has no effect without {needs}" for name, needs in idle))
        return made

    def _is_set(self, name: str) -> bool:
        field = type(self).model_fields.get(name)
        return field is not None and getattr(self, name) != field.default

    def identity(self, fingerprint: Mapping[str, str]) -> dict[str, str]:
        """What decides the result, as text: settings (but for paths and what is only watched) and fingerprints."""
        settings = self.model_dump(mode="json", exclude=set(self.WATCHED))
        return {**{key: json.dumps(value, sort_keys=True) for key, value in settings.items()}, **fingerprint}


class DreamBoothConfig(TrainConfig):
    """And what a subject needs: the class that it is one of, and how the rest of the class is kept."""

    class_prompt: str | None = Field(None, description="what the subject is one of: 'a man'; the caption without the trigger")  # fmt: skip  # noqa: E501
    preservation: Literal["class-free", "classic", "none"] = Field("class-free", description="class-free: the base's own answers are kept; classic: class pictures are trained, too")  # fmt: skip  # noqa: E501
    preservation_weight: float = Field(1.0, gt=0, le=_LARGE, description="of it in the loss")
    preservation_share: float = Field(0.5, gt=0, le=1, description="of the steps that have it, class-free")
    class_folder: Path | None = Field(None, description="class pictures; OUTPUT/class when not given")
    class_count: int = Field(100, ge=1, le=_STEPS, description="pictures that the folder is filled up to by drawing")


class InversionConfig(TrainConfig):
    """And what a new word needs."""

    word: str = Field(description="the new word: <ohwx>")
    initial: str = Field("object", description="words whose meaning it starts from")
    vectors: int = Field(1, ge=1, le=75, description="how many tokens it stands for")
    embedding_rate: float = Field(5e-3, gt=0, le=_RATE, description="learning rate of its vectors")
    norm_control: bool = Field(True, description="pull the vectors' spread back to that of the vocabulary")
    pivot: float = Field(
        0.5, gt=0, le=1, description="share of the steps that train the word; an adapter is trained in all"
    )
    adapter: bool = Field(False, description="train an adapter with it (pivotal tuning); one file holds both")

    @field_validator("word", mode="after")
    @classmethod
    def _a_word(cls, value: str) -> str:
        if not value.strip() or any(c.isspace() for c in value):
            raise ValueError("wanted one word without spaces, say <ohwx>")
        return value


_NEEDS: Sequence[tuple[tuple[str, ...], str, Callable[[Any], bool]]] = (
    (("restarts",), "schedule = restarts", lambda c: c.schedule == "restarts"),
    (("start_samples",), "start = eva, corda or lora_ga", lambda c: c.start in ("eva", "corda", "lora_ga")),
    (
        ("target_rank", "budget_phases", "budget_every", "orthogonality"),
        "method = adalora",
        lambda c: any("adalora" in text.lower() for text in (c.method, *c.methods.values())),
    ),
    (("huber_c",), "huber", lambda c: c.huber is not None),
    (("logit_mean", "logit_spread"), "timesteps = logit_normal", lambda c: c.timesteps == "logit_normal"),
    (("mode_scale",), "timesteps = mode", lambda c: c.timesteps == "mode"),
    (("crops",), "crop = random", lambda c: c.crop == "random"),
    (("unmasked_weight",), "mask", lambda c: c.mask != "none" or c.crop == "pad"),
    (("keep_tags", "caption_variants"), "shuffle_tags or tag_dropout", lambda c: c.shuffle_tags or c.tag_dropout > 0),
    (("strengths", "score_with"), "report", lambda c: c.report),
    (("class_folder", "class_count"), "preservation = classic", lambda c: c.preservation == "classic"),
    (("preservation_share",), "preservation = class-free", lambda c: c.preservation == "class-free"),
    (("preservation_weight",), "preservation", lambda c: c.preservation != "none"),
)
"""Settings, the other one that they are part of, and whether a config has that."""


def _explain(row: Any, known: Sequence[str]) -> str:
    key = ".".join(str(part)[:100] for part in row["loc"])
    if row["type"] == "extra_forbidden":
        for kind, config in (("character", DreamBoothConfig), ("concept", InversionConfig)):
            if key in config.model_fields:
                return f"'{key}' is for another kind of training: --kind {kind}"
        near = get_close_matches(key, known, n=1)
        return f"unknown key '{key}'" + (f", did you mean '{near[0]}'?" if near else f"; there are: {', '.join(known)}")
    if row["type"] == "missing":
        return f"'{key}' is not given" + {"word": ': --word "<ohwx>", the new word'}.get(key, "")
    message = row["msg"].removeprefix("Value error, ")
    return f"'{key}' is {texts.short(row['input'])}: {message[0].lower()}{message[1:]}"
