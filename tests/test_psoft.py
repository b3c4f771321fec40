"""PSOFT against peft, and what of an SVD its files must have; DoRA over what has tensors that stay."""

import copy
from typing import Any

import pytest
import torch
from peft import PsoftConfig
from peft.tuners.psoft.layer import Linear
from torch import nn

from imgadapt import AdapterFile, attach, parameters
from imgadapt.errors import ConfigError, FormatError, ShapeError
from imgadapt.formats import Part
from imgadapt.methods import PSOFT, DeLoRA, DoRA, VeRA
from imgadapt.methods.base import Peft
from imgadapt.sites import Site

SETTINGS: list[dict[str, Any]] = [
    {},
    {"psoft_mag_a": False, "ab_svd_init": "pissa_init"},
    {"psoft_orth": False, "psoft_mag_b": False},
    {"use_cayley_neumann": True, "cayley_neumann_eps": 0.2},
    {"use_cayley_neumann": True, "num_cayley_neumann_terms": 3},
]


def peft() -> Peft:
    assert PSOFT.peft is not None
    return PSOFT.peft


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_file_of_pefts_acts_as_it_does_there(settings: dict[str, Any]) -> None:
    layer, x = nn.Linear(12, 20), torch.randn(3, 5, 12)
    config: dict[str, Any] = {"r": 4, "psoft_alpha": 7, **settings}
    peer: Any = Linear(copy.deepcopy(layer), "default", PsoftConfig(init_weights=False, **config))
    own = peer.psoft_R["default"]
    with torch.no_grad():
        for tensor in own.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.3)
    t = {f"psoft_R.{name}": tensor.detach() for name, tensor in own.named_parameters()}
    method, tensors = peft().read(t, config, (20, 12))
    model: Any = nn.Sequential(layer)
    attach(model, AdapterFile({"model.0": Part(method, tensors)}))
    torch.testing.assert_close(model(x), peer(x), rtol=1e-4, atol=1e-5)
    (slot,) = model[0]
    delta = slot.method.delta(slot.tensors(), model[0].site, None)
    torch.testing.assert_close(delta, peer.get_delta_weight("default"), rtol=1e-4, atol=1e-5)
    written, fields = peft().write(slot.method, slot.tensors(), (20, 12))
    assert {name: torch.equal(tensor, t[name]) for name, tensor in written.items()} == dict.fromkeys(t, True)
    assert peft().read(written, fields, (20, 12))[0] == method


def test_a_rotation_belongs_to_the_signs_that_an_svd_chose() -> None:
    """peft's files have neither A nor B, and ours do."""
    weight, site, method = torch.randn(20, 12), Site((20, 12)), PSOFT(3)
    t = method.init(site, weight)
    t["psoft_r"] = torch.tensor([0.5, 0.2, -0.3])
    sign = torch.tensor([1.0, -1.0, 1.0])
    other = {**t, "psoft_a": t["psoft_a"] * sign[:, None], "psoft_b": t["psoft_b"] * sign}
    torch.testing.assert_close(other["psoft_b"] @ other["psoft_a"], t["psoft_b"] @ t["psoft_a"])
    assert (method.delta(other, site, None) - method.delta(t, site, None)).norm() > 0.5


def test_without_vectors_the_part_that_turns_keeps_its_size() -> None:
    weight, site, method = torch.randn(20, 12), Site((20, 12)), PSOFT(4, mag_a=False, mag_b=False)
    t = method.init(site, weight)
    t["psoft_r"].normal_()
    changed = t["psoft_b"] @ t["psoft_a"] + method.delta(t, site, None)
    assert float(changed.square().sum()) == pytest.approx(
        float(torch.linalg.svdvals(weight)[:4].square().sum()), rel=1e-4
    )


def test_what_cannot_be_read_or_written_is_refused() -> None:
    t = {"psoft_R.weight": torch.zeros(6)}
    for config in ({"psoft_svd": "lowrank"}, {"ab_svd_init": "x"}):
        with pytest.raises(FormatError):
            peft().read(t, config, None)
    with pytest.raises(ConfigError, match="neumann"):
        peft().read(t, {"use_cayley_neumann": True, "num_cayley_neumann_terms": 10**9}, None)
    with pytest.raises(ShapeError, match="upper triangle"):
        peft().read({"psoft_R.weight": torch.zeros(5)}, {}, None)
    with pytest.raises(FormatError, match="linear layers"):
        peft().write(PSOFT(4), {"psoft_r": torch.zeros(6)}, (4, 4, 3, 3))
    method, tensors = peft().read({"psoft_R.weight": torch.zeros(4950)}, {}, None)
    with pytest.raises(ShapeError, match="its rank is 100"):
        attach(nn.Sequential(nn.Linear(12, 20)), AdapterFile({"model.0": Part(method, tensors)}))


@pytest.mark.parametrize("inner", [DeLoRA(2), PSOFT(3), VeRA(4), VeRA(4, seed=None)], ids=str)
def test_what_stays_in_an_adapter_stays_under_dora(inner: Any) -> None:
    model: Any = nn.Sequential(nn.Linear(12, 20)).requires_grad_(False)
    x = torch.randn(3, 12)
    before = model(x)
    attach(model, DoRA(inner), targets="*")
    torch.testing.assert_close(model(x), before)
    names = {name for name, tensor in next(iter(model[0]))._parameters.items() if tensor.requires_grad}
    assert names == {*inner.shapes(model[0].site), "magnitude"} - {*inner.frozen}
    assert len(parameters(model)) == len(names)
