"""The parts of training: settings, pictures, noise, caches, checkpoints, losses, evaluation."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from imgadapt.errors import ConfigError, DataError, TrainingError
from imgadapt.training import checkpoint, noise
from imgadapt.training.cache import Cache
from imgadapt.training.config import TrainConfig, from_arguments, parser
from imgadapt.training.data import fingerprint, pixels, scan
from imgadapt.training.evaluate import bootstrap, held_out_losses
from imgadapt.training.families import StableDiffusion, load
from imgadapt.training.loop import Run

# --- settings


def test_an_unknown_key_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown key 'learning_rat', did you mean 'learning_rate'"):
        TrainConfig.of({"folder": "x", "learning_rat": 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps", 0), ("rank", "many"), ("learning_rate", float("nan")), ("learning_rate", -1), ("caption_dropout", 1.5),
     ("precision", "fp8"), ("steps", 1.5)],
)  # fmt: skip
def test_a_value_out_of_range_or_of_the_wrong_type_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' is"):
        TrainConfig.of({"folder": "x", key: value})


def test_flags_win_over_toml_and_toml_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        'folder = "pictures"\nsteps = 7\nrank = 3\nflip = true\ntargets = ["to_q", "!unet.mid*"]\n'
    )
    arguments = parser("").parse_args(
        ["--config", str(tmp_path / "a.toml"), "--steps", "9", "--no-flip", "--alpha", "0.5"]
    )
    config = from_arguments(arguments)
    assert (config.steps, config.rank, config.flip, config.alpha, config.seed) == (9, 3, False, 0.5, 0)
    assert config.targets == ["to_q", "!unet.mid*"]
    assert config.folder == tmp_path / "pictures"


@pytest.mark.parametrize("text", ["steps = ", "\xff\xfe", "steps = 3\nsteps = 4"])
def test_toml_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"a\.toml: "):
        from_arguments(parser("").parse_args(["x", "--config", str(tmp_path / "a.toml")]))


# --- pictures


def test_a_folder_gives_its_pictures_with_captions_in_order(folder: Path) -> None:
    examples = scan(folder)
    assert [(e.path.name, e.caption) for e in examples][:2] == [("ant.png", "a ant"), ("bee.png", "a bee")]
    before = fingerprint(examples)
    (folder / "bee.txt").write_text("a queen bee")
    assert fingerprint(scan(folder)) != before


def test_bad_folders_are_answered_with_the_way_out(folder: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        scan(folder / "nothing")
    with pytest.raises(DataError, match=r"no pictures in it; did you mean its folder pictures\?"):
        scan(folder.parent)
    (folder / "ant.txt").unlink()
    (folder / "elk.txt").unlink()
    with pytest.raises(
        DataError, match=r"2 of 5 pictures have no caption \(ant.png, elk.png\); write ant.txt .* --caption"
    ):
        scan(folder)
    assert scan(folder, "an animal")[0].caption == "an animal"
    data = (folder / "bee.png").read_bytes()
    (folder / "bee.png").write_bytes(data[: len(data) // 2])
    (folder / "cat.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"2 of 5 pictures cannot be read; mend or remove bee.png \(.*cat.png"):
        scan(folder, "an animal")


def test_exif_rotation_is_applied_alpha_goes_over_white_and_the_crop_is_central(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste((255, 0, 0), (0, 0, 20, 20))  # red at the left; turned by EXIF 6 it is at the top
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    x = pixels(tmp_path / "turned.png", 8)
    assert x.shape == (3, 8, 8)
    assert x[0, 0].mean() > 0.9
    assert x[0, -1].mean() < -0.9
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert torch.equal(pixels(tmp_path / "clear.png", 8), torch.ones(3, 8, 8))
    wide = Image.new("RGB", (30, 10), "white")
    wide.paste((0, 0, 0), (0, 0, 10, 10))
    wide.save(tmp_path / "wide.png")
    assert pixels(tmp_path / "wide.png", 10).min() > 0.5
    assert torch.equal(pixels(tmp_path / "turned.png", 8, flip=True), x.flip(2))


# --- randomness


def test_every_picture_comes_once_an_epoch_in_a_new_order_each() -> None:
    drawn = [i for step in range(10) for i in noise.order(3, 5, step, 4)]
    epochs = [drawn[k : k + 5] for k in range(0, 40, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4
    assert noise.order(3, 5, 7, 4) == drawn[28:32]


def test_noise_is_a_function_of_seed_step_and_place_and_is_normal() -> None:
    shape = torch.Size((4, 3, 16, 16))
    x = noise.gaussian(0, 5, shape)
    assert torch.equal(x, noise.gaussian(0, 5, shape))
    assert torch.equal(x[:2], noise.gaussian(0, 5, torch.Size((2, 3, 16, 16))))
    others = torch.stack([noise.gaussian(1, 5, shape), noise.gaussian(0, 6, shape)])
    both = torch.cat([x[None], others]).flatten(1)
    assert (torch.corrcoef(both) - torch.eye(3)).abs().max() < 0.06
    assert abs(both.mean()) < 0.03
    assert abs(both.std() - 1) < 0.03


def test_timesteps_are_one_in_each_bin() -> None:
    for step in range(20):
        t = noise.timesteps(0, step, 8, 1000)
        assert (t // 125).tolist() == list(range(8))


# --- caches and checkpoints


def test_a_torn_cache_entry_is_made_again_and_a_whole_one_is_not(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path), []

    def make() -> torch.Tensor:
        made.append(1)
        return torch.arange(6.0)

    for _ in range(3):
        assert torch.equal(cache.get(make, "a", "b"), torch.arange(6.0))
    assert len(made) == 1
    entry = next(tmp_path.glob("*.safetensors"))
    entry.write_bytes(entry.read_bytes()[:-3])
    assert torch.equal(cache.get(make, "a", "b"), torch.arange(6.0))
    assert len(made) == 2


def trained(steps: int) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    parameters = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    advance(parameters, optimizer, 0, steps)
    return parameters, optimizer


def advance(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        sum(((p * (step + 1)).sin().sum() for p in parameters), torch.zeros(())).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_checkpoint_brings_parameters_and_optimiser_back_to_the_bit(tmp_path: Path) -> None:
    parameters, optimizer = trained(5)
    checkpoint.save(tmp_path, 5, parameters, optimizer, {"seed": "0"})
    advance(parameters, optimizer, 5, 9)
    fresh, again = trained(0)
    assert checkpoint.resume(tmp_path, fresh, again, {"seed": "0"}) == 5
    advance(fresh, again, 5, 9)
    assert all(torch.equal(a, b) for a, b in zip(parameters, fresh, strict=True))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    parameters, optimizer = trained(5)
    checkpoint.save(tmp_path, 5, parameters, optimizer, {})
    advance(parameters, optimizer, 5, 6)
    newest = checkpoint.save(tmp_path, 6, parameters, optimizer, {})
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes({"cut": data[:-9], "flip": data, "empty": b""}[damage])
    assert checkpoint.resume(tmp_path, *trained(0), {}) == 5


def test_only_the_newest_checkpoints_are_kept_and_other_settings_are_refused(tmp_path: Path) -> None:
    parameters, optimizer = trained(1)
    for step in (1, 2, 10, 11):
        checkpoint.save(tmp_path / "checkpoints", step, parameters, optimizer, {"rank": "4"})
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-0000010.safetensors", "step-0000011.safetensors"]
    with pytest.raises(TrainingError, match=r"other settings \(rank was 4, is 8\); choose another --output"):
        checkpoint.resume(tmp_path / "checkpoints", parameters, optimizer, {"rank": "8"})


def go(folder: Path, losses: torch.Tensor) -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    config = TrainConfig.of({"folder": folder, "output": folder / "out", "steps": 30})
    with Run(config, parameters, torch.optim.AdamW(parameters), {}) as run:
        for step in run.steps():
            run.record(step, losses, torch.tensor([5, 7]), ["a.png", "b.png"])


def test_a_run_that_learns_nothing_or_nan_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no adapter tensor changed in 20 steps"):
        go(tmp_path, torch.ones(2))
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 20
    with pytest.raises(TrainingError, match=r"not finite in step 0 \(b.png at t=7\); the last checkpoint is kept"):
        go(tmp_path, torch.tensor([1.0, float("nan")]))
    assert (tmp_path / "out" / "log.jsonl").read_text() == ""  # no checkpoint yet: the run began anew


def test_the_rate_warms_up_and_falls_as_a_cosine(tmp_path: Path) -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    settings = {"folder": tmp_path, "output": tmp_path, "steps": 100, "warmup_steps": 10, "learning_rate": 2.0}
    run = Run(TrainConfig.of(settings), parameters, torch.optim.AdamW(parameters), {})
    assert [round(run.rate(step), 6) for step in (0, 9, 10, 55)] == [0.2, 2.0, 2.0, 1.0]
    assert 0 < run.rate(99) < 0.01


# --- losses


def fake(prediction: Any) -> StableDiffusion:
    """A family whose UNet answers its input, so that losses can be worked out by hand."""
    from diffusers import DDPMScheduler

    family = object.__new__(StableDiffusion)
    family.schedule = DDPMScheduler(prediction_type=prediction)
    family.device, family.dtype = torch.device("cpu"), torch.float32
    answer: Callable[..., Any] = lambda x, t, states: type("Answer", (), {"sample": x})  # noqa: E731
    family.unet = answer  # pyright: ignore[reportAttributeAccessIssue]
    return family


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_losses_are_the_formulas_of_the_papers(prediction: str, gamma: float | None) -> None:
    family = fake(prediction)
    z, n, t = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5), torch.tensor([3, 500, 990])
    a = family.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    x = a.sqrt() * z + (1 - a).sqrt() * n
    target = n if prediction == "epsilon" else a.sqrt() * n - (1 - a).sqrt() * z
    expected = (x - target).square().mean((1, 2, 3))
    if gamma is not None:  # w_x0 = min(SNR, gamma): epsilon error is SNR times, v error SNR + 1 times the x0 error
        snr = (a / (1 - a)).flatten()
        expected = expected * snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(family.losses(z, torch.zeros(3, 1, 1), n, t, gamma), expected)


def test_held_out_losses_compare_like_with_like() -> None:
    family = fake("v_prediction")
    z, states = torch.randn(5, 2, 4, 4), torch.zeros(5, 1, 1)
    whole = held_out_losses(family, z, states, timesteps=3, batch=32)
    assert whole.shape == (5, 3)
    torch.testing.assert_close(held_out_losses(family, z, states, timesteps=3, batch=2), whole)
    torch.testing.assert_close(held_out_losses(family, z[:2], states[:2], timesteps=3), whole[:2])


def test_the_bootstrap_interval_covers_what_it_should() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for k in range(100):
        gaps = torch.randn(40, 1, generator=generator) + 0.5
        mean, low, high = bootstrap(torch.zeros(40, 1), gaps, draws=1000, seed=k)
        assert low < mean < high
        hits += low <= 0.5 <= high
    assert 88 <= hits <= 100


def test_a_base_that_is_not_there_or_no_base_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"base .*nowhere is not there; wanted 'demo', a diffusers folder"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"has no model_index\.json"):
        load(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Nothing"}))
    with pytest.raises(ConfigError, match="cannot be read as a base"):
        load(str(tmp_path))
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="cannot be read as a base"):
        load(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"])
def test_the_forward_process_does_not_depend_on_the_pipelines_sampler(name: str, pipe: Any) -> None:
    import diffusers

    z, n, t = torch.randn(3, 16, 8, 8), torch.randn(3, 16, 8, 8), torch.tensor([3, 500, 990])
    sampler, usual = pipe.scheduler, StableDiffusion(pipe, torch.device("cpu"), torch.float32)
    expected = usual.losses(z, torch.zeros(3, 20, 128), n, t)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # diffusers' own, about numpy
            pipe.scheduler = getattr(diffusers, name).from_config(sampler.config)
            pipe.scheduler.set_timesteps(5)
        other = StableDiffusion(pipe, torch.device("cpu"), torch.float32)
        torch.testing.assert_close(other.losses(z, torch.zeros(3, 20, 128), n, t), expected, rtol=1e-4, atol=1e-4)
    finally:
        pipe.scheduler = sampler


def test_a_base_with_another_prediction_type_has_another_identity(pipe: Any) -> None:
    family = StableDiffusion(pipe, torch.device("cpu"), torch.float32)
    before = family.identity()
    assert before == family.identity()
    family.schedule.register_to_config(prediction_type="epsilon")
    after = family.identity()
    assert [key for key in before if before[key] != after[key]] == ["scheduler"]


def test_sixteen_bit_grey_keeps_its_greys_and_an_empty_caption_is_none(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "grey.png")
    assert pixels(tmp_path / "grey.png", 8).abs().max() < 0.01
    (tmp_path / "grey.txt").write_text(" \n")
    with pytest.raises(DataError, match="1 of 1 pictures have no caption"):
        scan(tmp_path)


def test_toml_of_the_wrong_type_and_shortened_flags_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("steps = true\n")
    with pytest.raises(ConfigError, match="'steps' is True, wanted a number"):
        from_arguments(parser("").parse_args(["x", "--config", str(tmp_path / "a.toml")]))
    with pytest.raises(SystemExit):
        parser("").parse_args(["x", "--step", "7"])


def test_pruning_never_takes_the_checkpoint_just_written(tmp_path: Path) -> None:
    parameters, optimizer = trained(1)
    for step in (100, 200, 300):
        checkpoint.save(tmp_path, step, parameters, optimizer, {})
    for step in (200, 300):
        path = tmp_path / f"step-{step:07d}.safetensors"
        path.write_bytes(path.read_bytes()[:-4])
    checkpoint.save(tmp_path, 150, parameters, optimizer, {})
    assert checkpoint.resume(tmp_path, parameters, optimizer, {}) == 150
