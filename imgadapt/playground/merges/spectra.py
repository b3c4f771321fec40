"""Spectra: how much of a merge would be lost at each rank."""

from collections.abc import Sequence

import torch

from imgadapt.combining.combine import Progress, common_architecture, form_of
from imgadapt.combining.engine import Engine
from imgadapt.combining.entering import Base
from imgadapt.combining.layers import Input
from imgadapt.combining.recipe import MergeRecipe


def residuals(
    recipe: MergeRecipe, inputs: Sequence[Input], base: Base | None, progress: Progress
) -> list[tuple[int, float]]:
    """(rank, relative Frobenius error of the whole when every layer is cut to it), for ranks 1, 2, 4, ... up to the one
    that loses nothing; none for rules of rotations, which have no rank. Norms and biases are never cut.
    """
    if recipe.row.rotations is not None:
        return []
    engine = Engine(recipe, inputs, common_architecture(inputs), base, form_of(recipe, inputs))
    squares, kept = list[torch.Tensor](), 0.0
    for k, (made, found) in enumerate(engine.spectra(), 1):
        if found is None:
            kept += made.norm**2
        else:
            squares.append(found.values**2)
        progress("measuring ranks", k, len(engine.names))
    if not squares:
        return []
    total = kept + sum(float(row.sum()) for row in squares)
    ranks = _doubling(max(_significant(row) for row in squares))
    left = [sum(float(row[rank:].sum()) for row in squares) for rank in ranks[:-1]]
    return [(rank, (lost / total) ** 0.5 if total else 0.0) for rank, lost in zip(ranks, [*left, 0.0], strict=True)]


def _significant(squares: torch.Tensor) -> int:
    """How many singular values there are that are no rounding of fp32's products."""
    return max(1, int((squares > squares[0] * 1e-12).sum()))


def _doubling(last: int) -> list[int]:
    """1, 2, 4, ..., last."""
    return [*(2**k for k in range(last.bit_length()) if 2**k < last), last]
