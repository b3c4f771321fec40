"""Base families: one step's loss and gradients are those of the diffusers example scripts; text, drawing, refusals."""

import copy
import runpy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
)
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F

from imgadapt import LoRA, attach, parameters
from imgadapt.errors import ConfigError, TrainingError
from imgadapt.layer import AdapterLayer
from imgadapt.training.families import FAMILIES, Family
from imgadapt.training.families.flux import pack, unpack
from imgadapt.training.objective import Objective, Weighting

tiny: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny.py"))))
CPU = torch.device("cpu")
PROMPTS = ["a fox", "a bee, x"]
NAMES = list(tiny.PIPELINES)
SIZES = torch.tensor([[20.0, 30.0, 2.0, 4.0, 12.0, 20.0], [12.0, 20.0, 0.0, 0.0, 12.0, 20.0]])

every_family = pytest.mark.parametrize("name", NAMES)


def family_of(pipeline: Any, dtype: torch.dtype = torch.float32) -> Family:
    return FAMILIES[type(pipeline).__name__](pipeline, CPU, dtype)


def build(name: str, dtype: torch.dtype = torch.float32) -> Family:
    torch.manual_seed(0)
    return family_of(tiny.PIPELINES[name](), dtype)


# --- one step, as diffusers' example scripts compute it ---------------------------------------------------------------
# The scripts of diffusers 58eb52c: text_to_image/train_text_to_image_lora.py (sd1, sd2), dreambooth/
# train_dreambooth_lora_{sdxl,sd3,flux}.py. What they tokenise, encode, noise, ask and subtract is done here with
# diffusers, transformers and peft alone.

Guess = tuple[Tensor, Tensor]
"""What a model predicts, and what it should."""


def ids(tokenizer: Any, length: int) -> Tensor:
    return tokenizer(PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def diffusion(pipe: Any, model: Any, latents: Tensor, eps: Tensor, times: Tensor, **inputs: Any) -> Guess:
    scheduler: Any = DDPMScheduler.from_config(pipe.scheduler.config)
    noisy = scheduler.add_noise(latents, eps, times)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, eps, times) if velocity else eps
    return model(noisy, times, inputs.pop("states"), return_dict=False, **inputs)[0], target


def sd_step(pipe: Any, model: Any, latents: Tensor, eps: Tensor, times: Tensor) -> Guess:
    states = pipe.text_encoder(ids(pipe.tokenizer, 77), return_dict=False)[0]
    return diffusion(pipe, model, latents, eps, times, states=states)


def sdxl_step(pipe: Any, model: Any, latents: Tensor, eps: Tensor, times: Tensor) -> Guess:
    both = [
        encoder(ids(tokenizer, 77), output_hidden_states=True, return_dict=False)
        for encoder, tokenizer in ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2))
    ]
    states = torch.concat([made[-1][-2] for made in both], dim=-1)
    width = pipe.text_encoder_2.config.projection_dim
    rows = [pipe._get_add_time_ids((h, w), (t, x), (a, b), torch.float32, width) for h, w, t, x, a, b in SIZES.tolist()]
    added = {"time_ids": torch.cat(rows), "text_embeds": both[-1][0]}
    return diffusion(pipe, model, latents, eps, times, states=states, added_cond_kwargs=added)


def sigmas(pipe: Any, times: Tensor) -> Tensor:
    """As get_sigmas looks them up, among the scheduler's own."""
    scheduler = pipe.scheduler
    found = [int((scheduler.timesteps == t).nonzero().item()) for t in times]
    return scheduler.sigmas[found].view(-1, 1, 1, 1)


def sd3_step(pipe: Any, model: Any, latents: Tensor, eps: Tensor, times: Tensor) -> Guess:
    both = [
        encoder(ids(tokenizer, 77), output_hidden_states=True)
        for encoder, tokenizer in ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2))
    ]
    clip = torch.cat([made.hidden_states[-2] for made in both], dim=-1)
    t5 = pipe.text_encoder_3(ids(pipe.tokenizer_3, 256))[0]
    clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    sigma = sigmas(pipe, times)
    guess = model(
        hidden_states=(1.0 - sigma) * latents + sigma * eps,
        timestep=times,
        encoder_hidden_states=torch.cat([clip, t5], dim=-2),
        pooled_projections=torch.cat([made[0] for made in both], dim=-1),
        return_dict=False,
    )[0]
    return guess, eps - latents


