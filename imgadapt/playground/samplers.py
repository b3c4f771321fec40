"""Samplers by the names that people know, as diffusers' schedulers, made right for each base."""

import inspect
import math
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from imgadapt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from imgadapt.training.families import Family

_ODE: Mapping[str, Any] = {"algorithm_type": "dpmsolver++", "use_karras_sigmas": False}
_SDE: Mapping[str, Any] = {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": False}
_KARRAS: Mapping[str, Any] = {"use_karras_sigmas": True}

SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "base": ("", {}),
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {"use_karras_sigmas": False}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {"use_karras_sigmas": False}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", _ODE),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {**_ODE, **_KARRAS}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", _SDE),
    "DPM++ 2M SDE Karras": ("DPMSolverMultistepScheduler", {**_SDE, **_KARRAS}),
    "UniPC": ("UniPCMultistepScheduler", {"use_karras_sigmas": False}),
    "LCM": ("LCMScheduler", {}),
}
"""Name (A1111's) -> diffusers' class and what is set in it; "base" is the base's own."""

_FLOW: Mapping[str, str] = {
    "base": "",
    "Euler": "FlowMatchEulerDiscreteScheduler",
    "Heun": "FlowMatchHeunDiscreteScheduler",
    "DPM++ 2M": "DPMSolverMultistepScheduler",
    "DPM++ 2M SDE": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
}
"""Of bases that match flows: name -> diffusers' class."""

_FINITE = ("Heun", "DPM++ 2M Karras", "DPM++ 2M SDE Karras")
"""Those that measure their steps by sigmas, and give rubbish, where the first sigma is
without end (zero terminal SNR)."""

_MOST_OF_LCM = 50  # steps that it was distilled from
_ALMOST = 2.0**-24  # below it a base's last alpha is zero, as far as diffusers goes


@dataclass(frozen=True)
class Level:
    """What latents are in a step: signal * picture + noise * noise."""

    signal: float
    noise: float


def for_base(family: "Family") -> list[str]:
    """Names of the samplers that a base can be drawn with."""
    return [name for name in SAMPLERS if not _why_not(name, family)]


def check(name: str, steps: int, family: "Family") -> None:
    """Raises ConfigError where a base cannot be drawn with a sampler."""
    if why := _why_not(name, family):
        there = ", ".join(for_base(family))
        raise ConfigError(f"this base cannot be drawn with the sampler {name}: {why}; there are: {there}")
    if name == "LCM" and steps > _MOST_OF_LCM:
        raise ConfigError(f"LCM takes {_MOST_OF_LCM} steps at most, not {steps}; 4 to 8 are usual")


def _why_not(name: str, family: "Family") -> str:
    if family.schedule.alphas is None:
        return "" if name in _FLOW else "it matches flows"
    whole = float(family.schedule.alphas[-1]) >= _ALMOST
    return "" if whole or name not in _FINITE else "it begins with noise alone, whose sigma has no end"


def scheduler(name: str, family: "Family", own: Any, sides: tuple[int, int], skip: int = 0, *, plain: bool) -> Any:
    """diffusers' scheduler of that name, with the betas and the prediction of the base.

    own: the base's. sides: width and height in pixels. skip: steps that are left out at the begin. plain: whether
        nothing more is wanted of the base's own one than that it draws, which it does as it is then.
    """
    if name == "base" and plain and not skip:
        return own
    flow = family.schedule.alphas is None
    class_name = _FLOW[name] if flow else SAMPLERS[name][0]
    kind = getattr(import_module("diffusers"), class_name) if class_name else type(own)
    changes = _flow_changes(name, family, sides) if flow else SAMPLERS[name][1]
    if name == "base":
        changes = {}
    known = inspect.signature(kind.__init__).parameters
    with _unwarned():
        made = _planned(kind).from_config({key: own.config[key] for key in own.config if key in known}, **changes)
    made.skip = skip
    return made


