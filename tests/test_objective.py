"""The objective in numbers: weights in x0-space, schedules, which times are trained, noise, masks."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr
from torch import Tensor

from imgadapt.errors import ConfigError
from imgadapt.training import noise
from imgadapt.training.objective import Huber, Objective, Sampling, Schedule, Weighting


def usual() -> Any:
    """Stable Diffusion's betas."""
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


ALPHAS: Tensor = usual().alphas_cumprod
SCHEDULES = {
    "epsilon": Schedule("epsilon", ALPHAS),
    "v": Schedule("v_prediction", ALPHAS),
    "sample": Schedule("sample", ALPHAS),
    "flow": Schedule("flow"),
}
TIMES = {name: torch.tensor([0, 3, 150, 480, 999]) for name in ("epsilon", "v", "sample")}
TIMES["flow"] = torch.tensor([3.0, 120.5, 480.0, 731.25, 999.0])

every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def x0_of(schedule: Schedule, noisy: Tensor, guess: Tensor, times: Tensor) -> Tensor:
    """The picture that a prediction stands for, in double precision."""
    a, s = (x.double().view(-1, 1, 1, 1) for x in schedule.amounts(times))
    if schedule.prediction == "epsilon":
        return (noisy - s * guess) / a
    if schedule.prediction == "v_prediction":
        return a * noisy - s * guess
    return guess if schedule.prediction == "sample" else noisy - s * guess


# --- weights ----------------------------------------------------------------------------------------------------------


@every_schedule
def test_an_error_of_the_prediction_is_the_share_of_that_of_x0(name: str) -> None:
    """SNR, SNR + 1, 1 and 1 / sigma^2 times."""
    schedule, times = SCHEDULES[name], TIMES[name]
    latents, eps, wrong = (torch.randn(5, 4, 6, 10).double() for _ in range(3))
    noisy, target = schedule.noised(latents, eps, times), schedule.target(latents, eps, times)
    assert torch.allclose(x0_of(schedule, noisy, target, times), latents, rtol=1e-4, atol=1e-4)
    error = (x0_of(schedule, noisy, target + wrong, times) - x0_of(schedule, noisy, target, times)).square()
    ratio = wrong.square().mean((1, 2, 3)) / error.mean((1, 2, 3))
    snr = schedule.snr(times).double()
    stated = {"epsilon": snr, "v": snr + 1, "sample": snr / snr, "flow": (1000 / TIMES["flow"].double()) ** 2}[name]
    assert torch.allclose(schedule.share(times).double(), stated, rtol=1e-3)  # 1 - alpha of the first times, in fp32
    assert torch.allclose(ratio, stated, rtol=1e-3)


@every_schedule
@pytest.mark.parametrize("weighting", ["min_snr", "debiased"])
def test_what_is_trained_is_the_weighted_error_of_x0(name: str, weighting: Weighting) -> None:
    schedule, times = SCHEDULES[name], TIMES[name]
    latents, eps, wrong = (torch.randn(5, 4, 6, 10) for _ in range(3))
    noisy, target = schedule.noised(latents, eps, times), schedule.target(latents, eps, times)
    found = Objective(schedule, weighting=weighting).losses(target + wrong, latents, eps, times).weighted.double()
    made, right = (x0_of(schedule, noisy.double(), g.double(), times) for g in (target + wrong, target))
    snr = schedule.snr(times).double()
    weight = snr.clamp(max=5) if weighting == "min_snr" else snr / snr.clamp(max=1000).sqrt()
    assert torch.allclose(found, weight * (made - right).square().mean((1, 2, 3)), rtol=2e-3)