def flux_step(pipe: Any, model: Any, latents: Tensor, eps: Tensor, times: Tensor) -> Guess:
    states = pipe.text_encoder_2(ids(pipe.tokenizer_2, 512))[0]
    batch, channels, height, width = latents.shape
    sigma = sigmas(pipe, times)
    noisy = (1.0 - sigma) * latents + sigma * eps
    scale = pipe.vae_scale_factor
    made = model(
        hidden_states=FluxPipeline._pack_latents(noisy, batch, channels, height, width),
        timestep=times / 1000,
        guidance=torch.tensor([1.0]).expand(batch),
        pooled_projections=pipe.text_encoder(ids(pipe.tokenizer, 77)).pooler_output,
        encoder_hidden_states=states,
        txt_ids=torch.zeros(states.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, CPU, torch.float32),
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(made, height * scale, width * scale, scale), eps - latents


STEPS: Mapping[str, Callable[[Any, Any, Tensor, Tensor, Tensor], Guess]] = {
    "sd1": sd_step, "sd2": sd_step, "sdxl": sdxl_step, "sd3": sd3_step, "flux": flux_step
}  # fmt: skip


def mean_of_squares(guess: Guess) -> Tensor:
    """(batch,)."""
    return (guess[0].float() - guess[1].float()).square().mean((1, 2, 3))


def plain(pipe: Any, guess: Guess, times: Tensor) -> Tensor:
    return F.mse_loss(guess[0].float(), guess[1].float(), reduction="mean")


def min_snr(pipe: Any, guess: Guess, times: Tensor) -> Tensor:
    """train_text_to_image_lora.py's. (The SDXL script's weight for velocity, min(SNR, gamma) / SNR + 1, is another.)"""
    scheduler: Any = DDPMScheduler.from_config(pipe.scheduler.config)
    snr = compute_snr(scheduler, times)
    weights = torch.stack([snr, 5.0 * torch.ones_like(times)], dim=1).min(dim=1)[0]
    weights = weights / (snr + 1 if scheduler.config.prediction_type == "v_prediction" else snr)
    return (mean_of_squares(guess) * weights).mean()


def with_prior(pipe: Any, guess: Guess, times: Tensor) -> Tensor:
    """Instances and class pictures in one batch, in halves; prior_loss_weight 1."""
    (made, made_prior), (target, target_prior) = (torch.chunk(x, 2, dim=0) for x in guess)
    prior = F.mse_loss(made_prior.float(), target_prior.float(), reduction="mean")
    return F.mse_loss(made.float(), target.float(), reduction="mean") + 1.0 * prior


MASK = torch.zeros(2, 6, 10)
MASK[0, :3], MASK[1, 2:, 4:], MASK[1, 0, 0] = 1, 1, 0.5


def masked(pipe: Any, guess: Guess, times: Tensor) -> Tensor:
    """No script has masks: the mean over the places that count, each sample's own."""
    errors = (guess[0] - guess[1]).square()
    return torch.stack([(e * m).sum() / (m.sum() * len(e)) for e, m in zip(errors, MASK, strict=True)]).mean()


VARIANTS = {"plain": plain, "min-SNR": min_snr, "prior": with_prior, "mask": masked}
CASES = [(name, kind) for name in NAMES for kind in VARIANTS if name in ("sd1", "sd2", "sdxl") or kind != "min-SNR"]


def ours(family: Family, kind: str, latents: Tensor, eps: Tensor, times: Tensor) -> Tensor:
    weighting: Weighting = "min_snr" if kind == "min-SNR" else "none"
    objective = Objective(family.schedule, weighting=weighting)
    conditions = {**family.text(PROMPTS), "sizes": SIZES}
    guess = family.predict(family.schedule.noised(latents, eps, times), conditions, times)
    losses = objective.losses(guess, latents, eps, times, MASK if kind == "mask" else None).weighted
    return losses[:1].mean() + 1.0 * losses[1:].mean() if kind == "prior" else losses.mean()


def adapters_of(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer) and module.slot("default") is not None:
            yield name, module.slot("default")


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_loss_and_gradients_are_the_example_scripts(name: str, kind: str) -> None:
    family = build(name)
    theirs: Any = copy.deepcopy(family.denoiser)
    modules = ["to_q", "to_k", "to_v", "to_out.0", *([] if family.component == "transformer" else ["conv1", "proj_in"])]
    theirs.add_adapter(LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules=modules))
    attach(family.denoiser, LoRA(rank=3, alpha=6), targets=[f"*.{module}" for module in modules])
    pairs = [(theirs.get_submodule(layer), slot) for layer, slot in adapters_of(family.denoiser)]
    assert len(pairs) >= 7
    with torch.no_grad():
        for layer, slot in pairs:
            slot.down.copy_(layer.lora_A["default"].weight.normal_(0, 0.2).view(slot.down.shape))
            slot.up.copy_(layer.lora_B["default"].weight.normal_(0, 0.2).view(slot.up.shape))

    latents, eps = torch.randn(2, 4, 6, 10), torch.randn(2, 4, 6, 10)
    times = torch.tensor([180, 947])
    if family.schedule.alphas is None:
        times = family.pipeline.scheduler.timesteps[times]
    guess = STEPS[name](family.pipeline, theirs, latents, eps, times)
    expected = VARIANTS[kind](family.pipeline, guess, times)
    loss = ours(family, kind, latents, eps, times)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    for layer, slot in pairs:
        for tensor, other in ((slot.down, layer.lora_A), (slot.up, layer.lora_B)):
            gradient = other["default"].weight.grad
            assert gradient.norm() > 0
            assert distance(tensor.grad, gradient.view(tensor.shape)) < 1e-5


