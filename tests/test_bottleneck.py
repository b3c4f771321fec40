"""Bottleneck and Compacter, which are no change of a weight: their formula, live; all else says so."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from imgadapt import Entry, MergeRecipe, attach, collect, combine, disabled, load, merge, parameters, save, set_weights
from imgadapt.combining.keep import Keep
from imgadapt.combining.resizing import resize
from imgadapt.errors import ConfigError, FormatError, StateError
from imgadapt.live import slots
from imgadapt.methods import Bottleneck, Compacter, DoRA, LoRA, Method
from imgadapt.sites import Site

METHODS: list[Method] = [
    Bottleneck(4, alpha=6),
    Bottleneck(4, alpha=6, placement="sequential", nonlinearity="relu", bias=False),
    Compacter(6, alpha=9, n=3, kron_rank=2, nonlinearity="silu"),
    Compacter(4, alpha=6, placement="sequential", nonlinearity="tanh"),
]
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 24), (4, 5, 12)),
    "conv": (lambda: nn.Conv2d(6, 12, (3, 2), stride=2, padding=1), (4, 6, 7, 9)),
    "conv grouped": (lambda: nn.Conv2d(12, 24, 3, padding=1, groups=2), (4, 12, 5, 6)),
}
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name} {m.placement}")
every_layer = pytest.mark.parametrize("layer", LAYERS)


def build(layer: str, method: Method) -> tuple[Any, Tensor]:
    """A model of two such layers side by side, and their input; trained."""
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    model = nn.ModuleDict({"a": make(), "b": make()}).requires_grad_(False)
    attach(model, method, targets="*")
    with torch.no_grad():
        for tensor in parameters(model):
            tensor.normal_(std=0.3)
    return model, torch.randn(shape)


def expected(model: Any, name: str, x: Tensor, strength: float | Tensor = 1.0) -> Tensor:
    """The formula, written out: convolutions of each group by itself, Kronecker products by torch.kron."""
    layer = model[name]
    (slot,) = layer
    m, t, base = slot.method, slot.tensors(), layer.base
    if isinstance(m, Compacter):
        t = {f"neck_{end}": t[f"compacter_{end}"] for end in ("down_b", "up_b")} | {
            f"neck_{end}": sum(
                (
                    torch.kron(a, u @ v)
                    for a, u, v in zip(t["compacter_a"], t[f"compacter_{end}_u"], t[f"compacter_{end}_v"], strict=True)
                ),
                torch.zeros(()),
            )
            for end in ("down", "up")
        }
    f = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}[m.nonlinearity]
    down_b, up_b = (t.get(f"neck_{end}_b", torch.zeros(())) for end in ("down", "up"))

    def last(tensor: Tensor) -> Tensor:
        return tensor if isinstance(base, nn.Linear) else tensor.movedim(1, -1)

    if m.placement == "sequential":
        bias = base.bias if isinstance(base, nn.Linear) else base.bias[:, None, None]
        h = last(base(x) - bias) @ t["neck_down"].t()
        made = f(h + down_b) @ t["neck_up"].t() + up_b
    elif isinstance(base, nn.Linear):
        made = f(x @ t["neck_down"].t() + down_b) @ t["neck_up"].t() + up_b
    else:
        down = t["neck_down"].reshape(m.rank, *base.weight.shape[1:])
        parts = [F.conv2d(part, down, None, base.stride, base.padding) for part in x.chunk(base.groups, 1)]
        ups = t["neck_up"].chunk(base.groups)
        made = torch.cat([f(last(h) + down_b) @ up.t() for h, up in zip(parts, ups, strict=True)], -1) + up_b
    made = made if isinstance(base, nn.Linear) else made.movedim(-1, 1)
    factor = strength.reshape(-1, *(1 for _ in made.shape[1:])) if isinstance(strength, Tensor) else strength
    return base(x) + factor * m.scale * made


@every_layer
@every_method
def test_live_is_the_formula_at_any_strength_and_for_each_sample(method: Method, layer: str) -> None:
    model, x = build(layer, method)
    assert method.scale == 1.5
    base = model["a"].base(x)
    for strength in (1.0, -0.4):
        set_weights(model, {"default": strength})
        torch.testing.assert_close(model["a"](x), expected(model, "a", x, strength), rtol=1e-4, atol=1e-5)
        assert (model["a"](x) - base).abs().max() > 0.05
    each = torch.tensor([0.0, 1.0, -2.0, 0.5])
    set_weights(model, {"default": each})
    torch.testing.assert_close(model["a"](x), expected(model, "a", x, each), rtol=1e-4, atol=1e-5)
    with disabled(model):
        assert torch.equal(model["a"](x), base)


@every_layer
@every_method
def test_beside_another_adapter_it_reads_the_base_alone(method: Method, layer: str) -> None:
    model, x = build(layer, method)
    own = model["b"](x)
    base = model["b"].base(x)
    attach(model, LoRA(2, alpha=3), name="other", targets="*")
    with torch.no_grad():
        for tensor in parameters(model, "other"):
            tensor.normal_(std=0.3)
    both = model["b"](x)
    set_weights(model, {"default": 0.0})
    torch.testing.assert_close(both - own, model["b"](x) - base, rtol=1e-4, atol=1e-5)


@every_method
def test_bf16_stays_bf16_and_autocast_follows_the_base(method: Method) -> None:
    model, x = build("conv", method)
    wanted = model["a"](x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model["a"](x)
    model["a"].base.bfloat16()
    half = model["a"](x.bfloat16())
    assert half.dtype == cast.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in parameters(model)} == {torch.float32}
    for found in (cast, half):
        torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.1)


@every_method
def test_files_copies_and_pickles_act_the_same(method: Method, tmp_path: Path) -> None:
    model, x = build("linear", method)
    live = {name: model[name](x) for name in model}
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert all(torch.equal(twin[name](x), live[name]) for name in live)
    path = save(collect(model), tmp_path / "x.safetensors")
    again = nn.ModuleDict({name: model[name].base for name in model})
    attach(again, load(path))
    assert all(torch.equal(again[name](x), live[name]) for name in live)
    assert {slot.method for _, _, slot in slots(again)} == {method}


def test_layers_share_compacters_first_factors_also_from_a_file(tmp_path: Path) -> None:
    model, _ = build("linear", METHODS[2])
    path = save(collect(model), tmp_path / "x.safetensors")
    again = nn.ModuleDict({name: model[name].base for name in model})
    attach(again, load(path), trainable=True)
    for one in (model, again):
        first, second = (slot.tensors() for _, _, slot in slots(one))
        assert first["compacter_a"] is second["compacter_a"]
        assert first["compacter_up_u"] is not second["compacter_up_u"]
        assert sum(tensor.numel() for tensor in parameters(one)) == 3**3 + 2 * (2 * (2 * 6 + 12 + 24) + 6 + 24)


@every_method
def test_what_cannot_be_says_what_to_do(method: Method, tmp_path: Path) -> None:
    model, x = build("linear", method)
    live, file = model["a"](x), collect(model)
    path = save(file, tmp_path / "x.safetensors")
    with pytest.raises(StateError, match=rf"default \({method.name}\) is no change of the weight.* keep it live"):
        merge(model)
    assert torch.equal(model["a"](x), live)
    with pytest.raises(FormatError, match=rf"{method.name}; it is no change of a weight"):
        save(file, tmp_path / "y.safetensors", format="peft")
    with pytest.raises(ConfigError, match=rf"model\.a: {method.name} is no change of the weight.*attach it beside"):
        combine(MergeRecipe((Entry(str(path)), Entry(str(path), 0.5))))
    with pytest.raises(ConfigError, match=f"model.a.*{method.name} is no change of the weight.*keep them"):
        resize(file, Keep(rank=2), name="x")
    with pytest.raises(StateError, match="keep it live"):
        method.delta({}, Site((24, 12)), None)
    with pytest.raises(ConfigError, match="additive"):
        DoRA(method)
    set_weights(model, {"default": 0.0})
    merge(model)  # what is off is in nobody's way


def test_a_strength_of_none_is_merged_around() -> None:
    model, x = build("linear", METHODS[0])
    attach(model, LoRA(2), name="other", targets="*")
    with torch.no_grad():
        for tensor in parameters(model, "other"):
            tensor.normal_()
    set_weights(model, {"default": 0.0})
    live = model["a"](x)
    merge(model)
    torch.testing.assert_close(model["a"](x), live, rtol=1e-5, atol=1e-5)


WRONG: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (Bottleneck, (0,), {}), (Bottleneck, (4, -1), {}), (Bottleneck, (4,), {"placement": "after"}),
    (Bottleneck, (4,), {"placement": []}), (Bottleneck, (4,), {"nonlinearity": "exp"}),
    (Compacter, (4,), {"n": 3}), (Compacter, (4,), {"kron_rank": 0}), (Compacter, (4,), {"nonlinearity": None}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "named"), WRONG)
def test_settings_that_cannot_be_are_refused(kind: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        kind(*given, **named)


def test_a_rank_of_any_size_is_no_size_of_memory() -> None:
    site = Site((24, 12))
    for method in (Bottleneck(10**30), Compacter(4 * 10**30), Compacter(4, kron_rank=10**30)):
        assert "is above" in (method.check(site) or "")
    assert Compacter(8 * 10**9, n=8 * 10**9).at(site).n == 4


def test_what_it_costs() -> None:
    for method in (Bottleneck(16), Bottleneck(16, placement="sequential"), Compacter(16)):
        model = nn.Sequential(nn.Linear(320, 320)).requires_grad_(False)
        attach(model, method, targets="*")
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1024, 320))
        extra = counter.get_total_flops() / (2 * 1024 * 320**2) - 1
        assert extra == pytest.approx(2 * 16 / 320, rel=0.02)


def test_a_file_whose_tensors_do_not_belong_together_is_refused() -> None:
    t = {name: torch.zeros(shape) for name, shape in Compacter(4).shapes(Site((24, 12))).items()}
    assert Compacter.infer(t, None) == Compacter(4)
    for name, shape in (("a", (4, 4, 3)), ("a", ()), ("down_u", (4, 1, 2)), ("down_b", (5,))):
        with pytest.raises(FormatError, match="sizes differ"):
            Compacter.infer({**t, f"compacter_{name}": torch.zeros(shape)}, None)
    with pytest.raises(FormatError, match="ranks differ"):
        Bottleneck.infer({"neck_down": torch.zeros(4, 12), "neck_up": torch.zeros(24, 3)}, None)
