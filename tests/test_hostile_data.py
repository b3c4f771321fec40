"""Folders from anyone, on any disk: what they may cost is a message that says what is wrong."""

import errno
import io
import itertools
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgadapt import reading
from imgadapt.errors import ConfigError, DataError, ImgadaptError, OutputError
from imgadapt.playground.decoding import decoded
from imgadapt.playground.settings import Settings
from imgadapt.playground.trainings import datasets
from imgadapt.training import data, decoding, flags, framing, leavings, lint, looks, plan, sheets
from imgadapt.training.buckets import View
from imgadapt.training.config import DreamBoothConfig, InversionConfig, TrainConfig
from imgadapt.training.data import Example, scan
from imgadapt.training.finding import Finding
from tests import hostile_pictures as hostile
from tests.hostile_pictures import picture

SECONDS = 2.0  # of CPU
LARGE = 8.0  # of the largest tables
Run = Callable[[str, Sequence[str]], None]


@contextmanager
def quickly(most: float = SECONDS) -> Generator[None]:
    began = time.thread_time()
    yield
    assert time.thread_time() - began < most


def trained(folder: Path, side: int = 8) -> tuple[list[Example], list[Finding]]:
    """All that `check` and `train` do with the files of a folder."""
    examples = scan(folder, "a drawing")
    found = lint.examine(examples, folder, resolution=side)
    views = [View(example, (16, 16)) for example in examples]
    for view in views:
        assert framing.frame(view, framing.Options(use_mask="file")).pixels.isfinite().all()
    sheets.contact_sheet(views, use_mask="file")
    return examples, found


def said(folder: Path, most: float = SECONDS) -> str:
    """The message that a folder gets."""
    with quickly(most), pytest.raises(DataError) as error:
        trained(folder)
    text = str(error.value)
    text.encode()
    assert len(text) < 2000
    assert re.search(r"[\x00-\x1f\x7f]", text) is None
    return text


# --- pictures


@pytest.mark.parametrize("name", [name for name in hostile.BOMBS if "strip" not in name])  # that is tried below
def test_what_would_take_minutes_or_gigabytes_is_refused(name: str, tmp_path: Path) -> None:
    make, wanted = hostile.BOMBS[name]
    (tmp_path / "a.png").write_bytes(make())
    with quickly(), pytest.raises(DataError, match=rf"mend or remove a\.png \(.*({wanted})"):
        scan(tmp_path, "x")
    with quickly(), pytest.raises(DataError):
        decoded((tmp_path / "a.png").read_bytes(), 2**24)


@pytest.mark.parametrize("read", [lambda content: decoded(content, 2**24), decoding.decoded])
def test_a_picture_that_memory_is_too_short_for_is_not_called_broken(
    read: Callable[[bytes], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: object) -> None:
        raise MemoryError

    content = picture()
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load, raising=False)
    with pytest.raises(DataError, match="memory is too short for"):
        read(content)


@pytest.mark.parametrize("name", [name for name in hostile.TAKEN if "strip" not in name])
def test_what_only_looks_dear_is_taken(name: str, tmp_path: Path) -> None:
    make, size = hostile.TAKEN[name]
    (tmp_path / "a.png").write_bytes(make())
    with quickly():
        (one,), found = trained(tmp_path)
    assert (one.width, one.height) == size
    assert ("animated" in " ".join(finding.text for finding in found)) == (name == "a million frames")


