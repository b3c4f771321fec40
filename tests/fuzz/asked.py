"""What a playground is asked: requests, prompts, axes, what other tools write into pictures."""

import io
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from PIL import Image

from imgadapt.errors import ConfigError, DataError
from imgadapt.playground import prompts
from imgadapt.playground.converting import ConvertRequest
from imgadapt.playground.grids import ranges
from imgadapt.playground.grids.axis import Axis
from imgadapt.playground.grids.cells import GridRequest, board
from imgadapt.playground.library.bases import Bases
from imgadapt.playground.library.library import Library
from imgadapt.playground.merges.lab import MergeRequest
from imgadapt.playground.pictures import foreign, infotext, record
from imgadapt.playground.requests import GenerateRequest, Request
from imgadapt.playground.settings import Limits, Settings
from imgadapt.playground.trainings.runs import TrainRequest
from tests.fuzz.files import scratch
from tests.fuzz.target import Target

A, B = "a" * 16, "b" * 16
_KINDS: Mapping[str, type[Request]] = {
    "generate": GenerateRequest, "merge": MergeRequest, "train": TrainRequest, "grid": GridRequest, "axis": Axis,
    "convert": ConvertRequest,
}  # fmt: skip


@cache
def _settings() -> Settings:
    return Settings(scratch() / "home")


@cache
def _library() -> Library:
    return Library(_settings())


@cache
def _bases() -> Bases:
    return Bases(_settings())


