"""Pixels and masks of a view: upright, on a background, resized and cropped to its bucket.

The picture is resized to cover its bucket and cropped (or, padded, to fit inside). Where it then lies is a `Placement`,
worked out without opening the file, so that the sizes that SDXL is told are there when the latents come from a cache.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from imgadapt.errors import DataError
from imgadapt.training import decoding, noise
from imgadapt.training.buckets import View
from imgadapt.training.data import Example, unchanged

Crop = Literal["centre", "random", "pad"]
Masking = Literal["none", "alpha", "file"]
Colour = tuple[int, int, int]

WHITE: Colour = (255, 255, 255)
VERSION = 1  # of the pixels that this file makes; in the key, so that no cache outlives a change here


@dataclass(frozen=True)
class Options:
    """What decides, beside the view, what `frame` makes.

    crop: "centre"; "random", a function of seed, the picture's digest and variant; or "pad", the whole picture on the
        background, which does not count then.
    variant: which of the random crops. flip: the mirror image.
    use_mask: "alpha", transparent pixels do not count; "file", nor do the black ones of the mask beside the picture.
        A picture without alpha or mask counts whole.
    background: (red, green, blue) of 0 to 255, under what is transparent and of the padding.
    """

    crop: Crop = "centre"
    variant: int = 0
    seed: int = 0
    flip: bool = False
    use_mask: Masking = "none"
    background: Colour = WHITE


_PLAIN = Options()


@dataclass(frozen=True)
class Placement:
    """How a picture lies in its bucket; pairs are (height, width) or (top, left), in pixels.

    original: the picture upright. resized: what it is resized to, before the crop. corner: the crop's in the resized
    picture, which is mirrored first when `mirrored`; (0, 0) for a padded one. target: the bucket.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    target: tuple[int, int]
    mirrored: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """What SDXL is told: original, corner, target (diffusers' train_text_to_image_lora_sdxl.py)."""
        return (*self.original, *self.corner, *self.target)

    @property
    def inside(self) -> tuple[int, int]:
        """(height, width) of what of the bucket is picture; smaller than the target where it is padded."""
        return min(self.resized[0], self.target[0]), min(self.resized[1], self.target[1])

    @property
    def window(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of what is seen of the picture, not mirrored, in shares of its sides."""
        (height, width), (top, left) = self.resized, self.corner
        if self.mirrored:
            left = width - self.inside[1] - left
        return left / width, top / height, (left + self.inside[1]) / width, (top + self.inside[0]) / height


@dataclass(frozen=True, eq=False)
class Frame:
    """A view as the model takes it.

    pixels: (3, h, w) in [-1, 1]. mask: (h, w) in [0, 1], how much each pixel counts; None: all alike. original, corner,
    target: (height, width), (top, left), (height, width), as in `Placement`.
    """

    pixels: Tensor
    mask: Tensor | None
    original: tuple[int, int]
    corner: tuple[int, int]
    target: tuple[int, int]


def placement(view: View, options: Options = _PLAIN) -> Placement:
    """Where the picture lies in its bucket."""
    (width, height), across, down = view.size, view.example.width, view.example.height
    factor = (min if options.crop == "pad" else max)(width / across, height / down)
    resized = max(1, round(down * factor)), max(1, round(across * factor))
    spare = max(0, resized[0] - height), max(0, resized[1] - width)
    if options.crop == "random":
        source = noise.generator(options.seed, view.example.digest, options.variant, "crop")
        share = torch.rand(2, generator=source, dtype=torch.float64).tolist()
        top, left = (int(part * (free + 1)) for part, free in zip(share, spare, strict=True))
    else:
        top, left = round(spare[0] / 2), round(spare[1] / 2)
    corner = top, spare[1] - left if options.flip else left
    return Placement((down, across), resized, corner, (height, width), options.flip)


def frame(view: View, options: Options = _PLAIN) -> Frame:
    """Open a view's picture and make it fit its bucket.

    Raises:
        DataError: the file is not readable or not the one that was scanned; its mask has nothing in it.
    """
    place = placement(view, options)
    image = upright(view.example)
    seen = _laid(flat(image, options.background), place, options.background, Image.Resampling.LANCZOS)
    mask = mask_of(view.example, image, options.use_mask)
    if mask is None and place.inside != place.target:
        mask = Image.new("L", (1, 1), 255)
    if mask is not None:
        # a triangle, not a box: Pillow's box takes whole pixels only, so masks would be off by up to half of one
        mask = _laid(mask, place, 0, Image.Resampling.BILINEAR)
        if options.crop != "random" and mask.getextrema()[1] == 0:  # of random crops another one may have some of it
            raise DataError(
                f"{view.example.path}: cropped to {place.target[1]} x {place.target[0]}, nothing is left of its mask, "
                "so nothing of it would be trained; crop it yourself, or give --crop pad"
            )
    pixels = torch.from_numpy(np.asarray(seen, np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()
    counts = None if mask is None else torch.from_numpy(np.asarray(mask, np.float32) / 255)
    return Frame(pixels, counts, place.original, place.corner, place.target)


def key(view: View, options: Options = _PLAIN) -> str:
    """All that decides what `frame` makes of a view, as text: for caches that are keyed by content.

    Equal for crops that fall on the same place.
    """
    place, example = placement(view, options), view.example
    mask = "none"
    if options.use_mask == "alpha" and example.alpha:
        mask = "alpha"
    elif options.use_mask == "file" and example.mask is not None:
        mask = example.mask_digest
    geometry = f"{place.resized} {place.corner} {place.target} {place.mirrored}"
    return f"frame {VERSION} {example.digest} {geometry} {options.background} {mask}"


def latent_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """A mask (h, w) as the mean over the pixels of each latent place: (height, width)."""
    return F.adaptive_avg_pool2d(mask[None], (height, width))[0]


def upright(example: Example, *, about: int | None = None) -> Image.Image:
    """The picture turned by its EXIF, 8 bits a channel: RGBA if it has transparency, else RGB.

    about: pixels of a side that suffice; JPEGs are then opened at a size near it, which is faster.

    Raises:
        DataError: the file is not readable, not the one that was scanned, or of numbers with an unknown range.
    """
    turned = decoding.plain(_decoded(example.path, example.digest, about))
    if about is None and turned.size != (example.width, example.height):
        wanted = f"{example.width} x {example.height}"
        raise DataError(f"{example.path}: wanted {wanted} pixels, as scanned, got {turned.width} x {turned.height}")
    return turned


def flat(image: Image.Image, background: Colour = WHITE) -> Image.Image:
    """RGB: the picture over a colour."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")