def test_no_picture_takes_more_than_a_gigabyte(tmp_path: Path) -> None:
    """In a process that has no more: the largest that is taken, and all that say they are larger."""
    code = """
import re, resource, sys
from pathlib import Path
from imgadapt.errors import DataError
from imgadapt.training import framing
from imgadapt.training.buckets import View
from imgadapt.training.data import scan
from tests.hostile_pictures import BOMBS, TAKEN
rows, folder = {**BOMBS, **TAKEN}, Path(sys.argv[1])
files = {name: rows[name][0]() for name in sys.argv[2:]}
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 1100 * 2**20,) * 2)
for name, data in files.items():
    (folder / "a.png").write_bytes(data)
    try:
        (one,) = scan(folder, "x")
        framing.frame(View(one, (16, 16)))
        assert (one.width, one.height) == TAKEN[name][1]
    except DataError as error:
        assert re.search(BOMBS[name][1], str(error)), (name, error)
print("all")
"""
    names = ["a strip of the largest size", "transparent strip", "a canvas of WebP", "a smaller canvas", "200 texts"]
    names += ["a lossless WebP", "a lossy WebP", "a TIFF of huge tiles", "a JPEG that says so"]
    command = [sys.executable, "-c", code, str(tmp_path), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.stdout == "all\n", done.stderr


def test_a_format_is_told_by_what_is_in_a_file(tmp_path: Path) -> None:
    read = {"BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP"}
    kinds = [kind for kind, _ in hostile.every_kind()]
    assert {"EPS", "ICO", "PDF", "JPEG2000", *read} <= set(kinds)
    for kind, content in hostile.every_kind():
        (tmp_path / "a.png").write_bytes(content)
        if kind in read:
            (one,), _ = trained(tmp_path)
            assert (one.width, one.height) == (32, 32), kind
        else:
            assert "(not a picture, whatever its name says)" in said(tmp_path), kind


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\0\0\0\x18ftypheic" + bytes(99), b"%PDF-1.4", b"GIF8"],
)
def test_what_is_no_picture_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert re.search(r"mend or remove a.png \((not a picture|an empty file)", said(tmp_path))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_cut_anywhere_is_refused(kind: str, tmp_path: Path) -> None:
    whole = picture(kind=kind)
    for length in {*range(0, 60, 7), *range(60, len(whole) - 12, len(whole) // 16)}:
        (tmp_path / "a.png").write_bytes(whole[:length])
        assert "1 of 1 pictures cannot be read; mend or remove a.png (" in said(tmp_path), length


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (7, 8)])
def test_threads_of_pixels_are_refused(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert f"({size[0]}x{size[1]} pixels, wanted 8 a side or more)" in said(tmp_path)


def test_a_strip_is_taken_and_told(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4000)).save(tmp_path / "a.png")
    _, found = trained(tmp_path)
    assert any("longer than 2:1" in finding.text for finding in found)


@pytest.mark.parametrize(
    ("image", "name", "wanted"),
    [
        (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "a.jpg", (254, 0, 0)),
        (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "a.tif", (255, 0, 0)),
        (Image.new("YCbCr", (9, 9), (76, 85, 255)), "a.jpg", (254, 0, 0)),
        (Image.new("LA", (9, 9), (0, 128)), "a.png", (127, 127, 127)),
        (Image.new("P", (9, 9), 1), "a.gif", (1, 1, 1)),
        (Image.new("1", (9, 9), 1), "a.tif", (255, 255, 255)),
        (Image.fromarray(np.full((9, 9), 40000, np.uint16)), "a.png", (156, 156, 156)),
        (Image.fromarray(np.full((9, 9), 40000, np.int32)), "a.tif", (156, 156, 156)),
        (Image.new("LAB", (9, 9)), "a.tif", "its colours are LAB; save it as RGB"),
        (Image.new("F", (9, 9)), "a.tif", "numbers of 32 bits, whose white is not known"),
        (Image.new("I", (9, 9), 70000), "a.tif", "numbers of 32 bits, whose white is not known"),
    ],
)
def test_colours_are_right_or_refused(
    image: Image.Image, name: str, wanted: str | tuple[int, ...], tmp_path: Path
) -> None:
    if image.mode == "P":
        image.putpalette(bytes(range(256)) * 3)
        image.putpalette([value for grey in range(256) for value in (grey,) * 3])
    image.save(tmp_path / name)
    if isinstance(wanted, str):
        assert wanted in said(tmp_path)
    else:
        (one,), _ = trained(tmp_path)
        made = framing.frame(View(one, (8, 8))).pixels[:, 4, 4]
        assert ((made + 1) * 127.5 - made.new_tensor(wanted)).abs().max() < 1.5


