"""The adapter methods, one file each."""

from imgadapt.methods.base import Method
from imgadapt.methods.lora import LoRA

METHODS: tuple[type[Method], ...] = (LoRA,)

__all__ = ["METHODS", "LoRA", "Method"]
