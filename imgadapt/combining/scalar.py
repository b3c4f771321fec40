"""Rules that give each input one number, from its weight and the inner products of the changes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from imgadapt.combining.rule import Rule


def weighted(weights: Tensor, gram: Tensor, options: Mapping[str, Any]) -> Tensor:
    """As they are."""
    return weights


RULES = (
    Rule("weighted", "the sum of all changes times their weights", "the definition", weighted),
    Rule("concat", "the same, factors side by side: the ranks add up", "the definition", weighted),
    Rule("svd", "the same, as the best approximation of the rank asked for", "Eckart and Young 1936", weighted),
)