@pytest.mark.parametrize(
    ("block", "size"),
    [
        (hostile.exif(b"\0\3\0\0\0\1\0\6\0\0"), (16, 32)),
        (hostile.exif(b"\0\3\0\0\0\1\0\x63\0\0"), (32, 16)),
        (hostile.exif(b"\0\3\0\0\0\1\0\0\0\0"), (32, 16)),
        (hostile.exif(b"\0\2\0\0\0\4six\0"), (32, 16)),
        (hostile.exif(b"\0\3\0\0\0\2\0\6\0\6"), (16, 32)),
        (hostile.exif(b"\0\5\0\0\0\1\xff\xff\xff\xff"), (32, 16)),
        (hostile.exif(b"\0\7\xff\xff\xff\xff\0\0\0\x1a"), (32, 16)),
        (b"MM\0*\0\0", None),
        (b"MM\0*\xff\xff\xff\xff", (32, 16)),
        (b"", (32, 16)),
    ],
)
def test_exif_of_nonsense_turns_nothing_or_is_told(block: bytes, size: tuple[int, int] | None, tmp_path: Path) -> None:
    Image.effect_mandelbrot((32, 16), (-2, -1.5, 1, 1.5), 60).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:33] + hostile.chunk(b"eXIf", block) + whole[33:])
    if size is None:
        assert "its EXIF is damaged, so that nobody knows which side is up" in said(tmp_path)
    else:
        (one,), _ = trained(tmp_path)
        assert (one.width, one.height) == size


# --- names, and what is no file


NAMES = (b"new\nline", b"\x1b[2J\x1b]0;title\x07", b"\xff\xfe not UTF-8", "🦊\u200d🔥".encode(), b"x" * 250, b"-rf",
         b"a\xe2\x80\xaegnp", b"'; $(touch x) `x`", b"%s%n{0}", b"\t", b"con")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_of_any_bytes_are_trained_and_said(name: bytes, tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(name + b".png")).write_bytes(picture())
    (tmp_path / os.fsdecode(name + b".txt")).write_text("a fox")
    (one,), _ = trained(tmp_path)
    assert one.captions == ("a fox",)
    (tmp_path / os.fsdecode(name + b".png")).write_bytes(b"no picture")
    assert "not a picture" in said(tmp_path)


def test_names_of_any_bytes_are_printed(tmp_path: Path, run: Run, capfd: Any) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in NAMES:
        (folder / os.fsdecode(name + b".png")).write_bytes(picture())
        (folder / os.fsdecode(name + b".txt")).write_text("a fox")
    for name in NAMES[:3]:  # those that are named
        (folder / os.fsdecode(b"\1" + name + b".odd")).write_text("not used")
    given = [str(folder), "--no-step", "--output", str(tmp_path / "out"), "--base", "demo", "--batch-size", "1"]
    run("check", [*given, "--targets", "unet.mid_block*to_q", "--rank", "2"])
    out = capfd.readouterr().out
    out.encode()
    assert "3 files are not used: " in out
    assert r"\udcff" in out
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", out) is None


def test_names_that_differ_in_case_are_two_pictures_and_share_no_caption_unsaid(tmp_path: Path) -> None:
    for name, text in (("Fox", "one"), ("fox", "two")):
        (tmp_path / f"{name}.png").write_bytes(picture())
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "FOX.PNG").write_bytes(picture())
    examples, found = trained(tmp_path)
    assert {e.path.name: e.captions for e in examples} == {
        "FOX.PNG": ("one",),
        "Fox.png": ("one",),
        "fox.png": ("two",),
    }
    assert any("3 pictures share Fox.txt" in finding.text for finding in found)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def circle(path: Path) -> None:
    path.symlink_to(path.name)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


