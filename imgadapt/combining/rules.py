"""The table of merging rules: `RULES`."""

from imgadapt.combining import elements, factors, scalar
from imgadapt.combining.rule import Rule

RULES: tuple[Rule, ...] = (*scalar.RULES, *factors.RULES, *elements.RULES)
