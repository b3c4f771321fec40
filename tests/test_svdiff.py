"""SVDiff: singular values, what they cost, and what of an SVD is not the weight's own."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from imgadapt import attach, parameters
from imgadapt.methods.svdiff import SVDiff
from imgadapt.sites import Site


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (6, 4, 3, 3)])
def test_the_singular_values_are_shifted_and_none_below_zero(shape: tuple[int, ...]) -> None:
    site = Site(shape, "conv" if len(shape) > 2 else "linear")
    weight = torch.randn(shape)
    values = torch.linalg.svdvals(weight.flatten(1))
    shift = torch.linspace(-0.1, 0.3, len(values)).add(torch.where(values == values.min(), -9.0, 0.0))
    changed = weight + SVDiff().delta({"spectral": shift}, site, weight)
    expected = (values + shift).relu().sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(changed.flatten(1)), expected, rtol=1e-4, atol=1e-5)


def test_signs_that_an_svd_chooses_cancel() -> None:
    weight, site = torch.randn(20, 12), Site((20, 12))
    made = SVDiff().constants(site, weight)
    signs = torch.randint(0, 2, (12,)) * 2.0 - 1
    others = {"svdiff_u": made["svdiff_u"] * signs, "svdiff_v": made["svdiff_v"] * signs[:, None]}
    t = {"spectral": torch.randn(12)}
    torch.testing.assert_close(
        SVDiff().delta({**t, **made}, site, weight), SVDiff().delta({**t, **made, **others}, site, weight)
    )


def test_weights_that_are_rounded_otherwise_are_nearly_the_same_only_where_values_lie_apart() -> None:
    """Of values that are equal, a shift of one is a shift in a direction that rounding chooses."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(12, 12, dtype=torch.double)).Q for _ in "uv")
    t, site = {"spectral": torch.eye(12)[0]}, Site((12, 12))
    errors: list[float] = []
    for values in (torch.arange(12, 0, -1.0), torch.ones(12)):
        weight = ((u * values) @ v).float()
        a, b = (SVDiff().delta(t, site, w) for w in (weight, weight.half().float()))
        errors.append(float((a - b).norm()))
    assert errors[0] < 0.1 < errors[1]


def test_the_delta_is_built_once_and_goes_into_the_layers_own_product() -> None:
    n, width = 512, 64
    model: Any = nn.Sequential(nn.Linear(width, width)).requires_grad_(False)
    attach(model, SVDiff(), targets="*")
    x = torch.randn(n, width, requires_grad=True)
    model(x)  # the singular vectors are made
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    layer = 2 * n * width**2
    assert counter.get_total_flops() == 3 * layer + 2 * 2 * width**3
    assert sum(tensor.numel() for tensor in parameters(model)) == width
