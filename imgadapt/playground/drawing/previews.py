"""Previews: small pictures of what is being drawn, without the autoencoder where that is a large one."""

import io
import time

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from imgadapt.errors import ImgadaptError
from imgadapt.training.families import Family

SIDE = 256
"""Pixels of the longer side, at most."""
_APART = 0.33  # seconds
_LEARNT_FROM = 4  # pictures that the map is fitted to
_SEED = 7


class Previews:
    """Of one base: its latents as colours by a map that is linear, fitted to pictures that its own autoencoder has
    encoded; an autoencoder that is tiny decodes them itself.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._tiny = type(family.vae).__name__ == "AutoencoderTiny"
        self._map: Tensor | None = None
        self._last = 0.0

    def due(self, *, last: bool) -> bool:
        """Whether it is time for another; always for the last."""
        now = time.monotonic()
        if not last and now - self._last < _APART:
            return False
        self._last = now
        return True

    def of(self, latents: Tensor) -> bytes | None:
        """WebP of a batch's latents (batch, channels, h, w), side by side; None where they are not finite."""
        colours = self._colours(latents)
        if not colours.isfinite().all():
            return None
        batch, _, height, width = colours.shape
        columns = int(np.ceil(batch**0.5))
        sheet = colours.new_zeros(3, -(-batch // columns) * height, columns * width)
        for k, one in enumerate(colours.clamp(0, 1)):
            top, left = k // columns * height, k % columns * width
            sheet[:, top : top + height, left : left + width] = one
        image = Image.fromarray((sheet.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8))
        scale = SIDE / max(image.size)
        if scale != 1:
            sides = max(1, round(image.width * scale)), max(1, round(image.height * scale))
            image = image.resize(sides, Image.Resampling.BICUBIC)
        data = io.BytesIO()
        image.save(data, "WEBP", quality=70, method=0)
        return data.getvalue()

    @torch.no_grad()
    def _colours(self, latents: Tensor) -> Tensor:
        """(batch, 3, h, w) in [0, 1]."""
        if self._tiny:
            vae = self._family.vae
            unscaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
            small = vae.decode(unscaled).sample.float() / 2 + 0.5
            return small if max(small.shape[2:]) <= SIDE else F.interpolate(small, size=_within(small.shape[2:]))
        if self._map is None:
            self._map = self._fitted()
        flat = latents.float().movedim(1, -1)
        ones = flat.new_ones(*flat.shape[:-1], 1)
        return (torch.cat([flat, ones], -1) @ self._map.to(flat.device)).movedim(-1, 1)

    def _fitted(self) -> Tensor:
        """(channels + 1, 3): colours of a place by its latent, by least squares."""
        places = self._family.latent_shape[1]
        side = max(1, min(self._family.native, SIDE) // self._family.factor) * self._family.factor
        generator = torch.Generator().manual_seed(_SEED)
        rows: list[Tensor] = []
        wanted: list[Tensor] = []
        for _ in range(_LEARNT_FROM):
            coarse = torch.rand(1, 3, 5, 5, generator=generator)
            image = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True)[0].clamp(0, 1)
            try:
                latent = self._family.encode_image(image * 2 - 1)
            except ImgadaptError:
                break
            rows.append(latent.flatten(1).T)
            wanted.append(F.avg_pool2d(image[None], places)[0].flatten(1).T)
        if not rows:  # an autoencoder that gives NaN; decoding says so
            return torch.zeros(self._family.latent_shape[0] + 1, 3)
        x = torch.cat(rows)
        x = torch.cat([x, x.new_ones(len(x), 1)], 1).double()
        damped = x.T @ x + 1e-4 * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
        return torch.linalg.solve(damped, x.T @ torch.cat(wanted).double()).float()


def _within(sides: torch.Size) -> tuple[int, int]:
    scale = SIDE / max(sides)
    return max(1, round(sides[0] * scale)), max(1, round(sides[1] * scale))