def test_weights_in_the_predictions_own_terms() -> None:
    snr = compute_snr(usual(), TIMES["v"])
    assert snr[0] > 1000 > snr[1]
    weights = {
        (name, kind): Objective(SCHEDULES[name], weighting=kind).weights(TIMES[name])
        for name in ("epsilon", "v")
        for kind in ("none", "min_snr", "debiased")
    }
    assert torch.equal(weights["epsilon", "none"], torch.ones(5))
    assert torch.equal(weights["v", "none"], torch.ones(5))
    least = snr.clamp(max=5)
    assert torch.allclose(weights["epsilon", "min_snr"], least / snr, rtol=1e-5)
    assert torch.allclose(weights["v", "min_snr"], least / (snr + 1), rtol=1e-4)
    assert torch.allclose(weights["epsilon", "debiased"], 1 / snr.clamp(max=1000).sqrt(), rtol=1e-5)
    assert torch.allclose(weights["v", "debiased"][1:], snr[1:].sqrt() / (snr[1:] + 1), rtol=1e-4)
    assert weights["v", "debiased"][0].item() == pytest.approx(
        1000**-0.5 * snr[0].item() / (snr[0].item() + 1), rel=1e-4
    )


def test_raw_is_the_plain_error_whatever_is_trained() -> None:
    latents, eps, guess = (torch.randn(5, 4, 6, 10) for _ in range(3))
    for kind in ("none", "min_snr", "debiased"):
        made = Objective(SCHEDULES["epsilon"], weighting=kind, huber="snr")
        raw = made.losses(guess.requires_grad_(), latents, eps, TIMES["epsilon"]).raw
        assert torch.allclose(raw, (guess - eps).square().mean((1, 2, 3)))
        assert not raw.requires_grad


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["epsilon", "v"])
def test_noising_and_velocity_are_diffusers(name: str) -> None:
    latents, eps = torch.randn(5, 4, 6, 10), torch.randn(5, 4, 6, 10)
    schedule, times = SCHEDULES[name], TIMES[name]
    theirs: Any = usual()
    assert torch.allclose(schedule.noised(latents, eps, times), theirs.add_noise(latents, eps, times), atol=1e-6)
    velocity = theirs.get_velocity(latents, eps, times)
    assert torch.allclose(SCHEDULES["v"].target(latents, eps, times), velocity, atol=1e-6)


def test_zero_terminal_snr_leaves_nothing_of_the_picture_at_the_end_and_the_start_as_it_was() -> None:
    made = SCHEDULES["v"].with_zero_terminal_snr()
    assert made.alphas is not None
    assert made.alphas[-1] == 0
    assert made.alphas[0].item() == pytest.approx(ALPHAS[0].item(), rel=1e-6)
    assert (made.alphas.diff() < 0).all()
    betas = rescale_zero_terminal_snr(usual().betas)
    assert torch.allclose(made.alphas, torch.cumprod(1 - betas, 0), rtol=1e-3, atol=1e-5)
    again = made.with_zero_terminal_snr()
    assert again.alphas is not None
    assert torch.allclose(again.alphas, made.alphas, atol=1e-7)
    latents, eps, last = torch.randn(1, 4, 6, 10), torch.randn(1, 4, 6, 10), torch.tensor([999])
    assert torch.equal(made.noised(latents, eps, last), eps)
    assert torch.equal(made.target(latents, eps, last), -latents)


@pytest.mark.parametrize("weighting", ["min_snr", "debiased"])
def test_where_nothing_of_the_picture_is_left_weights_are_the_limits(weighting: Weighting) -> None:
    last = torch.tensor([999])
    made = Objective(SCHEDULES["v"].with_zero_terminal_snr(), weighting=weighting, huber="snr")
    assert 0 <= made.weights(last).item() < 1e-3
    latents, eps, guess = (torch.randn(1, 4, 6, 10) for _ in range(3))
    assert made.losses(guess, latents, eps, last).weighted.isfinite().all()
    assert Objective(SCHEDULES["v"]).weights(last).item() == 1


@pytest.mark.parametrize("name", ["epsilon", "sample", "flow"])
def test_zero_terminal_snr_is_refused_where_velocity_is_not_predicted(name: str) -> None:
    with pytest.raises(ConfigError, match="zero terminal SNR is for bases that predict velocity; this one predicts"):
        SCHEDULES[name].with_zero_terminal_snr()


