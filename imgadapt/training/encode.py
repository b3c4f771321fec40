"""Pictures and captions as the model takes them, each computed once and kept on disk by its content."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from imgadapt.training.cache import Cache
from imgadapt.training.data import Example, pixels
from imgadapt.training.families import StableDiffusion


class Encoder:
    """A base's autoencoder and text encoder, behind a cache.

    size: pixels of the square that pictures are cropped to.
    """

    def __init__(self, family: StableDiffusion, size: int, folder: Path) -> None:
        self.family, self.size = family, size
        self.cache = Cache(folder)
        self.identity = family.identity()

    def latent(self, example: Example, flip: bool = False) -> Tensor:
        """Latent (channels, h, w) of a picture, or of its mirror image."""

        def make() -> Tensor:
            return self.family.encode_image(pixels(example.path, self.size, flip=flip))

        return self.cache.get(make, "latent", example.digest, f"{self.size} {flip}", self.identity["vae"])

    def states(self, caption: str) -> Tensor:
        """Text states (tokens, width)."""
        encoders = self.identity["text_encoder"] + self.identity["tokenizer"]
        return self.cache.get(lambda: self.family.encode_text(caption), "text", caption, encoders)

    def both(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """(pictures, channels, h, w) latents and (pictures, tokens, width) states."""
        latents = torch.stack([self.latent(example) for example in examples])
        return latents, torch.stack([self.states(example.caption) for example in examples])