@pytest.mark.parametrize(
    ("make", "why"),
    [(fifo, "a pipe"), (device, "or device"), (circle, "symbolic links"),
     (nowhere, "only a link to one|no such|cannot"), (sparse, "1,099,511,627,776 bytes")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["b.png", "a.txt", "a-mask.png", "metadata.jsonl", "metadata.csv"])
def test_what_is_no_file_is_refused_and_never_waited_for(
    make: Callable[[Path], None], why: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    make(tmp_path / name)
    text = said(tmp_path)
    assert name in text
    assert re.search(why, text)


def test_folders_called_as_files_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    for name in ("b.png", "a.txt", "metadata.jsonl", "a-mask.png"):
        (tmp_path / name).mkdir()
    examples, _ = trained(tmp_path)
    assert [(e.path.name, e.captions, e.mask) for e in examples] == [("a.png", ("a drawing",), None)]


def test_a_link_to_a_picture_is_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "set").mkdir()
    (tmp_path / "elsewhere" / "x").write_bytes(picture())
    (tmp_path / "set" / "a.png").symlink_to(tmp_path / "elsewhere" / "x")
    (one,), _ = trained(tmp_path / "set")
    assert one.width == 48


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("name", ["a.png", "a.txt", "a-mask.png", "metadata.jsonl"])
def test_a_disk_that_fails_is_told(code: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file, content in {
        "a.png": picture(),
        "a.txt": b"x",
        "a-mask.png": picture(mode="L"),
        "metadata.jsonl": b"",
    }.items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')

    def failing(path: Any, *rest: Any) -> int:
        if os.path.basename(path) == name:
            raise OSError(code, os.strerror(code), path)
        return opening(path, *rest)

    trained(tmp_path)
    opening = os.open
    monkeypatch.setattr(reading.os, "open", failing)
    text = said(tmp_path)
    assert name in text
    assert os.strerror(code) in text


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    for change in (lambda: path.write_bytes(picture() + b"more"), lambda: os.truncate(path, 10)):
        path.write_bytes(picture())
        looking, looks = os.fstat, itertools.count()

        def looked(of: int, change: Callable[[], object] = change) -> os.stat_result:
            status = looking(of)  # noqa: B023
            if next(looks) == 1:  # noqa: B023 # what it is was the first
                monkeypatch.undo()
                change()
            return status

        monkeypatch.setattr(reading.os, "fstat", looked)
        assert "it changed while it was read" in said(tmp_path)


@pytest.mark.parametrize("name", ["a.png", "a-mask.png"])
def test_what_changed_after_it_was_scanned_is_never_trained(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    Image.new("L", (48, 48), 255).save(tmp_path / "a-mask.png")
    (one,) = scan(tmp_path, "x")
    options = framing.Options(use_mask="file")
    before = framing.key(View(one, (16, 16)), options)
    (tmp_path / name).write_bytes(picture(mode="L"))
    assert (
        framing.key(View(one, (16, 16)), options) == before
    )  # so what is made now would be kept as what was there then
    with pytest.raises(DataError, match=rf"{name}: the file has changed since it was scanned; start the run anew"):
        framing.frame(View(one, (16, 16)), options)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(no such file\)"):
        framing.frame(View(one, (16, 16)), options)
    again = replace(one, path=tmp_path / "b.png")
    with pytest.raises(DataError, match=r"b\.png: cannot be read"):
        lint.examine([again], tmp_path, resolution=8)


# --- captions


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("Füchse".encode("latin-1"), "not UTF-8 text .*save it as UTF-8"),
        ("a fox".encode("utf-16"), "not UTF-8 text .*save it as UTF-8"),
        ("a fox".encode("utf-16-le"), "is it UTF-16\\? save it as UTF-8"),
        (b"a\x00fox", "is it UTF-16"),
        (b"\x1b[31mred\x1b[0m", r"x1b\[31mred.* has characters that are no text; remove them"),
        (b"a\x07\x08\x7f", "no text; remove them"),
        (b"x" * 10**8, "100,000,000 bytes, wanted 1,048,576 at most"),
        (b"{a|b}" * 40, "wordings of one picture, wanted 64 at most"),
        (b"{" + b"a|" * 10**5 + b"}", "wordings of one picture, wanted 64 at most"),
        (bytes(range(256)) * 50, "not UTF-8|no text"),
        (b"\xed\xa0\x80", "not UTF-8"),
    ],
)
def test_a_caption_that_is_no_text_is_named(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "a.txt").write_bytes(content)
    text = said(tmp_path)
    assert "a.txt" in text
    assert re.search(why, text)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [(b"  \n\t\r\n ", "a drawing"), (b"\xef\xbb\xbf", "a drawing"), (b"{{{{|||}", "{{{{|||}"),
     (b"a \xe2\x80\xae b", "a \u202e b"), (b"x" * 10**6, "x" * 10**6), (b"{" * 10**5, "{" * 10**5)],
)  # fmt: skip
def test_a_caption_that_is_odd_text_is_taken_as_it_is(content: bytes, wanted: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "a.txt").write_bytes(content)
    with quickly():
        (one,), found = trained(tmp_path)
    assert (
        set(one.captions) <= {wanted, *(wanted if len(wanted) < 20 else ()), "{{{", "{{{{", ""}
        or one.captions[0] == wanted
    )
    assert all("\u202e" not in finding.text for finding in found)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png", "text": ' + b"[" * 10**5, r"jsonl:1: nested too deeply"),
        ("metadata.jsonl", b'{"file_name": ' + b"9" * 10**5, r"jsonl:1: not JSON"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x", "text": "y"}', r"not JSON \(a name comes twice"),
        ("metadata.jsonl", b'{"file_name": {"a": NaN}}', r"jsonl:1: wanted 'file_name'"),
        ("metadata.jsonl", b'{"file_name": "a\\u0000.png", "text": "x"}', "that it names are not there"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "\\ud800"}', "characters that are no text"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": ' + b"[[1]]}", "wanted a text or a list"),
        ("metadata.jsonl", b'"' + b"x" * 10**6 + b'"', "jsonl:1: wanted an object"),
        ("metadata.jsonl", b'{"file_name": "' + b"x" * 10**6 + b'.png"}', "that it names are not there"),
        ("metadata.jsonl", b'{"file_name": "' + b"../" * 10**5 + b'a.png"}', "is not inside the folder"),
        ("metadata.jsonl", b'{"file_name": "' + b"d/" * 10**5 + b'a.png"}', "that it names are not there"),
        ("metadata.jsonl", b"\xff\xfe{\0", "not UTF-8"),
        ("metadata.jsonl", b"".join(b'{"file_name": "%d"}\n' % k for k in range(10**5)), "100000 pictures .* not"),
        ("metadata.csv", b'file_name,text\na.png,"never closed', r"csv:\d: not CSV"),
        ("metadata.csv", b'file_name,text\na.png,"x"y"', r"csv:\d: not CSV"),
        ("metadata.csv", b"file_name,text,text\na.png,x,y", "csv:1: two columns of one name"),
        ("metadata.csv", b"file_name,text\na.png," + b"x" * 10**6, r"csv:\d: not CSV \(field larger"),
        ("metadata.csv", b"file_name,text\na.png,x\0", "not CSV|no text"),
        ("metadata.csv", b"file_name,text\na.png,x,y,z", "more values than columns"),
        ("metadata.csv", b"," * 10**5 + b"\na.png", "csv:1: two columns of one name"),
        ("metadata.csv", b"\n\n\n", "have no row in it"),
    ],
)  # fmt: skip
def test_a_table_at_fault_is_told(name: str, content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / name).write_bytes(content)
    text = said(tmp_path, LARGE if content.count(b"\n") == 10**5 else SECONDS)
    assert name in text
    assert re.search(why, text), text