# --- Huber ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("huber", "time", "expected"),
    [
        ("constant", 500.0, 0.0432456),  # c = 0.1: 0.2 (sqrt(0.09 + 0.01) - 0.1)
        ("exponential", 500.0, 0.0756810),  # c = 0.1^0.5 = 0.3162278
        ("exponential", 0.0, 0.0880613),  # c = 1
        ("snr", 500.0, 0.0762418),  # s / a = 1: c = 0.9 / 4 + 0.1 = 0.325
        ("snr", 750.0, 0.0568755),  # s / a = 3: c = 0.9 / 16 + 0.1 = 0.15625
    ],
)
def test_pseudo_huber_of_an_error_of_three_tenths(huber: Huber, time: float, expected: float) -> None:
    latents, times = torch.randn(2, 4, 6, 10), torch.tensor([time, time])
    eps = torch.randn(2, 4, 6, 10)
    made = Objective(Schedule("flow"), huber=huber, huber_c=0.1).losses(eps - latents + 0.3, latents, eps, times)
    assert made.weighted.tolist() == pytest.approx([expected] * 2, abs=1e-6)
    assert made.raw.tolist() == pytest.approx([0.09] * 2, abs=1e-6)


def test_huber_grows_linearly_where_squares_explode() -> None:
    latents, eps, times = torch.zeros(1, 4, 6, 10), torch.zeros(1, 4, 6, 10), torch.tensor([500.0])
    huber = Objective(Schedule("flow"), huber="constant", huber_c=0.1)
    far = [huber.losses(torch.full_like(eps, d), latents, eps, times).weighted.item() for d in (10.0, 20.0)]
    assert far[1] / far[0] == pytest.approx(2, rel=0.01)


# --- which times ------------------------------------------------------------------------------------------------------

U = (torch.arange(200_000) + 0.5) / 200_000


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (-0.5, 0.7)])
def test_logit_normal_levels_have_its_mean_and_deviation(mean: float, spread: float) -> None:
    levels = Sampling("logit_normal", mean=mean, spread=spread).levels(U)
    logits = torch.logit(levels.double())
    assert logits.mean().item() == pytest.approx(mean, abs=1e-3)
    assert logits.std().item() == pytest.approx(spread, rel=1e-3)
    assert levels.median().item() == pytest.approx(1 / (1 + math.exp(-mean)), abs=1e-4)


def test_mode_and_shift_at_points_worked_out() -> None:
    quarter, half = torch.tensor([0.25]), torch.tensor([0.5])
    assert Sampling("mode", spread=1.29).levels(quarter).item() == pytest.approx(0.616416, abs=1e-5)
    assert Sampling(shift=3.0).levels(half).item() == pytest.approx(0.75)
    assert Sampling(shift=3.1582).levels(quarter).item() == pytest.approx(0.512843, abs=1e-5)
    assert Sampling("logit_normal", shift=3.0).levels(half).item() == pytest.approx(0.75)
    assert Sampling(low=0.2, high=0.6).levels(half).item() == pytest.approx(0.4)


@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "mode"])
def test_levels_are_monotone_and_inside(kind: Any) -> None:
    levels = Sampling(kind, spread=1.0, shift=2.0, low=0.1, high=0.9).levels(torch.cat([torch.zeros(1), U]))
    steps = levels.diff()
    assert (steps >= 0).all() or (steps <= 0).all()
    assert levels.min() >= 0.1
    assert levels.max() <= 0.9