# --- text -------------------------------------------------------------------------------------------------------------


def asked(family: Family, draw: Callable[[], Any]) -> dict[str, Any]:
    """What the denoiser is given first while something is drawn."""
    seen: dict[str, Any] = {}

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault("kwargs", kwargs)

    hook = family.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    draw()
    hook.remove()
    return seen["kwargs"]


@every_family
def test_text_is_encoded_as_the_pipeline_does_when_it_draws(name: str) -> None:
    family = build(name)
    pipe: Any = family.pipeline
    given = asked(
        family,
        lambda: pipe(PROMPTS, num_inference_steps=1, guidance_scale=1.0, height=16, width=24, output_type="latent"),
    )
    added: Any = given.get("added_cond_kwargs") or {"text_embeds": given.get("pooled_projections")}
    kept = [family.encode_text(prompt) for prompt in PROMPTS]
    assert torch.allclose(torch.stack([c["states"] for c in kept]), given["encoder_hidden_states"], atol=1e-6)
    assert set(kept[0]) == {"states"} | ({"pooled"} if name in ("sdxl", "sd3", "flux") else set())
    if "pooled" in kept[0]:
        assert torch.allclose(torch.stack([c["pooled"] for c in kept]), added["text_embeds"], atol=1e-6)
    if name == "sdxl":  # the sizes of a picture that was neither scaled nor cropped
        assert added["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]] * 2
    assert distance(kept[0]["states"], kept[1]["states"]) > 0.01
    assert family.encode_text("")["states"].shape == kept[0]["states"].shape


@every_family
def test_blank_conditions_have_the_shapes_of_those_of_captions(name: str) -> None:
    family = build(name)
    blank, given = family.blank(2), {**family.text(PROMPTS), "sizes": SIZES}
    assert {key: value.shape for key, value in blank.items()} == {key: value.shape for key, value in given.items()}


@every_family
def test_gradients_reach_adapters_on_every_text_encoder(name: str) -> None:
    family = build(name)
    t5 = ["text_encoder*.SelfAttention.q"] if name in ("sd3", "flux") else []
    attach(family.pipeline, LoRA(rank=2, alpha=3), targets=["text_encoder*.layers.0.*.q_proj", *t5])
    tensors = parameters(family.pipeline)
    assert len(tensors) == 2 * len(family.encoders)
    with torch.no_grad():
        for tensor in tensors:
            tensor.normal_(0, 0.3)
    before = [tensor.detach().clone() for tensor in tensors]
    sum(value.square().mean() for value in family.text(PROMPTS).values()).backward()  # pyright: ignore[reportAttributeAccessIssue] # not 0
    assert all(tensor.grad is not None and tensor.grad.norm() > 0 for tensor in tensors)
    assert all(map(torch.equal, before, tensors))


def test_sd3_does_without_t5() -> None:
    torch.manual_seed(0)
    family = family_of(tiny.sd3(with_t5=False))
    states = family.text(PROMPTS)["states"]
    assert states.shape == (2, 77 + 256, 24)
    assert states[:, :77].abs().max() > 0.1
    assert not states[:, 77:].any()
    assert set(family.encoders) == {"text_encoder", "text_encoder_2"}
    assert family.draw(["a fox"], [0], steps=1)[0].size == (16, 16)


def test_schnell_has_no_guidance_and_half_the_tokens_when_it_draws_too() -> None:
    torch.manual_seed(0)
    family = family_of(tiny.flux(guided=False))
    assert family.text(PROMPTS)["states"].shape == (2, 256, 24)
    given = asked(family, lambda: family.draw(["a fox"], [0], steps=1, side=16))
    assert given["guidance"] is None
    assert given["encoder_hidden_states"].shape == (1, 256, 24)
    latents, states = torch.randn(1, 4, 6, 10), family.text(["a fox"])
    assert family.predict(latents, states, torch.tensor([500.0])).shape == latents.shape


# --- drawing ----------------------------------------------------------------------------------------------------------


def pixels(picture: Any) -> Tensor:
    return torch.from_numpy(np.asarray(picture).astype(np.float32))


@every_family
def test_a_picture_is_the_pipelines_own_in_any_batch(name: str) -> None:
    family = build(name)
    pair = family.draw(PROMPTS, [1, 2], steps=2, guidance=3.0, side=16)
    alone = family.draw(PROMPTS[1:], [2], steps=2, guidance=3.0, side=16)
    expected = family.pipeline(
        PROMPTS[1],
        num_inference_steps=2,
        guidance_scale=3.0,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(2),
    ).images[0]
    assert (pixels(alone[0]) - pixels(expected)).abs().max() <= 1
    assert (pixels(alone[0]) - pixels(pair[1])).abs().max() <= 1
    assert (pixels(pair[0]) - pixels(pair[1])).abs().max() > 10


@every_family
def test_in_bf16_the_autoencoder_stays_in_fp32_and_the_base_draws(name: str) -> None:
    image = torch.rand(3, 12, 20) * 2 - 1
    exact = build(name)
    family = build(name, torch.bfloat16)
    assert family.vae.dtype == torch.float32
    assert family.denoiser.dtype == torch.bfloat16
    assert {encoder.dtype for encoder in family.encoders.values()} == {torch.bfloat16}
    assert torch.equal(family.encode_image(image), exact.encode_image(image))
    assert family.identity()["vae"] == exact.identity()["vae"]
    assert family.encode_text("a fox")["states"].dtype == torch.bfloat16
    drawn, wanted = (pixels(f.draw(["a fox"], [3], steps=1, side=16)[0]) for f in (family, exact))
    assert (drawn - wanted).abs().mean() < 10  # of 255; another prompt is further off
    assert family.vae.dtype == torch.float32


@every_family
def test_decoding_undoes_the_scaling_of_encoding(name: str) -> None:
    family = build(name)
    image = torch.rand(1, 3, 12, 20) * 2 - 1
    latent = family.encode_image(image[0])
    assert latent.shape == (4, 6, 10)
    config = family.vae.config
    mean = family.vae.encode(image).latent_dist.mean[0]
    assert torch.allclose(latent, (mean - (config.shift_factor or 0)) * config.scaling_factor, atol=1e-6)
    expected = family.vae.decode(mean[None]).sample[0].clamp(-1, 1).permute(1, 2, 0) / 2 + 0.5
    assert (pixels(family.decode(latent)) - expected * 255).abs().max() < 1


def test_a_sample_that_is_not_a_number_is_an_error_not_a_black_picture() -> None:
    family = build("sd1")
    with torch.no_grad():
        next(family.denoiser.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"NaN or infinite: the unet gives such in torch\.float32"):
        family.draw(["a fox"], [0], steps=1)


def test_an_autoencoder_that_gives_nan_is_named() -> None:
    family = build("sdxl")
    with torch.no_grad():
        next(family.vae.parameters()).fill_(float("nan"))
    with pytest.raises(ConfigError, match=r"the autoencoder gives NaN or infinity in torch\.float32"):
        family.encode_image(torch.zeros(3, 8, 8))


def test_packing_is_fluxs_own_and_undone() -> None:
    latents = torch.randn(2, 4, 6, 10)
    packed = pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 4, 6, 10))
    assert torch.equal(unpack(packed, 6, 10), latents)