# --- folders


def test_folders_without_end_are_looked_through_once(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "out").symlink_to("/")
    deep = tmp_path
    for _ in range(400):
        deep = deep / "d"
        try:
            deep.mkdir()
        except OSError:
            break
    (deep.parent / "lost.txt").write_text("x")
    with quickly():
        _, found = trained(tmp_path)
    (lost,) = (finding for finding in found if "belong to no picture" in finding.text)
    assert len(lost.paths) == 1


def test_a_folder_that_nobody_may_look_into_is_told_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "lost+found").mkdir()

    def failing(folder: Any) -> Any:
        if Path(folder).name == "lost+found":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        return looking(folder)

    looking = os.scandir
    monkeypatch.setattr(os, "scandir", failing)
    examples, found = trained(tmp_path)
    assert len(examples) == 1
    assert [finding.text for finding in found if "cannot be looked into" in finding.text] == [
        "1 folders cannot be looked into: lost+found"
    ]


def test_ten_thousand_files_and_pictures_that_all_look_alike_take_no_square_of_it(tmp_path: Path) -> None:
    for k in range(10_000):
        (tmp_path / f"{k}.odd").touch()
    with quickly(), pytest.raises(DataError, match="no pictures in it; wanted"):
        scan(tmp_path)
    (tmp_path / "a.png").write_bytes(picture())
    with quickly():
        _, found = trained(tmp_path)
    assert any(finding.text.startswith("10000 files are not used") for finding in found)

    one = scan(tmp_path, "x")[0]
    many = [replace(one, path=tmp_path / f"{k}.png", digest=f"{k:064x}") for k in range(4000)]
    seen = [looks.look(one.path)] * len(many)
    with quickly():
        (alike,) = lint._same(many, seen)
    assert alike.text.startswith("4000 pictures look alike")


