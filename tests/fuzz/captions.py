"""Words about pictures: captions beside them, tables of them, what other tools put beside adapters, what files say."""

import contextlib
import io
import json
import runpy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as bytes_of

from imgadapt import summary
from imgadapt.playground import filenames
from imgadapt.playground.library import sidecars, telling
from imgadapt.training import captions
from imgadapt.training.captions import Wording
from tests.fuzz.files import placed, scratch
from tests.fuzz.target import Target

_SHOW = Path(__file__).resolve().parents[2] / "converters" / "show.py"


# --- captions


def _caption(data: bytes) -> None:
    said = captions.beside([placed(data, "x.txt")])
    assert len(said) <= captions.MOST_WORDINGS
    for text in said[:4]:
        captions.with_trigger(text, "ohwx", "x").encode()
    if said:
        wording = Wording(shuffle=True, keep=1, tag_dropout=0.2, dropout=0.1, variants=3)
        for place in range(4):
            captions.caption(said, wording, 1, "x", place).encode()


def _captions() -> Iterator[bytes]:
    yield from (
        b"a fox, red, [trigger]\na {red|blue|} fox ||| b",
        "\ufeffein Füchslein".encode(),
        b"{a|b}{c|d}{e|f}{g|h}",
    )
    yield "a fox".encode("utf-16")


def _table(data: bytes) -> None:
    ending = "csv" if data[:1] == b"c" else "jsonl"
    said = captions.table(placed(data[1:], f"metadata.{ending}"))
    for name, texts in said.items():
        assert not Path(name).is_absolute()
        assert ".." not in Path(name).parts
        assert len(texts) <= captions.MOST_WORDINGS
        "".join(texts).encode()


def _tables() -> Iterator[bytes]:
    yield b'j{"file_name": "a.png", "text": "a fox"}\n{"file_name": "b/c.png", "text": ["x", "y"], "caption": null}\n'
    yield b'cfile_name,text\na.png,"a fox, red"\nb.png,"x\ny"\n'


# --- sidecars


def _sidecar(data: bytes) -> None:
    said = sidecars.said_in([placed(data, "x.json")])
    for text in (said.notes, *said.trigger):
        assert text.isprintable()
        text.encode()
    assert said.weight is None or 0 < abs(said.weight) <= 10


def _sidecars() -> Iterator[bytes]:
    yield b'{"preferred weight": 0.8, "activation text": "ohwx", "notes": "<b>x</b>", "description": "y"}'
    yield b'{"civitai": {"trainedWords": ["a", "b"]}, "preferred weight": "1e3"}'


# --- metadata of a file, as it is shown


@cache
def _show() -> Any:
    return runpy.run_path(str(_SHOW))["main"]


def _shown(data: bytes) -> None:
    """`imgadapt show` of a file with this metadata, a JSON object of texts."""
    try:
        said = json.loads(data)
        metadata = {str(key): str(value) for key, value in said.items()}
        "".join([*metadata, *metadata.values()]).encode()
    except (ValueError, AttributeError, RecursionError):
        metadata = {"ss_tag_frequency": data.decode("utf-8", "replace"), "modelspec.title": data.decode("latin-1")}
    for _, text in telling.training(metadata):
        assert text.isprintable()
    for word in summary.trigger_words(metadata):
        word.encode()
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
    tensors = {f"{layer}.lora_down.weight": torch.ones(1, 320), f"{layer}.lora_up.weight": torch.ones(320, 1)}
    path = placed(bytes_of(tensors, metadata), "shown.safetensors")
    for flags in ([], ["--json"]):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            _show()([str(path), *flags])
        assert all(c.isprintable() or c == "\n" for c in output.getvalue())


def _metadata() -> Iterator[bytes]:
    yield json.dumps(
        {"ss_tag_frequency": json.dumps({"a": {"red\u001b[31m": 3, "b": 2}}), "modelspec.title": "x\u202e"}
    ).encode()
    yield json.dumps(
        {"modelspec.trigger_phrase": "ohwx\u001b]0;x\u0007", "ss_network_dim": "4", "ss_bucket_info": "{}"}
    ).encode()
    yield json.dumps(
        {"ss_dataset_dirs": json.dumps({"3_x": {"img_count": 3, "n_repeats": 2}}), "ss_steps": "3"}
    ).encode()


_WORDS = ("\u001b[2J", "\\u001b[31m", "\\u202e", "\\u0000", "\\ud800", "ss_tag_frequency", "modelspec.trigger_phrase", "null",  # noqa: E501
          "1e999", "NaN", "9" * 30, "[" * 30, '":{"', "ss_training_started_at", "trigger_words", "ss_epoch")  # fmt: skip  # noqa: E501


# --- names of files


def _name(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    name = filenames.cleaned(text, "x")
    assert name not in ("", ".", "..")
    assert not set(name) & set('/\\\0<>:"|?*\n')
    assert len(name.encode()) <= filenames.MOST
    assert filenames.cleaned(name, "x") == name
    path = scratch() / "names" / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    path.unlink()


def _names() -> Iterator[bytes]:
    yield from (
        b"style",
        b"../../etc/passwd",
        b"con.txt",
        b"a\\b",
        "é ü".encode(),
        b"<lora:x:1>",
        b".hidden",
        b"x" * 300,
    )


TARGETS = (
    Target(
        "caption", _caption, _captions, ("{", "|", "}", "|||", ",", "[trigger]", "\n", "\u2028", "{a|b}" * 9, "\x00")
    ),
    Target(
        "caption-table",
        _table,
        _tables,
        ('"file_name":', '"text":', "../", "C:\\", "null", "[" * 30, '""', ",", "\\ud800", "1e999"),
    ),
    Target(
        "sidecar",
        _sidecar,
        _sidecars,
        ("civitai", "trainedWords", "preferred weight", "1e999", "NaN", "[" * 30, "\\ud800", "null"),
    ),
    Target("shown", _shown, _metadata, _WORDS),
    Target(
        "file-name", _name, _names, ("/", "\\", "..", "con", "nul.", ":", "\x00", "\u202e", "\ufe0f", " ", ".", "-")
    ),
)
