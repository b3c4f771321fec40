"""HRA against peft, and what the contract does not say of it."""

from typing import Any

import pytest
import torch
from peft import HRAConfig
from peft.tuners.hra.layer import HRAConv2d, HRALinear
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from imgadapt import attach, parameters
from imgadapt.errors import ConfigError, FormatError
from imgadapt.methods.hra import HRA
from imgadapt.sites import Site


def peers(base: Any, rank: int, orthogonal: bool = False) -> Any:
    kind = HRAConv2d if isinstance(base, nn.Conv2d) else HRALinear
    return kind(base, "default", HRAConfig(r=rank, apply_GS=orthogonal, init_weights=False), r=rank)


def change(base: Any, method: HRA, u: torch.Tensor) -> torch.Tensor:
    site = Site.of(base)
    assert site is not None
    return method.delta({"hra_u": u.double()}, site, base.weight.detach().double())


@pytest.mark.parametrize("rank", [1, 4, 5])
@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("layer", [nn.Linear(12, 20), nn.Conv2d(4, 6, 3, padding=1)], ids=["linear", "conv"])
def test_the_change_is_pefts(layer: Any, rank: int, orthogonal: bool) -> None:
    peer = peers(layer.double(), rank, orthogonal).double()
    u = peer.hra_u["default"].detach()
    whole = layer.weight.detach().flatten(1) @ peer.get_delta_weight("default").detach()
    found = change(layer, HRA(rank, orthogonal), u)
    torch.testing.assert_close(found, whole.reshape(layer.weight.shape) - layer.weight.detach())


def test_peft_forgets_dilation_and_a_second_stride() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=2, dilation=2).double()
    peer, x = peers(layer, 4).double(), torch.randn(1, 4, 9, 9).double()
    assert peer(x).shape != layer(x).shape


@pytest.mark.parametrize("inputs", [9, 1281, 11520])
@pytest.mark.parametrize("rank", [2, 8, 32])
def test_fresh_reflections_undo_each_other_to_the_bit(inputs: int, rank: int) -> None:
    layer: Any = nn.Linear(inputs, 3)
    x = torch.randn(4, inputs)
    model = nn.Sequential(layer)
    before = model(x)
    attach(model, HRA(min(rank, inputs // 2 * 2)), targets="*")
    assert torch.equal(model(x), before)
    model.bfloat16()
    assert torch.equal(model(x.bfloat16()), layer(x.bfloat16()))


def test_pefts_orthogonal_start_changes_the_layer_and_ours_is_refused() -> None:
    layer = nn.Linear(12, 20)
    peer = HRALinear(layer, "default", HRAConfig(r=4, apply_GS=True), r=4)
    assert (peer.get_delta_weight("default") - torch.eye(12)).norm() > 1
    for method in (HRA(4, orthogonal=True), HRA(3)):
        with pytest.raises(ConfigError, match="a fresh HRA is of an even rank, not orthogonal"):
            attach(nn.Sequential(nn.Linear(12, 20)), method, targets="*")


def test_training_keeps_the_weights_singular_values() -> None:
    model: Any = nn.Sequential(nn.Linear(12, 20))
    attach(model, HRA(4), targets="*")
    with torch.no_grad():
        for tensor in parameters(model):
            tensor.add_(torch.randn_like(tensor))
    weight = model[0].weight.detach()
    delta = HRA(4).delta({"hra_u": parameters(model)[0].detach()}, model[0].site, weight)
    torch.testing.assert_close(torch.linalg.svdvals(weight + delta), torch.linalg.svdvals(weight))


def test_it_costs_two_thin_products_and_not_one_dense_matrix() -> None:
    model: Any = nn.Sequential(nn.Linear(128, 96)).requires_grad_(False)
    attach(model, HRA(8), targets="*")
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1000, 128))
    assert counter.get_total_flops() == 2 * 1000 * 128 * 96 + 4 * 1000 * 128 * 8 + 2 * 128 * 8 * 8


def test_files_of_peft_are_read_and_written() -> None:
    assert HRA.peft is not None
    t = {"hra_u": torch.randn(12, 4)}
    method, tensors = HRA.peft.read(t, {"r": 4, "apply_GS": True}, (20, 12))
    assert method == HRA(4, orthogonal=True)
    written, fields = HRA.peft.write(method, tensors, (20, 12))
    assert (written, fields) == (t, {"r": 4, "apply_GS": True})
    with pytest.raises(FormatError, match="square kernels"):
        HRA.peft.write(method, tensors, (20, 2, 2, 3))
    with pytest.raises(FormatError, match="apply_GS"):
        HRA.peft.read(t, {"apply_GS": "yes"}, None)
