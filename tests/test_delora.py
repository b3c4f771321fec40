"""DeLoRA against peft, and its bound."""

from typing import Any

import pytest
import torch
from peft import DeloraConfig
from peft.tuners.delora.layer import DeloraLinear
from torch import nn

from imgadapt import AdapterFile, attach, parameters
from imgadapt.errors import ConfigError, FormatError, ShapeError
from imgadapt.formats import Part
from imgadapt.methods.delora import DeLoRA
from imgadapt.sites import Site

NAMES = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")


def peer_of(layer: nn.Linear, rank: int, init: bool = False) -> Any:
    return DeloraLinear(layer, "default", DeloraConfig(r=rank, init_weights=init), r=rank, delora_lambda=15)


def test_the_change_and_the_layer_are_pefts() -> None:
    layer, x = nn.Linear(12, 20), torch.randn(3, 5, 12)
    peer = peer_of(layer, 4)
    t = {name: getattr(peer, name)["default"].detach() for name in NAMES}
    assert DeLoRA.peft is not None
    method, tensors = DeLoRA.peft.read(t, {"r": 4}, (20, 12))
    site = Site.of(layer)
    assert site is not None
    torch.testing.assert_close(method.delta(tensors, site, None), peer.get_delta_weight("default").detach())
    model = nn.Sequential(nn.Linear(12, 20))
    model.load_state_dict({f"0.{name}": value for name, value in layer.state_dict().items()})
    attach(model, AdapterFile({"model.0": Part(method, tensors)}))
    torch.testing.assert_close(model(x), peer(x))
    written, fields = DeLoRA.peft.write(method, tensors, (20, 12))
    assert fields == {"r": 4}
    assert written.keys() == t.keys()
    assert all(torch.equal(written[name], t[name]) for name in t)


def test_a_fresh_one_has_pefts_norms_and_they_stay() -> None:
    layer = nn.Linear(12, 20)
    model: Any = nn.Sequential(layer).requires_grad_(False)
    peer = peer_of(layer, 4, init=True)
    attach(model, DeLoRA(4, bound=15), targets="*")
    (slot,) = model[0]
    torch.testing.assert_close(slot.tensors()["delora_norm"], peer.delora_w_norm["default"])
    assert slot.delora_lambda.item() == peer.delora_lambda["default"].item()
    assert not slot.delora_norm.requires_grad
    assert sum(tensor.numel() for tensor in parameters(model)) == 4 * (12 + 20) + 1


def test_the_change_is_bounded_whatever_the_factors_are() -> None:
    site = Site((20, 8, 3, 3), "conv")
    weight = torch.randn(site.shape)
    t = DeLoRA(4, bound=2).init(site, weight)
    t["delora_b"].normal_(std=1000)
    unit = DeLoRA(4).delta({**t, "delora_norm": torch.ones_like(t["delora_norm"])}, site, None)
    assert unit.norm() <= 2 + 1e-4
    torch.testing.assert_close(t["delora_norm"], weight.norm(dim=0))


@pytest.mark.parametrize("bound", [0, None, float("nan"), "15"])
def test_a_bound_is_a_number_above_0(bound: Any) -> None:
    with pytest.raises(ConfigError, match="bound"):
        DeLoRA(4, bound)


def test_files_that_cannot_be_are_refused() -> None:
    assert DeLoRA.peft is not None
    t = {name: torch.zeros(1) for name in NAMES}
    with pytest.raises(ShapeError, match="belong together"):
        DeLoRA.peft.read(t, {}, None)
    del t["delora_w_norm"]
    with pytest.raises(FormatError, match="delora_w_norm"):
        DeLoRA.peft.read(t, {}, None)
