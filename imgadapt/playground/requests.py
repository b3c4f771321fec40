"""Requests: what is asked of a playground, checked once, for the page, the API and programs alike."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from imgadapt.errors import ConfigError
from imgadapt.playground.samplers import SAMPLERS
from imgadapt.playground.settings import Limits

STRONGEST = 10.0
"""Of an adapter's weight, either way."""
RANDOM = -1
"""A seed that means: choose one."""


def _number(value: Any) -> Any:
    """Refuses what Python takes for a number and a user does not: true, NaN, "3"."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        raise ValueError("is far too large") from None
    if not finite:
        raise ValueError("must be a finite number")
    return value + 0  # -0.0 is 0.0


def _text(value: str) -> str:
    """Refuses what no file, header or terminal takes; line ends become \\n."""
    if any(0xD800 <= ord(c) <= 0xDFFF for c in value):
        raise ValueError("has half a character (a lone surrogate)")
    cleaned = value.replace("\r\n", "\n").replace("\r", "\n")
    if any(ord(c) < 32 and c not in "\n\t" for c in cleaned):
        raise ValueError("has control characters")
    return cleaned


def _whole(value: Any) -> Any:
    value = _number(value)
    if value != int(value):
        raise ValueError("must be a whole number")
    return int(value)


def _sampler(value: Any) -> Any:
    """Its own spelling, whatever the capitals."""
    own = {name.lower(): name for name in SAMPLERS}
    return own.get(value.lower(), value) if isinstance(value, str) else value


Number = Annotated[float, BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_whole)]
Strength = Annotated[Number, Field(ge=-STRONGEST, le=STRONGEST)]
Text = Annotated[str, Field(max_length=Limits.prompt), AfterValidator(_text)]
Line = Annotated[str, Field(max_length=200), AfterValidator(_text)]
Id = Annotated[str, Field(pattern=r"^[0-9a-z]{8,40}$")]
"""Of an adapter, a base, a picture, a run: a playground gives them out and looks them up; none is a path."""


class Request(BaseModel):
    """A checked request: no unknown keys, no conversions.

    `of` makes one of JSON.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def of(cls, values: Any) -> Self:
        """A request of plain values, as JSON has them.

        Raises:
            ConfigError: what is wrong with it, in one line.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a request is a table of settings, not {type(values).__name__}")
        try:
            return cls.model_validate(_tuples(values))
        except ValidationError as error:
            raise ConfigError(_said(error)) from None
        except RecursionError:
            raise ConfigError("the request is nested too deeply") from None


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, which frozen requests have."""
    if isinstance(value, Mapping):
        return {str(key): _tuples(inner) for key, inner in value.items()}  # pyright: ignore[reportUnknownVariableType]
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownVariableType]


_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is no setting of this request",
    "string_type": "must be text",
    "string_unicode": "has half a character (a lone surrogate)",
    "string_too_long": "has more than {max_length:,} characters",
    "string_too_short": "is empty or too short",
    "string_pattern_mismatch": "is none of the ids that were given out here",
    "bool_type": "must be true or false",
    "greater_than": "must be more than {gt:,}",
    "greater_than_equal": "must be {ge:,} or more",
    "less_than": "must be less than {lt:,}",
    "less_than_equal": "must be {le:,} or less",
    "multiple_of": "must be a multiple of {multiple_of}",
    "literal_error": "must be one of {expected}",
    "tuple_type": "must be a list",
    "too_long": "has more than {max_length:,} entries",
    "too_short": "lacks entries: it takes {min_length} or more",
    "model_type": "must be a table of settings",
    "model_attributes_type": "must be a table of settings",
    "dict_type": "must be a table",
    "value_error": "{error}",
}
"""What pydantic's errors are called here."""
_BRACES = str.maketrans({"{": "{{", "}": "}}"})


