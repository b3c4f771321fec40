"""Foreign: how other tools say in a picture what made it: A1111 and Forge (and all that write like them), SwarmUI."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from imgadapt.errors import ConfigError, DataError
from imgadapt.playground import prompts
from imgadapt.playground.pictures import infotext
from imgadapt.playground.samplers import SAMPLERS

_LONGEST = 2**20
"""Characters of a text; a long prompt has thousands."""
_EXIF, _USER_COMMENT = 0x8769, 0x9286
_GRAPHS = {"workflow": "ComfyUI", "prompt": "ComfyUI", "invokeai_metadata": "InvokeAI", "Comment": "another tool"}
_COMFY = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "lms": "LMS",
    "ddim": "DDIM",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "uni_pc": "UniPC",
    "lcm": "LCM",
}
"""ComfyUI's and SwarmUI's names of samplers."""


@dataclass(frozen=True)
class Said:
    """values: of a GenerateRequest, as found. tags: adapters; hashes: by their names. model: the base's name."""

    values: Mapping[str, Any]
    tags: Sequence[prompts.Tag] = ()
    hashes: Mapping[str, str] = field(default_factory=dict[str, str])
    model: str = ""
    lacks: Sequence[str] = ()


def read(image: Image.Image) -> Said:
    """What an opened picture says.

    Raises:
        DataError: nothing, or nothing that is known here.
    """
    text = _text(image)
    if len(text) > _LONGEST:
        raise DataError(f"the picture's text has {len(text):,} characters; {_LONGEST:,} are allowed")
    if not text.strip():
        tool = next((tool for key, tool in _GRAPHS.items() if key in image.info), None)
        if tool is not None:
            raise DataError(f"the picture is of {tool}, whose settings are not read here; those of A1111's kind are")
        raise DataError("the picture does not say how it was made; it may have been saved anew or screenshot")
    is_json = text.lstrip().startswith("{") and not infotext.split(text)[2]  # a prompt may begin with {red|blue}
    return _swarm(text) if is_json else _a1111(text)


def _text(image: Image.Image) -> str:
    """A1111's text: in a PNG under its name, in JPEG and WebP as EXIF's comment."""
    text = image.info.get(infotext.A1111)
    if isinstance(text, str):
        return text
    try:
        comment = image.getexif().get_ifd(_EXIF).get(_USER_COMMENT, b"")
    except Exception:  # a broken EXIF raises anything, and says nothing
        return ""
    if isinstance(comment, str):
        return comment
    if not isinstance(comment, bytes) or len(comment) > 2 * _LONGEST:
        return ""
    head, body = comment[:8], comment[8:]
    if head == b"UNICODE\0":
        return body.decode("utf-16-le" if body[1:2] == b"\0" else "utf-16-be", "replace")
    return (body if head == b"ASCII\0\0\0" else comment).decode("utf-8", "replace").lstrip("\0")


def _a1111(text: str) -> Said:
    prompt, negative, table = infotext.split(text)
    if len(table) < 3:
        raise DataError("the picture's text is not A1111's: it has no line of settings (Steps: ..., Sampler: ...)")
    lacks = list[str]()
    prompt, tags = _tags(prompt, lacks)
    values: dict[str, Any] = {"prompt": prompt, "negative": negative, "sampler": _sampler(table, lacks)}
    for name, key, whole in (("Steps", "steps", True), ("CFG scale", "guidance", False), ("Seed", "seed", True)):
        if name in table:
            values[key] = _number(table[name], whole)
    width, cross, height = table.get("Size", "").partition("x")
    if cross:
        values |= {"width": _number(width, True), "height": _number(height, True)}
    if "Denoising strength" in table:
        lacks.append("it was drawn from another picture, or upscaled; give that picture again where it is one")
        values["denoise"] = _number(table["Denoising strength"], False)
    rows = (row.strip().rpartition(": ") for row in table.get("Lora hashes", "").split(","))
    hashes = {name: hash for name, colon, hash in rows if colon}
    return Said(values, tags, hashes, table.get("Model", ""), lacks)


def _swarm(text: str) -> Said:
    try:
        table = json.loads(text)
        table = table["sui_image_params"]
        prompt, negative = str(table.get("prompt", "")), str(table.get("negativeprompt", ""))
        names, weights = table.get("loras") or [], table.get("loraweights") or []
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError("the picture's text is JSON of another tool than SwarmUI, and is not read here") from None
    lacks = list[str]()
    prompt, tags = _tags(prompt, lacks, te_first=False)
    for k, name in enumerate(names if isinstance(names, list) else ()):  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        weight = infotext.number(str(weights[k])) if isinstance(weights, list) and k < len(weights) else 1.0  # pyright: ignore[reportUnknownArgumentType]
        if len(tags) < 64:
            tags = [*tags, prompts.Tag(str(name).rsplit("/", 1)[-1].removesuffix(".safetensors")[:200], weight)]  # pyright: ignore[reportUnknownArgumentType]
    known = {"Sampler": str(table.get("sampler", "")), "Schedule type": str(table.get("scheduler", ""))}
    values: dict[str, Any] = {"prompt": prompt, "negative": negative, "sampler": _sampler(known, lacks)}
    for key, mine in (("steps",) * 2, ("cfgscale", "guidance"), ("seed",) * 2, ("width",) * 2, ("height",) * 2):
        if key in table:
            values[mine] = table[key]
    model = str(table.get("model", "")).rsplit("/", 1)[-1].removesuffix(".safetensors")
    return Said(values, tags, {}, model, lacks)


def _tags(prompt: str, lacks: list[str], *, te_first: bool = True) -> tuple[str, Sequence[prompts.Tag]]:
    try:
        parsed = prompts.parse(prompt, te_first=te_first)
    except ConfigError as error:
        lacks.append(f"{error}; the prompt is left as it is")
        return prompt, ()
    return parsed.prompt, parsed.tags


def _sampler(table: Mapping[str, str], lacks: list[str]) -> str:
    """Ours of another tool's name and schedule."""
    name, schedule = table.get("Sampler", ""), table.get("Schedule type", "")
    known = {sampler.casefold(): sampler for sampler in SAMPLERS}
    name = _COMFY.get(name, name)
    both = f"{name} karras" if schedule.casefold() == "karras" else name
    found = known.get(both.casefold()) or known.get(name.casefold())
    if found is None:
        if name:
            lacks.append(f"the sampler {name[:40]!r} is not here; the base's own is taken")
        return "base"
    if schedule and schedule.casefold() not in ("automatic", "normal", "simple") and "karras" not in found.casefold():
        lacks.append(f"the schedule {schedule[:40]!r} is not here; the sampler's own is taken")
    return found


def _number(text: str, whole: bool) -> float | str:
    """A number of a text; the text itself where it is none, which a request then refuses by name."""
    value = infotext.number(text)
    if whole and math.isfinite(value) and value == int(value):
        return int(value)
    return value if math.isfinite(value) else text[:40]
