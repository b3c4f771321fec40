"""Files that are damaged, or change while they are read; what is printed of any; headers as safetensors' own reader."""

import contextlib
import errno
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from torch import Tensor

from imgadapt import adapters, attach, load, save
from imgadapt.errors import FormatError, ImgadaptError
from imgadapt.file import outline
from imgadapt.formats.layer_config import LayerConfig
from imgadapt.header import BITS, header_of
from imgadapt.tensors import read_tensors, write_tensors
from tests import tiny
from tests.hostile import INF, LAYER, NAN, lora, raw, row

# --- what is fine to load and not to use

WIDTH = tiny.sd1().unet.mid_block.attentions[0].proj_in.weight.shape[0]


def wide(**other: Tensor) -> dict[str, Tensor]:
    """A LoRA that fits the tiny base."""
    return lora(**{"up": torch.ones(WIDTH, 2), "down": torch.ones(2, WIDTH, 1, 1), **other})


BROKEN: dict[str, tuple[dict[str, Tensor], str]] = {
    "NaN": (wide(up=torch.full((WIDTH, 2), NAN)), "up has NaN or infinity"),
    "infinity": (wide(down=torch.full((2, WIDTH, 1, 1), INF)), "down has NaN or infinity"),
    "int8": (wide(up=torch.ones(WIDTH, 2, dtype=torch.int8)), r"up is torch\.int8"),
    "bool": (wide(up=torch.ones(WIDTH, 2, dtype=torch.bool)), r"up is torch\.bool"),
    "dora_scale": (wide(dora_scale=torch.ones(5, 3)), "magnitude"),
    "another size": (lora(), "is the file for another base"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_loads_and_cannot_be_used_says_so_when_it_is_attached(what: str, tmp_path: Path) -> None:
    of, said = BROKEN[what]
    pipe = tiny.sd1()
    write_tensors(tmp_path / "x.safetensors", of, {})
    with pytest.raises(FormatError, match=said):
        attach(pipe, load(tmp_path / "x.safetensors"), name="x")
    assert list(adapters(pipe)) == []


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_is_not_written(value: float, tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", lora(down=torch.full((2, 8), value)), {})
    with pytest.raises(FormatError, match=r"NaN or infinity in .*lora_down"):
        save(load(tmp_path / "x.safetensors"), tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()


# --- damage


def whole(path: Path) -> bytes:
    write_tensors(path, lora(), {"ss_output_name": "x", "a": "é"})
    return path.read_bytes()


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    data = whole(path)
    for kept in range(len(data)):
        path.write_bytes(data[:kept])
        with pytest.raises(FormatError, match=rf"^{path}: (an empty file|only \d bytes|not whole)"):
            load(path)


def test_a_header_with_another_byte_is_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    data, random = whole(path), Random(0)
    start = 8 + int.from_bytes(data[:8], "little")
    outcomes = Counter[str]()
    for _ in range(500):
        place = random.randrange(start)
        path.write_bytes(data[:place] + bytes([random.randrange(256)]) + data[place + 1 :])
        try:
            load(path)
            outcomes["read"] += 1
        except FormatError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 5


# --- files that change while they are read


def shorter(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def rewritten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    os.utime(path, ns=(0, 1))  # a file system's clock may be too coarse to show it


def replaced(path: Path) -> None:
    path.with_name("other").replace(path)


def when_read(change: Callable[[Path], object], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The change comes at the first of the reads of data."""
    read, done = os.preadv, list[int]()

    def once(*arguments: Any) -> int:
        if not done:
            done.append(1)
            change(path)
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", once)


@pytest.mark.parametrize("change", [shorter, longer, rewritten])
def test_a_file_that_changes_while_it_is_read_is_refused(
    change: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tensors(path := tmp_path / "x.safetensors", lora(), {})
    when_read(change, path, monkeypatch)
    with pytest.raises(FormatError, match=rf"^{path}: it (became shorter|changed) while it was read"):
        load(path)


@pytest.mark.parametrize("change", [Path.unlink, replaced])
def test_a_file_that_goes_while_it_is_read_is_read_as_it_was(
    change: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tensors(path := tmp_path / "x.safetensors", lora(), {})
    write_tensors(tmp_path / "other", lora(up=torch.zeros(8, 2)), {})
    when_read(change, path, monkeypatch)
    (part,) = load(path).parts.values()
    assert torch.equal(part.tensors["up"], torch.ones(8, 2))


def test_what_was_read_stays_whatever_happens_to_the_file(tmp_path: Path) -> None:
    write_tensors(path := tmp_path / "x.safetensors", lora(), {})
    (part,) = load(path).parts.values()
    path.write_bytes(b"\xff" * path.stat().st_size)
    os.truncate(path, 0)
    assert torch.equal(part.tensors["up"], torch.ones(8, 2))


def test_reads_that_stop_short_are_gone_on_with_and_a_disk_that_fails_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tensors(path := tmp_path / "x.safetensors", lora(), {})
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, place: read(file, [buffers[0][:3]], place))
    assert torch.equal(read_tensors(path)[0][f"{LAYER}.lora_up.weight"], torch.ones(8, 2))

    def failing(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(FormatError, match=rf"^{path}: Input/output error$"):
        load(path)


# --- what is printed


def test_show_and_convert_move_no_cursor_and_begin_no_line_for_a_file(
    run: Callable[[str, Sequence[str]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07\r\n\u202eNOTE all is well\x9b31m<script>"
    metadata = {"ss_output_name": evil, evil: evil, "modelspec.trigger_phrase": evil}
    write_tensors(tmp_path / "x.safetensors", {**lora(), f"{evil}.x": torch.ones(1)}, metadata)
    write_tensors(tmp_path / "w.safetensors", {f"<{evil}>": torch.ones(2, 8)}, metadata)
    for name, options in (("x", ["--layers", "--base", "sd1"]), ("w", [])):
        path = str(tmp_path / f"{name}.safetensors")
        for program, arguments in (("show", options), ("show", ["--json"]), ("convert", ["--to", "xlabs"])):
            try:
                with contextlib.suppress(SystemExit):
                    run(program, [path, *arguments])
            except ImgadaptError as error:
                assert str(error).isprintable()  # noqa: PT017
    said = capsys.readouterr()
    assert said.out.count("<script>") >= 8
    assert all(line.isprintable() for line in (said.out + said.err).split("\n"))
    assert not any(line.startswith("NOTE") for line in said.out.split("\n"))


# --- against the safetensors package
# Refused here and read by it: what is too large (see header.py; nothing here is), a key that is there twice, a row with
# more than three entries, metadata that is null, zeros after the header.

ODD = ("C64", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4")
SIZES = {name: bits // 8 for name, bits in BITS.items() if name not in ODD}
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-2, 99), st.floats(), st.text(max_size=3))


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A small file, good but for what is drawn to be wrong."""
    place, rows = 0, dict[str, Any]()
    for key in draw(st.lists(st.text(max_size=4), max_size=4, unique=True)):
        dtype, shape = draw(st.sampled_from(sorted(SIZES))), draw(st.lists(st.integers(0, 3), max_size=3))
        last = place + math.prod(shape) * SIZES[dtype]
        rows[key] = row(shape, place, last, dtype)
        place = last
    for _ in range(draw(st.integers(0, 2)) if rows else 0):
        wrong = rows[draw(st.sampled_from(sorted(rows)))]
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        wrong[field] = draw(st.one_of(VALUES, st.lists(VALUES, max_size=3)))
    if draw(st.booleans()):
        rows["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    marks = draw(st.sampled_from([(",", ":"), (", ", ": ")]))
    text = json.dumps(rows, ensure_ascii=draw(st.booleans()), separators=marks).encode("utf-8", "surrogatepass")
    text += b" " * draw(st.integers(0, 9))
    data = bytearray(raw(text, bytes(max(0, place + draw(st.sampled_from([0, 0, 0, 1, -1]))))))
    for _ in range(draw(st.integers(0, 2))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@settings(max_examples=1500, deadline=None, database=None)
@given(data=headers())
def test_a_header_is_read_as_the_safetensors_package_reads_it(data: bytes, shared: Path) -> None:
    shared.write_bytes(data)
    try:
        with safe_open(shared, "pt") as file:
            theirs = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 # not a dict
            theirs = theirs, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, OverflowError):
        theirs = None
    try:
        header = header_of(shared)
        ours = {key: row.shape for key, row in header.rows.items()}, dict(header.metadata)
    except FormatError:
        assert theirs is None or deliberate(data)
        return
    assert ours == theirs


def deliberate(data: bytes) -> bool:
    """Whether a header has what is refused here on purpose."""
    twice = list[bool]()

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.append(len(dict(pairs)) < len(pairs))
        return dict(pairs)

    start = 8 + int.from_bytes(data[:8], "little")
    rows = json.loads(data[8:start].rstrip(b"\0"), object_pairs_hook=once)
    more = any(len(row) > 3 for key, row in rows.items() if key != "__metadata__")
    return any(twice) or more or rows.get("__metadata__", {}) is None


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers") / "x.safetensors"


# --- outlines, configs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_an_outline_is_the_file_but_for_its_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    of = {key: tensor.to(dtype) for key, tensor in lora(alpha=torch.tensor(1.5)).items()}
    write_tensors(path := tmp_path / "x.safetensors", of, {"a": "b"})
    full, drawn = load(path), outline(path)
    (part,), (told,) = full.parts.values(), drawn.parts.values()
    assert (list(drawn.parts), told.method, drawn.metadata) == (list(full.parts), part.method, {"a": "b"})
    assert told.method.file_alpha == 1.5
    for key, tensor in part.tensors.items():
        assert (told.tensors[key].shape, told.tensors[key].dtype) == (tensor.shape, tensor.dtype)
        assert not told.tensors[key].float().any()


def test_the_first_pattern_that_matches_counts_whether_it_is_a_name_or_not() -> None:
    rows = {r"down\..*": 1, "to_q": 2, "^up.to_q": 3, r"up\.to_[kq]": 4, "(a|b.c)": 5}
    config = LayerConfig({"peft_config": json.dumps({"lora_alpha": 9, "alpha_pattern": rows})})
    asked = ("down.to_q", "up.to_q", "x.up.to_q", "up.to_k", "to_q_", "b.c", "z.a", "ba")
    assert [config.of(f"unet.{path}")["alpha"] for path in asked] == [1, 2, 2, 4, 9, 5, 5, 9]
