"""The album: pictures that are kept and given, what is taken from outside, and who sees what."""

import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from imgadapt.errors import ConfigError, DataError, OutputError
from imgadapt.playground.pictures.album import Album, Picture

RECORD = {"version": 1, "request": {"prompt": "a fox", "seed": 3}, "base": {"name": "demo"}}


@pytest.fixture
def album(tmp_path: Path) -> Album:
    return opened(tmp_path)


def opened(home: Path) -> Album:
    return Album(home / "outputs", home / "uploads", most_bytes=2**20, most_pixels=2**20)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def coded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def pixels(picture: Picture) -> np.ndarray[Any, Any]:
    with Image.open(picture.path) as image:
        assert image.mode in ("RGB", "RGBA")
        return np.asarray(image)


def png(width: int, height: int, data: bytes, *, chunks: bytes = b"") -> bytes:
    """A PNG, 1 bit a pixel, of any bytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_a_kept_picture_is_the_same_to_the_bit_and_has_its_record_after_a_restart(album: Album, tmp_path: Path) -> None:
    image = noise(24, 16)
    kept = album.keep(image, RECORD, owner="ann")
    assert (kept.width, kept.height, kept.owner, kept.record) == (24, 16, "ann", RECORD)
    assert kept.path.parent.parent == tmp_path / "outputs"
    again = opened(tmp_path).get(kept.id)
    assert (again.id, again.width, again.height, again.record) == (kept.id, 24, 16, RECORD)
    assert np.array_equal(pixels(again), np.asarray(image))
    with Image.open(kept.path) as written:
        assert written.info["parameters"].startswith("a fox\nSteps: 20, Sampler: base, Seed: 3, Model: demo")


def test_pictures_of_an_earlier_session_are_still_their_owners(album: Album, tmp_path: Path) -> None:
    kept = album.keep(noise(8, 8), RECORD, owner="user-ada")
    given = album.accept(coded(noise(8, 8)), owner="user-bob")
    nobodys = album.keep(noise(8, 8), RECORD)
    album.remove(album.keep(noise(8, 8), RECORD, owner="user-ada").id)
    again = opened(tmp_path)
    assert (again.get(kept.id, "user-ada").owner, again.get(given.id, "user-bob").owner) == ("user-ada", "user-bob")
    for id, other in ((kept.id, "user-bob"), (given.id, "user-ada"), (kept.id, ""), (nobodys.id, "user-ada")):
        with pytest.raises(ConfigError, match="no such picture"):
            again.get(id, other)
    assert [one.id for one in again.recent(owner="user-ada")] == [kept.id]
    assert b"user-ada" not in kept.path.read_bytes()


def test_the_list_of_owners_is_private_stays_small_and_may_be_torn(album: Album, tmp_path: Path) -> None:
    kept = album.keep(noise(8, 8), RECORD, owner="user-ada")
    file = tmp_path / "outputs" / ".owners"
    assert os.name != "posix" or file.stat().st_mode & 0o777 == 0o600
    file.write_bytes(b"\xff\n\n" + file.read_bytes() + b"0123456789abcdef user-bob\n" * 5000 + kept.id.encode())
    second = album.keep(noise(8, 8), RECORD, owner="user-bob")
    again = opened(tmp_path)
    assert (again.get(kept.id).owner, again.get(second.id).owner) == ("user-ada", "user-bob")
    recent = "0123456789abcdef user-bob\n" * 998 + f"{kept.id}\n{second.id} user-bob\n"  # may be about to be written
    assert file.read_text("utf-8") == f"{kept.id} user-ada\n{recent}"
    assert os.name != "posix" or file.stat().st_mode & 0o777 == 0o600


def test_owners_see_their_own_when_they_are_asked_for(album: Album) -> None:
    ann, bob = (album.keep(noise(8, 8), RECORD, owner=owner) for owner in ("ann", "bob"))
    assert album.get(ann.id, "ann") == ann
    for call in (album.get, album.remove, lambda id, owner: album.thumbnail(id, owner=owner)):
        with pytest.raises(ConfigError, match=r"^there is no such picture, or it is another's$"):
            call(ann.id, "bob")
    assert [one.id for one in album.recent(owner="bob")] == [bob.id]
    assert [one.id for one in album.recent(1)] == [bob.id]
    assert [one.id for one in album.recent()] == [bob.id, ann.id]


@pytest.mark.parametrize("id", ["../../etc/passwd", "/etc/passwd", "", "0" * 16, "a\0b", "con", "x" * 10**5])
def test_an_id_that_was_not_given_out_is_no_picture(album: Album, id: str) -> None:
    for call in (album.get, album.remove, album.thumbnail):
        with pytest.raises(ConfigError, match=r"^there is no such picture, or it is another's$"):
            call(id)


def test_a_removed_picture_is_gone_from_disk_lists_and_thumbnails(album: Album) -> None:
    kept = album.keep(noise(8, 8), RECORD)
    album.thumbnail(kept.id)
    album.remove(kept.id)
    assert not kept.path.exists()
    assert album.recent() == []
    for call in (album.get, album.thumbnail, album.remove):
        with pytest.raises(ConfigError):
            call(kept.id)


def test_a_picture_deleted_by_hand_is_left_out(album: Album, tmp_path: Path) -> None:
    first, second = album.keep(noise(8, 8), RECORD), album.keep(noise(9, 8), RECORD)
    later = opened(tmp_path)
    first.path.unlink()
    assert [one.id for one in later.recent()] == [second.id]
    with pytest.raises(ConfigError):
        later.get(first.id)


def test_what_is_no_picture_of_ours_and_what_leads_out_is_not_found(album: Album, tmp_path: Path) -> None:
    kept = album.keep(noise(8, 8), RECORD)
    day, outside = kept.path.parent, tmp_path / "outside"
    outside.mkdir()
    (outside / f"{'1' * 16}.png").write_bytes(coded(noise(8, 8)))
    (day / f"{'2' * 16}.png").symlink_to(outside / f"{'1' * 16}.png")
    (day.parent / "2020-01-01").symlink_to(outside)
    (day / "cat.png").write_bytes(coded(noise(8, 8)))
    (day / f"{'3' * 16}.png").mkdir()
    later = opened(tmp_path)
    assert [one.id for one in later.recent()] == [kept.id]
    for id in ("1" * 16, "2" * 16, "3" * 16, "cat"):
        with pytest.raises(ConfigError):
            later.get(id)


def test_a_disk_that_cannot_be_written_is_said_and_leaves_nothing(album: Album, tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file is here")
    with pytest.raises(OutputError, match="cannot write"):
        album.keep(noise(8, 8), RECORD)
    assert album.recent() == []


def test_thumbnails_are_small_and_of_few_sizes(album: Album) -> None:
    kept = album.keep(noise(400, 100), RECORD)
    for side, size in ((256, (256, 64)), (1, (64, 16)), (200, (256, 64)), (10**9, (400, 100)), (-5, (64, 16))):
        with Image.open(io.BytesIO(album.thumbnail(kept.id, side))) as image:
            assert (image.format, image.size) == ("WEBP", size)
    assert album.thumbnail(kept.id, 250) is album.thumbnail(kept.id, 256)


def test_the_thumbnails_kept_are_bounded(album: Album, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [album.keep(noise(64, 64), RECORD) for _ in range(6)]
    monkeypatch.setattr(Album, "_cached", 3 * len(album.thumbnail(kept[0].id)))
    made = [album.thumbnail(one.id) for one in kept]
    assert len(set(made)) == 1
    same = [album.thumbnail(one.id) is bytes for one, bytes in zip(kept[::-1], made[::-1], strict=True)]
    assert same[:3] == [True] * 3
    assert same[4:] == [False] * 2


ODD: dict[str, tuple[Callable[[], bytes], tuple[int, int], str]] = {
    "1x1": (lambda: coded(noise(1, 1)), (1, 1), "RGB"),
    "1x10000": (lambda: coded(noise(1, 10_000)), (1, 10_000), "RGB"),
    "cmyk": (lambda: coded(noise(8, 6, "CMYK"), "JPEG"), (8, 6), "RGB"),
    "gray": (lambda: coded(noise(8, 6, "L")), (8, 6), "RGB"),
    "gray with alpha": (lambda: coded(noise(8, 6, "LA")), (8, 6), "RGBA"),
    "palette": (lambda: coded(noise(8, 6).quantize(16)), (8, 6), "RGB"),
    "palette with a clear colour": (lambda: coded(noise(8, 6).quantize(16), transparency=0), (8, 6), "RGBA"),
    "one bit": (lambda: coded(noise(8, 6, "L").convert("1")), (8, 6), "RGB"),
    "rgba": (lambda: coded(noise(8, 6, "RGBA"), "WEBP", lossless=True), (8, 6), "RGBA"),
    "bmp": (lambda: coded(noise(8, 6), "BMP"), (8, 6), "RGB"),
    "gif": (lambda: coded(noise(8, 6), "GIF"), (8, 6), "RGB"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_become_plain_ones(album: Album, name: str) -> None:
    make, size, mode = ODD[name]
    given = album.accept(make())
    assert (given.width, given.height) == size
    assert given.record is None
    with Image.open(given.path) as image:
        assert (image.format, image.size, image.mode, image.info) == ("PNG", size, mode, {})


def test_sixteen_bits_are_scaled_not_cut_off(album: Album) -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    given = album.accept(coded(Image.fromarray(values)))
    assert pixels(given)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_a_turned_photo_stands_upright(album: Album) -> None:
    image, exif = noise(8, 6), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    given = album.accept(coded(image, exif=exif))
    assert np.array_equal(pixels(given), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_of_moving_pictures_the_first_frame_is_taken(album: Album, form: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    given = album.accept(coded(frames[0], form, save_all=True, append_images=frames[1:], **options))
    assert (pixels(given)[..., :3] == (255, 0, 0)).all()


def test_what_is_hidden_in_a_picture_is_not_written_on(album: Album) -> None:
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "<script>alert(1)</script>")
    data = (
        coded(noise(8, 6), pnginfo=info, exif=b"Exif\0\0secret", icc_profile=b"secret") + b"<script>alert(1)</script>"
    )
    written = album.accept(data).path.read_bytes()
    for word in (b"script", b"secret", b"parameters", b"iCCP", b"eXIf", b"tEXt"):
        assert word not in written


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
NONE: dict[str, tuple[bytes, str]] = {
    "0 bytes": (b"", r"^the picture is empty \(0 bytes\)$"),
    "svg": (SVG, "^this is no picture that can be read; PNG, JPEG, WebP, GIF and BMP are"),
    "html": (b"<!doctype html><script>alert(1)</script>", "^this is no picture"),
    "tiff": (coded(noise(8, 6), "TIFF"), "^this is no picture"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "^this is no picture"),
    "only a signature": (b"\x89PNG\r\n\x1a\n", "^this is no picture"),
    "no pixels": (png(0, 0, b""), "^this is no picture|^the picture is broken"),
    "not its data": (png(8, 8, b"not zlib"), "^the picture is broken or cut off"),
    "cut off": (coded(noise(64, 64))[:3000], "^the picture is broken or cut off"),
    "cut off jpeg": (coded(noise(64, 64), "JPEG")[:900], "^the picture is broken or cut off"),
    "cut off webp": (coded(noise(64, 64), "WEBP")[:300], "^this is no picture|^the picture is broken"),
    "too many bytes": (bytes(2**20 + 1), "^the picture has 1,048,577 bytes; 1,048,576 are allowed$"),
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_whole_picture_is_refused_and_nothing_is_written(album: Album, name: str) -> None:
    data, said = NONE[name]
    with pytest.raises(DataError, match=said):
        album.accept(data)
    assert not album.uploads.exists() or os.listdir(album.uploads) == []


@pytest.mark.parametrize("side", [2000, 12_000, 20_000])
@pytest.mark.parametrize("strict", [True, False], ids=["warnings raise", "warnings pass"])
def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded(
    album: Album, side: int, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    data = png(side, side, b"".join(rows.compress(row) for _ in range(side)) + rows.flush())
    assert len(data) < 100_000

    def decode(_: Any) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        with pytest.raises(DataError, match=rf"({side} x {side}|{side**2:,}) pixels; 1,048,576 are allowed"):
            album.accept(data)


def test_a_text_that_unpacks_to_gigabytes_is_refused(album: Album) -> None:
    bomb = b"parameters\0\0" + zlib.compress(bytes(2**26))
    chunk = struct.pack(">I", len(bomb)) + b"zTXt" + bomb + struct.pack(">I", zlib.crc32(b"zTXt" + bomb))
    with pytest.raises(DataError, match=r"^this is no picture that can be read"):
        album.accept(png(8, 8, zlib.compress(bytes(16)), chunks=chunk))


def test_given_pictures_are_bounded_and_the_oldest_go(album: Album, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Album, "given", 5)
    monkeypatch.setattr(Album, "given_each", 3)
    kept = album.keep(noise(8, 8), RECORD, owner="ann")
    data = coded(noise(8, 8))
    ann = [album.accept(data, owner="ann") for _ in range(5)]
    assert [one.path.exists() for one in ann] == [False, False, True, True, True]
    bob = [album.accept(data, owner="bob") for _ in range(3)]
    assert [one.path.exists() for one in (*ann, *bob)] == [False] * 3 + [True] * 5
    monkeypatch.setattr(Album, "given_bytes", 2 * len(bob[0].path.read_bytes()))
    last = album.accept(data, owner="cid")
    assert [one.path.exists() for one in (*ann, *bob, last)] == [False] * 7 + [True] * 2
    assert album.get(kept.id) == kept
    assert len(os.listdir(album.uploads)) == 2


def test_a_given_picture_is_found_by_its_id_after_a_restart(album: Album, tmp_path: Path) -> None:
    given = album.accept(coded(noise(8, 6)))
    again = opened(tmp_path).get(given.id)
    assert (again.width, again.height, again.record) == (8, 6, None)
    assert opened(tmp_path).recent() == []


def test_many_threads_at_once_mix_nothing_up(album: Album) -> None:
    failed = list[object]()

    def work(k: int) -> None:
        try:
            for j in range(4):
                side = 8 + 4 * k + j
                one = album.keep(Image.new("RGB", (side, 8), (k, j, 0)), RECORD, owner=str(k))
                given = album.accept(coded(Image.new("RGB", (side, 9), (k, j, 1))), owner=str(k))
                album.thumbnail(one.id)
                album.recent(5)
                assert pixels(album.get(one.id, str(k)))[0, 0].tolist() == [k, j, 0]
                assert pixels(album.get(given.id, str(k)))[0, 0].tolist() == [k, j, 1]
                album.remove(given.id)
        except BaseException as error:  # a thread's error is no test's
            failed.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(album.recent(100)) == 32
    assert os.listdir(album.uploads) == []


def test_of_too_many_lent_pictures_the_first_are_forgotten_and_their_files_stay(
    album: Album, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Album, "lends", 2)
    paths = [tmp_path / f"{k}.png" for k in range(3)]
    for path in paths:
        path.write_bytes(coded(noise(8, 8)))
    lent = [album.lend(path) for path in paths]
    with pytest.raises(ConfigError):
        album.get(lent[0].id)
    assert album.get(lent[2].id).path == paths[2]
    assert album.lend(paths[0]) == lent[0]
    assert all(path.is_file() for path in paths)
