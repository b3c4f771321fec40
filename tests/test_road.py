"""RoAd against peft, and the bias that peft turns."""

from typing import Any

import pytest
import torch
from peft import RoadConfig
from peft.tuners.road.layer import Linear
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from imgadapt import attach, parameters
from imgadapt.errors import FormatError
from imgadapt.file import AdapterFile
from imgadapt.formats import Part
from imgadapt.methods.road import RoAd
from imgadapt.sites import Site

VARIANTS = ["road_1", "road_2", "road_4"]


def peer_of(layer: nn.Linear, variant: str, group_size: int) -> Any:
    config = RoadConfig(variant=variant, group_size=group_size, init_weights=False)
    return Linear(layer, "default", config)


def tensors_of(peer: Any) -> dict[str, torch.Tensor]:
    return {name: getattr(peer, name)["default"].detach() for name in ("road_theta", "road_alpha")}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group_size", [2, 6, 24])
@pytest.mark.parametrize("bias", [False, True])
def test_a_file_of_pefts_acts_as_it_does_there(variant: str, group_size: int, bias: bool) -> None:
    layer, x = nn.Linear(10, 24, bias=bias), torch.randn(3, 5, 10)
    peer = peer_of(layer, variant, group_size)
    assert RoAd.peft is not None
    config = {"variant": variant, "group_size": group_size}
    method, tensors = RoAd.peft.read(tensors_of(peer), config, (24, 10))
    model: Any = nn.Sequential(nn.Linear(10, 24, bias=bias))
    model.load_state_dict({f"0.{name}": value for name, value in layer.state_dict().items()})
    attach(model, AdapterFile({"model.0": Part(method, tensors)}))
    torch.testing.assert_close(model(x), peer(x))
    site = Site.of(layer)
    assert site is not None
    delta = method.delta(tensors, site, layer.weight.detach())
    peer.merge()
    torch.testing.assert_close(peer.base_layer.weight, model[0].pristine() + delta)
    if not bias:  # then nothing of the bias is in question
        assert RoAd.peft.write(method, tensors, (24, 10)) == (tensors, config)


def test_what_does_not_turn_the_bias_is_not_written_as_pefts() -> None:
    assert RoAd.peft is not None
    t = {"road_theta": torch.zeros(12), "road_alpha": torch.ones(12)}
    for method, own in ((RoAd(group_size=4), t), (RoAd(group_size=4, bias=True), {**t, "diff_b": torch.zeros(24)})):
        with pytest.raises(FormatError, match="turns a layer's bias"):
            RoAd.peft.write(method, own, (24, 10))
    with pytest.raises(FormatError, match="linear layers"):
        RoAd.peft.write(RoAd(bias=True), t, (24, 10, 3, 3))


@pytest.mark.parametrize("config", [{"variant": []}, {"variant": "road_3"}, {"group_size": "64"}, {"group_size": 3}])
def test_a_config_that_says_what_cannot_be_is_refused(config: dict[str, Any]) -> None:
    assert RoAd.peft is not None
    with pytest.raises(FormatError):
        RoAd.peft.read({"road_theta": torch.zeros(12), "road_alpha": torch.ones(12)}, config, None)


def test_angles_learn_also_where_the_size_of_the_output_does_not_change() -> None:
    model: Any = nn.Sequential(nn.Linear(10, 24, bias=False)).requires_grad_(False)
    attach(model, RoAd(), targets="*")
    (model(torch.randn(3, 10)) - 1).square().sum().backward()
    assert all(tensor.grad is not None and (tensor.grad != 0).all() for tensor in parameters(model))


def test_it_costs_no_product() -> None:
    model: Any = nn.Sequential(nn.Linear(32, 64)).requires_grad_(False)
    attach(model, RoAd("road_4"), targets="*")
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(100, 32, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 4 * 100 * 32 * 64
