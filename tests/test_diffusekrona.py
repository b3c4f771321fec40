"""DiffuseKronA (arXiv 2402.17412) is LoKr with two full factors: docs/methods.md says so."""

from typing import Any

import torch
from torch import Tensor, nn

from imgadapt import AdapterFile, LoKr, attach, parameters
from imgadapt.formats import Part
from imgadapt.sites import Site

A1, A2, B1, B2 = 6, 2, 4, 8
"""out = A1 * B1 and in = A2 * B2."""


def released(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """What KronALinearLayer does with three-dimensional activations: down (A2, A1), up (B1, B2) (IBM/DiffuseKronA
    diffusekrona/krona.py, commit eb17309).
    """
    z = torch.einsum("pj,nsij,iq->nspq", up, x.unflatten(2, (A2, B2)), down)
    return z.flatten(2)


def test_the_papers_change_is_lokrs_also_where_the_factors_are_unequal() -> None:
    model: Any = nn.Sequential(nn.Linear(A2 * B2, A1 * B1))
    x = torch.randn(2, 5, A2 * B2)
    base = model(x)
    a, b = torch.randn(A1, A2), torch.randn(B1, B2)
    t = {"w1": a, "w2": b}
    attach(model, AdapterFile({"model.0": Part(LoKr.infer(t, None), t)}))
    torch.testing.assert_close(model(x) - base, x @ torch.kron(a, b).t(), rtol=1e-4, atol=1e-5)


def test_a_fresh_one_has_the_papers_numbers() -> None:
    model: Any = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
    attach(model, LoKr(rank=None, factor=4), targets="*")
    assert [tuple(tensor.shape) for tensor in parameters(model)] == [(4, 4), (16, 16)]


def test_its_released_code_shuffles_the_inputs_of_a_kronecker_product() -> None:
    x, down, up = torch.randn(2, 5, A2 * B2), torch.randn(A2, A1), torch.randn(B1, B2)
    found = released(x, down, up)
    shuffled = x.unflatten(2, (A2, B2)).transpose(2, 3).flatten(2)
    method = LoKr.infer({"w1": up, "w2": down.t()}, None)
    delta = method.delta({"w1": up, "w2": down.t()}, Site((A1 * B1, A2 * B2)), None)
    torch.testing.assert_close(found, shuffled @ delta.t(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, x @ delta.t(), atol=0.1)
