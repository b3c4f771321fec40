"""Zipping: adapters merged by coefficients of their columns that are learnt, so that each goes on doing what it did.

After ZipLoRA (arXiv 2311.13600): ΔW = Σ ΔWᵢ diag(mᵢ), where the m are such that the merged model predicts of each
adapter's own prompts what the model with that adapter alone does, and that columns overlap little. No pictures are
needed: each adapter draws its own. The result is LoRA whose rank is the sum of theirs, exactly.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from imgadapt import attaching, live
from imgadapt.combining.inheriting import inherited, united_words
from imgadapt.combining.layers import Input
from imgadapt.errors import ConfigError, TrainingError, first_few
from imgadapt.file import AdapterFile
from imgadapt.training import noise
from imgadapt.training.coefficients import Coefficients
from imgadapt.training.families import Family
from imgadapt.training.families.family import Conditions
from imgadapt.training.objective import Objective

Progress = Callable[[str, int, int, float], None]
"""(what, done, of, loss over the plain sum's; NaN where there is none)."""
KEY = "imgadapt_zip"
"""Of the metadata: what was asked, and `Zipped.statistics`, as JSON."""
_HELD_OUT, _TIMES = 2, 4  # pictures of each adapter that are measured and not learnt from, and times of each
_SCALES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Source:
    """An adapter that is zipped. prompts: of what it was trained on; weight: the strength it is to keep; digest:
    SHA-256 of its file, for the record.
    """

    name: str
    file: AdapterFile
    prompts: Sequence[str]
    weight: float = 1.0
    digest: str = ""


@dataclass(frozen=True)
class ZipConfig:
    """How coefficients are learnt.

    steps: of Adam at `rate`, which falls to 0 as a cosine; of `batch` samples of each adapter. overlap: what the mean
        of |mᵢ mⱼ| counts, where the errors of the plain sum together count 1 (the paper's lambda is over errors as they
        are, which differ a hundredfold from base to base).
    pictures: that each adapter draws to learn from, in `sampler_steps` at `side` pixels (None: the base's).

    Raises:
        ConfigError: a number is out of its range.
    """

    steps: int = 100
    rate: float = 0.03
    overlap: float = 0.01
    batch: int = 2
    pictures: int = 4
    sampler_steps: int = 20
    side: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "pictures", "sampler_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ConfigError(f"rate is {self.rate}; it must be a number above 0")
        if not (math.isfinite(self.overlap) and self.overlap >= 0):
            raise ConfigError(f"overlap is {self.overlap}; it must be a number, 0 or more")


@dataclass(frozen=True)
class Zipped:
    """Mean squared errors to each adapter's own prediction, on pictures and noise not learnt from. before: of the plain
    sum; after: of what was learnt; without: of no columns, so what each adapter does; scaled: of the sum times `scale`,
    the best of `_SCALES` for just these, which takes no learning. overlap: mean |mᵢ mⱼ|, which was 1. coefficients:
    layer -> adapter -> (inputs,).
    """

    file: AdapterFile
    before: Sequence[float]
    after: Sequence[float]
    without: Sequence[float]
    scale: float
    scaled: Sequence[float]
    overlap: float
    coefficients: Mapping[str, Mapping[int, Tensor]]

    def statistics(self) -> dict[str, Any]:
        """Of the coefficients: by adapter, and by layer, the mean and standard deviation of each adapter's."""
        every = sorted({i for own in self.coefficients.values() for i in own})
        joined = {i: torch.cat([own[i] for own in self.coefficients.values() if i in own]) for i in every}
        return {
            "error_of_the_sum": [_short(x) for x in self.before],
            "error_without": [_short(x) for x in self.without],
            "error_of_the_sum_scaled": [_short(x) for x in self.scaled],
            "scale": self.scale,
            "error": [_short(x) for x in self.after],
            "overlap": _short(self.overlap),
            "coefficients": [
                {**_spread(m), "least": _short(m.min()), "most": _short(m.max())} for m in joined.values()
            ],
            "layers": {name: [_spread(own[i]) for i in sorted(own)] for name, own in self.coefficients.items()},
        }


def _short(x: Any) -> float:
    return float(f"{float(x):.4g}")


def _spread(m: Tensor) -> dict[str, float]:
    return {"mean": _short(m.mean()), "deviation": _short(m.std(correction=0))}


def zipped(family: Family, sources: Sequence[Source], config: ZipConfig, progress: Progress | None = None) -> Zipped:
    """The merged adapter. The base is bare again afterwards.

    Raises:
        ConfigError: fewer than two adapters, no prompts, or an adapter that is no sum (DoRA, OFT, ...).
        TrainingError: the loss is not finite.
        TargetError, ShapeError, FormatError, StateError: see `attach`.
    """
    if len(sources) < 2:
        raise ConfigError(f"there is {len(sources)} adapter to zip; wanted two or more")
    if empty := [source.name for source in sources if not list(source.prompts)]:
        raise ConfigError(f"{first_few(empty)} has no prompts; give some of what it was trained on")
    if empty := [source.name for source in sources if not source.file.parts]:
        raise ConfigError(f"{first_few(empty)} has no layers to zip")
    if live.adapters(family.pipeline):
        raise ConfigError(f"the base has adapters on already ({first_few(live.adapters(family.pipeline))})")
    try:
        return _Zip(family, sources, config, progress or (lambda *_: None)).learn()
    finally:
        if live.adapters(family.pipeline):
            attaching.detach(family.pipeline)


@dataclass(frozen=True)
class _Held:
    """A question that is only measured: of which picture, and what the adapter alone says."""

    place: int
    noisy: Tensor
    times: Tensor
    wanted: Tensor


class _Zip:
    """The adapters on the base, each alone and all with coefficients, and what they are asked."""

    def __init__(self, family: Family, sources: Sequence[Source], config: ZipConfig, progress: Progress) -> None:
        self.family, self.sources, self.config, self.progress = family, sources, config, progress
        for i, source in enumerate(sources):
            attaching.attach(family.pipeline, source.file, name=f"alone {i}", weight=0.0)
        names = [f"alone {i}" for i in range(len(sources))]
        self.coefficients = Coefficients(family, names, [source.weight for source in sources])
        self.text = any(not name.startswith(f"{family.component}.") for name in self.coefficients.layers)
        with torch.no_grad():
            self.latents = [self._pictures(i) for i in range(len(sources))]
            self.alone = [self._conditions(i, alone=True) for i in range(len(sources))]
            self.shared = None if self.text else [self._conditions(i, alone=False) for i in range(len(sources))]
        height, width = self.latents[0].shape[2:]
        self.objective = Objective(family.schedule, family.sampling(height, width))

    def _as(self, i: int | None) -> None:
        """The model with adapter i alone, or with all of them and their coefficients."""
        weights = {f"alone {k}": s.weight if k == i else 0.0 for k, s in enumerate(self.sources)}
        weights |= {f"zip {k}": s.weight if i is None else 0.0 for k, s in enumerate(self.sources)}
        live.set_weights(self.family.pipeline, weights)

    def _pictures(self, i: int) -> Tensor:
        """Latents (n, channels, h, w) of what an adapter draws alone; the last `_HELD_OUT` are only measured."""
        self._as(i)
        count, config = self.config.pictures + _HELD_OUT, self.config
        prompts = [self._prompt(i, k) for k in range(count)]
        seeds = [noise.number(config.seed, "zip", i, k, "picture") for k in range(count)]
        made: list[Tensor] = []
        for k, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            (picture,) = self.family.draw([prompt], [seed], steps=config.sampler_steps, side=config.side)
            values = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1)
            made.append(self.family.encode_image(values.float() / 127.5 - 1))
            self.progress("drawing", i * count + k + 1, len(self.sources) * count, math.nan)
        return torch.stack(made).to(self.family.device)

    def _prompt(self, i: int, k: int) -> str:
        return self.sources[i].prompts[k % len(self.sources[i].prompts)]

    def _conditions(self, i: int, *, alone: bool) -> list[Conditions]:
        """Of each of an adapter's prompts, as the model with it alone has them, or the merged one."""
        self._as(i if alone else None)
        return [self.family.text([prompt]) for prompt in self.sources[i].prompts]

    def _asked(self, i: int, places: Sequence[int], kept: list[list[Conditions]] | None) -> Conditions:
        """Conditions of an adapter's pictures. kept None: of the text encoders as they are now."""
        which = [k % len(self.sources[i].prompts) for k in places]
        if kept is None:
            made = dict(self.family.text([self.sources[i].prompts[k] for k in which]))
        else:
            made = {name: torch.cat([kept[i][k][name] for k in which]) for name in kept[i][0]}
        h, w = (n * self.family.latent_shape[1] for n in self.latents[i].shape[2:])
        return {**made, "sizes": torch.tensor([[h, w, 0, 0, h, w]] * len(places), dtype=torch.float32)}

    @torch.no_grad()
    def _target(self, i: int, places: Sequence[int], noisy: Tensor, times: Tensor) -> Tensor:
        self._as(i)
        made = self.family.predict(noisy, self._asked(i, places, self.alone), times)
        self._as(None)
        return made

    def _error(self, step: int, i: int) -> Tensor:
        """Mean squared distance of the merged prediction to an adapter's own, in a step."""
        config = self.config
        places = [(step * config.batch + k) % config.pictures for k in range(config.batch)]
        latents = self.latents[i][places]
        asked = self.objective.ask(
            latents, noise.number(config.seed, "zip", i), step, range(config.batch), config.batch
        )
        wanted = self._target(i, places, asked.noisy, asked.times)
        guess = self.family.predict(asked.noisy, self._asked(i, places, self.shared), asked.times)
        return F.mse_loss(guess.float(), wanted.float())

    @torch.no_grad()
    def _held_out(self) -> list[list[_Held]]:
        """Of each adapter: pictures and noise that are not learnt from, and its own predictions."""
        made: list[list[_Held]] = []
        schedule = self.objective.schedule
        for i, latents in enumerate(self.latents):
            made.append([])
            for place in range(self.config.pictures, len(latents)):
                for k in range(_TIMES):
                    t = torch.full((1,), (k + 0.5) / _TIMES * schedule.total, device=self.family.device)
                    t = t if schedule.alphas is None else t.long()
                    source = noise.generator(self.config.seed, "zip", i, place, k, "held out")
                    eps = torch.randn(latents[place : place + 1].shape, generator=source).to(latents.device)
                    noisy = schedule.noised(latents[place : place + 1], eps, t)
                    made[i].append(_Held(place, noisy, t, self._target(i, [place], noisy, t)))
        return made

    @torch.no_grad()
    def measured(self, held_out: Sequence[Sequence[_Held]]) -> list[float]:
        """Mean squared distance of the merged prediction to each adapter's own."""
        made: list[float] = []
        for i, own in enumerate(held_out):
            guesses = [self.family.predict(h.noisy, self._asked(i, [h.place], self.shared), h.times) for h in own]
            errors = [float(F.mse_loss(g.float(), h.wanted.float())) for g, h in zip(guesses, own, strict=True)]
            made.append(math.fsum(errors) / len(errors))
        return made

    @torch.no_grad()
    def _scaled(self, held_out: Sequence[Sequence[_Held]]) -> dict[float, list[float]]:
        """Errors of one factor for all coefficients, which are 1 again afterwards."""
        found: dict[float, list[float]] = {}
        for k, scale in enumerate(_SCALES):
            for m in self.coefficients.parameters:
                m.fill_(scale)
            found[scale] = self.measured(held_out)
            self.progress("measuring", k + 1, len(_SCALES), math.nan)
        return found

    def learn(self) -> Zipped:
        config, held_out = self.config, self._held_out()
        found = self._scaled(held_out)
        before, best = found[1.0], min(found, key=lambda scale: (math.fsum(found[scale]), -scale))
        unit = math.fsum(before) or 1.0  # adapters that do not touch each other: nothing is to be learnt
        optimizer = torch.optim.Adam(self.coefficients.parameters, lr=config.rate)
        for step in range(config.steps):
            optimizer.param_groups[0]["lr"] = config.rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
            optimizer.zero_grad()
            total = 0.0
            for i in range(len(self.sources)):  # one after the other: the activations of one at a time
                error = self._error(step, i) / unit
                error.backward()
                total += float(error.detach())
            penalty = config.overlap * self.coefficients.overlap()
            if penalty.requires_grad:
                penalty.backward()
            if not math.isfinite(total):
                raise TrainingError(f"the loss is not finite in step {step}; lower the rate, or use fp32")
            optimizer.step()
            self.progress("learning", step + 1, config.steps, total)
        overlap = float(self.coefficients.overlap().detach())
        after, values = self.measured(held_out), self.coefficients.values()
        made = Zipped(self._file(), before, after, found[0.0], best, found[best], overlap, values)
        asked = {"prompts": [list(source.prompts) for source in self.sources], **asdict(config)}
        said = json.dumps({**asked, **made.statistics()}, ensure_ascii=False)
        return replace(made, file=replace(made.file, metadata={**made.file.metadata, KEY: said}))

    def _file(self) -> AdapterFile:
        files = [source.file for source in self.sources]
        inputs = [Input(s.name, s.file, s.digest, lambda _: 1.0) for s in self.sources]
        form, table = ({getattr(file, key) for file in files} for key in ("format", "architecture"))
        return AdapterFile(
            self.coefficients.parts(),
            inherited(inputs, [source.weight for source in self.sources]),
            form.pop() if len(form) == 1 else None,
            table.pop() if len(table) == 1 else None,
            embeddings=united_words(inputs),
        )