def _said(error: ValidationError) -> str:
    """The first thing that is wrong, without what was sent where that may be long."""
    rows = error.errors(include_url=False)
    first = rows[0]
    place = ".".join(str(_brief(step)) for step in first["loc"][:6])
    words = _WORDS.get(first["type"], first["msg"].replace("Input should", "should").translate(_BRACES))
    sent = first.get("input")
    small = isinstance(sent, int | float) or (isinstance(sent, str) and len(sent) <= 40)
    shown = f" (it is {_brief(sent)!r})" if small and first["type"] not in ("missing", "extra_forbidden") else ""
    more = f"; and {len(rows) - 1} more" if len(rows) > 1 else ""
    context = {key: _brief(value) if isinstance(value, float) else value for key, value in first.get("ctx", {}).items()}
    return f"{place}: {words.format(**context)}{shown}{more}".removeprefix(": ")


def _brief(sent: object) -> Any:
    """Something sent, as far as it may be repeated: short, and without half characters."""
    if isinstance(sent, float) and sent.is_integer() and abs(sent) < 10**16:
        return int(sent)
    if isinstance(sent, bool | float) or (isinstance(sent, int) and abs(sent) < 10**16):
        return sent
    if isinstance(sent, int):
        return f"10^{int(sent.bit_length() * math.log10(2))} or so"
    text = str(sent)
    text = text[:41].encode("utf-8", "replace").decode()
    return text if len(text) <= 40 else f"{text[:37]}..."


class Use(Request):
    """An adapter in a stack.

    weight: its strength; text: on text encoders, None: as weight. blocks: a preset's name or kohya's list of numbers
    (see docs/merging.md), on top of it. start, stop: the first step at which it acts, and the first at which it does
    not any more (text encoders act before all steps, so `start` and `stop` are the denoiser's).
    """

    adapter: Id
    weight: Strength = 1.0
    text: Strength | None = None
    blocks: Annotated[str, Field(max_length=1000), AfterValidator(_text)] = ""
    start: Annotated[Whole, Field(ge=0, le=Limits.steps)] = 0
    stop: Annotated[Whole, Field(ge=0, le=Limits.steps)] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(f"stop ({self.stop}) is not after start ({self.start})")
        return self


class Layout(Request):
    """How a picture was computed, to the bit: as the `row` of a batch of `rows` pictures; by_sample: with a strength
    for each of them. (Floating-point sums differ in their last bits with the size of a batch.)
    """

    rows: Annotated[Whole, Field(ge=1, le=64)] = 1
    row: Annotated[Whole, Field(ge=0, le=63)] = 0
    by_sample: bool = False

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if self.row >= self.rows:
            raise ValueError(f"row {self.row} is not one of {self.rows}")
        return self


class GenerateRequest(Request):
    """Pictures of one prompt.

    prompt: may have `<lora:name:weight>` (see prompts.py), which join `adapters`. seed: of the first, the others
    count on from it; -1: any. width, height: pixels; None: the base's own. init: a picture to start from (image to
    image), of which `denoise` is redrawn; mask: where it is (white), for inpainting. base: None: the one that was
    asked for last. layout: draw one picture again to the bit.
    """

    prompt: Text = ""
    negative: Text = ""
    adapters: Annotated[tuple[Use, ...], Field(max_length=Limits.adapters)] = ()
    seed: Annotated[Whole, Field(ge=RANDOM, lt=2**53)] = RANDOM
    count: Annotated[Whole, Field(ge=1, le=Limits.pictures)] = 1
    steps: Annotated[Whole, Field(ge=1, le=Limits.steps)] = 20
    guidance: Annotated[Number, Field(ge=0, le=50)] | None = None
    sampler: Annotated[Literal[tuple(SAMPLERS)], BeforeValidator(_sampler)] = "base"  # pyright: ignore[reportInvalidTypeForm] # an allow-list that is a table
    width: Annotated[Whole, Field(ge=8, le=Limits.side, multiple_of=8)] | None = None
    height: Annotated[Whole, Field(ge=8, le=Limits.side, multiple_of=8)] | None = None
    base: Id | None = None
    init: Id | None = None
    mask: Id | None = None
    denoise: Annotated[Number, Field(gt=0, le=1)] = 0.75
    layout: Layout | None = None

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.mask is not None and self.init is None:
            raise ValueError("there is a mask and no picture under it")
        names = [use.adapter for use in self.adapters]
        if len(set(names)) < len(names):
            raise ValueError("an adapter is in the stack twice")
        if self.layout is not None and self.count != 1:
            raise ValueError("layout is for one picture")
        return self
