"""Base families: how each kind of pipeline encodes pictures and text, adds noise and predicts. One file a family."""

from imgadapt.training.families.load import load
from imgadapt.training.families.sd import StableDiffusion

__all__ = ["StableDiffusion", "load"]
