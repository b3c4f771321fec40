"""Base families: how each kind of pipeline encodes pictures and text, adds noise and predicts. One file a family."""

from imgadapt.training.families.family import DTYPES, Conditions, Family
from imgadapt.training.families.flux import Flux
from imgadapt.training.families.load import FAMILIES, load
from imgadapt.training.families.sd import StableDiffusion
from imgadapt.training.families.sd3 import StableDiffusion3
from imgadapt.training.families.sdxl import StableDiffusionXL

__all__ = [
    "DTYPES",
    "FAMILIES",
    "Conditions",
    "Family",
    "Flux",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "load",
]