def _flow_changes(name: str, family: "Family", sides: tuple[int, int]) -> dict[str, Any]:
    """The shift of the base at these sides, in the words of each class."""
    if name == "Euler":
        return {}
    places = family.latent_shape[1]
    shift = float(family.sampling(sides[1] // places, sides[0] // places).shift)
    if not family.pipeline.scheduler.config.get("use_dynamic_shifting"):
        shift = float(family.pipeline.scheduler.config.shift)
    if name == "Heun":
        return {"shift": shift}
    same = {"use_flow_sigmas": True, "flow_shift": shift, "use_dynamic_shifting": False}
    return {**SAMPLERS[name][1], **same, "prediction_type": "flow_prediction"}


@cache
def _planned(kind: Any) -> Any:
    """A scheduler's class, that may leave out steps at the begin, whose latents have the noise of that place then;
    starts at its first step, which diffusers looks for by its time, and misses where two have the same; and takes no
    sigmas or shifts from a pipeline that its class does not know.
    """
    takes = inspect.signature(kind.set_timesteps).parameters

    def set_timesteps(
        self: Any,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        own = self.config
        steps = len(sigmas) if num_inference_steps is None else num_inference_steps
        given: dict[str, Any] = {}
        if "sigmas" in takes and sigmas is not None and not own.get("use_flow_sigmas"):
            given["sigmas"] = sigmas
        if "mu" in takes and own.get("use_dynamic_shifting"):
            given["mu"] = mu
        with _unwarned():
            kind.set_timesteps(self, steps, device=device, **given)
        if own.get("use_flow_sigmas"):  # which diffusers rounds down to whole numbers
            self.timesteps = (self.sigmas[:-1] * own.num_train_timesteps).to(device)
        _cut(self, self.skip * self.order)
        self.set_begin_index(0) if hasattr(self, "set_begin_index") else None

    return type(f"Planned{kind.__name__}", (kind,), {"set_timesteps": set_timesteps, "skip": 0, "plans": kind})


def _cut(scheduler: Any, count: int) -> None:
    """Leave out the first steps of a schedule."""
    if not count:
        return
    twice = scheduler.timesteps.tolist()
    if hasattr(scheduler, "sigmas"):
        scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[count:], scheduler.sigmas[count:]
    elif hasattr(scheduler, "plms_timesteps"):  # PNDM, whose second time comes twice
        left = list(dict.fromkeys(twice))[count:]
        scheduler.timesteps = scheduler.timesteps.new_tensor([*left[:2], *left[1:]])
    else:
        scheduler.timesteps = scheduler.timesteps[count:]
        if type(scheduler).__name__.endswith("LCMScheduler"):  # it knows its last step by their number
            scheduler.num_inference_steps = len(scheduler.timesteps)


def prepare(plan: Any, steps: int, family: "Family", places: tuple[int, int]) -> None:
    """Set a schedule's steps as the base's pipeline will. places: height and width of the latents."""
    given: dict[str, Any] = {}
    if family.packing > 1:  # Flux's pipeline has sigmas of its own
        given = {"sigmas": [1 - k / steps for k in range(steps)], "mu": math.log(family.sampling(*places).shift)}
    elif family.schedule.alphas is None and plan.config.get("use_dynamic_shifting"):
        given = {"mu": math.log(family.sampling(*places).shift)}
    plan.set_timesteps(steps, device=family.device, **given)


def first_sigma(plan: Any) -> float:
    """What the pipeline multiplies its first latents by."""
    return float(getattr(plan, "init_noise_sigma", 1.0))


def level(scheduler: Any, index: int) -> Level:
    """Of the latents before a call of the denoiser; after the last there is no noise. Its steps are set."""
    if index >= len(scheduler.timesteps):
        return Level(1.0, 0.0)
    if not hasattr(scheduler, "sigmas"):
        signal = float(scheduler.alphas_cumprod[int(scheduler.timesteps[index])])
        return Level(signal**0.5, (1 - signal) ** 0.5)
    sigma = float(scheduler.sigmas[index])
    if scheduler.config.get("use_flow_sigmas") or not hasattr(scheduler, "alphas_cumprod"):
        return Level(1 - sigma, sigma)
    kind = getattr(scheduler, "plans", type(scheduler))
    scaled = isinstance(getattr(kind, "init_noise_sigma", None), property)  # their noise grows, their signal stays
    norm = 1.0 if scaled else (1 + sigma**2) ** 0.5
    return Level(1 / norm, sigma / norm)


def clean(predicts: str, latents: "Tensor", output: "Tensor", at: Level) -> "Tensor":
    """The latents without noise that a prediction amounts to. predicts: see Schedule; at: of these latents."""
    if predicts == "flow":
        return latents - at.noise * output
    norm = (at.signal**2 + at.noise**2) ** 0.5
    if predicts == "v_prediction":
        return (at.signal / norm) * (latents / norm) - (at.noise / norm) * output
    return output if predicts == "sample" else (latents - at.noise * output) / max(at.signal, 1e-4)


@contextmanager
def _unwarned() -> Generator[None]:
    """diffusers reads its own tensors by numpy in a way that numpy 2 warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
