"""Decoding: pictures of anyone's, within bounds of time and memory; upright, with 8 bits a channel."""

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from imgadapt.errors import DataError

# Pillow opens more, some of it by starting other programs (EPS); cameras' MPO is opened as JPEG
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MOST_BYTES = 2**29
"""Of a file."""
MOST_WEBP = 2**26
"""Pixels; its decoder holds five copies. Of the others, Pillow allows 178,956,970."""
_READS = 20_000  # and one more for so many bytes:
_PIECE = 64
_ORIENTATION = 0x0112  # of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_LYING = frozenset(way for said, way in _TURNS.items() if said >= 5)
_SCAN_HEADERS = (b"\xff\xda\0\x08\x01", b"\xff\xda\0\x0a\x02", b"\xff\xda\0\x0c\x03", b"\xff\xda\0\x0e\x04")
_SCANS = 16  # usual are 10; each is a pass over all pixels
_SCANNED = 2**30  # pixels of all scans
_COLOURS = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"})


class _Counted(io.BytesIO):
    """Bytes that are not read in millions of pieces: Pillow's readers take some microseconds for each, and a chunk, a
    marker or a frame may have three bytes.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = _READS + len(data) // _PIECE

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise DataError("it is made of more pieces than a picture is; save it anew")
        return super().read(size)


def bounded(data: bytes) -> io.BytesIO:
    """The bytes of a picture for Pillow to open, which sets memory aside for a WebP before it looks at its sides.

    Raises:
        DataError: it is a WebP that has too many pixels; reading it does, if it would take very long.
    """
    width, height = _sides_of_webp(data)
    if width * height > MOST_WEBP:
        raise DataError(f"{width}x{height} pixels; of a WebP {MOST_WEBP:,} pixels are read")
    return _Counted(data)


def _sides_of_webp(data: bytes) -> tuple[int, int]:
    """(width, height) as the first chunk says; (0, 0) of others. Layout:
    https://developers.google.com/speed/webp/docs/riff_container.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return 0, 0
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        both = int.from_bytes(data[21:25], "little")
        return 1 + (both & 0x3FFF), 1 + (both >> 14 & 0x3FFF)
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def opened(data: bytes) -> Image.Image:
    """A picture of which the header is read; its pixels follow when they are asked for, and may raise anything.

    Raises:
        DataError: it is none, has too many pixels, or would take very long.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes between the limit and half of it, and of damage that is no harm
            image = Image.open(bounded(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise DataError("not a picture, whatever its name says") from error
    except Exception as error:  # Pillow's readers raise whatever damaged bytes lead them to
        raise DataError(_why(error)) from error
    check(image, data)
    return image


def check(image: Image.Image, data: bytes) -> None:
    """What is known of the header of a picture, before its pixels are asked for.

    Raises:
        DataError: they would take very long, or very much memory.
    """
    pixels = image.width * image.height
    scans = sum(data.count(header) for header in _SCAN_HEADERS) if image.format in ("JPEG", "MPO") else 0
    if scans > _SCANS and scans * pixels > _SCANNED:
        raise DataError(f"a JPEG of {scans} scans, which takes very long; save it anew")


def decoded(data: bytes, *, about: int | None = None) -> Image.Image:
    """A picture with its pixels, as they lie in the file; of an animation, the first.

    about: pixels of a side that suffice; JPEGs are then read at a size near it, which is faster.

    Raises:
        DataError: as `opened`; or it is damaged, or has numbers of which the white is not known.
    """
    image = opened(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if about is not None:
                image.draft("RGB", (about, about))
            image.load()
    except Exception as error:
        raise DataError(_why(error)) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turn(image)
    except Exception as error:  # struct.error, KeyError, ...
        raise DataError("its EXIF is damaged, so that nobody knows which side is up; save it anew") from error
    if image.mode == "F" or (image.mode.startswith("I") and np.asarray(image).max() > 0xFFFF):
        raise DataError("numbers of 32 bits, whose white is not known; save it with 8 or 16 bits a channel")
    if not image.mode.startswith("I") and image.mode not in _COLOURS:
        raise DataError(f"its colours are {image.mode}; save it as RGB")
    return image


def turn(image: Image.Image) -> Image.Transpose | None:
    """How a picture is turned upright, as its EXIF says; None: it is.

    Raises:
        Exception: whatever damaged EXIF leads to.
    """
    said = image.getexif().get(_ORIENTATION)
    return _TURNS.get(said) if isinstance(said, int) else None


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of a picture upright."""
    return (image.height, image.width) if turn(image) in _LYING else image.size


def plain(image: Image.Image) -> Image.Image:
    """A picture of `decoded` upright, RGB or, where it has transparency, RGBA. Of 16 bits the upper 8 are taken, where
    Pillow's own conversion makes most of it white.
    """
    way = turn(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0).astype(np.uint16) >> 8).astype(np.uint8))
    mode = "RGBA" if image.has_transparency_data else "RGB"
    made = image if image.mode == mode else image.convert(mode)
    return made if way is None else made.transpose(way)


def transparency(image: Image.Image) -> tuple[int, int]:
    """Least and most opacity in a picture of `decoded`, of 0 to 255."""
    if not image.has_transparency_data or image.mode.startswith("I"):
        return 255, 255
    alpha = (image if image.mode in ("RGBA", "LA") else image.convert("RGBA")).getchannel("A")
    least, most = alpha.getextrema()
    return int(least), int(most)  # pyright: ignore[reportArgumentType] # of one channel, two numbers


def painted(image: Image.Image) -> Image.Image:
    """A picture of `decoded` as a mask: upright, 8-bit grey; what is transparent in it was not painted, so it is
    black.
    """
    made = plain(image)
    if made.mode == "RGBA":
        made = Image.alpha_composite(Image.new("RGBA", made.size, (0, 0, 0, 255)), made)
    return made.convert("L")


def _why(error: Exception) -> str:
    text = str(error)
    if isinstance(error, MemoryError):
        return "memory is too short for it"
    if isinstance(error, DataError):
        return text
    if "MAX_TEXT" in text:
        return "its texts, or its colour profile, are larger than they may be; save it without them"
    if "DOS attack" in text:
        return text.partition(", could be")[0]
    return f"damaged: {text or type(error).__name__}"
