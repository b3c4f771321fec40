"""BitFit, HiRA, GraLoRA and MiSS against peft; MoRA against its formula; what they cost."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import BeftConfig, GraloraConfig, HiraConfig, MissConfig
from peft.tuners.beft.layer import Linear as BeftLinear
from peft.tuners.gralora.layer import Linear as GraloraLinear
from peft.tuners.hira.layer import Conv2d as HiraConv2d
from peft.tuners.hira.layer import Linear as HiraLinear
from peft.tuners.miss.layer import MissLinear
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from imgadapt import attach, merge, parameters
from imgadapt.errors import ConfigError, FormatError, ImgadaptError, ShapeError, TargetError
from imgadapt.file import AdapterFile
from imgadapt.formats import Part
from imgadapt.methods import BitFit, GraLoRA, HiRA, Method, MiSS, MoRA
from imgadapt.sites import Site


def miss(layer: nn.Linear, **settings: Any) -> Any:
    return MissLinear(layer, "default", MissConfig(**settings), r=settings["r"])


def gralora(layer: nn.Linear, **settings: Any) -> Any:
    return GraloraLinear(layer, "default", "layer", GraloraConfig(**settings), r=settings["r"])


PEERS: dict[str, tuple[type[Method], Any, dict[str, Any], nn.Module, tuple[int, ...]]] = {
    "BEFT": (BitFit, lambda m: BeftLinear(m, "default", BeftConfig()), {}, nn.Linear(10, 12), (3, 5, 10)),
    "HiRA": (HiRA, lambda m: HiraLinear(m, "default", HiraConfig(r=3), r=3), {"r": 3}, nn.Linear(10, 12), (3, 5, 10)),
    "HiRA conv": (
        HiRA,
        lambda m: HiraConv2d(m, "default", HiraConfig(r=3), r=3),
        {"r": 3},
        nn.Conv2d(6, 8, (3, 2), stride=2, padding=1),
        (2, 6, 7, 9),
    ),
    **{
        name: (GraLoRA, lambda m, s=settings: gralora(m, **s), settings, nn.Linear(12, 24), (3, 5, 12))
        for name, settings in {
            "GraLoRA": {"r": 6, "hybrid_r": 0, "gralora_k": 3, "alpha": 4},
            "GraLoRA hybrid": {"r": 4, "hybrid_r": 3, "gralora_k": 2, "alpha": 5},
        }.items()
    },
    **{
        name: (MiSS, lambda m, s=settings: miss(m, **s), settings, nn.Linear(12, 20), (3, 5, 12))
        for name, settings in {
            "MiSS": {"r": 4, "mini_r": 1, "init_weights": True},
            "MiSS, inputs not divided": {"r": 5, "mini_r": 1, "init_weights": True},
            "MiSS mini": {"r": 5, "mini_r": 4, "init_weights": "mini"},
            "MiSS bat": {"r": 4, "mini_r": 1, "init_weights": "bat"},
        }.items()
    },
}  # fmt: skip
every_peer = pytest.mark.parametrize("name", PEERS)


def named(peer: Any) -> dict[str, Tensor]:
    """The peer's tensors as peft's files call them, with random values."""
    found = {}
    for key, tensor in peer.named_parameters():
        if "base_layer" not in key:
            tensor.data.normal_(std=0.3)
            found[key.replace(".default", "")] = tensor.detach().clone()
    return found


@every_peer
def test_a_file_of_pefts_acts_as_it_does_there_and_is_written_back(name: str) -> None:
    kind, make, config, layer, shape = PEERS[name]
    peer, x = make(layer), torch.randn(shape)
    theirs, weight = named(peer), peer.base_layer.weight.detach().clone()
    assert kind.peft is not None
    assert set(theirs) <= {*kind.peft.ends}
    method, tensors = kind.peft.read(theirs, config, tuple(weight.shape))
    assert method.scale == pytest.approx(
        config.get("alpha", 1) / (config["r"] + config["hybrid_r"]) if "alpha" in config else 1
    )
    model: Any = nn.Sequential(type(layer)(**_geometry(layer)))
    model.load_state_dict(
        {f"0.{key.removeprefix('base_layer.')}": v for key, v in peer.state_dict().items() if "base_layer" in key}
    )
    attach(model, AdapterFile({"model.0": Part(method, tensors)}))
    torch.testing.assert_close(model(x), peer(x), rtol=1e-5, atol=1e-5)
    peer.merge()
    merge(model)
    torch.testing.assert_close(peer.base_layer.weight, model[0].weight, rtol=1e-5, atol=1e-5)
    written, fields = kind.peft.write(method, tensors, tuple(weight.shape))
    assert written.keys() == theirs.keys()
    assert all(torch.equal(written[key], theirs[key]) for key in theirs)
    assert fields == config


def _geometry(layer: Any) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    kept = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
    return {name: getattr(layer, name) for name in kept}


@pytest.mark.parametrize("kind", [BitFit, GraLoRA, MiSS])
def test_what_peft_has_for_linear_layers_only_is_not_written_for_others(kind: type[Method]) -> None:
    assert kind.peft is not None
    with pytest.raises(FormatError, match="linear layers only"):
        kind.peft.write(kind(), {}, (8, 4, 3, 3))


def test_pefts_gralora_and_miss_of_a_wrong_kind_are_refused() -> None:
    assert MiSS.peft is not None
    assert GraLoRA.peft is not None
    for said in ("olora", 7, [], None):
        with pytest.raises(FormatError, match="init_weights"):
            MiSS.peft.read({"miss_block": torch.zeros(4, 8)}, {"init_weights": said}, None)
    tensors = {"gralora_A": torch.zeros(2, 4, 6), "gralora_B": torch.zeros(2, 6, 8)}
    for alpha in ("64", None, True, [], -1, float("nan")):
        with pytest.raises(ImgadaptError, match="alpha"):
            GraLoRA.peft.read(tensors, {"alpha": alpha}, None)
    for wrong in (
        {"gralora_A": torch.zeros(4)},
        {"gralora_B": torch.zeros(3, 6, 8)},
        {"gralora_B": torch.zeros(2, 5, 8)},
    ):
        with pytest.raises(ShapeError):
            GraLoRA.peft.read({**tensors, **wrong}, {}, None)


def mora(kind: int, core: Tensor, x: Tensor, out: int) -> Tensor:
    """kongds/MoRA, peft-mora/src/peft/tuners/lora/layer.py: what `_apply_mora` gives for one input, block by block."""
    size, inputs = len(core), len(x)
    count = math.ceil(inputs / size)
    filled = [x[k % inputs] for k in range(count * size)]
    blocks = [torch.stack(filled[k * size : (k + 1) * size]) for k in range(count)]
    if kind == 1:
        gathered = core @ torch.stack(blocks).sum(0)
    else:
        half, made = size // 2, []
        for k, block in enumerate(blocks):
            angle = torch.tensor([k / 10000 ** (2 * i / size) for i in range(half)])
            a, b = block[:half], block[half:]
            made.append(core @ torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]))
        gathered = torch.cat(made)
    return torch.stack([gathered[k % len(gathered)] for k in range(out)])


@pytest.mark.parametrize("kind", [1, 6])
@pytest.mark.parametrize(("inputs", "out"), [(12, 24), (20, 12), (13, 31), (24, 24), (50, 7)])
def test_mora_is_its_references(kind: Any, inputs: int, out: int) -> None:
    method, site, x = MoRA(1, kind), Site((out, inputs)), torch.randn(inputs)
    (size, _), *_ = method.shapes(site).values()
    root = int(math.sqrt(inputs + out) + 0.5)
    assert size == (min(root, inputs, out) if kind == 1 else min(root, inputs, out) // 2 * 2)
    t = {"mora": torch.randn(size, size)}
    expected = mora(kind, t["mora"], x, out)
    torch.testing.assert_close(method.delta(t, site, None) @ x, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        method.act(method.operands(t, site, None), site, x[None], None, None)[0], expected, rtol=1e-4, atol=1e-4
    )


def test_mora_has_the_numbers_of_a_lora() -> None:
    for site in (Site((1280, 1280)), Site((5120, 640)), Site((640, 320, 3, 3), "conv")):
        count = math.prod(MoRA(8, 1).shapes(site)["mora"])
        assert count == pytest.approx(8 * (site.rows + site.fan_in), rel=0.02)


@pytest.mark.parametrize("site", [Site((20, 12)), Site((16, 8, 3, 2), "conv"), Site((16, 2, 3, 3), "conv", groups=4)])
def test_mini_repeats_its_outputs_live_and_merged(site: Site) -> None:
    method = MiSS(2, "mini", 4).at(site)
    kernel: Any = site.kernel
    layer = nn.Conv2d(8, 16, kernel, groups=site.groups) if kernel else nn.Linear(12, 20)
    model: Any = nn.Sequential(layer)
    x = torch.randn(2, 8, 5, 6) if site.kernel else torch.randn(3, 12)
    base = model(x)
    attach(model, method, targets="*")
    assert torch.equal(model(x), base)
    with torch.no_grad():
        for tensor in parameters(model):
            tensor.normal_()
    live = model(x)
    assert (live - base).abs().max() > 0.1
    merge(model)
    torch.testing.assert_close(model(x), live, rtol=1e-5, atol=1e-5)


def test_bitfit_passes_by_layers_without_a_bias_unless_they_are_named() -> None:
    model: Any = nn.ModuleDict({"to_q": nn.Linear(8, 8, bias=False), "to_out": nn.Linear(8, 8)})
    attach(model, BitFit(), targets=["to_*"])
    assert len(parameters(model)) == 1
    with pytest.raises(TargetError, match="to_q: bitfit cannot act on it: it has no bias"):
        attach(model, BitFit(), name="other", targets=["to_q"])


WRONG: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (HiRA, (0,), {}), (HiRA, (True,), {}), (MoRA, (1.5,), {}), (MoRA, (8, 2), {}), (MoRA, (8, True), {}),
    (GraLoRA, (16,), {"k": 3}), (GraLoRA, (16,), {"k": 0}), (GraLoRA, (16,), {"hybrid_rank": -1}),
    (GraLoRA, (16,), {"hybrid_rank": False}), (GraLoRA, (16,), {"alpha": 0}), (MiSS, (0,), {}),
    (MiSS, (4, "bone"), {}), (MiSS, (4, "mini", 0), {}), (MiSS, (4, []), {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "named"), WRONG)
def test_settings_that_cannot_be_are_refused(kind: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        kind(*given, **named)


def test_a_rank_of_any_size_is_no_size_of_memory() -> None:
    site = Site((64, 48))
    assert MoRA(10**400).shapes(site) == {"mora": (48, 48)}
    for method in (HiRA(10**30), GraLoRA(10**30), MiSS(10**30)):
        assert method.check(site)
    assert MiSS(10**30, "bat").at(site).rank == 16
    assert MiSS(4, "mini", 10**30).at(site).mini_rank == 64


COSTS: Mapping[str, tuple[Method, float]] = {
    "BitFit": (BitFit(), 1.0),
    "HiRA": (HiRA(16), 1 + 16 / 1024),
    "GraLoRA": (GraLoRA(16, k=4), 1 + 2 * 16 / 1280),
    "MoRA": (MoRA(8, 1), 1 + 143**2 / 1280**2),
    "MoRA, turned": (MoRA(8, 6), 1 + 1278 * 142 / 1280**2 + 142 * 142 / 1280**2),
    "MiSS": (MiSS(32), 1 + 32 / 1280),
    "MiSS mini": (MiSS(32, "mini", 64), 1 + 32 * 64 / 1280**2),
    "MiSS bat": (MiSS(32, "bat"), 1 + 32 / 1024),
}
"""Of a forward over 1,024 tokens, in the layer's own; the docs' column."""


@pytest.mark.parametrize("name", COSTS)
def test_flops(name: str) -> None:
    method, exactly = COSTS[name]
    model = nn.Sequential(nn.Linear(1280, 1280)).requires_grad_(False)
    attach(model, method, targets="*")
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1024, 1280))
    assert counter.get_total_flops() / (2 * 1024 * 1280**2) == pytest.approx(exactly, abs=1e-5)