def mask_of(example: Example, image: Image.Image, use_mask: Masking) -> Image.Image | None:
    """The mask of a picture that `upright` opened, 8-bit grey, white where to train; None: it has none.

    Raises:
        DataError: the mask is not readable, or black all over.
    """
    if use_mask == "alpha" and example.alpha:
        mask, name = image.getchannel("A"), f"{example.path}: the picture is transparent"
    elif use_mask == "file" and example.mask is not None:
        mask, name = decoding.painted(_decoded(example.mask, example.mask_digest)), f"{example.mask}: the mask is black"
    else:
        return None
    if mask.getextrema()[1] == 0:
        raise DataError(f"{name} all over, so nothing of {example.path.name} would be trained; mend or remove it")
    return mask


def _decoded(path: Path, digest: str, about: int | None = None) -> Image.Image:
    data = unchanged(path, digest)
    try:
        return decoding.decoded(data, about=about)
    except DataError as error:
        raise DataError(f"{path}: cannot be read ({error}); mend or remove it") from error


def _laid(image: Image.Image, place: Placement, fill: Colour | int, filter_: Image.Resampling) -> Image.Image:
    """The picture, or a mask of any size of it, resized and cropped in one go, on a canvas of the bucket's size."""
    (height, width), (inner_height, inner_width) = place.target, place.inside
    left, top, right, bottom = place.window
    box = left * image.width, top * image.height, right * image.width, bottom * image.height
    seen = image.resize((inner_width, inner_height), filter_, box)
    if place.inside != place.target:
        canvas = Image.new(image.mode, (width, height), fill)
        canvas.paste(seen, ((width - inner_width) // 2, (height - inner_height) // 2))
        seen = canvas
    return ImageOps.mirror(seen) if place.mirrored else seen