def _json(data: bytes) -> Any:
    """As the API reads bodies."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError("not JSON") from error


# --- requests


def _request(data: bytes) -> None:
    said = _json(data)
    name = said.pop("kind_of", "generate") if isinstance(said, dict) else "generate"
    kind = _KINDS.get(name if isinstance(name, str) else "", GenerateRequest)
    try:
        made = kind.of(said)
    except ConfigError as error:
        assert len(str(error)) < 1000  # noqa: PT017
        raise
    assert kind.of(json.loads(made.model_dump_json())) == made
    if isinstance(made, MergeRequest):
        from imgadapt.combining.recipe import Entry, MergeRecipe

        names = ("rule", "options", "space", "rank", "error", "energy", "size", "seed", "format", "dtype")
        entries = tuple(Entry(use.adapter, use.weight, blocks=use.blocks) for use in made.adapters)
        MergeRecipe(entries, **{name: getattr(made, name) for name in names})


def _requests() -> Iterator[bytes]:
    use = {"adapter": A, "weight": 0.8, "text": None, "blocks": "INS", "start": 2, "stop": 9}
    generate = {"prompt": "a fox <lora:x:1>", "negative": "", "adapters": [use], "seed": 7, "count": 2, "steps": 20,
                "guidance": 7.5, "sampler": "Euler a", "width": 64, "height": 64, "init": B, "mask": B, "denoise": 0.5}  # fmt: skip  # noqa: E501
    yield json.dumps(generate).encode()
    yield json.dumps({"layout": {"rows": 4, "row": 3, "by_sample": True}, "prompt": "\u2028"}).encode()
    yield json.dumps({"kind_of": "merge", "adapters": [{"adapter": A}, {"adapter": B, "weight": -1}], "rule": "ties",
                      "options": {"density": 0.3}, "rank": 8, "name": "x"}).encode()  # fmt: skip
    yield json.dumps(
        {"kind_of": "train", "data": A, "kind": "style", "method": "lora", "rank": 4, "name": "é"}
    ).encode()
    yield json.dumps(
        {"kind_of": "grid", "common": {}, "x": {"kind": "weight", "values": "0:1:0.25"}, "z": None}
    ).encode()
    yield json.dumps({"kind_of": "convert", "adapter": A, "format": "kohya"}).encode()


_JSON = (
    *("null", "true", "NaN", "Infinity", "-Infinity", "1e999", "-0.0", "1e400", "9" * 50, "[" * 30, '{"":', "\\ud800"),
    *(
        "\\u0000",
        '"adapters":',
        '"layout":',
        '"kind_of":"merge"',
        '"kind_of":"grid"',
        '"kind_of":"train"',
        '"options":{',
    ),
)


# --- prompts


def _prompt(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    for te_first in (False, True):
        said = prompts.parse(text, te_first=te_first)
        if not said.tags:
            assert said.prompt == text
            continue
        uses = [tag.use(f"{k:016x}") for k, tag in enumerate(said.tags)]
        names = {use.adapter: tag.name for use, tag in zip(uses, said.tags, strict=True)}
        if any(prompts._UNSAID.search(tag.name) or tag.name.strip('"') != tag.name for tag in said.tags):
            continue
        again = prompts.parse(prompts.spell(uses, names))
        assert again.prompt.strip() == ""
        for one, use, tag in zip(again.tags, uses, said.tags, strict=True):
            assert (one.name, one.weight, one.text, one.start) == (tag.name, use.weight, use.text, use.start)
            assert one.blocks == use.blocks.strip() or prompts._UNSAID.search(use.blocks)
            assert one.stop == use.stop


def _prompts() -> Iterator[bytes]:
    yield from (
        b"a fox, <lora:x:0.8>, red",
        b"<lora:a b:te=0.5:unet=1:lbw=INS:start=3:stop=9>",
        b"<lyco:x:1:0.5:step=2-5>",
    )
    yield from (b'<lora:"x y":.5> <lora:z>', b"<lora:x:1e1>\n<LORA:y:-3>", b"<lora:x:lbw=1,0,0,0.5>")


_TAGS = (
    "<lora:",
    "<lyco:",
    ">",
    ":",
    "te=",
    "unet=",
    "lbw=",
    "start=",
    "stop=",
    "step=",
    "1e5",
    "-0",
    '"',
    "\r",
    ",",
    "<",
)


# --- infotext


def _infotext(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    image = Image.new("RGB", (1, 1))
    image.info[infotext.A1111] = text
    said = foreign.read(image)
    made = record._foreign(said, _library(), _bases()).request
    used = {"request": made.model_dump(mode="json"), "adapters": {}, "base": {"name": said.model}, "versions": {}}
    written = infotext.parameters(used)
    image.info[infotext.A1111] = written
    back = record._foreign(foreign.read(image), _library(), _bases()).request
    plain = not re.search(r"^\s*(Negative prompt|Steps):|<lora:|<lyco:", f"{made.prompt}\n{made.negative}", re.M | re.I)
    if plain and made.seed >= 0 and not re.search(r"[\x0b\x0c\x1c-\x1f\x85\u2028\u2029]", made.prompt + made.negative):
        assert (back.prompt, back.negative) == (made.prompt.strip(), made.negative.strip())
        assert (back.steps, back.sampler, back.seed) == (made.steps, made.sampler, made.seed)


def _infotexts() -> Iterator[bytes]:
    yield b'a fox <lora:x:0.8>\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 3, Size: 512x768, Model: demo, Lora hashes: "x: 0123456789ab, y: 00", Version: v1.9'  # noqa: E501
    yield b"Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 1e5, Seed: -1, Denoising strength: 0.5"
    yield json.dumps({"sui_image_params": {"prompt": "a <lora:x:1>", "negativeprompt": "b", "loras": ["a/x.safetensors"],  # noqa: E501
                      "loraweights": ["0.8"], "steps": 20, "cfgscale": 7, "seed": 3, "width": 512, "sampler": "dpmpp_2m",  # noqa: E501
                      "scheduler": "karras", "model": "x/y.safetensors"}}).encode()  # fmt: skip


_INFO = (
    *(
        "\nNegative prompt: ",
        "\nSteps: 20, ",
        "Sampler: ",
        ", CFG scale: ",
        "Seed: ",
        "Size: ",
        '"',
        "\\u0000",
        "1e999",
        "nan",
    ),
    *(
        "Lora hashes: ",
        "<lora:x:1>",
        '{"sui_image_params":{',
        '"loras":[',
        "null",
        "\u2028",
        "\r\n",
        "[" * 30,
        "x" * 30,
    ),
)


# --- our records


def _record(data: bytes) -> None:
    """Our JSON in a PNG, as anyone may have written it."""
    file = io.BytesIO()
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt(infotext.KEY, data.decode("utf-8", "replace"))
    Image.new("RGB", (1, 1)).save(file, "PNG", pnginfo=info)
    made = record.restore(file.getvalue(), _library(), _bases(), settings=_settings())
    assert GenerateRequest.of(made.request.model_dump(mode="json")) == made.request
    "\n".join((*made.lacks, *made.differs)).encode()
    assert all(len(line) < 2000 for line in (*made.lacks, *made.differs))


def _records() -> Iterator[bytes]:
    request = {"prompt": "a", "adapters": [{"adapter": A, "weight": 1}], "seed": 3, "init": B, "mask": B, "base": A}
    row = {"version": 1, "request": request, "adapters": {A: {"name": "ink", "sha256": "00", "size": 3}}, "base": {"name": "demo",  # noqa: E501
           "print": "x"}, "given": {B: "00"}, "versions": {"torch": "2"}, "device": "cpu", "dtype": "fp32", "threads": 1}  # fmt: skip  # noqa: E501
    yield json.dumps(row).encode()
    yield json.dumps({"pictures": [row, row]}).encode()


# --- axes


def _ranges(data: bytes) -> None:
    found = ranges.listed(data.decode("utf-8", "replace"), 400)
    assert 0 < len(found) <= 400
    again = ranges.listed(", ".join(ranges.plain(value) for value in found), 400)
    assert again == found


def _range_texts() -> Iterator[bytes]:
    yield from (
        b"0, 0.5, 1",
        b"0:1:0.25",
        b"1..5",
        b"1, 2, .., 10",
        b"0-1 (+0.25)",
        b"0-1 [5]",
        b"0:1e9:1e-9",
        b"0:999999999:0.000001",
    )
    yield from (b"5:1:-1", b"-1--2 (-0.5)", b"0:1:0")


def _axes(data: bytes) -> None:
    """A grid; `KIND=VALUES` a line, of x, y and z."""
    library = _library()
    card = library.cards()[0]
    rows = [line.partition("=") for line in data.decode("utf-8", "replace").split("\n\n")[:3]]
    axes = {name: {"kind": kind, "values": values} for name, (kind, _, values) in zip("xyz", rows, strict=False)}
    common = {"prompt": "a red fox", "adapters": [{"adapter": card.id}], "seed": 1}
    made = board(GridRequest.of({"common": common, **axes}), library, Limits())
    assert 0 < len(made.cells) <= Limits.cells
    assert len(made.cells) == len(made.labels[0]) * len(made.labels[1]) * len(made.labels[2])


def _axis_texts() -> Iterator[bytes]:
    yield from (b"weight=0:1:0.25", b"seed=random 4\n\nsteps=1..5", b"prompt=red -> blue\nfox -> cat\n\nguidance=1,7.5")
    yield (b"sampler=Euler a, DDIM\n\nadapter=none, ink, ink+duotone:0.5\n\nblocks=INS;OUTALL\n1,0,0,1,1,1,1,1,1,1,1,1")
    yield from (b"rule=live, ties density=0.3, svd\n\ncheckpoint=all", b"prompt=a <lora:ink:0.5>\nb\n\nweight=0-1 [3]")


_AXIS = ("weight=", "seed=random ", "prompt=", "blocks=", "rule=", "adapter=", "steps=", "\n\n", " -> ", "..", ":", "[999999999]",  # noqa: E501
         "(+0.0001)", "1e9", "ties density=", "<lora:ink:1>", "999999999999999999", "0.000000000001")  # fmt: skip


TARGETS = (
    Target("request", _request, _requests, _JSON),
    Target("prompt", _prompt, _prompts, _TAGS),
    Target("infotext", _infotext, _infotexts, _INFO),
    Target("record", _record, _records, _JSON),
    Target(
        "ranges",
        _ranges,
        _range_texts,
        (":", "..", ",", "-", "(+", "[", "]", "0.000000000001", "999999999999999999", "e"),
    ),
    Target("axes", _axes, _axis_texts, _AXIS),
)