# --- what a base says of itself ---------------------------------------------------------------------------------------


def test_sizes_and_steps_of_every_family() -> None:
    found = {name: (f.native, f.step, f.latent_shape, f.component) for name in NAMES if (f := build(name))}
    assert found["sd1"] == found["sd2"] == found["sdxl"] == (16, 2, (4, 2), "unet")
    assert found["sd3"] == (16, 4, (4, 2), "transformer")
    assert found["flux"] == (256, 32, (4, 2), "transformer")
    with pytest.raises(ConfigError, match="resolution is 18; it must be a multiple of 4 for this base, say 16"):
        build("flux").check_side(18)


def test_flux_shifts_times_by_resolution_and_schnell_does_not() -> None:
    family = build("flux")
    shifts = {side: family.sampling(side // 8, side // 8).shift for side in (256, 512, 1024)}
    assert shifts[1024] == pytest.approx(3.1582, abs=1e-4)
    assert shifts[512] == pytest.approx(1.8776, abs=1e-4)
    assert shifts[256] == pytest.approx(1.6487, abs=1e-4)
    assert family.sampling(96, 160).shift == pytest.approx(3.0243, abs=1e-4)  # 3840 packed places
    assert family.sampling(1, 1).kind == "logit_normal"
    assert family_of(tiny.flux(guided=False)).sampling(128, 128).shift == 1.0


def test_sd3_shifts_times_by_the_root_of_the_number_of_places() -> None:
    family = build("sd3")  # of 8 x 8 places itself
    assert [family.sampling(*size).shift for size in ((8, 8), (4, 4), (4, 16), (2, 2))] == [3.0, 1.5, 3.0, 1.0]
    assert build("sd1").sampling(8, 8).kind == "uniform"


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_the_schedule_does_not_depend_on_the_sampler(kind: Any) -> None:
    pipe = tiny.sd2()
    expected = family_of(pipe).schedule
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    found = family_of(pipe).schedule
    assert found.prediction == "v_prediction"
    assert found.alphas is not None
    assert expected.alphas is not None
    assert torch.equal(found.alphas, expected.alphas)


@pytest.mark.parametrize("kind", [EDMEulerScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_unet_trained_in_another_way_is_refused(kind: Any) -> None:
    pipe = tiny.sdxl()
    pipe.scheduler = kind()
    with pytest.raises(ConfigError, match=f"sampled by {kind.__name__}, which has no betas"):
        family_of(pipe)


def test_the_refiner_is_refused_with_the_reason() -> None:
    pipe = tiny.sdxl()
    pipe.register_modules(text_encoder=None, tokenizer=None)
    with pytest.raises(ConfigError, match="it is SDXL's refiner"):
        family_of(pipe)


def test_an_inpainting_unet_under_the_plain_pipelines_name_is_refused() -> None:
    pipe = tiny.sd1()
    pipe.register_modules(unet=tiny.unet(in_channels=9))
    with pytest.raises(ConfigError, match="unet takes 9 channels where a noisy latent has 4"):
        family_of(pipe)


def test_identity_tells_weights_configs_and_schedules_apart() -> None:
    first, again, other = build("sd1").identity(), build("sd1").identity(), build("sd2").identity()
    assert first == again
    assert {key for key in first if first[key] != other[key]} == {"schedule"}
    family, usual = build("sdxl"), build("sdxl").identity()
    assert set(usual) == {*("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "schedule")}
    with torch.no_grad():
        next(family.encoders["text_encoder_2"].parameters())[0] += 1
    changed = family.identity()
    assert {key for key in usual if usual[key] != changed[key]} == {"text_encoder_2"}
    with torch.no_grad():
        next(family.denoiser.parameters())[0] += 1
    assert family.identity() == changed  # as it was at the first call
