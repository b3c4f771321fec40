"""OSF against peft: the change, its gradients, and files."""

import copy
from typing import Any

import pytest
import torch
from peft import OSFConfig
from peft.tuners.osf.layer import Linear
from torch import nn

from imgadapt import AdapterFile, attach, parameters
from imgadapt.errors import FormatError, ShapeError, TargetError
from imgadapt.formats import Part
from imgadapt.methods.base import Peft
from imgadapt.methods.osf import OSF

SHAPES = [(12, 20), (20, 12), (12, 12)]


def peft() -> Peft:
    assert OSF.peft is not None
    return OSF.peft


def trained(inputs: int, outputs: int, rank: int) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """A layer, peft's of it with other values, and what peft has of that in a file."""
    layer = nn.Linear(inputs, outputs)
    kept = min(inputs, outputs) - rank
    peer: Any = Linear(copy.deepcopy(layer), "default", OSFConfig(), effective_rank=kept)
    with torch.no_grad():
        for tensor in peer.osf_svd_params["default"].values():
            tensor.add_(torch.randn_like(tensor) * 0.2)
    t = {f"osf_svd_params.{name}": tensor.detach() for name, tensor in peer.osf_svd_params["default"].items()}
    return layer, peer, t


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_file_of_pefts_acts_and_learns_as_it_does_there(inputs: int, outputs: int) -> None:
    layer, peer, t = trained(inputs, outputs, 3)
    x = torch.randn(3, 5, inputs)
    method, tensors = peft().read(t, {"effective_rank": 9}, (outputs, inputs))
    model: Any = nn.Sequential(layer).requires_grad_(False)
    attach(model, AdapterFile({"model.0": Part(method, tensors)}), trainable=True)
    torch.testing.assert_close(model(x), peer(x), rtol=1e-4, atol=1e-5)
    (slot,) = model[0]
    delta = slot.method.delta(slot.tensors(), model[0].site, None)
    torch.testing.assert_close(delta, peer.get_delta_weight("default"), rtol=1e-4, atol=1e-5)
    for live in (model, peer):
        live(x).square().sum().backward()
    for own, name in (("osf_u", "U_low"), ("osf_s", "S_low"), ("osf_v", "V_low")):
        theirs = peer.osf_svd_params["default"][name].grad
        torch.testing.assert_close(slot._parameters[own].grad, theirs, rtol=1e-3, atol=1e-4)
    written, fields = peft().write(method, slot.tensors(), (outputs, inputs))
    assert fields == {"effective_rank": min(inputs, outputs) - 3}
    assert {name: torch.equal(tensor, t[name]) for name, tensor in written.items()} == dict.fromkeys(t, True)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_plain_descent_leaves_what_the_kept_directions_do(inputs: int, outputs: int) -> None:
    model: Any = nn.Sequential(nn.Linear(inputs, outputs)).requires_grad_(False)
    attach(model, OSF(3), targets="*")
    optimizer = torch.optim.SGD(parameters(model), lr=0.05)
    for _ in range(3):
        model(torch.randn(8, inputs)).square().sum().backward()
        optimizer.step()
    weight = model[0].pristine()
    (slot,) = model[0]
    delta = OSF(3).delta({name: tensor.detach() for name, tensor in slot.tensors().items()}, model[0].site, weight)
    u, _, v = torch.linalg.svd(weight, full_matrices=False)
    assert delta.norm() > 0.01
    assert (u[:, :-3].t() @ delta).norm() < 1e-4
    assert (delta @ v[:-3].t()).norm() < 1e-4


def test_what_cannot_be_is_refused() -> None:
    _, _, t = trained(12, 20, 3)
    with pytest.raises(ShapeError, match="their ranks differ"):
        peft().read({**t, "osf_svd_params.S_low": torch.zeros(4)}, {}, None)
    with pytest.raises(FormatError, match="S_low"):
        peft().read({"osf_svd_params.U_low": torch.zeros(4, 3)}, {}, None)
    with pytest.raises(TargetError, match="leaves none of its 12"):
        attach(nn.Sequential(nn.Linear(12, 20)), OSF(12), targets=["model.0"])
