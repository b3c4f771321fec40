"""Merged layers added up: to a matrix, to a bias, to factors of a lower rank."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from imgadapt.combining.layers import Layer, Merged
from imgadapt.combining.lowrank import concat, spectrum
from imgadapt.combining.terms import Dense, Pair, Term


@torch.no_grad()
def truncated(made: Merged, rank: int, workers: int = 1) -> Merged:
    """The best approximation of a rank, with what it leaves out; one whose factors are no wider is left as it is. Of
    rank 0 there are no terms left.
    """
    if rank == 0 and made.bias is None:
        return replace(made, terms=(), residual=1.0)
    rank = min(max(rank, 1), made.site.rows, made.site.fan_in)  # what carries a bias stays
    if len(made.terms) >= 1 and all(isinstance(term, Pair) for term in made.terms):
        width = sum(term.up.shape[1] for term in made.terms if isinstance(term, Pair))
        if width <= rank:
            return replace(made, terms=(concat(made.terms),))
    found = spectrum(made.terms, rank, workers=workers)
    return replace(made, terms=(found.truncated(rank),), residual=found.residual(rank))


def bias_of(layer: Layer, factors: Tensor) -> Tensor | None:
    """The sum of biases times factors; None where no input has one."""
    biases = [
        change.bias * float(f) for change, f in zip(layer.changes, factors, strict=True) if change.bias is not None
    ]
    return torch.stack(biases).sum(0) if biases else None


def whole(terms: Sequence[Term]) -> Tensor:
    """The sum of terms as a dense matrix (out, fan_in), fp32."""
    shape = terms[0].shape
    if len(terms) == 1 and isinstance(terms[0], Dense):
        return terms[0].rows(0, shape[0])
    total = torch.zeros(shape)
    for term in terms:
        if isinstance(term, Pair):
            total.addmm_(term.up, term.down)
        else:
            total += term.rows(0, shape[0])
    return total
