"""What the model is asked: how pictures are noised, what it predicts, and which errors count how much.

All weights are stated once, in x0-space: `w` of |x0' - x0|^2. With x_t = a x0 + s noise and SNR = a^2 / s^2, the
squared error of what a model predicts is that of x0 times SNR (noise), SNR + 1 = 1 / s^2 (velocity, with a^2 + s^2 = 1)
or 1 / s^2 (flow matching), so that one division turns a weight into the prediction's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from imgadapt.errors import ConfigError
from imgadapt.training import noise
from imgadapt.training.config import TrainConfig

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
Weighting = Literal["none", "min_snr", "debiased"]
Huber = Literal["constant", "exponential", "snr"]
_DEBIASED_MOST = 1000.0  # SNR above it counts, for the weight of noise, as that (sd-scripts: 1 / sqrt(min(SNR, 1000)))


@dataclass(frozen=True)
class Schedule:
    """A base's forward process, x_t = a x0 + s noise, and what it predicts.

    alphas: (total,) cumulative products of a diffusion's noise schedule (a^2; arXiv 2006.11239); None for flow
        matching, where a = 1 - t / total and s = t / total (arXiv 2403.03206). Times are whole for the first, real for
        the second.
    """

    prediction: Prediction
    alphas: Tensor | None = None
    total: int = 1000

    def amounts(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """a and s of (batch,) times, fp32."""
        if self.alphas is None:
            sigma = times.float() / self.total
            return 1 - sigma, sigma
        kept = self.alphas.to(times.device)[times.long()].float()
        return kept.sqrt(), (1 - kept).sqrt()

    def snr(self, times: Tensor) -> Tensor:
        """Signal to noise (batch,), a^2 / s^2."""
        a, s = self.amounts(times)
        return a.square() / s.square()

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t of (batch, channels, h, w)."""
        a, s = (_wide(x, latents) for x in self.amounts(times))
        return a * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the model should say of x_t: noise, a noise - s x0 (arXiv 2202.00512), x0, or noise - x0."""
        if self.prediction == "flow":
            return noise - latents
        if self.prediction == "v_prediction":
            a, s = (_wide(x, latents) for x in self.amounts(times))
            return a * noise - s * latents
        return noise if self.prediction == "epsilon" else latents

    def share(self, times: Tensor) -> Tensor:
        """(batch,) what the squared error of x0 is multiplied by to be that of the prediction."""
        if self.prediction == "epsilon":
            return self.snr(times)
        if self.prediction == "sample":
            return torch.ones_like(times, dtype=torch.float32)
        return 1 / self.amounts(times)[1].square()

    def with_zero_terminal_snr(self) -> "Schedule":
        """The same, shifted and scaled so that nothing of the picture is left at the last time (arXiv 2305.08891).

        Raises:
            ConfigError: the base does not predict velocity, and noise says nothing of the picture there.
        """
        if self.alphas is None or self.prediction != "v_prediction":
            raise ConfigError(
                f"zero terminal SNR is for bases that predict velocity; this one predicts {self.prediction}"
            )
        a = self.alphas.double().sqrt()
        a = (a - a[-1]) * a[0] / (a[0] - a[-1])
        return Schedule(self.prediction, a.square().float(), self.total)


@dataclass(frozen=True)
class Sampling:
    """Which times are trained, as a mapping of uniform numbers: noise levels in (0, 1).

    kind: "uniform"; "logit_normal": sigmoid(mean + spread n); "mode": 1 - u - spread (cos^2(pi u / 2) - 1 + u)
        (both arXiv 2403.03206); then shift: s u / (1 + (s - 1) u). low, high: the part of (0, 1) that is trained.
    """

    kind: Literal["uniform", "logit_normal", "mode"] = "uniform"
    mean: float = 0.0
    spread: float = 1.0
    shift: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def levels(self, u: Tensor) -> Tensor:
        """(batch,) noise levels of uniform numbers in [0, 1); monotone, so that stratified numbers stay so."""
        u = u.double().clamp(1e-6, 1 - 1e-6)
        if self.kind == "logit_normal":
            u = torch.sigmoid(self.mean + self.spread * math.sqrt(2) * torch.erfinv(2 * u - 1))
        elif self.kind == "mode":
            u = 1 - u - self.spread * (torch.cos(math.pi * u / 2).square() - 1 + u)
        u = self.shift * u / (1 + (self.shift - 1) * u)
        return (self.low + (self.high - self.low) * u).float()


@dataclass(frozen=True)
class Question:
    """What is put to the model: times (n,), the noise of the target, and the noised latents (n, channels, h, w)."""

    times: Tensor
    noise: Tensor
    noisy: Tensor


@dataclass(frozen=True)
class Losses:
    """raw: mean squared error of each sample's prediction, (batch,), over its mask; weighted: what is trained."""

    raw: Tensor
    weighted: Tensor


