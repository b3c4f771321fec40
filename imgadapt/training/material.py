"""Material: pictures and captions as the base takes them, each computed once and kept by its content, and batches."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from imgadapt.errors import ConfigError
from imgadapt.training import captions, framing
from imgadapt.training.buckets import View, views
from imgadapt.training.cache import Cache
from imgadapt.training.config import TrainConfig
from imgadapt.training.data import Example
from imgadapt.training.families import Family
from imgadapt.training.order import Order

_Asked = tuple[Callable[[], dict[str, Tensor]], str, str, str]  # of the cache: how it is made, and its key


@dataclass(frozen=True)
class Batch:
    """Samples of one size, on the device.

    latents: (n, channels, h, w); conditions: as `Family.predict` takes them; mask: (n, h, w) weights of places, or
    None; captions, names: of each.
    """

    latents: Tensor
    conditions: Mapping[str, Tensor]
    mask: Tensor | None
    captions: Sequence[str]
    names: Sequence[str]


class Material:
    """The examples of a training.

    live: text encoders are trained, so that captions are encoded when they are used and not once.
    fixed: pictures are not varied (for evaluation): centre crops, not mirrored, the first wording, never left out.
    """

    def __init__(
        self,
        config: TrainConfig,
        family: Family,
        examples: Sequence[Example],
        *,
        live: bool = False,
        fixed: bool = False,
    ) -> None:
        self.config, self.family, self.live, self.fixed = config, family, live, fixed
        resolutions = config.resolution or [family.native]
        for side in resolutions:
            family.check_side(side)
        batch = 1 if fixed else config.batch_size
        self.views: list[View] = views(examples, resolutions, family.step, square=not config.buckets, batch=batch)
        self.order = Order(self.views, config.batch_size, config.seed)
        self.cache = Cache(config.cache or config.output / "cache")
        identity = family.identity()
        self._vae = f"{identity['vae']} {family.vae.dtype}"
        texts = sorted(name for name in identity if name.startswith(("text_encoder", "tokenizer")))
        self._text = " ".join([*(identity[name] for name in texts), str(family.dtype)])
        self.wording = captions.Wording(
            shuffle=config.shuffle_tags, keep=config.keep_tags, tag_dropout=config.tag_dropout,
            dropout=0.0 if fixed else config.caption_dropout, variants=config.caption_variants,
        )  # fmt: skip

    def prepare(self, *, quiet: bool = False) -> None:
        """Compute all that is not yet kept."""
        every = [(view, flip, crop) for view in self.views for flip in self._flips for crop in range(self._crops)]
        with self.family.here():  # once for all of them, and not for each
            for view, flip, crop in tqdm(every, "pictures", leave=False, disable=quiet, dynamic_ncols=True):
                self.cache.ensure(*self._picture(view, flip=flip, crop=crop))
        self.prepare_texts(self.texts(), quiet=quiet)

    def prepare_texts(self, texts: Collection[str], *, quiet: bool = False) -> None:
        """Compute the conditions of texts that are not yet kept; none where text encoders are trained."""
        if self.live:
            return
        with self.family.here():
            for text in tqdm(texts, "captions", leave=False, disable=quiet, dynamic_ncols=True):
                self.cache.ensure(*self._words(text))

    def texts(self) -> list[str]:
        """All that pictures may be shown with, each once."""
        examples = dict.fromkeys(view.example for view in self.views)
        return list(dict.fromkeys(text for example in examples for text in self._texts(example)))

    def batch(self, step: int, places: range) -> Batch:
        """Some places of a step's batch."""
        chosen, seen = self.order.batch(step), self.order.seen(step)
        rows = [(self.views[chosen[k]], seen[k]) for k in places]
        texts = [self._caption(view.example, count) for view, count in rows]
        held = [self._encoded(view, flip=self._mirrored(view, count), crop=count % self._crops) for view, count in rows]
        return self._stacked(rows, held, texts)

    def all(self, size: int | None = None) -> Iterator[tuple[list[int], Batch]]:
        """Every view once, (places in `views`, batch), in batches of one size each: twice what a step computes at once,
        for without gradients that takes less.
        """
        size = size or 2 * -(-self.config.batch_size // self.config.pieces)
        by_size: dict[tuple[int, int], list[int]] = {}
        for k, view in enumerate(self.views):
            by_size.setdefault(view.size, []).append(k)
        for places in by_size.values():
            for first in range(0, len(places), size):
                some = places[first : first + size]
                rows = [(self.views[k], 0) for k in some]
                held = [self._encoded(view, flip=False, crop=0) for view, _ in rows]
                yield some, self._stacked(rows, held, [captions.plain(view.example.captions[0]) for view, _ in rows])

    def conditions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Text conditions of captions, (n, ...), on the device."""
        if self.live:
            return dict(self.family.text(texts))
        rows = [self.states(text) for text in texts]
        return {name: torch.stack([row[name] for row in rows]).to(self.family.device) for name in rows[0]}

    def states(self, text: str) -> dict[str, Tensor]:
        """Text conditions of one caption, kept."""
        return self.cache.get(*self._words(text))

    def _words(self, text: str) -> _Asked:
        return lambda: self.family.encode_text(text), "text", text, self._text

    def _stacked(
        self, rows: Sequence[tuple[View, int]], held: Sequence[Mapping[str, Tensor]], texts: Sequence[str]
    ) -> Batch:
        device = self.family.device
        latents = torch.stack([row["latent"] for row in held]).to(device)
        sizes = torch.stack([row["sizes"] for row in held]).to(device)
        mask = None
        if any("mask" in row for row in held):
            whole = torch.ones(latents.shape[2:])
            mask = torch.stack([row.get("mask", whole) for row in held]).to(device)
            mask = mask + self.config.unmasked_weight * (1 - mask)
        names = [view.example.path.name for view, _ in rows]
        return Batch(latents, {**self.conditions(texts), "sizes": sizes}, mask, texts, names)

    @property
    def _flips(self) -> tuple[bool, ...]:
        return (False, True) if self.config.flip and not self.fixed else (False,)

    @property
    def _crops(self) -> int:
        return self.config.crops if self.config.crop == "random" and not self.fixed else 1

    def _mirrored(self, view: View, count: int) -> bool:
        """Every second time, each picture in turns of its own, so that all crops are seen both ways."""
        return len(self._flips) > 1 and (count // self._crops + int(view.example.digest[:8], 16)) % 2 == 1

    def _caption(self, example: Example, count: int) -> str:
        if self.fixed:
            return captions.plain(example.captions[0])
        return captions.caption(example.captions, self.wording, self.config.seed, example.digest, count)

    def _texts(self, example: Example) -> Sequence[str]:
        if self.fixed:
            return [captions.plain(example.captions[0])]
        return captions.every(example, self.wording, self.config.seed)

    def _encoded(self, view: View, *, flip: bool, crop: int) -> dict[str, Tensor]:
        return self.cache.get(*self._picture(view, flip=flip, crop=crop))

    def _picture(self, view: View, *, flip: bool, crop: int) -> _Asked:
        policy = "centre" if self.fixed and self.config.crop == "random" else self.config.crop
        options = framing.Options(policy, crop, self.config.seed, flip, self.config.mask)

        def make() -> dict[str, Tensor]:
            frame = framing.frame(view, options)
            latent = self.family.encode_image(frame.pixels)
            sizes = torch.tensor([*frame.original, *frame.corner, *frame.target], dtype=torch.float32)
            made = {"latent": latent, "sizes": sizes}
            if frame.mask is not None:
                made["mask"] = framing.latent_mask(frame.mask, latent.shape[1], latent.shape[2])
            return made

        return make, "picture", framing.key(view, options), self._vae


def kept_out(examples: Sequence[Example], count: int) -> tuple[list[Example], list[Example]]:
    """(to train on, to be held out): which ones does not change when others come or go.

    Raises:
        ConfigError: fewer than one would be left.
    """
    if count >= len(examples):
        raise ConfigError(f"held_out_count is {count}, of {len(examples)} pictures")
    out = {e.digest for e in sorted(examples, key=lambda e: e.digest)[:count]}
    return [e for e in examples if e.digest not in out], [e for e in examples if e.digest in out]
