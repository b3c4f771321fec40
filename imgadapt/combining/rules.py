"""The table of merging rules: `RULES`."""

from imgadapt.combining import elements, scalar
from imgadapt.combining.rule import Rule

RULES: tuple[Rule, ...] = (*scalar.RULES, *elements.RULES)
