"""Decoding: pictures from outside, which may be hostile."""

import math
import re

import numpy as np
from PIL import Image, ImageOps

from imgadapt.errors import DataError
from imgadapt.training import decoding

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_SIXTEEN = {"I;16", "I;16B", "I;16L", "I;16N", "I"}


def opened(data: bytes, most_pixels: int) -> Image.Image:
    """A picture whose header was read and whose pixels were not.

    Raises:
        DataError: it is none, or has too many pixels.
    """
    if not data:
        raise DataError("the picture is empty (0 bytes)")
    try:
        image = Image.open(decoding.bounded(data), formats=FORMATS)
    except DataError as error:
        raise DataError(f"this is no picture that can be read: {error}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        count = int((re.findall(r"\d+", str(error)) or ["0"])[0])
        raise DataError(f"the picture has {count:,} pixels; {most_pixels:,} are allowed") from None
    except Exception as error:  # readers of foreign bytes raise anything
        known = "PNG, JPEG, WebP, GIF and BMP are"
        raise DataError(f"this is no picture that can be read; {known} ({type(error).__name__})") from None
    if image.width * image.height > most_pixels:
        side = math.isqrt(most_pixels)
        raise DataError(
            f"the picture has {image.width} x {image.height} pixels; {most_pixels:,} are allowed ({side} x {side})"
        )
    decoding.check(image, data)
    return image


def decoded(data: bytes, most_pixels: int) -> Image.Image:
    """The first frame, upright, RGB or RGBA, with nothing but its pixels.

    Raises:
        DataError: see `opened`; or its pixels are broken.
    """
    image = opened(data, most_pixels)
    try:
        image.load()
        plain = _eight_bits(_upright(image))
        alpha = plain.has_transparency_data
        made = plain.convert("RGBA" if alpha else "RGB")
    except MemoryError:
        raise DataError(f"memory is too short for a picture of {image.width} x {image.height} pixels") from None
    except Exception as error:  # decoders of foreign bytes raise anything
        raise DataError(f"the picture is broken or cut off ({type(error).__name__})") from None
    made.info = {}
    return made


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; a broken EXIF says nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # readers of foreign bytes raise anything
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow cuts 16 bits off at 255; here they are scaled."""
    if image.mode in _SIXTEEN:
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    return image
