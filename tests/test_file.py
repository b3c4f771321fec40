"""Files: what is written is safetensors, the same bytes, whole or not at all; what is no file is refused by name."""

import errno
import hashlib
import json
import os
import resource
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from imgadapt import AdapterFile, load, save
from imgadapt.atomic import atomically, write_bytes
from imgadapt.errors import FormatError, OutputError
from imgadapt.formats import Part
from imgadapt.methods import LoRA
from imgadapt.tensors import DTYPES, read_tensors, write_tensors

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
CONV = "unet.conv_in"


def adapter() -> AdapterFile:
    """Two layers, linear and convolution, of different ranks and alphas; the same in every process."""
    linear = Part(LoRA(3, 2.0), {"down": torch.arange(18.0).view(3, 6), "up": torch.arange(15.0).view(5, 3)})
    shapes = {"down": (2, 4, 3, 3), "up": (8, 2, 1, 1)}
    conv = Part(LoRA(2, 0.5), {key: torch.full(shape, 0.25).bfloat16() for key, shape in shapes.items()})
    return AdapterFile({LAYER: linear, CONV: conv}, {f"key {i}": f"value {i}" for i in range(20)})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_safetensors_package_reads_the_same_tensors_and_metadata(dtype: torch.dtype, tmp_path: Path) -> None:
    numbers = (torch.arange(24) % 2 if dtype == torch.bool else torch.arange(24)).to(dtype)
    tensors = {
        "a matrix": numbers.view(4, 6),
        "transposed": numbers.view(4, 6).T,
        "every other": numbers[1::2],
        "broadcast": numbers[3].expand(2, 3),
        "0-dim": numbers[1],
        "empty": numbers[:0].view(0, 3),
        'ünï"\\\n☃': numbers[:3],
        "one byte, to misalign what follows": torch.ones(1, dtype=torch.uint8),
        "wide": torch.ones(3, dtype=torch.float64).requires_grad_(),
    }
    metadata = {"z": "1", "a": 'ü "quoted" \\ \n ☃', "": ""}
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors, metadata)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == metadata
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            again: Tensor = file.get_tensor(name)
            assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
            flat = tensor.detach().reshape(-1).contiguous()
            assert again.reshape(-1).view(torch.uint8).equal(flat.view(torch.uint8)), name
    assert read_tensors(path)[1] == metadata


def test_tensors_are_aligned_to_their_size_in_the_file(tmp_path: Path) -> None:
    """As the safetensors package does, so that mapped files can be read without a copy."""
    path = tmp_path / "x.safetensors"
    write_tensors(path, {dtype_name: torch.ones(3).to(dtype) for dtype, dtype_name in DTYPES.items()}, {})
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert len(header) == len(DTYPES)
    sizes = {dtype_name: dtype.itemsize for dtype, dtype_name in DTYPES.items()}
    assert all(row["data_offsets"][0] % sizes[name] == 0 for name, row in header.items())
    assert max(row["data_offsets"][1] for row in header.values()) == len(data) - 8 - length


def test_a_file_without_metadata_has_none(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {})
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() is None
    assert read_tensors(tmp_path / "x.safetensors")[1] == {}


WITH_ALPHA = ("kohya", "lycoris", "lycoris-wrapper", "onetrainer", "diffusers", "peft", "comfyui", "imgadapt")
"""Formats that have a LoRA's tensors as they are."""


@pytest.mark.parametrize("form", WITH_ALPHA)
def test_an_adapter_survives_a_file(form: str, tmp_path: Path) -> None:
    file = adapter()
    again = load(save(file, tmp_path / "x.safetensors", format=form))
    for name, part in file.parts.items():
        assert again.parts[name].method == part.method
        assert all(torch.equal(again.parts[name].tensors[key], tensor) for key, tensor in part.tensors.items())
        assert all(again.parts[name].tensors[key].dtype == tensor.dtype for key, tensor in part.tensors.items())
    assert {key: again.metadata[key] for key in file.metadata} == dict(file.metadata)


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    """With another hash seed, and so another order of sets and of Rust's maps."""
    program = (
        "import hashlib, runpy, sys\n"
        "here = runpy.run_path(sys.argv[1])\n"
        "for form in here['WITH_ALPHA']:\n"
        "    path = here['save'](here['adapter'](), f'{sys.argv[2]}/{form}.safetensors', format=form)\n"
        "    print(hashlib.sha256(path.read_bytes()).hexdigest())\n"
    )
    theirs = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, __file__, str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        check=True,
        capture_output=True,
        text=True,
    )
    ours = [save(adapter(), tmp_path / f"{form}-here.safetensors", format=form).read_bytes() for form in WITH_ALPHA]
    assert theirs.stdout.split() == [hashlib.sha256(data).hexdigest() for data in ours]


