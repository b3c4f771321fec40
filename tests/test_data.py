"""Pictures and captions: layouts of folders, masks, damage, wordings, and what is odd about them."""

import contextlib
import io
import json
import os
import shutil
import struct
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from imgadapt.errors import ConfigError, DataError
from imgadapt.training.captions import Wording, caption, every, plain, wordings
from imgadapt.training.data import Example, digest, fingerprint, scan
from imgadapt.training.finding import Finding
from imgadapt.training.lint import examine
from imgadapt.training.looks import look, phash


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (48, 32), text: str | None = None, **how: Any) -> Path:
    """A picture of coarse noise, with a caption beside it if there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 9, 3), np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, **how)
    if text is not None:
        path.with_suffix(".txt").write_text(text, "utf-8")
    return path


def png(side: int, bits: int, rows: bytes) -> bytes:
    """A square RGB file as Pillow does not write it."""
    header = struct.pack(">II5B", side, side, bits, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def said(folder: Path, *args: str | None, **how: str) -> dict[str, tuple[str, ...]]:
    return {e.path.relative_to(folder).as_posix(): e.captions for e in scan(folder, *args, **how)}


def example(*captions: str) -> Example:
    return Example(Path("x.png"), captions, digest(captions), 64, 64)


# --- layouts


def test_a_flat_folder_gives_pictures_by_name_in_any_case_and_hidden_files_are_passed_by(tmp_path: Path) -> None:
    draw(tmp_path / "b.png", 1, text="a b")
    draw(tmp_path / "A.JPG", 2)
    (tmp_path / "a.TXT").write_text("\ufeffan a\r\n", "utf-8")
    draw(tmp_path / ".hidden.png", 3)
    (tmp_path / "._b.png").write_bytes(b"of macOS")
    assert said(tmp_path) == {"A.JPG": ("an a",), "b.png": ("a b",)}
    first = scan(tmp_path)[0]
    assert (first.width, first.height, first.repeats, first.concept, first.mask, first.alpha) == (
        48,
        32,
        1,
        "",
        None,
        False,
    )


def test_names_are_paired_whatever_their_unicode_form(tmp_path: Path) -> None:
    draw(tmp_path / (unicodedata.normalize("NFD", "zoë été") + ".png"))
    (tmp_path / (unicodedata.normalize("NFC", "zoë été") + ".txt")).write_text("日本の狐 🦊", "utf-8")
    assert list(said(tmp_path).values()) == [("日本の狐 🦊",)]


def test_kohyas_folders_give_repeats_and_concepts_that_caption_what_has_no_file(tmp_path: Path) -> None:
    draw(tmp_path / "10_ohwx man" / "a.png", 1)
    draw(tmp_path / "10_ohwx man" / "b.png", 2, text="ohwx man outdoors")
    draw(tmp_path / "1_a_dog" / "c.png", 3)
    draw(tmp_path / "2019_holidays" / "d.png", 4)
    examples = scan(tmp_path)
    assert [(e.path.name, e.repeats, e.concept, e.captions) for e in examples] == [
        ("a.png", 10, "ohwx man", ("ohwx man",)),
        ("b.png", 10, "ohwx man", ("ohwx man outdoors",)),
        ("c.png", 1, "a_dog", ("a_dog",)),
    ]
    leaf = scan(tmp_path / "10_ohwx man")
    assert leaf == [e for e in examples if e.repeats == 10]
    assert said(tmp_path, "a photo")["1_a_dog/c.png"] == ("a photo",)
    assert any("2019_holidays/d.png" in finding.text for finding in examine(examples, tmp_path, resolution=8))


def test_a_leaf_is_known_by_its_name_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "7_sks cat" / "a.png")
    monkeypatch.chdir(tmp_path / "7_sks cat")
    assert [(e.repeats, e.captions) for e in scan(Path("."))] == [(7, ("sks cat",))]


def test_two_layouts_in_one_folder_and_no_repeats_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "10_man" / "a.png")
    draw(tmp_path / "lone.png")
    with pytest.raises(DataError, match=r"1 pictures \(lone.png\) lie beside kohya's folders \(10_man\); move them"):
        scan(tmp_path)
    (tmp_path / "lone.png").unlink()
    (tmp_path / "10_man").rename(tmp_path / "0_man")
    with pytest.raises(DataError, match="0_man: its name says 0 repeats; name it 1_man"):
        scan(tmp_path)


def test_folders_without_pictures_say_where_some_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing: no such folder"):
        scan(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"no pictures in it; wanted \.bmp"):
        scan(tmp_path)
    draw(tmp_path / "fox" / "a.png")
    with pytest.raises(DataError, match=r"did you mean its folder fox\?"):
        scan(tmp_path)


def test_pictures_in_formats_that_are_not_read_are_an_error_and_not_left_out(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", text="a")
    (tmp_path / "IMG_1.HEIC").write_bytes(b"heic")
    with pytest.raises(
        DataError, match=r"1 pictures \(IMG_1.HEIC\) are in formats that are not read; save them as .png"
    ):
        scan(tmp_path)


# --- metadata


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_metadata_captions_pictures_of_folders_below(tmp_path: Path, kind: str, column: str) -> None:
    draw(tmp_path / "a.png", 1)
    draw(tmp_path / "in" / "b.png", 2)
    # U+0085 is a line's end to `splitlines`, not to JSON and CSV
    rows = [("a.png", 'a fox,\x85"red"'), ("in/b.png", "a {cat|dog}"), ("./a.png", "one more")]
    if kind == "jsonl":
        each = [json.dumps({"file_name": name, column: text}, ensure_ascii=False) for name, text in rows]
        text = "\n".join(each) + "\n\n"
    else:
        quoted = ['"' + text.replace('"', '""') + '"' for _, text in rows]
        text = f"file_name,{column}\r\n" + "".join(f"{r[0]},{q}\r\n" for r, q in zip(rows, quoted, strict=True))
    (tmp_path / f"metadata.{kind}").write_bytes(text.encode("utf-8-sig"))
    assert said(tmp_path) == {"a.png": ("a fox,", '"red"', "one more"), "in/b.png": ("a cat", "a dog")}
    assert examine(scan(tmp_path), tmp_path, resolution=8) == []


@pytest.mark.parametrize("name", ["../out.png", "/etc/out.png", "in/../../out.png", "..\\out.png", "C:\\out.png", "."])
def test_metadata_does_not_reach_outside_its_folder(tmp_path: Path, name: str) -> None:
    draw(tmp_path / "out.png")
    draw(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    with pytest.raises(DataError, match=r"metadata.jsonl:1: .* is not inside the folder"):
        scan(tmp_path / "set")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"file_name": "a.png", "text": "x"}\n{"file', r"metadata.jsonl:2: not JSON"),
        ("[1]", r"metadata.jsonl:1: wanted an object"),
        ('{"image": "a.png", "text": "x"}', r"metadata.jsonl:1: wanted 'file_name', .* among image, text"),
        ('{"file_name": "a.png", "text": 7}', r"metadata.jsonl:1: 'text' is 7, wanted a text"),
        ('{"file_name": "a.png", "text": "x", "prompt": "y"}', r":1: 'text' and 'prompt' say different things"),
        ('{"file_name": "b.png", "text": "x"}', r"1 pictures \(b.png\) that it names are not there"),
        ('{"file_name": "no/b.png", "text": "x"}', r"1 pictures \(b.png\) that it names are not there"),
        ('{"file_name": "notes.md", "text": "x"}', r"1 pictures \(notes.md\) that it names are not there"),
        ("", r"1 pictures \(a.png\) beside it have no row in it"),
    ],
)
def test_metadata_at_fault_names_the_line(tmp_path: Path, rows: str, message: str) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "metadata.jsonl").write_text(rows)
    with pytest.raises(DataError, match=message):
        scan(tmp_path)


def test_a_csv_text_with_commas_outside_quotes_is_an_error_and_not_cut(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a fox, red\n")
    with pytest.raises(DataError, match=r"metadata.csv:2: more values than columns; put texts with commas in quotes"):
        scan(tmp_path)


def test_two_tables_or_a_table_and_a_file_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", text="a fox")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a cat"}')
    with pytest.raises(DataError, match=r"metadata.jsonl's row says 'a cat' and .*a.txt says 'a fox'"):
        scan(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a fox\n")
    with pytest.raises(DataError, match=r"metadata.jsonl and .*metadata.csv are both there"):
        scan(tmp_path)


def test_a_row_without_text_leaves_it_to_the_file_beside_the_picture(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", text="a fox")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "A.png", "text": null}')
    assert said(tmp_path) == {"a.png": ("a fox",)}


# --- captions of files


def test_lines_and_choices_are_wordings(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", text="a {red|blue} {fox|}\n\n  two   words \na red\n{not a choice}")
    assert said(tmp_path)["a.png"] == ("a red fox", "a red", "a blue fox", "a blue", "two words", "{not a choice}")
    (tmp_path / "a.txt").write_text("{1|2}" * 7)
    with pytest.raises(DataError, match=r"a.txt: 128 wordings of one picture, wanted 64 at most"):
        scan(tmp_path)
    (tmp_path / "a.txt").write_text("{1|1}" * 60)
    with pytest.raises(DataError, match="wanted 64 at most"):
        scan(tmp_path)
    assert len(wordings(["{1|2}" * 6], "x")) == 64


def test_two_caption_files_must_say_the_same(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", text="a fox")
    (tmp_path / "a.caption").write_text(" a  fox\n")
    assert said(tmp_path)["a.png"] == ("a fox",)
    (tmp_path / "a.caption").write_text("a fox\na cat")
    with pytest.raises(DataError, match=r"a.txt says 'a fox' and .*a.caption says 'a cat' of one picture; remove one"):
        scan(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    assert said(tmp_path)["a.png"] == ("a fox", "a cat")


def test_a_trigger_is_put_in_and_stands_before_captions_without_it(tmp_path: Path) -> None:
    for name, text in {"a": "a man", "b": "photo of Ohwx, smiling", "c": "a [trigger] man", "d": "ohwxx"}.items():
        draw(tmp_path / f"{name}.png", text=text)
    draw(tmp_path / "e.png")
    assert list(said(tmp_path, trigger="ohwx").values()) == [
        ("ohwx, a man",), ("photo of Ohwx, smiling",), ("a ohwx man",), ("ohwx, ohwxx",), ("ohwx",)
    ]  # fmt: skip
    assert said(tmp_path, "a photo of [trigger]", trigger="<fox>")["e.png"] == ("a photo of <fox>",)
    with pytest.raises(DataError, match=r"c.png: the caption says \[trigger\], and no trigger is given: --trigger"):
        scan(tmp_path, "x")


def test_pictures_without_words_are_counted_and_an_empty_caption_for_all_is_one(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png", text="b")
    draw(tmp_path / "c.png", text="\n")
    with pytest.raises(DataError, match=r"2 of 3 pictures have no caption \(a.png, c.png\); write a.txt .*--caption"):
        scan(tmp_path)
    assert said(tmp_path, "") == {"a.png": ("",), "b.png": ("b",), "c.png": ("",)}


def test_a_caption_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("Füchse".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.txt: not UTF-8 text .*save it as UTF-8"):
        scan(tmp_path)


# --- masks


@pytest.mark.parametrize(
    "name", ["fox-mask.png", "fox-masklabel.png", "FOX-MASK.PNG", "masks/fox.png", "masks/fox.jpg"]
)
def test_masks_belong_to_pictures_and_are_none(tmp_path: Path, name: str) -> None:
    draw(tmp_path / "fox.png", text="a fox")
    (tmp_path / "masks").mkdir()
    Image.new("L", (24, 16), 255).save(tmp_path / name)
    draw(tmp_path / "cat.png", 1, text="a cat")
    examples = scan(tmp_path)
    assert [(e.path.name, e.mask) for e in examples] == [("cat.png", None), ("fox.png", tmp_path / name)]
    assert [f.text for f in examine(examples, tmp_path, resolution=8)] == [
        "1 pictures (cat.png) have no mask, unlike the others; all of them counts"
    ]


def test_masks_that_do_not_fit_are_counted_with_the_pictures(tmp_path: Path) -> None:
    draw(tmp_path / "fox.png", text="a fox")
    Image.new("L", (32, 32), 255).save(tmp_path / "fox-mask.png")
    with pytest.raises(
        DataError, match=r"1 of 1 pictures .*fox.png \(its mask fox-mask.png is 32x32, not the shape of 48x32"
    ):
        scan(tmp_path)
    Image.new("RGBA", (48, 32), (255, 255, 255, 0)).save(tmp_path / "fox-mask.png")
    with pytest.raises(DataError, match="is black all over"):
        scan(tmp_path)
    Image.fromarray(np.full((32, 48), 65535, np.uint16)).save(tmp_path / "fox-mask.png")
    assert scan(tmp_path)[0].mask
    (tmp_path / "fox-mask.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"its mask fox-mask\.png: an empty file"):
        scan(tmp_path)


def test_two_masks_and_masks_of_nothing_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "fox.png", text="a fox")
    for name in ("fox-mask.png", "fox-masklabel.png"):
        Image.new("L", (48, 32), 255).save(tmp_path / name)
    with pytest.raises(DataError, match=r"fox-mask.png and .*fox-masklabel.png are both masks of fox.png"):
        scan(tmp_path)
    (tmp_path / "fox-masklabel.png").rename(tmp_path / "cat-masklabel.png")
    with pytest.raises(DataError, match=r"1 masks have no picture \(cat-masklabel.png\)"):
        scan(tmp_path)
    (tmp_path / "cat-masklabel.txt").write_text("a picture of a mask")
    assert [e.path.name for e in scan(tmp_path)] == ["cat-masklabel.png", "fox.png"]


def test_a_photo_turned_by_exif_fits_a_mask_painted_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(tmp_path / "fox.jpg", text="a fox", exif=exif)
    Image.new("L", (32, 48), 255).save(tmp_path / "fox-mask.png")
    (only,) = scan(tmp_path)
    assert (only.width, only.height) == (32, 48)
    Image.new("L", (48, 32), 255).save(tmp_path / "fox-mask.png")
    with pytest.raises(DataError, match="not the shape of 32x48"):
        scan(tmp_path)


# --- what is in the files


def test_every_kind_of_damage_is_counted_in_one_error(tmp_path: Path) -> None:
    draw(tmp_path / "0.png", size=(200, 200), text="good")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "html.jpg").write_bytes(b"<html>")
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\nshowpage\n")
    draw(tmp_path / "tiny.png", size=(7, 40))
    Image.new("RGBA", (9, 9)).save(tmp_path / "void.png")
    (tmp_path / "zbomb.png").write_bytes(png(20000, 8, bytes(9)))
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"9 of 10 pictures cannot be read; mend or remove cut.png \(") as all_of_them:
        scan(tmp_path, "x")
    names = ["cut", "empty", "eps", "link", "pipe", "tiny", "void", "zbomb"]
    assert all(f"{name}.png (" in str(all_of_them.value) for name in names)
    reasons: dict[str, str] = {}
    for name in ("eps.png", "html.jpg", "empty.png", "tiny.png", "void.png", "zbomb.png", "link.png", "pipe.png"):
        (tmp_path / "one").mkdir()
        (tmp_path / name).rename(tmp_path / "one" / name)
        with pytest.raises(DataError) as error:
            scan(tmp_path / "one", "x")
        reasons[name] = str(error.value).split("(", 1)[1][:-1]
        shutil.rmtree(tmp_path / "one")
    assert "exceeds limit" in reasons.pop("zbomb.png")
    assert reasons == {
        "eps.png": "not a picture, whatever its name says",
        "html.jpg": "not a picture, whatever its name says",
        "empty.png": "an empty file",
        "tiny.png": "7x40 pixels, wanted 8 a side or more",
        "void.png": "transparent all over",
        "link.png": "no such file, only a link to one",
        "pipe.png": "no file, but a pipe, socket or device",
    }


def test_faults_of_pictures_and_captions_are_told_together(tmp_path: Path) -> None:
    for k in range(60):
        (tmp_path / f"p{k:02}.png").write_bytes(b"")
        (tmp_path / f"p{k:02}.txt").write_text("a fox")
    with pytest.raises(DataError, match=r"60 of 60 pictures cannot .* p49.png \(an empty file\) and 10 more$") as error:
        scan(tmp_path)
    assert str(error.value).count("an empty file") == 50
    for k in range(5):
        draw(tmp_path / f"p{k:02}.png", size=(32, 32))
    (tmp_path / "p00.txt").write_bytes(b"a f\xf6x")
    (tmp_path / "p01.txt").write_bytes(b"a\0f")
    (tmp_path / "p02.txt").unlink()
    (tmp_path / "p05.txt").write_bytes(b"\xff")
    with pytest.raises(DataError) as error:
        scan(tmp_path)
    pictures, captions, missing = str(error.value).split("; and ")
    assert "55 of 60 pictures cannot be read" in pictures
    assert captions.startswith("3 captions cannot be used: ")
    assert all(f"{tmp_path / name}: " in captions for name in ("p00.txt", "p01.txt", "p05.txt"))
    assert "1 of 60 pictures have no caption (p02.png)" in missing


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "bmp", "tif"])
def test_a_file_cut_anywhere_is_never_taken(tmp_path: Path, kind: str) -> None:
    whole = draw(tmp_path / f"a.{kind}", size=(64, 64)).read_bytes()
    for share in (0.02, 0.2, 0.5, 0.9):
        (tmp_path / f"a.{kind}").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError, match=rf"1 of 1 pictures cannot be read; mend or remove a.{kind}"):
            scan(tmp_path, "x")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF
@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]), data=st.data())
def test_damaged_bytes_give_a_picture_or_our_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    buffer = io.BytesIO()
    Image.effect_mandelbrot((24, 16), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(buffer, kind)
    raw = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "a.png").write_bytes(raw)
    # any other error fails the test
    with contextlib.suppress(DataError):
        assert len(scan(folder, "x")) == 1
        oddities(folder)


def test_a_cameras_file_of_two_pictures_and_a_large_one_are_taken_in_peace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [Image.effect_mandelbrot((48, 32), (-2, -1.5, 1, 1.5), 20 + k).convert("RGB") for k in range(2)]
    frames[0].save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # between this and twice as many Pillow warns
    assert oddities(tmp_path) == []
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(DataError, match="exceeds limit of 1400 pixels"):
        scan(tmp_path, "x")


def test_transparency_is_told_only_where_there_is_some(tmp_path: Path) -> None:
    Image.new("RGBA", (9, 9), (1, 2, 3, 255)).save(tmp_path / "full.png")
    Image.new("RGBA", (9, 9), (1, 2, 3, 254)).save(tmp_path / "glass.png")
    holes = Image.new("P", (9, 9), 0)
    holes.putpixel((3, 3), 1)
    holes.save(tmp_path / "holes.gif", transparency=1)
    holes.save(tmp_path / "plain.gif", transparency=7)
    assert [e.alpha for e in scan(tmp_path, "x")] == [False, True, True, False]


def test_numbers_of_32_bits_are_refused_as_their_white_is_unknown(tmp_path: Path) -> None:
    Image.fromarray(np.ones((9, 9), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="numbers of 32 bits"):
        scan(tmp_path, "x")


def test_the_fingerprint_is_of_what_is_trained_and_not_of_where_it_lies(tmp_path: Path) -> None:
    a = tmp_path / "a" / "3_fox"
    draw(a / "x.png", 1, text="one\ntwo")
    draw(a / "y.png", 2)
    Image.new("L", (48, 32), 255).save(a / "x-mask.png")
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "c")
    b = tmp_path / "b" / "c" / "3_fox"
    before = fingerprint(scan(tmp_path / "a"))
    assert fingerprint(scan(b.parent)) == before == fingerprint(scan(b))

    def change(act: Callable[[], object]) -> str:
        act()
        return fingerprint(scan(tmp_path / "b" / "c"))

    changes = [
        change(lambda: (b / "x.txt").write_text("one two")),
        change(lambda: Image.new("L", (48, 32), 254).save(b / "x-mask.png")),
        change((b / "x-mask.png").unlink),
        change(lambda: draw(b / "y.png", 3)),
        change(lambda: b.rename(b.parent / "4_fox")),
    ]
    assert len({before, *changes}) == 6
    gone = scan(tmp_path / "a")
    (a / "x-mask.png").unlink()
    assert fingerprint(gone) == before


# --- which wording is shown

WORDS = st.text(st.sampled_from("ab, |"), max_size=24).map(lambda x: " ".join(x.split()))
WORDINGS = st.builds(
    Wording, shuffle=st.booleans(), keep=st.integers(0, 3), tag_dropout=st.sampled_from([0.0, 0.3, 1.0]),
    dropout=st.sampled_from([0.0, 0.2, 1.0]), variants=st.integers(1, 5),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=4), WORDINGS, st.integers(0, 2**40))
def test_every_caption_that_is_shown_is_among_those_encoded_up_front(
    texts: list[str], wording: Wording, seed: int
) -> None:
    one = example(*texts)
    known = every(one, wording, seed)
    assert len(known) <= len(texts) * wording.variants + 1
    assert len(set(known)) == len(known)
    shown = [caption(one.captions, wording, seed, one.digest, place) for place in range(30)]
    assert set(shown) <= set(known)
    assert shown == [caption(one.captions, wording, seed, one.digest, place) for place in range(30)]
    assert not any("|||" in text for text in shown)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True), st.integers(0, 3), st.integers(0, 99))
def test_shuffling_moves_all_tags_but_the_kept(tags: list[str], keep: int, place: int) -> None:
    text = caption([", ".join(tags)], Wording(shuffle=True, keep=keep), 0, "d", place)
    shown = text.split(", ")
    assert sorted(shown) == sorted(tags)
    assert shown[:keep] == tags[:keep]


def test_the_separator_keeps_what_stands_before_it_and_after_a_second_one() -> None:
    text = "x, y ||| " + ", ".join("abcdefgh") + " ||| end"
    shown = {caption([text], Wording(shuffle=True, tag_dropout=0.5, keep=1), 0, "d", place) for place in range(99)}
    assert len(shown) == 8
    assert all(one.startswith("x, y, ") and one.endswith(", end") for one in shown)
    assert plain(text) == "x, y, a, b, c, d, e, f, g, h, end"
    assert caption([text], Wording(), 0, "d", 5) == plain(text)
    assert plain("as,it , is") == "as,it , is"


def test_tags_and_captions_are_left_out_as_often_as_told() -> None:
    tags = ", ".join(f"t{k}" for k in range(20))
    wording = Wording(tag_dropout=0.25, dropout=0.1, variants=400)
    shown = [caption([tags], wording, 3, "d", place) for place in range(2000)]
    assert np.mean([text == "" for text in shown]) == pytest.approx(0.1, abs=0.02)
    counts = [len(text.split(", ")) for text in shown if text]
    assert np.mean(counts) == pytest.approx(1 + 19 * 0.75, abs=0.3)
    assert all(text.startswith("t0") for text in shown if text)


def test_wordings_take_turns_in_a_new_order_each_round() -> None:
    shown = [caption(["a", "b", "c"], Wording(), 1, "d", place) for place in range(60)]
    rounds = [tuple(shown[k : k + 3]) for k in range(0, 60, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) == 6
    assert shown != [caption(["a", "b", "c"], Wording(), 2, "d", place) for place in range(60)]
    assert shown != [caption(["a", "b", "c"], Wording(), 1, "e", place) for place in range(60)]


def test_all_variants_are_shown_about_equally_often() -> None:
    one = example(", ".join("abcdefghijkl"))
    wording = Wording(shuffle=True, variants=6)
    shown = Counter(caption(one.captions, wording, 0, one.digest, place) for place in range(1200))
    assert set(shown) == set(every(one, wording, 0))
    assert len(shown) == 6
    assert min(shown.values()) > 150


@pytest.mark.parametrize(
    ("key", "value"),
    [("dropout", -0.1), ("tag_dropout", 1.5), ("dropout", float("nan")), ("keep", -1), ("variants", 0)],
)
def test_settings_of_wording_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' is {value}, wanted"):
        Wording(**cast(Any, {key: value}))


# --- what is odd


def oddities(folder: Path, caption: str | None = "x", trigger: str | None = "x", **how: Any) -> list[Finding]:
    examples = scan(folder, caption, trigger)
    options: dict[str, Any] = {"resolution": 8, **how}
    return examine(examples, folder, trigger=trigger, **options)


def test_nothing_is_odd_about_good_pictures(tmp_path: Path) -> None:
    for k in range(30):
        draw(tmp_path / f"{k}.png", k)
    (tmp_path / "Thumbs.db").write_bytes(b"")
    assert oddities(tmp_path) == []


def test_captions_beyond_the_limit_tell_what_is_lost(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 1, text="one two three four five six")
    draw(tmp_path / "b.png", 2, text="one two three")  # 6 tokens with the trigger: just fits
    draw(tmp_path / "c.png", 3, text="one two three four x")

    def tokens(text: str) -> int:
        return len(text.split()) + 2

    error, warning = oddities(tmp_path, tokens=tokens, limit=6)
    assert error.level == "error"
    assert error.paths == (tmp_path / "c.png",)
    assert error.text == "in 1 captions the trigger 'x' is among what is cut; put it first"
    # with the trigger before it, a.png has 9 tokens
    assert warning.text.startswith("2 captions are longer than the 6 tokens that the model reads; of a.png the last 3")
    assert "are cut, from 'four five six'" in warning.text
    assert [path.name for path in warning.paths] == ["a.png", "c.png"]


def test_the_same_words_for_all_are_noted_unless_there_is_a_trigger(tmp_path: Path) -> None:
    for k in range(3):
        draw(tmp_path / f"{k}.png", k)
    (note,) = oddities(tmp_path, "a fox", None)
    assert note.level == "note"
    assert note.text.startswith("all captions are 'a fox': ")
    assert oddities(tmp_path, "", None)[0].text.startswith("no picture has a caption: ")
    assert oddities(tmp_path) == []


def test_copies_likenesses_and_mirror_images_are_told_apart(tmp_path: Path) -> None:
    for k in range(8):
        draw(tmp_path / f"{k}.png", k, (120, 80))
    shutil.copy(tmp_path / "0.png", tmp_path / "copy.png")
    with Image.open(tmp_path / "1.png") as image:
        image.convert("RGB").crop((3, 2, 119, 79)).save(tmp_path / "like.jpg", quality=60)
    hashes = [look(tmp_path / name).hashes for name in ("1.png", "like.jpg")]
    assert hashes[0]
    assert hashes[1]
    assert 1 <= (hashes[0][0] ^ hashes[1][0]).bit_count() <= 6
    with Image.open(tmp_path / "2.png") as image:
        ImageOps.mirror(image).save(tmp_path / "turned.png")
    for k in range(2):
        Image.new("RGB", (16, 16), (200 + k, 0, 0)).save(tmp_path / f"red{k}.png")  # of one colour: no likeness told
    texts = [(f.text, sorted(path.name for path in f.paths)) for f in oddities(tmp_path)]
    assert [(text.split(";")[0], names) for text, names in texts] == [
        ("2 pictures are the same file", ["0.png", "copy.png"]),
        ("2 pictures look alike", ["1.png", "like.jpg"]),
        ("2 pictures are mirror images", ["2.png", "turned.png"]),
    ]
    assert texts[1][0].endswith(": 1.png = like.jpg")


def test_a_mirror_images_hash_is_that_of_the_mirrored_picture() -> None:
    grey = np.random.default_rng(0).normal(size=(32, 32)) * 50 + 100
    first, second = phash(grey)
    assert phash(grey[:, ::-1]) == (second, first)
    assert (first ^ second).bit_count() > 12
    assert (first ^ phash(grey + 1)[0]).bit_count() <= 1


def test_small_and_long_pictures_are_told_with_numbers(tmp_path: Path) -> None:
    draw(tmp_path / "small.png", 1, (48, 48))
    draw(tmp_path / "long.png", 2, (160, 40))
    draw(tmp_path / "good.png", 3, (80, 80))
    small, long = oddities(tmp_path, resolution=64)
    assert small.level == "warning"
    assert small.text == (
        "1 pictures are below 64x64 and would be enlarged, small.png (48x48) 1.33 times; "
        "use larger ones, or a resolution of 48"
    )
    assert long.text.startswith("1 pictures are longer than 2:1; of long.png (160x40) 50% would be cut away")


def test_odd_kinds_of_pictures_are_told(tmp_path: Path) -> None:
    frames = [Image.effect_noise((32, 24), k + 20.0) for k in range(2)]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    deep = np.random.default_rng(0).integers(0, 65535, (16, 16)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    rows = b"".join(b"\0" + bytes([15 * k]) * 96 for k in range(16))
    (tmp_path / "rgb16.png").write_bytes(png(16, 16, rows))
    Image.effect_mandelbrot((32, 32), (-2, -1.5, 1, 1.5), 20).convert("CMYK").save(tmp_path / "print.jpg")
    exif = Image.Exif()
    exif[0x0112] = 3
    draw(tmp_path / "turned.jpg", 1, exif=exif)
    draw(tmp_path / "png.png", 2).rename(tmp_path / "png.webp")
    glass = Image.fromarray(np.random.default_rng(5).integers(0, 255, (8, 8, 4), np.uint8)).resize((32, 32))
    glass.save(tmp_path / "glass.png")
    found = {f.text.split("(", 1)[1].split(")")[0]: (f.level, f.text.split(") ", 1)[1]) for f in oddities(tmp_path)}
    assert {name: level for name, (level, _) in found.items()} == {
        "moves.gif": "warning", "print.jpg": "warning", "deep.tif, rgb16.png": "note", "turned.jpg": "note",
        "png.webp": "note", "glass.png": "note",
    }  # fmt: skip
    assert found["moves.gif"][1].startswith("are animated; only the first frame is trained")
    assert found["glass.png"][1].startswith("have transparent pixels, which are laid over white")
    assert not any("transparent" in f.text for f in oddities(tmp_path, alpha_counts=True))


def test_uneven_concepts_are_told_with_the_repeats_that_balance_them(tmp_path: Path) -> None:
    for k in range(6):
        draw(tmp_path / "10_man" / f"{k}.png", k)
    for k in range(3):
        draw(tmp_path / "2_dog" / f"{k}.png", 10 + k)
    (uneven,) = oddities(tmp_path)
    assert uneven.text == (
        "an epoch has 60 pictures of 10_man and 6 of 2_dog (repeats included); to balance them, "
        "begin the name of 2_dog with 20_"
    )
    (tmp_path / "2_dog").rename(tmp_path / "20_dog")
    assert oddities(tmp_path) == []


def test_files_that_are_not_used_are_listed(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 1, text="an a, x")
    draw(tmp_path / "b.png", 2)
    (tmp_path / "b.png.txt").write_text("lost")
    (tmp_path / "z.caption").write_text("lost")
    (tmp_path / "a.npz").write_bytes(b"")
    draw(tmp_path / "old" / "c.png", 3, text="lost too")
    draw(tmp_path / "masks" / "q.png", 4)
    draw(tmp_path / "held_out" / "h.png", 5, text="used elsewhere")
    (tmp_path / "old" / "round").symlink_to(tmp_path)
    pictures, captions, others = oddities(tmp_path, elsewhere=[tmp_path / "held_out"])
    assert pictures.text.startswith(
        "2 pictures are not part of it; move those to train beside the others: masks/q.png, old/c.png"
    )
    assert captions.text.startswith("3 caption files belong to no picture")
    assert [p.relative_to(tmp_path).as_posix() for p in captions.paths] == ["b.png.txt", "old/c.txt", "z.caption"]
    assert (others.level, others.text) == ("note", "1 files are not used: a.npz")


def test_pictures_that_share_a_caption_file_are_told(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 1, text="x")
    draw(tmp_path / "a.jpg", 2)
    (shared,) = oddities(tmp_path)
    assert shared.text == "2 pictures share a.txt; give each a name of its own"
