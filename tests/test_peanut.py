"""PEANuT against peft."""

import pytest
import torch
from peft import PeanutConfig
from peft.tuners.peanut.layer import Linear
from torch import nn

from imgadapt.methods import PEANuT
from imgadapt.sites import Site


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_the_delta_is_pefts_and_its_file_comes_back(depth: int, activation: str) -> None:
    config = PeanutConfig(r=3, depth=depth, act_fn=activation, scaling=0.5, init_weights=False)
    base = nn.Linear(20, 12)
    peer = Linear(base, "default", r=3, config=config)
    t = {name.replace(".default", ""): tensor.detach() for name, tensor in peer.named_parameters() if "peanut_" in name}
    peft = PEANuT.peft
    assert peft is not None
    assert t.keys() <= {*peft.ends}
    said = {"r": 3, "depth": depth, "act_fn": activation, "scaling": 0.5}
    method, own = peft.read(t, said, (12, 20))
    assert method == PEANuT(3, depth, activation, 0.5)
    found = method.scale * method.delta(own, Site((12, 20)), base.weight.detach())
    torch.testing.assert_close(found, peer.get_delta_weight("default").detach())
    tensors, config_of_it = peft.write(method, own, (12, 20))
    assert config_of_it == said
    assert tensors.keys() == t.keys()
    assert all(torch.equal(tensors[name], t[name]) for name in t)
