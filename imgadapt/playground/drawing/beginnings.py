"""Beginnings: what a picture is drawn from: noise, another picture under noise, and where it may change."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from imgadapt.errors import ConfigError
from imgadapt.playground import samplers
from imgadapt.playground.pictures.album import Album
from imgadapt.playground.requests import GenerateRequest
from imgadapt.training.families import Family
from imgadapt.training.families.flux import pack

_KEPT = 16  # encoded pictures
_MORE = 1.5  # times the base's own side: pictures to begin from that are larger are drawn smaller


@dataclass(frozen=True, eq=False)
class Beginning:
    """image: the one to begin from, in the request's sides; latent: its own, (1, channels, h, w). mask: where to redraw
    it, in pixels; free: the same in the latent's places, 1 or 0. skip: steps that are left out.
    """

    image: Image.Image
    latent: Tensor
    mask: Image.Image | None
    free: Tensor | None
    skip: int

    def blended(self, latents: Tensor, noise: Tensor, at: samplers.Level) -> Tensor:
        """Latents with the picture's own outside of the mask. (batch, channels, h, w) all."""
        if self.free is None:
            return latents
        own = (at.signal * self.latent.to(noise) + at.noise * noise).to(latents)
        return torch.where(self.free.to(latents.device).bool(), latents, own)

    def finished(self, drawn: Image.Image) -> Image.Image:
        """The drawn picture, outside of the mask the one from before to the bit."""
        return drawn if self.mask is None else Image.composite(drawn, self.image, self.mask)

    @property
    def notes(self) -> list[str]:
        empty = self.mask is not None and not self.mask.getbbox()
        return ["the mask is empty: nothing was redrawn"] if empty else []


class Beginnings:
    """Pictures of an album as one base sees them; each is encoded once."""

    def __init__(self, family: Family, album: Album) -> None:
        self._family, self._album = family, album
        self._kept: OrderedDict[tuple[Any, ...], tuple[Image.Image, Tensor]] = OrderedDict()

    def sides(self, id: str) -> tuple[int, int]:
        """Width and height for a picture to begin from: its own, as the base takes them."""
        picture, family = self._album.get(id), self._family
        most, least = (_MORE * family.native) ** 2, (family.native / _MORE) ** 2
        pixels = picture.width * picture.height
        scale = 1.0 if least <= pixels <= most else (family.native**2 / pixels) ** 0.5
        step, longest = family.factor, family.native * 4
        near = [round(side * scale / step) * step for side in (picture.width, picture.height)]
        return min(max(near[0], step), longest), min(max(near[1], step), longest)

    def of(self, request: GenerateRequest, sides: tuple[int, int]) -> Beginning | None:
        """What a settled request begins from; None: from noise.

        Raises:
            ConfigError: a picture is gone from the album.
        """
        if request.init is None:
            return None
        drawn = steps_of(request)
        image, latent = self._encoded(request.init, sides)
        mask = None if request.mask is None else self._mask(request.mask, request.init, sides)
        free = None
        if mask is not None:
            places = F.max_pool2d(_array(mask)[None, None], self._family.latent_shape[1])
            free = (places > 0).float()
        return Beginning(image, latent, mask, free, request.steps - drawn)

    def _encoded(self, id: str, sides: tuple[int, int]) -> tuple[Image.Image, Tensor]:
        if (id, sides) not in self._kept:
            image = fitted(self._open(id), sides)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
            self._kept[id, sides] = image, self._family.encode_image(pixels)[None]
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end((id, sides))
        return self._kept[id, sides]

    def _mask(self, id: str, under: str, sides: tuple[int, int]) -> Image.Image:
        """In L, white where it is redrawn; it lies on the picture, whatever its own size."""
        given = self._open(id)
        if given.mode in ("RGBA", "LA", "PA") or "transparency" in given.info:
            given = _over(given, (0, 0, 0))
        picture = self._album.get(under)
        return fitted(given.convert("L").resize((picture.width, picture.height), Image.Resampling.BOX), sides)

    def _open(self, id: str) -> Image.Image:
        try:
            with Image.open(self._album.get(id).path) as image:
                image.load()
                return image
        except (OSError, SyntaxError, ValueError) as error:
            raise ConfigError(f"the picture {id} cannot be read any more") from error


def steps_of(request: GenerateRequest) -> int:
    """Steps that are drawn: `denoise` of them where there is a picture to begin from."""
    return request.steps if request.init is None else max(1, round(request.steps * request.denoise))


def fitted(image: Image.Image, sides: tuple[int, int]) -> Image.Image:
    """A picture, in RGB or L, that covers the sides and is cut to them around its middle."""
    if image.mode != "L":
        image = _over(image, (255, 255, 255))
    return image if image.size == sides else ImageOps.fit(image, sides, Image.Resampling.LANCZOS)


def noise(family: Family, requests: Sequence[GenerateRequest], sides: tuple[int, int], dtype: torch.dtype) -> Any:
    """(noise (batch, channels, h, w), generators to go on with), each row by its own seed, as the pipelines draw it."""
    from diffusers.utils.torch_utils import randn_tensor

    channels, places = family.latent_shape
    shape = (len(requests), channels, sides[1] // places, sides[0] // places)
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    return randn_tensor(shape, generator=generators, device=family.device, dtype=dtype), generators


def packed(family: Family, latents: Tensor) -> Tensor:
    """(batch, channels, h, w) as the family's pipeline has latents."""
    return pack(latents) if family.packing > 1 else latents


def _over(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """RGB of a picture, over a colour where it lets through."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    given = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", given.size, (*colour, 255)), given).convert("RGB")


def _array(mask: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(mask)).float()
