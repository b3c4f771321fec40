"""The table of merging rules: `RULES`."""

from imgadapt.combining import elements, factors, rotations, scalar
from imgadapt.combining.rule import Rule

RULES: tuple[Rule, ...] = (*scalar.RULES, *factors.RULES, *elements.RULES, *rotations.RULES)
