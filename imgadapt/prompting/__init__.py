"""Learned tokens for attention to read: prompt tuning, P-tuning, prefix tuning, gated prompts."""

from imgadapt.prompting.gated import GatedPrompts
from imgadapt.prompting.kind import Place, Prompting, Prompts
from imgadapt.prompting.prefix import PrefixTuning
from imgadapt.prompting.tokens import PromptTuning
from imgadapt.prompting.tuned import PTuning

KINDS: tuple[type[Prompting], ...] = (PromptTuning, PTuning, PrefixTuning, GatedPrompts)
"""All kinds; a file's is the one whose `name` its metadata says."""

__all__ = ["KINDS", "GatedPrompts", "PTuning", "Place", "PrefixTuning", "PromptTuning", "Prompting", "Prompts"]