def test_times_are_whole_and_spread_for_diffusion_and_real_for_flow() -> None:
    diffusion, flow = Objective(SCHEDULES["epsilon"]), Objective(Schedule("flow"))
    for step in range(50):
        times = diffusion.times(7, step, 8)
        assert times.dtype == torch.int64
        assert sorted((times // 125).tolist()) == list(range(8))  # one in each eighth
        real = flow.times(7, step, 8)
        assert sorted((real // 125).long().tolist()) == list(range(8))
        assert (real != real.round()).any()
    edge = Objective(SCHEDULES["epsilon"], Sampling(low=0.999999, high=1.0)).times(0, 0, 4)
    assert edge.max() == 999
    assert torch.equal(diffusion.times(7, 3, 8), diffusion.times(7, 3, 8))
    assert not torch.equal(diffusion.times(7, 3, 8), diffusion.times(8, 3, 8))


# --- noise ------------------------------------------------------------------------------------------------------------

SHAPE = torch.Size((400, 4, 6, 10))


def test_offset_adds_its_variance_to_the_mean_of_each_channel() -> None:
    eps, given = Objective(SCHEDULES["epsilon"], offset=0.3).noises(1, 2, SHAPE)
    assert eps is given  # the target includes it
    assert eps.mean((2, 3)).var().item() == pytest.approx(0.3**2 + 1 / 60, rel=0.1)
    assert (eps - eps.mean((2, 3), keepdim=True)).var().item() == pytest.approx(59 / 60, rel=0.02)


def test_pyramid_noise_has_variance_one_and_more_of_it_in_the_large() -> None:
    shape = torch.Size((100, 4, 24, 40))
    plain, _ = Objective(SCHEDULES["epsilon"]).noises(1, 2, shape)
    eps, _ = Objective(SCHEDULES["epsilon"], pyramid=0.6).noises(1, 2, shape)
    assert torch.allclose(eps.std((1, 2, 3)), torch.ones(100), atol=1e-5)
    large = torch.nn.functional.avg_pool2d(eps, 8).var().item()
    assert large > 5 * torch.nn.functional.avg_pool2d(plain, 8).var().item()


def test_perturbation_leaves_the_target() -> None:
    plain, _ = Objective(SCHEDULES["epsilon"]).noises(1, 2, SHAPE)
    eps, given = Objective(SCHEDULES["epsilon"], perturbation=0.5).noises(1, 2, SHAPE)
    assert torch.equal(eps, plain)
    assert (given - eps).std().item() == pytest.approx(0.5, rel=0.02)
    assert given.var().item() == pytest.approx(1.25, rel=0.02)


@pytest.mark.parametrize("options", [{}, {"offset": 0.1}, {"pyramid": 0.3}, {"perturbation": 0.1}], ids=str)
def test_noise_is_the_same_in_pieces_and_another_in_every_step(options: Any) -> None:
    made = Objective(SCHEDULES["epsilon"], **options)
    whole = made.noises(5, 9, torch.Size((4, 4, 6, 10)))
    for first in (0, 2):
        for piece, all_of_it in zip(made.noises(5, 9, torch.Size((2, 4, 6, 10)), first), whole, strict=True):
            assert torch.equal(piece, all_of_it[first : first + 2])
    assert not torch.equal(made.noises(5, 10, torch.Size((4, 4, 6, 10)))[1], whole[1])
    assert noise.number(5, 9, "noise") != noise.number(6, 9, "noise")


# --- masks ------------------------------------------------------------------------------------------------------------


def test_a_loss_is_the_mean_over_the_mask_however_small() -> None:
    latents, eps, guess = (torch.randn(3, 4, 6, 10) for _ in range(3))
    mask = torch.ones(3, 6, 10)
    mask[1, :, 2:] = 0
    mask[2] *= 0.25
    found = Objective(SCHEDULES["epsilon"]).losses(guess, latents, eps, TIMES["epsilon"][:3], mask).raw
    squares = (guess - eps).square()
    expected = [squares[0].mean(), squares[1, :, :, :2].mean(), squares[2].mean()]
    assert torch.allclose(found, torch.stack(expected))


def test_an_empty_mask_gives_zero_and_no_nan() -> None:
    latents, eps, guess = (torch.randn(1, 4, 6, 10) for _ in range(3))
    made = Objective(SCHEDULES["epsilon"], weighting="min_snr").losses(
        guess, latents, eps, torch.tensor([5]), torch.zeros(1, 6, 10)
    )
    assert made.weighted.item() == 0
