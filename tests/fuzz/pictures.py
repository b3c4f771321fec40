"""Pictures of any bytes: decoded, trained on, asked how they were made."""

import io
import random
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from imgadapt.playground.decoding import decoded
from imgadapt.playground.library.bases import Bases
from imgadapt.playground.library.library import Library
from imgadapt.playground.pictures import record
from imgadapt.playground.settings import Settings
from imgadapt.training.data import scan
from tests.fuzz.files import scratch
from tests.fuzz.pickles import png
from tests.fuzz.target import Target

_MOST = 512 * 512  # pixels
_PARAMETERS = (
    "a cat <lora:fox:0.8>\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x64"
)


def _decode(data: bytes) -> None:
    image = decoded(data, _MOST)
    assert image.mode in ("RGB", "RGBA")
    assert image.width * image.height <= _MOST
    image.tobytes()


def _train(data: bytes) -> None:
    """As a folder that is trained on has it: with every ending, as the format is told by content."""
    folder = scratch() / "pictures"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / "a.png").write_bytes(data)
    (one,) = scan(folder, "a cat")
    assert one.width >= 8 <= one.height


@cache
def _house(home: Path) -> tuple[Settings, Library, Bases]:
    settings = Settings(home)
    return settings, Library(settings), Bases(settings)


def _asked(data: bytes) -> None:
    settings, library, bases = _house(scratch() / "home")
    restored = record.restore(data, library, bases, settings=settings)
    assert all(len(line) < 2000 for line in restored.lacks)


def _text(data: bytes) -> None:
    """A PNG whose texts are these, name and value in turn, between bytes 0."""
    pieces = data.split(b"\0")[:8]
    pairs = list(zip(pieces[::2], pieces[1::2], strict=False))
    kinds: tuple[Callable[[bytes, bytes], tuple[bytes, bytes]], ...] = (
        lambda name, text: (b"tEXt", name + b"\0" + text),
        lambda name, text: (b"zTXt", name + b"\0\0" + zlib.compress(text)),
        lambda name, text: (b"iTXt", name + b"\0\0\0\0\0" + text),
    )
    _asked(png(*(kinds[(k + len(data)) % 3](name, text) for k, (name, text) in enumerate(pairs))))


def _texts() -> Iterator[bytes]:
    yield b"parameters\0" + _PARAMETERS.encode()
    yield (
        b"imgadapt\0"
        + b'{"version":1,"request":{"prompt":"a cat","steps":4,"seed":3},"base":{"name":"demo"},"adapters":{}}'
    )
    yield (
        b"parameters\0"
        + b'{"sui_image_params":{"prompt":"x","steps":5,"loras":["a"],"loraweights":["0.5"],"sampler":"euler"}}'
    )
    yield b"prompt\0{}\0workflow\0{}"
    yield b"XML:com.adobe.xmp\0<x:xmpmeta/>"


def _made(format: str, mode: str = "RGB", side: int = 12, **options: Any) -> bytes:
    image = Image.frombytes("RGB", (side, side), random.Random(side).randbytes(3 * side * side)).convert(mode)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _told() -> Iterator[bytes]:
    """Pictures that say how they were made, and others."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", _PARAMETERS, zip=True)
    yield _made("PNG", pnginfo=info)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + _PARAMETERS.encode("utf-16-be")
    yield _made("JPEG", exif=exif)
    yield _made("WEBP", exif=exif)
    yield from _images()


def _images() -> Iterator[bytes]:
    for format, modes in (
        ("PNG", ("RGB", "RGBA", "L", "P", "1", "I;16", "LA")), ("JPEG", ("RGB", "L", "CMYK")),
        ("WEBP", ("RGB", "RGBA")),
        ("GIF", ("P", "L")), ("BMP", ("RGB", "P", "1")), ("TIFF", ("RGB", "I;16", "F", "CMYK", "1")),
    ):  # fmt: skip
        for mode in modes:
            yield _made(format, mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    yield _made("JPEG", exif=exif)
    yield _made("PNG", exif=exif)
    yield _made("WEBP", exif=exif, lossless=True)
    yield _made("JPEG", progressive=True)
    yield _made("TIFF", compression="tiff_lzw")
    yield _made("TIFF", compression="tiff_adobe_deflate")
    yield _made("PNG", "P", transparency=0)
    frames = [Image.new("P", (9, 9), k) for k in range(3)]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        file = io.BytesIO()
        frames[0].save(file, format, save_all=True, append_images=frames[1:])
        yield file.getvalue()


_WORDS = (
    *("IHDR", "IDAT", "tEXt", "zTXt", "iTXt", "eXIf", "PLTE", "tRNS", "acTL", "fcTL", "fdAT", "iCCP", "IEND", "sRGB"),
    *("\xff\xd8", "\xff\xe1", "Exif\0\0", "\xff\xc0", "\xff\xc2", "\xff\xda", "JFIF", "Adobe", "MPF\0", "ICC_PROFILE"),
    *("RIFF", "WEBP", "VP8 ", "VP8L", "VP8X", "ALPH", "ANIM", "ANMF", "EXIF", "XMP ", "GIF89a", "BM", "II*\0", "MM\0*"),
    *("\xff\xff\xff\xff", "\x7f\xff\xff\xff", "parameters", "UNICODE\0"),
)

TARGETS = (
    Target("picture", _decode, _images, _WORDS),
    Target("picture-trained", _train, _images, _WORDS),
    Target("picture-asked", _asked, _told, _WORDS),
    Target(
        "picture-text",
        _text,
        _texts,
        (
            "parameters\0",
            "imgadapt\0",
            "Steps: 5, Sampler: ",
            "Negative prompt:",
            "<lora:a:1>",
            '{"request":{',
            '"adapters":',
            '"sui_image_params":{',
        ),
    ),
)
