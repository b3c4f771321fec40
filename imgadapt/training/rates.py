"""Learning rates in LoRA's: what a method, a start or a rule wants, as benchmarks/methods.py found it."""

from collections.abc import Mapping
from typing import Any

from imgadapt.training import spelling

STARTS: Mapping[str, float] = {"pissa": 0.18, "olora": 0.25, "eva": 0.71, "corda": 0.18, "lora_ga": 0.35}
"""Of `--start`; others want LoRA's."""
RULES: Mapping[str, float] = {"freeze_down": 2.0}
"""Of settings that are on."""
LORA_PLUS = -0.75
"""The power of its ratio: 0.35 at 4, where it was measured."""


def over_lora(settings: Mapping[str, Any]) -> tuple[float, list[str]]:
    """(the factor that goes with these settings, what it is for).

    Raises:
        ConfigError: there is no such method, or it does not take its fields.
    """
    method = spelling.innermost(spelling.method(str(settings.get("method", "lora")), {}))
    factors = {
        method.name: method.rate_over_lora,
        f"start {settings.get('start')}": STARTS.get(str(settings.get("start")), 1.0),
        **{name: factor for name, factor in RULES.items() if settings.get(name)},
        "lora_plus": float(f"{(settings.get('lora_plus') or 1) ** LORA_PLUS:.2g}"),
    }
    found, why = 1.0, list[str]()
    for name, factor in factors.items():
        if factor != 1:
            found, why = found * factor, [*why, f"times {factor:g} for {name}"]
    return found, why