def test_a_file_is_replaced_whole_with_the_users_permissions(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "x.bin"
    mask = os.umask(0o027)
    try:
        write_bytes(path, b"old")
        write_bytes(path, b"new")
    finally:
        os.umask(mask)
    assert content(path.parent) == {"x.bin": b"new"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files cannot grow past 16 MiB: writing fails as it does on a full disk, by the system's own doing.

    The limit holds for pytest's own output, too, where that is a file: it must be far above any log.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_disk")
def test_a_file_that_finds_no_room_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(8)}, {})
    before = content(tmp_path)
    with pytest.raises(OutputError, match=r"cannot write .*x\.safetensors: File too large; what was there is unto"):
        write_tensors(path, {"a": torch.ones(5 << 20)}, {})
    assert content(tmp_path) == before


def failing(code: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("module", "function", "code"),
    [
        (os, "fsync", errno.ENOSPC),  # space is found missing only when it is flushed
        (os, "fsync", errno.EIO),
        (os, "replace", errno.EACCES),
        (os, "open", errno.EROFS),
        (os, "open", errno.EACCES),
    ],
    ids=lambda value: errno.errorcode.get(value, "") if isinstance(value, int) else getattr(value, "__name__", value),
)
@pytest.mark.parametrize("existed", [True, False], ids=["over an old file", "anew"])
def test_any_failure_to_write_names_the_path_and_leaves_things_as_they_were(
    module: Any, function: str, code: int, existed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    if existed:
        save(AdapterFile({LAYER: adapter().parts[LAYER]}), path)
    before = content(tmp_path)
    monkeypatch.setattr(module, function, failing(code))
    with pytest.raises(OutputError) as caught:
        save(adapter(), path)
    monkeypatch.undo()
    assert str(path) in str(caught.value)
    assert os.strerror(code) in str(caught.value)
    assert content(tmp_path) == before


def test_a_folder_that_cannot_be_synced_does_not_undo_a_written_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems refuse it; the file is in place by then, and saying otherwise would be untrue."""
    sync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    write_bytes(tmp_path / "x.bin", b"new")
    assert content(tmp_path) == {"x.bin": b"new"}


def test_a_path_that_cannot_be_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x.safetensors", tmp_path / "folder"):
        with pytest.raises(OutputError, match=str(path)):
            save(adapter(), path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_the_old_file_and_the_interruption(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with atomically(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert content(tmp_path) == {"x.bin": b"old"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty file"),
        (b"just words, no tensors at all\n", "not a safetensors file"),
        (struct.pack("<Q", 2) + b"{}", "not an adapter that imgadapt reads: none of its 0 keys"),
        (struct.pack("<Q", 2**40) + b"{}", "not a safetensors file"),
        (b"PK\x03\x04 no pickle, as torch.save writes it", "not a safetensors file, but a zip archive: unpack it"),
    ],
    ids=["empty", "text", "no tensors", "a header of a terabyte", "zip"],
)
def test_what_is_no_adapter_is_refused_by_its_path(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("kept", [4, 100, -1], ids=["in the length", "in the header", "the last byte"])
def test_a_truncated_file_is_refused_by_its_path(kept: int, tmp_path: Path) -> None:
    path = save(adapter(), tmp_path / "x.safetensors")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FormatError, match=rf"{path}: (only 4 bytes; )?not (a )?whole"):
        load(path)


def test_a_missing_file_and_a_folder_are_refused_by_their_paths(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=rf"{tmp_path}/nothing: no such file$"):
        load(tmp_path / "nothing")
    with pytest.raises(FormatError, match=rf"{tmp_path}: a folder without adapter_config\.json and adapter_model"):
        load(tmp_path)
    with pytest.raises(FormatError, match=rf"{tmp_path}: no such file, only a folder"):
        read_tensors(tmp_path)


def test_a_file_is_written_over_itself_while_its_tensors_are_in_use(tmp_path: Path) -> None:
    """They are in memory; what is written is another file, put in its place."""
    path = save(adapter(), tmp_path / "x.safetensors", format="kohya")
    file = load(path)
    save(file, path, format="diffusers")
    again = load(path)
    assert (file.format, again.format) == ("kohya", "diffusers")
    for name, part in adapter().parts.items():
        for key, tensor in part.tensors.items():
            assert torch.equal(file.parts[name].tensors[key], tensor)
            assert torch.equal(again.parts[name].tensors[key], tensor)


@pytest.mark.parametrize("end", ["bin", "pt"])
def test_a_pickle_of_tensors_is_read_and_any_other_is_refused_unopened(end: str, tmp_path: Path) -> None:
    """diffusers' older scripts wrote `pytorch_lora_weights.bin`."""
    tensors, _ = read_tensors(save(adapter(), tmp_path / "x.safetensors", format="kohya"))
    path = tmp_path / f"x.{end}"
    torch.save(tensors, path)
    with pytest.raises(FormatError, match=rf"{path}: a pickle, .*show --pickle.*convert --pickle.*pickle=True\)"):
        load(path)
    file = load(path, pickle=True)
    assert (file.format, set(file.parts)) == ("kohya", {LAYER, CONV})
    assert {name: part.method for name, part in file.parts.items()} == {
        name: part.method for name, part in adapter().parts.items()
    }
    torch.save({"code": Unpickled()}, path)
    with pytest.raises(FormatError, match=rf"{path}: .*it wants to run \S+_open"):
        load(path, pickle=True)
    assert not Unpickled.opened
    path.write_bytes(b"no pickle")
    with pytest.raises(FormatError, match=str(path)):
        load(path)


class Unpickled:
    """Says whether it was made again from a pickle."""

    opened = False

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _open, ()


def _open() -> None:
    Unpickled.opened = True


@pytest.mark.parametrize(("dtype", "size"), [("C64", 64), ("U16", 16), ("F8_E8M0", 8), ("F4", 4)])
def test_a_dtype_that_could_not_be_written_back_is_refused(dtype: str, size: int, tmp_path: Path) -> None:
    header = json.dumps({"odd": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    with pytest.raises(FormatError, match=rf"{path}: odd of type {dtype}, which no adapter has"):
        load(path)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def loads_or_refuses(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        for part in load(path, strict=False).parts.values():
            assert set(part.tensors) == {"down", "up"}
    except FormatError as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017


FUZZ = settings(max_examples=60, deadline=None, database=None)


@FUZZ
@given(data=st.binary(max_size=300), framed=st.booleans())
def test_no_bytes_raise_anything_but_a_format_error(data: bytes, framed: bool, scratch: Path) -> None:
    loads_or_refuses(scratch / "x.safetensors", struct.pack("<Q", len(data)) + data if framed else data)


@FUZZ
@given(form=st.sampled_from(WITH_ALPHA), where=st.floats(0, 1), flip=st.integers(0, 255), cut=st.booleans())
def test_no_damage_to_a_file_raises_anything_but_a_format_error(
    form: str, where: float, flip: int, cut: bool, scratch: Path
) -> None:
    data = bytearray(save(adapter(), scratch / "whole.safetensors", format=form).read_bytes())
    at = int(where * (len(data) - 1))
    data[at] ^= flip
    loads_or_refuses(scratch / "x.safetensors", bytes(data[:at] if cut else data))


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers()))


@FUZZ
@given(
    down=st.lists(st.integers(0, 3), max_size=4),
    up=st.lists(st.integers(0, 3), max_size=4),
    alpha=st.one_of(VALUES, st.just({})),
    patterns=st.one_of(VALUES, st.dictionaries(st.text(max_size=5), VALUES, max_size=3)),
)
def test_no_shapes_and_no_metadata_raise_anything_but_a_format_error(
    down: list[int], up: list[int], alpha: Any, patterns: Any, scratch: Path
) -> None:
    config = {"unet.lora_alpha": alpha, "unet.alpha_pattern": patterns, "unet.use_rslora": alpha}
    tensors = {f"{CONV}.lora_A.weight": torch.zeros(down), f"{CONV}.lora_B.weight": torch.zeros(up)}
    path = scratch / "shapes.safetensors"
    write_tensors(path, tensors, {"lora_adapter_metadata": json.dumps(config)})
    loads_or_refuses(path, path.read_bytes())