def test_too_many_files_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leavings, "MOST_FILES", 10)
    (tmp_path / "a.png").write_bytes(picture())
    for k in range(10):
        (tmp_path / f"{k}.odd").touch()
    assert "more than 10 files and folders in it" in said(tmp_path)


def test_what_a_training_writes_into_its_pictures_is_none_of_them(folder: Path, run: Run, quick: Any) -> None:
    for output, cache in (("out", "."), (".", "cache")):
        given = [
            str(folder),
            "--output",
            str(folder / output),
            "--cache",
            str(folder / cache),
            "--log-with",
            "--no-report",
        ]
        given += [
            "--steps",
            "1",
            "--batch-size",
            "1",
            "--targets",
            "unet.mid_block*to_q",
            "--rank",
            "2",
            "--warmup-steps",
            "0",
        ]
        run("style", given)
        assert len(scan(folder)) == 5
        assert list((folder / output).glob("*.safetensors"))


# --- settings

NUMBERS = (float("nan"), float("inf"), float("-inf"), 1e308, 10**30, "nan", "1e308", "9" * 5000)
ODD = (*NUMBERS, -1, "", "x" * 10**6, [], {}, "\x1b[2J", "\0", b"\xff", object(), [[]], {"": 1}, {"a": float("nan")},
       ["x" * 10**6], [float("nan")], [-1], [10**30], [[[]]] * 1000)  # fmt: skip
NUMERIC = tuple(map(str, (int, float, int | None, float | None)))
WORDS = ("method", "caption", "trigger", "title", "class_prompt", "initial", "word")


def every_setting() -> Iterator[tuple[type[TrainConfig], str]]:
    for kind in (TrainConfig, DreamBoothConfig, InversionConfig):
        for name in kind.model_fields:
            if kind is TrainConfig or name not in TrainConfig.model_fields:
                yield kind, name


