"""Samplers by the names that people know, as diffusers' schedulers; those of flow matching keep their own."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from imgadapt.errors import ConfigError

if TYPE_CHECKING:
    from imgadapt.training.families import Family

SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "base": ("", {}),
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2M SDE Karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "LCM": ("LCMScheduler", {}),
}
"""Name (A1111's) -> diffusers' class and what is set in it; "base" is the base's own."""


def for_base(family: "Family") -> list[str]:
    """Names of the samplers that a base can be drawn with."""
    return ["base"] if family.schedule.alphas is None else list(SAMPLERS)


def check(name: str, family: "Family") -> None:
    """Raises ConfigError where a base cannot be drawn with a sampler."""
    if name not in (there := for_base(family)):
        raise ConfigError(f"this base cannot be drawn with the sampler {name}; there are: {', '.join(there)}")


def scheduler(name: str, family: "Family", own: Any) -> Any:
    """diffusers' scheduler of that name, with the betas and the prediction of the base. own: the base's, which "base"
    gives.
    """
    kind, changes = SAMPLERS[name]
    return own if not kind else getattr(import_module("diffusers"), kind).from_config(own.config, **changes)
