"""Infotext: what a PNG says of how it was made: A1111's `parameters`, which all tools read, and our JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import PngImagePlugin

from imgadapt.playground import prompts
from imgadapt.playground.requests import GenerateRequest

KEY = "imgadapt"
"""Of our JSON in a PNG's text."""
A1111 = "parameters"
"""Of A1111's text there."""
VERSION = 1
"""Of our JSON; a later one may be unreadable for an older program."""


def chunks(record: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    """A PNG's text for a record; A1111's is of pictures that a request made."""
    info = PngImagePlugin.PngInfo()
    if "request" in record:
        info.add_text(A1111, parameters(record))
    info.add_itxt(KEY, json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False))
    return info


def ours(info: Mapping[Any, Any]) -> Mapping[str, Any] | None:
    """The record in a PNG's text; None where there is none, or none that can be read."""
    text = info.get(KEY)
    if not isinstance(text, str):
        return None
    try:
        record = json.loads(text)
        if "\\u" in text:
            json.dumps(record, ensure_ascii=False).encode()  # half a character goes into no file of ours again
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None  # pyright: ignore[reportUnknownVariableType]


def parameters(record: Mapping[str, Any]) -> str:
    """A1111's text of a record."""
    request = GenerateRequest.of(record["request"])
    adapters: Mapping[str, Mapping[str, str]] = record.get("adapters", {})
    names = {use.adapter: adapters.get(use.adapter, {}).get("name", use.adapter) for use in request.adapters}
    tags = prompts.spell(request.adapters, names)
    lines = [" ".join(part for part in (request.prompt, tags) if part)]
    if request.negative:
        lines.append(f"Negative prompt: {request.negative}")
    base: Mapping[str, str] = record.get("base", {})
    sampler, karras, _ = request.sampler.partition(" Karras")
    fields: dict[str, Any] = {"Steps": request.steps, "Sampler": sampler}
    if karras:
        fields["Schedule type"] = "Karras"
    if request.guidance is not None:
        fields["CFG scale"] = f"{request.guidance:g}"
    fields["Seed"] = request.seed
    if request.width is not None and request.height is not None:
        fields["Size"] = f"{request.width}x{request.height}"
    if base.get("name"):
        fields["Model"] = base["name"]
    if request.init is not None:
        fields["Denoising strength"] = f"{request.denoise:g}"
    hashes = [f"{_bare(names[i])}: {adapters[i]['autov3'][:12]}" for i in names if adapters.get(i, {}).get("autov3")]
    if hashes:
        fields["Lora hashes"] = ", ".join(hashes)
    fields["Version"] = f"imgadapt {record.get('versions', {}).get('imgadapt', '')}".strip()
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items()))
    return "\n".join(lines)


def settings(line: str) -> dict[str, str]:
    """A1111's `Name: value, Name: "quoted, value"` as a table, in one pass."""
    found = dict[str, str]()
    at, decoder = 0, json.JSONDecoder()
    while at < len(line):
        colon = line.find(":", at)
        if colon < 0:
            break
        name, at = line[at:colon].strip(" ,"), colon + 1
        at += len(line[at : at + 8]) - len(line[at : at + 8].lstrip(" "))
        if line[at : at + 1] == '"':
            try:
                value, at = decoder.raw_decode(line, at)
                found.setdefault(name, str(value))
                at = _after(line, at)
                continue
            except ValueError:
                pass
        comma = line.find(",", at)
        stop = comma if comma >= 0 else len(line)
        found.setdefault(name, line[at:stop].strip())
        at = stop + 1
    return found


def _after(line: str, at: int) -> int:
    comma = line.find(",", at)
    return comma + 1 if comma >= 0 else len(line)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ',\n:"') else text


def _bare(name: str) -> str:
    return name.replace(":", "").replace(",", "")


def number(text: str | None) -> float:
    """A number of a foreign text; NaN where it is none."""
    try:
        return float(text[:40]) if text else math.nan
    except ValueError:
        return math.nan


def split(text: str) -> tuple[str, str, Mapping[str, str]]:
    """A1111's text as prompt, negative prompt and settings; the last line has those, if it begins like them."""
    lines: Sequence[str] = text.replace("\r\n", "\n").strip().split("\n")
    last = next((k for k in range(len(lines) - 1, -1, -1) if lines[k].lstrip().startswith("Steps:")), len(lines))
    table = settings("".join(lines[last:])) if last < len(lines) else {}
    if len(table) < 3:  # a prompt that speaks of steps
        last, table = len(lines), {}
    head = "\n".join(lines[:last])
    first = 0 if head.startswith("Negative prompt:") else head.find("\nNegative prompt:")
    if first < 0:
        return head.strip(), "", table
    negative = head[first:].strip().removeprefix("Negative prompt:")
    return head[:first].strip(), negative.strip(), table