@dataclass(frozen=True)
class Objective:
    """The loss of a training.

    weighting: "none": errors of the prediction count alike; "min_snr": x0 errors count min(SNR, gamma) (arXiv
        2303.09556); "debiased": sqrt(SNR) (arXiv 2310.08442).
    huber: pseudo-Huber 2c (sqrt(d^2 + c^2) - c) in the place of squares, c scheduled as in sd-scripts: c0, c0^(t/T), or
        (1 - c0) / (1 + s/a)^2 + c0; None: squares.
    offset, pyramid: see `noise.shaped`. perturbation: the input, not the target, has this much more noise (arXiv
        2301.11706).
    shift: of the sampling for latents of (height, width), where it is the base's own; None: the same for all sizes.
    """

    schedule: Schedule
    sampling: Sampling = field(default_factory=Sampling)
    weighting: Weighting = "none"
    gamma: float = 5.0
    huber: Huber | None = None
    huber_c: float = 0.1
    offset: float = 0.0
    pyramid: float = 0.0
    perturbation: float = 0.0
    shift: Callable[[int, int], float] | None = None

    def times(self, seed: int, step: int, batch: int, size: tuple[int, int] | None = None) -> Tensor:
        """(batch,) times of a step, one in each of `batch` equal parts of the distribution (less variance).

        Whole and below `total` for diffusion, real for flow matching. size: (height, width) of the latents.
        """
        u = noise.stratified(seed, step, batch)
        sampling = self.sampling
        if size is not None and self.shift is not None:
            sampling = replace(sampling, shift=self.shift(*size))
        levels = sampling.levels(u) * self.schedule.total
        return levels if self.schedule.alphas is None else levels.long().clamp(0, self.schedule.total - 1)

    def noises(self, seed: int, step: int, shape: torch.Size, first: int = 0) -> tuple[Tensor, Tensor]:
        """(noise of the target, noise of the input) of the samples `first`, `first + 1`, ... of a step."""
        eps = noise.shaped(seed, step, shape, first, offset=self.offset, pyramid=self.pyramid)
        if not self.perturbation:
            return eps, eps
        return eps, eps + self.perturbation * noise.gaussian(seed, step, shape, first, purpose="perturbation")

    def ask(self, latents: Tensor, seed: int, step: int, places: range, batch: int) -> Question:
        """What some places of a step are asked: a function of seed, step and place. batch: of the whole step."""
        size = latents.shape[2], latents.shape[3]
        times = self.times(seed, step, batch, size)[places.start : places.stop].to(latents.device)
        target, added = self.noises(seed, step, latents.shape, places.start)
        noisy = self.schedule.noised(latents, added.to(latents.device), times)
        return Question(times, target.to(latents.device), noisy)

    def losses(self, guess: Tensor, latents: Tensor, eps: Tensor, times: Tensor, mask: Tensor | None = None) -> Losses:
        """Losses of a prediction (batch, channels, h, w).

        mask: (batch, h, w) weights of the places, whose mean each sample's loss is over, so that a small mask learns
            as fast.
        """
        target = self.schedule.target(latents, eps, times)
        squares = F.mse_loss(guess.float(), target.float(), reduction="none")
        raw = _mean(squares, mask)
        trained = raw
        if self.huber is not None:
            c = _wide(self._c(times), squares)
            trained = _mean(2 * c * ((squares + c.square()).sqrt() - c), mask)
        return Losses(raw.detach(), trained * self.weights(times).to(trained.device))

    def weights(self, times: Tensor) -> Tensor:
        """(batch,) what the errors of the prediction are multiplied by."""
        if self.weighting == "none":
            return torch.ones_like(times, dtype=torch.float32)
        floor = 1e-8  # where there is no signal: the limit, 1 for noise and 0 for velocity
        snr = self.schedule.snr(times).clamp(min=floor)
        share = self.schedule.share(times).clamp(min=floor)
        wanted = (
            snr.clamp(max=self.gamma) if self.weighting == "min_snr" else snr / snr.clamp(max=_DEBIASED_MOST).sqrt()
        )
        return wanted / share

    def _c(self, times: Tensor) -> Tensor:
        if self.huber == "exponential":
            return self.huber_c ** (times.float() / self.schedule.total)
        if self.huber == "snr":
            a, s = self.schedule.amounts(times)
            return (1 - self.huber_c) / (1 + s / a.clamp(min=1e-8)).square() + self.huber_c
        return torch.full_like(times, self.huber_c, dtype=torch.float32)