@pytest.mark.parametrize(("kind", "name"), list(every_setting()))
def test_no_setting_takes_what_is_of_no_use(kind: type[TrainConfig], name: str) -> None:
    usual = {"folder": "x", **({"word": "<x>"} if kind is InversionConfig else {})}
    refused = 0
    for value in ODD:
        made, text = None, ""
        with quickly():
            try:
                made = kind.of({**usual, name: value})
            except ConfigError as error:
                text = str(error)
        if made is None:
            refused += 1
            assert name in text
            assert len(text) < 1500
            continue
        taken = getattr(made, name)
        if name in WORDS:
            assert len(taken) <= 5000
        elif isinstance(taken, int | float):
            assert value == -1
            assert name in ("logit_mean", "mode_scale")
        else:  # nothing, the name of a file, or -1 as a strength
            assert taken in ([], {}, Path("nan"), "nan", Path("1e308"), "1e308", [-1.0])
    assert refused >= len(ODD) - 12
    if str(kind.model_fields[name].annotation) in NUMERIC:
        for number in NUMBERS:
            with pytest.raises(ConfigError, match=name):
                kind.of({**usual, name: number})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"\0", "not TOML"),
        (b"steps = [" + b"[" * 10**5, "not TOML|nested"),
        (b"a" + b".a" * 10**5 + b" = 1", "a key of more than 32 parts"),
        (b"steps = " + b"9" * 10**5, "not TOML|64 bits"),
        (b"x = '" + b"x" * 10**7 + b"'", "wanted 1,048,576 at most"),
        (b"steps = 1\nsteps = 2", "not TOML"),
        (b"learning_rate = nan", "'learning_rate' is nan"),
        (b"learning_rate = inf", "'learning_rate' is inf"),
        (b"steps = 1979-05-27", "'steps' is datetime"),
        (b"[steps]\na = 1", "'steps' is {'a': 1}"),
        (b"lerning_rate = 1", "unknown key 'lerning_rate', did you mean 'learning_rate'"),
        (b'"' + b"x" * 10**5 + b'" = 1', "unknown key 'xxx"),
        (b'base = "' + b"x" * 10**4 + b'"', "a name of 10,000 bytes in it"),
        (b'base = "a\\u0000b"', "'base' is .*control characters"),
        (b'output = ""', "'output' is '': wanted a path"),
        (b'folder = "\\u001b[2J"', "'folder' is .*control characters"),
        (b"batch_size = 4.5", "'batch_size' is 4.5"),
        (b"score_with = [1]", "'score_with"),
        (b'score_with = ["' + b"x" * 9999 + b'"]', "a name of 9,999 bytes"),
        (b"resolution = [" + b"64," * 1000 + b"]", "'resolution' is"),
        (b"learning_rates = {a = -1}", "learning_rates"),
        (b"ranks = {a = 0}", "ranks"),
    ],
)
def test_a_config_at_fault_is_told_and_names_what(content: bytes, why: str, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.toml").write_bytes(content)
    with quickly(), pytest.raises(ConfigError, match=why) as error:
        plan.of({"folder": folder, **flags.read_toml(tmp_path / "a.toml")})
    assert len(str(error.value)) < 2500


@pytest.mark.parametrize("name", ["a folder", "nothing", "a\0b", "x" * 300])
def test_a_config_that_is_no_file_is_told(name: str, tmp_path: Path) -> None:
    (tmp_path / "a folder").mkdir()
    with pytest.raises(ConfigError):
        flags.read_toml(tmp_path / name)


@pytest.mark.parametrize(
    ("index", "why"),
    [(b"", "is not JSON"), (b"[" * 10**5, "is not JSON"), (b"[]", "is no table"), (b"\xff", "is not JSON")],
)  # fmt: skip
def test_a_base_of_broken_settings_is_told(index: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_bytes(index)
    with quickly(), pytest.raises(ConfigError, match=rf"model_index\.json {why}"):
        plan.kind_of_base(str(tmp_path))


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null", "/proc/self/mem", "/nowhere", "x" * 300, "a\0b"])
def test_places_that_hold_no_pictures_are_told(place: str) -> None:
    with quickly(), pytest.raises(ImgadaptError):
        plan.of({"folder": Path(place)})


def test_numbers_as_text_are_numbers_everywhere(folder: Path) -> None:
    made = plan.of({"folder": folder, "batch_size": "4.0", "steps": "8"}).config
    assert (made.batch_size, made.steps, made.warmup_steps) == (4, 8, 5)


# --- zips


def zipped(rows: Sequence[tuple[str | zipfile.ZipInfo, bytes]], kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, content in rows:
            archive.writestr(name, content, kind)
    return buffer.getvalue()


def link(name: str, to: str) -> tuple[zipfile.ZipInfo, bytes]:
    made = zipfile.ZipInfo(name)
    made.external_attr = 0o120777 << 16
    return made, to.encode()


def damaged(content: bytes, place: int, by: bytes) -> bytes:
    return content[:place] + by + content[place + len(by) :]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: zipped([("a.png", picture()), link("a.txt", "/etc/passwd")]), r"a\.txt is a link; put the"),
        (lambda: zipped([link("a.png", "/etc/passwd")]), r"a\.png is a link"),
        (lambda: zipped([("a.png", picture())], zipfile.ZIP_LZMA), "compressed in a rare way"),
        (lambda: zipped([("a.png", picture())], zipfile.ZIP_BZIP2), "compressed in a rare way"),
        (lambda: zipped([("a.png", picture()), ("a.PNG", picture())]), r"a\.PNG was given twice"),
        (lambda: zipped([("a.zip", zipped([("a.png", picture())]))]), "none of the 1 files is a picture"),
        (lambda: zipped([(f"{k}.txt", b"") for k in range(10**5)]), r"has (some )?100000 files; 4000 are allowed"),
        (lambda: zipped([("a.png", bytes(10**8))]), r"a\.png has more than the 100,000 bytes"),
        (lambda: damaged(zipped([("a.png", picture())], zipfile.ZIP_STORED), 200, b"xxxx"), "no zip|broken"),
        (lambda: zipped([("a.png", picture())])[:-5], "no zip that can be read"),
        (lambda: b"PK\5\6" + b"\xff" * 18, "no zip that can be read|broken zip"),
        (lambda: zipped([("x" * 60000 + ".png", b"no")]), "picture"),
    ],
)  # fmt: skip
def test_a_hostile_zip_is_refused_and_leaves_nothing(make: Callable[[], bytes], why: str, tmp_path: Path) -> None:
    limits = replace(Settings(tmp_path).limits, upload=100_000)
    content = make()
    with quickly(), pytest.raises(DataError, match=why):
        datasets.Datasets(Settings(tmp_path, limits=limits)).add("x", [("a.zip", content)])
    assert not list(tmp_path.rglob("*.png")) + list(tmp_path.rglob("*.txt"))


