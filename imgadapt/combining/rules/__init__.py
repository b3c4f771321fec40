"""The table of merging rules: `RULES`."""

from imgadapt.combining.rules import elements, factors, rotations, scalar
from imgadapt.combining.rules.rule import Rule

RULES: tuple[Rule, ...] = (*scalar.RULES, *factors.RULES, *elements.RULES, *rotations.RULES)