def _mean(errors: Tensor, mask: Tensor | None) -> Tensor:
    """(batch,) means of (batch, channels, h, w), weighted by (batch, h, w)."""
    if mask is None:
        return errors.mean((1, 2, 3))
    return (errors.mean(1) * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1e-6)


def _wide(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.device).view(-1, *[1] * (like.ndim - 1))


def of(
    config: TrainConfig, schedule: Schedule, usual: Sampling, shift: Callable[[int, int], float] | None = None
) -> Objective:
    """The objective that settings ask for.

    usual: how the base's family samples times where the settings say nothing; shift: its shift, by size.

    Raises:
        ConfigError: settings that exclude one another, or that this base has no use for.
    """
    if config.min_snr_gamma is not None and config.debiased:
        raise ConfigError("min_snr_gamma and debiased are two weightings; choose one")
    if config.prediction is not None:
        if schedule.alphas is None:
            raise ConfigError(f"prediction is {config.prediction}, and this base is trained by flow matching")
        schedule = replace(schedule, prediction=config.prediction)
    if config.zero_terminal_snr:
        schedule = schedule.with_zero_terminal_snr()
    if schedule.prediction == "flow" and (config.noise_offset or config.pyramid_noise):
        raise ConfigError("noise_offset and pyramid_noise are for diffusion; flow matching sees pure noise in training")
    if schedule.alphas is not None and schedule.prediction == "epsilon" and float(schedule.alphas[-1]) < 1e-9:
        raise ConfigError("this base has zero terminal SNR and predicts noise; give --prediction v_prediction")
    scales = {"logit_normal": (config.logit_mean, config.logit_spread), "mode": (0.0, config.mode_scale)}
    kind = config.timesteps or usual.kind
    mean, spread = (usual.mean, usual.spread) if config.timesteps is None else scales.get(kind, (0.0, 1.0))
    low, high = config.timestep_range
    sampling = Sampling(kind, mean, spread, usual.shift if config.shift is None else config.shift, low, high)
    return Objective(
        schedule, sampling, "debiased" if config.debiased else "none" if config.min_snr_gamma is None else "min_snr",
        config.min_snr_gamma or 5.0, config.huber, config.huber_c, config.noise_offset, config.pyramid_noise,
        config.input_perturbation, shift if config.shift is None else None,
    )  # fmt: skip