def test_pictures_of_one_name_in_thousands_of_folders_are_numbered() -> None:
    with quickly():
        names = datasets._renamed([f"{k}/x" for k in range(12_000)])
    assert sorted(names.values()) == sorted(["x", *(f"x-{k}" for k in range(2, 12_001))])
    assert datasets._renamed(["a/x", "a/x-2", "b/X"]) == {"a/x": "x", "a/x-2": "x-2", "b/X": "X-3"}


def test_owners_that_are_no_owners_are_told(tmp_path: Path) -> None:
    sets = datasets.Datasets(Settings(tmp_path))
    sets.add("x", [("a.png", picture())], "ada")
    (tmp_path / "data" / ".owners.json").write_text("[]")
    for ask in (lambda: sets.all("ada"), lambda: sets.add("y", [("a.png", picture())], "ada")):
        with pytest.raises(
            OutputError, match=r"cannot read .*owners\.json, which says whose the data are \(not an obj"
        ):
            ask()
    assert [path.name for path in (tmp_path / "data").iterdir() if path.is_dir()] == ["x"]


# --- as a user types them


@pytest.mark.parametrize("program", ["check", "train", "style", "dreambooth", "textual_inversion"])
@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("cat.png", b"", r"cat\.png \(an empty file\)"),
        ("cat.png", picture()[:300], r"cat\.png \(damaged: "),
        ("cat.png", hostile.png(65500, 65500, pixels=b""), r"cat\.png \(Image size"),
        ("cat.txt", b"\xff\xfe\0", r"cat\.txt: not UTF-8"),
        ("cat.txt", b"\x1b[2J", r"cat\.txt: .*no text; remove them"),
        ("metadata.jsonl", b"[" * 10**5, r"metadata\.jsonl:1: nested too deeply"),
        ("bird.heic", b"x", r"bird\.heic\) are in formats that are not read; save them as \.png"),
    ],
)
def test_programs_say_what_is_wrong_before_anything_is_loaded(
    program: str, name: str, content: bytes, why: str, folder: Path, tmp_path: Path, run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("imgadapt.training.families.load", lambda *_, **__: pytest.fail("a base was loaded"))
    (folder / name).write_bytes(content)
    given = [str(folder), "--output", str(tmp_path / "out")]
    given += {"check": ["--no-step"], "dreambooth": ["--trigger", "ohwx"], "textual_inversion": ["--word", "<x>"]}.get(
        program, []
    )
    with pytest.raises(DataError, match=why):
        run(program, given)
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_a_picture_that_changes_under_a_training_ends_it_with_its_name(
    folder: Path, tmp_path: Path, run: Run, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked(given: Path) -> tuple[str, tuple[int, int], bool]:
        found = look(given)
        if given.name == "cat.png":
            given.write_bytes(picture(80))
        return found

    look = data._look
    monkeypatch.setattr(data, "_look", looked)
    given = [
        "--output",
        str(tmp_path / "out"),
        "--steps",
        "1",
        "--targets",
        "unet.mid_block*to_q",
        "--warmup-steps",
        "0",
    ]
    with pytest.raises(DataError, match=r"cat\.png: the file has changed since it was scanned; start the run anew"):
        run("style", [str(folder), *given, "--rank", "2", "--log-with", "--no-report"])
    kept = json.dumps([str(path) for path in tmp_path.rglob("*.safetensors")])
    assert "adapter" not in kept.replace("adapter_out", "")
