"""Pictures that no camera made: bytes by name, for tests of what they may cost."""

import io
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from PIL import Image


def picture(side: int = 48, mode: str = "RGB", kind: str = "PNG", **how: Any) -> bytes:
    """A good one, of coarse noise."""
    buffer = io.BytesIO()
    drawn = Image.effect_mandelbrot((side, side), (-2, -1.5, 1, 1.5), 60).convert("RGB")
    (drawn if mode == "RGB" else drawn.convert(mode)).save(buffer, kind, **how)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, bits: int = 8, colour: int = 2, pixels: bytes | None = None) -> bytes:
    """Of one colour. extra: chunks before the pixels."""
    if pixels is None:
        packer, line = zlib.compressobj(9), bytes(1 + width * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] * bits // 8)
        pixels = b"".join([*(packer.compress(line) for _ in range(height)), packer.flush()])
    head = chunk(b"IHDR", struct.pack(">II5B", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_of_scans(side: int, count: int) -> bytes:
    """The last pass of a progressive JPEG, again and again."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), 128).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()[:-2]
    return data + data[data.rindex(b"\xff\xda") :] * count + b"\xff\xd9"


def jpeg_that_says(width: int, height: int) -> bytes:
    data = bytearray(picture(kind="JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def webp(width: int, height: int) -> bytes:
    """An animation of one frame of 48 x 48 on a canvas."""
    frame = bytes(6) + (47).to_bytes(3, "little") * 2 + bytes(4) + picture(kind="WEBP")[12:]
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    parts = [(b"VP8X", b"\x12\0\0\0" + sides), (b"ANIM", bytes(6)), (b"ANMF", frame)]
    body = b"WEBP" + b"".join(kind + struct.pack("<I", len(data)) + data for kind, data in parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_that_says(*, lossless: bool) -> bytes:
    """16383 x 16383, without a canvas."""
    data = bytearray(picture(kind="WEBP", lossless=lossless))
    assert data[12:16] == (b"VP8L" if lossless else b"VP8 ")
    if lossless:
        data[21:25] = (16382 | 16382 << 14).to_bytes(4, "little")
    else:
        data[26:30] = struct.pack("<HH", 16383, 16383)
    return bytes(data)


def gif(frames: int) -> bytes:
    """16 x 16, the same frame again and again."""
    data = picture(16, "L", "GIF")
    start = 13 + (3 * 2 ** ((data[10] & 7) + 1) if data[10] & 128 else 0)
    return data[:start] + data[start:-1] * frames + b";"


def tiff(*, loop: bool = False, tile: int | None = None) -> bytes:
    """loop: the next directory is the first again. tile: its sides, as the file says."""
    data = bytearray(picture(16, "L", "TIFF"))
    place = struct.unpack("<I", data[4:8])[0]
    (count,) = struct.unpack("<H", data[place : place + 2])
    if loop:
        data[place + 2 + 12 * count : place + 6 + 12 * count] = struct.pack("<I", place)
    if tile:
        rows = dict(struct.iter_unpack("<H10s", data[place + 2 : place + 2 + 12 * count]))
        rows[322] = rows[323] = struct.pack("<HII", 4, 1, tile)
        rows[324], rows[325] = rows.pop(273), rows.pop(279)
        rows.pop(278, None)
        made = struct.pack("<H", len(rows)) + b"".join(struct.pack("<H", k) + v for k, v in sorted(rows.items()))
        return bytes(data[:4]) + struct.pack("<I", len(data)) + bytes(data[8:]).rjust(len(data) - 8) + made + bytes(4)
    return bytes(data)


def exif(orientation: bytes) -> bytes:
    """A block of one entry: its type, count and value."""
    return b"MM\0*\0\0\0\x08\0\x01\x01\x12" + orientation + bytes(4)


LARGEST = 178_956_970
"""Pixels that Pillow opens."""
_PIXELS = zlib.compress(b"".join(b"\0" + bytes(range(48)) for _ in range(16)))


def _small(*chunks: bytes) -> bytes:
    return png(16, 16, *chunks, pixels=_PIXELS)


BOMBS: Mapping[str, tuple[Callable[[], bytes], str]] = {
    "65500 x 65500": (lambda: png(65500, 65500, pixels=b""), r"exceeds limit of \d+ pixels"),
    "a JPEG that says so": (lambda: jpeg_that_says(65500, 65500), r"exceeds limit of \d+ pixels"),
    "transparent strip": (lambda: png(65500, 2700, colour=6), "transparent all over"),
    "a canvas of WebP": (lambda: webp(16383, 16383), "16383x16383 pixels; of a WebP 67,108,864"),
    "a lossless WebP": (lambda: webp_that_says(lossless=True), "16383x16383 pixels; of a WebP 67,108,864"),
    "a lossy WebP": (lambda: webp_that_says(lossless=False), "16383x16383 pixels; of a WebP 67,108,864"),
    "a smaller canvas": (lambda: webp(13000, 13000), "13000x13000 pixels; of a WebP"),
    "a text of 100 MB": (lambda: _small(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))), "its texts, or its"),
    "200 texts": (lambda: _small(*[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6)))] * 200), "its texts, or its"),
    "a profile of 100 MB": (lambda: _small(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8)))), "its texts, or"),
    "a million chunks": (lambda: _small(chunk(b"abCd", b"") * 10**6), "made of more pieces than a picture"),
    "a million texts": (lambda: _small(chunk(b"tEXt", b"a\0b") * 10**6), "made of more pieces than a picture"),
    "a JPEG of fillings": (lambda: b"\xff\xd8" + b"\xff" * 10**7, "made of more pieces than a picture"),
    "a JPEG of segments": (lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * 10**6, "made of more pieces than a picture"),
    "a GIF of comments": (lambda: gif(1)[:-30] + b"!\xfe\1a\0" * 10**6, "made of more pieces than a picture|damaged"),
    "a JPEG of 2000 scans": (lambda: jpeg_of_scans(6000, 2000), r"a JPEG of 20\d\d scans"),
    "a TIFF of huge tiles": (lambda: tiff(tile=2**16), "damaged|not a picture"),
    "nothing but zeros": (lambda: bytes(10**8), "not a picture"),
}  # fmt: skip
"""What would take gigabytes or minutes, and what is said of it."""

TAKEN: Mapping[str, tuple[Callable[[], bytes], tuple[int, int]]] = {
    "a strip of the largest size": (lambda: png(65500, LARGEST // 65500), (65500, LARGEST // 65500)),
    "a million frames": (lambda: gif(10**6), (16, 16)),
    "a TIFF in a circle": (lambda: tiff(loop=True), (16, 16)),
    "EXIF of 10 MB": (lambda: _small(chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + os.urandom(10**7))), (16, 16)),
    "XMP of 10 MB": (lambda: _small(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"<" * 10**6)), (16, 16)),
    "a profile that is none": (lambda: _small(chunk(b"iCCP", b"a\0\0nonsense")), (16, 16)),
}  # fmt: skip
"""What costs little though it looks dear, and its size."""


@cache
def every_kind() -> Sequence[tuple[str, bytes]]:
    """A picture in each format that Pillow writes."""
    Image.init()
    made: list[tuple[str, bytes]] = []
    for kind in sorted(Image.SAVE):
        for mode in ("RGB", "L", "1", "P"):
            try:
                made.append((kind, picture(32, mode, kind)))
                break
            except Exception:  # it has no such colours, or needs what is not here
                continue
    return made
