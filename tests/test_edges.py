"""Inputs and layers of odd shape: what the base takes, its adapters take, and give what the dense formula gives."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from imgadapt import (
    BOFT,
    IA3,
    OFT,
    AdapterFile,
    DoRA,
    Full,
    GLoRA,
    ImgadaptError,
    LoHa,
    LoKr,
    LoRA,
    Method,
    attach,
    merge,
    parameters,
    unmerge,
)
from imgadapt.errors import ConfigError, ShapeError, StateError, TargetError
from imgadapt.formats import Part
from imgadapt.sites import Site

LAST = torch.channels_last


def zeroed(layer: Any) -> Any:
    """With rows and columns of zeros."""
    with torch.no_grad():
        layer.weight[2:5] = 0
        layer.weight[:, 3] = 0
    return layer


def all_zero(layer: Any) -> Any:
    """As zero-initialised projections are."""
    nn.init.zeros_(layer.weight)
    return layer


def channels_last(layer: Any) -> Any:
    return layer.to(memory_format=LAST)


Case = tuple[Callable[[], Any], Callable[[], Tensor]]
CASES: dict[str, Case] = {
    "fewer outputs than a block": (lambda: nn.Linear(12, 6), lambda: torch.randn(3, 12)),
    "one output": (lambda: nn.Linear(12, 1), lambda: torch.randn(3, 12)),
    "one input": (lambda: nn.Linear(1, 12), lambda: torch.randn(3, 1)),
    "prime sizes": (lambda: nn.Linear(7, 13), lambda: torch.randn(3, 7)),
    "four axes": (lambda: nn.Linear(12, 24), lambda: torch.randn(2, 3, 4, 12)),
    "one axis": (lambda: nn.Linear(12, 24), lambda: torch.randn(12)),
    "no sample": (lambda: nn.Linear(12, 24), lambda: torch.randn(0, 12)),
    "no token": (lambda: nn.Linear(12, 24), lambda: torch.randn(2, 0, 12)),
    "transposed": (lambda: nn.Linear(12, 24), lambda: torch.randn(12, 5, 3).permute(1, 2, 0)),
    "every other element": (lambda: nn.Linear(12, 24), lambda: torch.randn(5, 2, 24)[..., ::2]),
    "expanded": (lambda: nn.Linear(12, 24), lambda: torch.randn(1, 1, 12).expand(4, 3, 12)),
    "rows of zeros": (lambda: zeroed(nn.Linear(12, 24)), lambda: torch.randn(3, 12)),
    "all zero": (lambda: all_zero(nn.Linear(12, 24)), lambda: torch.randn(3, 12)),
    "convolution of zeros": (lambda: all_zero(nn.Conv2d(8, 16, 3)), lambda: torch.randn(2, 8, 5, 6)),
    "no picture": (lambda: nn.Conv2d(8, 16, 3, padding=1), lambda: torch.randn(0, 8, 5, 6)),
    "no picture, 1x1": (lambda: nn.Conv2d(8, 16, 1), lambda: torch.randn(0, 8, 5, 6)),
    "channels last": (lambda: nn.Conv2d(8, 16, 3), lambda: torch.randn(2, 8, 5, 6).to(memory_format=LAST)),
    "channels last, weight too": (
        lambda: channels_last(nn.Conv2d(8, 16, 3)),
        lambda: torch.randn(2, 8, 5, 6).to(memory_format=LAST),
    ),
    "reversed axes": (lambda: nn.Conv2d(8, 16, 3), lambda: torch.randn(6, 5, 8, 2).permute(3, 2, 1, 0)),
    "3-d 1x1": (lambda: nn.Conv3d(8, 16, 1), lambda: torch.randn(2, 8, 3, 4, 2)),
    "padded, strided 1x1": (lambda: nn.Conv2d(8, 16, 1, stride=2, padding=1), lambda: torch.randn(2, 8, 5, 6)),
    "grouped 1x1": (lambda: nn.Conv2d(8, 16, 1, groups=2), lambda: torch.randn(2, 8, 5, 6)),
    "depthwise": (lambda: nn.Conv1d(8, 24, 3, groups=8), lambda: torch.randn(2, 8, 5)),
    "row of a kernel": (lambda: nn.Conv2d(8, 16, (1, 3)), lambda: torch.randn(2, 8, 5, 6)),
    "padding index": (lambda: nn.Embedding(18, 12, padding_idx=0), lambda: torch.randint(0, 18, (2, 5))),
    "32-bit ids": (lambda: nn.Embedding(18, 12), lambda: torch.randint(0, 18, (5,), dtype=torch.int32)),
}

METHODS: dict[str, Method] = {
    "LoRA": LoRA(1, alpha=2),
    "LoRA of all ranks": LoRA(12),
    "LoHa": LoHa(1, alpha=2),
    "LoKr": LoKr(1, alpha=3),
    "LoKr of both": LoKr(1, alpha=3, both=True, tucker=True),
    "LoKr of full factors": LoKr(None, factor=4),
    "OFT": OFT(8, rescaled=True),
    "OFT of the input": OFT(8, "input"),
    "BOFT": BOFT(8, 1, rescaled=True),
    "BOFT of the input": BOFT(2, 2, "input"),
    "DoRA": DoRA(LoRA(1, alpha=2)),
    "DoRA of the input": DoRA(LoRA(1, alpha=2), "input"),
    "DoRA over LoHa": DoRA(LoHa(1, alpha=2)),
    "DoRA over LoKr": DoRA(LoKr(1, alpha=3)),
    "GLoRA": GLoRA(1, alpha=2),
    "IA3": IA3(),
    "IA3 of the input": IA3("input", absolute=True),
    "Full": Full(),
}


def site_of(module: nn.Module) -> Site:
    site = Site.of(module)
    assert site is not None
    return site


PAIRS = [
    (method, case) for method in METHODS for case in CASES if METHODS[method].check(site_of(CASES[case][0]())) is None
]


@pytest.mark.parametrize(("method", "case"), PAIRS)
def test_live_and_merged_equal_the_dense_formula(method: str, case: str) -> None:
    make, draw = CASES[case]
    base, x = make(), draw()
    model: Any = nn.Sequential(copy.deepcopy(base)).requires_grad_(False)
    attach(model, METHODS[method], targets=["0"])
    before = base(x)
    assert torch.equal(model(x), before)  # and no NaN
    slot, site = next(iter(model[0])), model[0].site
    with torch.no_grad():
        for tensor in parameters(model):
            tensor.normal_(std=0.3)
        t = slot.tensors(torch.float64)
        base = base.double()
        change = slot.method.scale * slot.method.delta(t, site, site.seen(base.weight))
        base.weight += site.seen(change)
        if (bias := slot.method.bias_delta(t)) is not None:
            base.bias += bias
        expected = base(x.double() if x.is_floating_point() else x)
    out = model(x)
    assert out.stride() == before.stride()  # channels_last stays so
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)
    out.square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in parameters(model))
    merge(model)
    torch.testing.assert_close(model(x).double(), expected, rtol=2e-5, atol=2e-5)
    unmerge(model)
    assert torch.equal(model(x), out)


def dense(slot: Any, layer: Any, x: Tensor) -> Tensor:
    """The output by the method's delta, differentiably."""
    t = slot.tensors(x.dtype)
    weight = layer.base.weight + slot.method.scale * slot.method.delta(t, layer.site, layer.base.weight)
    bias = slot.method.bias_delta(t)
    return nn.functional.linear(x, weight, layer.base.bias if bias is None else layer.base.bias + bias)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_dense_formula(method: str) -> None:
    """peft detaches DoRA's norm as the paper says, and so do both of these."""
    model: Any = nn.Sequential(nn.Linear(64, 96)).requires_grad_(False)
    attach(model, METHODS[method], targets="*")
    model.double()
    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        for tensor in parameters(model):
            tensor.normal_(std=0.3)
    wanted = [x, *parameters(model)]
    weights = torch.randn(5, 96, dtype=torch.float64)
    ours = torch.autograd.grad((model(x).sin() * weights).sum(), wanted)
    theirs = torch.autograd.grad((dense(next(iter(model[0])), model[0], x).sin() * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_agrees_with_double(method: str, dtype: torch.dtype) -> None:
    model: Any = nn.Sequential(nn.Linear(64, 96)).to(dtype).requires_grad_(False)
    attach(model, METHODS[method], targets="*")
    x = torch.randn(5, 64, dtype=dtype)
    with torch.no_grad():
        for tensor in parameters(model):
            tensor.add_(torch.randn_like(tensor) * 0.2)
        out = model(x)
        model.double()
        expected = model(x.double())
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0.01, atol=0.01 if dtype == torch.float16 else 0.06)


MISFITS: dict[str, tuple[Method, dict[str, tuple[int, ...]]]] = {
    "a core that the method does not have": (LoRA(2), {"down": (2, 16), "up": (24, 2), "mid": (2, 2)}),
    "a factor that the method does not have": (OFT(4, "input"), {"packed": (4, 6), "rescale": (24,)}),
    "blocks that leave rows over": (OFT(5), {"blocks": (4, 5, 5)}),
    "stages that leave rows over": (BOFT(4, 3), {"stages": (3, 6, 4, 4)}),
    "another rank": (LoKr(100, alpha=1), {"w1": (4, 4), "w2_a": (6, 2), "w2_b": (2, 4)}),
    "two ranks": (LoKr(2), {"w1": (4, 4), "w2_a": (6, 3), "w2_b": (2, 4)}),
    "no rank": (LoKr(None), {"w1": (4, 4), "w2_a": (6, 2), "w2_b": (2, 4)}),
    "half of it": (LoKr(2), {"w1": (4, 4)}),
    "twice the first factor": (LoKr(None), {"w1": (4, 4), "w1_a": (4, 2), "w1_b": (2, 4), "w2": (6, 4)}),
    "a vector": (LoKr(None), {"w1": (4,), "w2": (6, 4)}),
}


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_are_not_the_methods_own_are_refused(case: str) -> None:
    method, shapes = MISFITS[case]
    model: Any = nn.Sequential(nn.Linear(16, 24))
    part = Part(method, {name: torch.randn(shape) for name, shape in shapes.items()})
    with pytest.raises(ShapeError, match=r"model\.0"):
        attach(model, AdapterFile({"model.0": part}))
    assert type(model[0]) is nn.Linear


NONSENSE: dict[str, tuple[Callable[[], Method], type[ImgadaptError]]] = {
    "alpha of text": (lambda: LoRA(4, "1"), ConfigError),  # pyright: ignore[reportArgumentType] # that is the test
    "alpha of 400 digits": (lambda: LoRA(4, 10**400), ConfigError),
    "half a term": (lambda: OFT(8, neumann=2.5), ConfigError),  # pyright: ignore[reportArgumentType] # that is the test
    "constraint of text": (lambda: BOFT(8, constraint="3"), ConfigError),  # pyright: ignore[reportArgumentType] # that is the test
    "DoRA of nothing": (lambda: DoRA(None), ConfigError),  # pyright: ignore[reportArgumentType] # that is the test
    "a billion stages": (lambda: BOFT(2, 10**9), TargetError),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_settings_that_cannot_be_are_refused(case: str) -> None:
    make, error = NONSENSE[case]
    with pytest.raises(error):
        attach(nn.Sequential(nn.Linear(16, 24)), make(), targets="0")


def test_a_block_larger_than_the_layer_is_cut_to_it_at_once() -> None:
    assert BOFT(10**9, 1).at(site_of(nn.Linear(16, 24))).block_size == 24


def test_dora_over_full_changes_the_bias() -> None:
    model: Any = nn.Sequential(nn.Linear(16, 24)).requires_grad_(False)
    x = torch.randn(3, 16)
    before = model(x)
    attach(model, DoRA(Full()), targets="0", weight=0.5)
    with torch.no_grad():
        next(iter(model[0])).diff_b.fill_(3)
    torch.testing.assert_close(model(x), before + 1.5)
    merge(model)
    torch.testing.assert_close(model(x), before + 1.5)


def test_unmerge_from_a_checkpoint_casts_to_the_dtype_the_model_was_moved_to(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(16, 24)).requires_grad_(False)
    save_file(dict(model.state_dict()), tmp_path / "base.safetensors")
    wanted = model[0].weight.half()
    attach(model, LoRA(2), targets="0")
    merge(model, originals=tmp_path / "base.safetensors")
    model.half()
    unmerge(model)
    assert torch.equal(model[0].weight, wanted)


def test_unmerge_refuses_a_checkpoint_that_has_changed(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(16, 24)).requires_grad_(False)
    save_file(dict(model.state_dict()), tmp_path / "base.safetensors")
    attach(model, LoRA(2), targets="0")
    merge(model, originals=tmp_path / "base.safetensors")
    save_file({key: tensor + 1 for key, tensor in model.state_dict().items()}, tmp_path / "base.safetensors")
    os.utime(tmp_path / "base.safetensors", (1, 1))  # it may have been the same tick of the file system's clock
    with pytest.raises(StateError, match="has changed since the merge"):
        unmerge(model)
    assert model[0].merged


def test_a_polynomial_of_a_thousand_million_terms_is_refused() -> None:
    with pytest.raises(ConfigError, match="64 at most"):
        OFT(4, "input", neumann=10**9)
