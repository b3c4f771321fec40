"""What a method costs on one 1280 x 1280 linear layer over 1,024 tokens: matmul FLOPs and what is kept for backward."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from imgadapt import BOFT, OFT, DoRA, LoHa, LoKr, LoRA, Method, attach, parameters

TOKENS, WIDTH = 1024, 1280
MIB = 2**20
CASES: dict[str, tuple[Method, float, float, float, float]] = {
    # method; FLOPs forward and backward, in those of the frozen layer: exactly, at most; MiB kept: exactly, at most
    "LoRA": (LoRA(16), 1.0375, 1.05, 5.141, 5.2),
    "DoRA": (DoRA(LoRA(16)), 1.04551, 1.06, 10.233, 10.3),
    "LoHa": (LoHa(8), 1.15, 1.16, 5.875, 5.9),
    "LoKr of a full second factor": (LoKr(None, factor=16), 1.1125, 1.1126, 10.001, 10.2),
    "LoKr": (LoKr(8), 1.02625, 1.04, 7.004, 7.1),
    "OFT": (OFT(32), 1.03828, 1.05, 5.313, 5.5),
    "OFT of the input": (OFT(32, "input"), 1.03828, 1.05, 5.320, 5.5),
    "BOFT": (BOFT(4, 4), 1.03782, 1.0379, 5.605, 20.3),
    "BOFT of the input": (BOFT(4, 4, "input"), 1.03782, 1.0379, 5.605, 20.3),
}
"""peft 0.21.2: LoRA 1.04, DoRA 1.05 (2.05 with dropout), LoHa 2.53, LoKr 2.50, OFT 1.04, BOFT of one factor 6.25."""


def build(methods: Sequence[Method], dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Any:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH)).to(dtype).requires_grad_(False)
    for k, method in enumerate(methods):
        attach(model, method, name=f"adapter {k}", targets="*", dropout=dropout)
        with torch.no_grad():
            for tensor in parameters(model, f"adapter {k}"):
                tensor.add_(torch.randn_like(tensor) * 0.02)
    return model


def flops(methods: Sequence[Method], dropout: float = 0.0) -> float:
    """Of a forward and a backward, which needs the gradient of the input, in those of the frozen layer alone."""
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        build(methods, dropout=dropout)(x).sum().backward()
    return counter.get_total_flops() / (4 * TOKENS * WIDTH**2)


def kept(method: Method, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> dict[int, Tensor]:
    """What autograd keeps beyond parameters, one tensor of each storage."""
    model = build([method], dtype, dropout)
    x = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    assert out.requires_grad
    for tensor in model.parameters():
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return found


def mebibytes(found: dict[int, Tensor]) -> float:
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values()) / MIB


def test_the_frozen_layer_alone_costs_two_products() -> None:
    assert flops([]) == 1


@pytest.mark.parametrize("case", CASES)
def test_flops(case: str) -> None:
    method, exactly, most, _, _ = CASES[case]
    found = flops([method])
    assert found <= most
    assert found == pytest.approx(exactly, abs=1e-5)


@pytest.mark.parametrize("case", ["LoRA", "DoRA"])
def test_input_dropout_costs_no_further_product(case: str) -> None:
    """peft's DoRA with dropout runs the base a second time."""
    method, exactly, _, _, _ = CASES[case]
    assert flops([method], dropout=0.1) == pytest.approx(exactly, abs=1e-5)


def test_four_loras_cost_what_one_of_their_ranks_together_does() -> None:
    assert flops([LoRA(16)] * 4) == flops([LoRA(64)]) == pytest.approx(1.15)


@pytest.mark.parametrize("case", CASES)
def test_bytes_kept_for_backward(case: str) -> None:
    """In fp32, where the activation is of 5 MiB."""
    method, _, _, exactly, most = CASES[case]
    found = mebibytes(kept(method))
    assert found <= most
    assert found == pytest.approx(exactly, abs=1e-3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bf16_keeps_nothing_of_activation_size_in_fp32(case: str, dropout: float) -> None:
    """peft casts the activation up, and keeps that."""
    found = kept(CASES[case][0], torch.bfloat16, dropout)
    wide = [tensor for tensor in found.values() if tensor.dtype.itemsize > 2]
    assert all(tensor.untyped_storage().nbytes() < TOKENS * WIDTH for tensor in wide)
    assert mebibytes(found) < mebibytes(kept(CASES[case][0], dropout=dropout)) / 2 + 0.25
