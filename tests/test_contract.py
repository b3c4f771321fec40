"""The contract that every method keeps, over METHODS x layers x dtypes."""

import contextlib
import copy
import functools
import inspect
import io
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from imgadapt import (
    BOFT,
    IA3,
    OFT,
    DoRA,
    Full,
    GLoRA,
    LoHa,
    LoKr,
    LoRA,
    Norm,
    attach,
    detach,
    disabled,
    merge,
    parameters,
    set_weights,
    unmerge,
)
from imgadapt.errors import StateError
from imgadapt.layer import AdapterLayer
from imgadapt.live import adapters as adapters_of
from imgadapt.methods import METHODS, Method
from imgadapt.sites import Site

Case = tuple[Callable[[], nn.Module], tuple[int, ...]]


class Attend(nn.MultiheadAttention):
    """Self-attention with one argument."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] # one argument for a Sequential
        return super().forward(x, x, x)[0]


def _norm(layer: Any) -> nn.Module:
    """A norm whose weight and bias are not 1 and 0."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    return layer


LAYERS: dict[str, Case] = {
    "linear": (lambda: nn.Linear(12, 24), (3, 7, 12)),
    "linear without bias": (lambda: nn.Linear(20, 12, bias=False), (5, 20)),
    "conv 1x1": (lambda: nn.Conv2d(8, 16, 1), (2, 8, 5, 7)),
    "conv 3x3": (lambda: nn.Conv2d(8, 16, 3, padding=1), (2, 8, 9, 7)),
    "conv strided": (lambda: nn.Conv2d(8, 16, 3, stride=2, padding=1), (2, 8, 9, 8)),
    "conv dilated": (lambda: nn.Conv2d(8, 16, 3, dilation=(2, 1), padding=(2, 1)), (2, 8, 9, 8)),
    "conv grouped": (lambda: nn.Conv2d(8, 16, 3, padding=1, groups=4), (2, 8, 9, 8)),
    "conv depthwise": (lambda: nn.Conv2d(8, 16, 3, padding=1, groups=8), (2, 8, 5, 8)),
    "conv non-square": (lambda: nn.Conv2d(8, 16, (3, 5), stride=(1, 2), padding=(0, 2)), (2, 8, 9, 11)),
    "conv reflect": (lambda: nn.Conv2d(8, 16, (3, 5), padding=(1, 2), padding_mode="reflect"), (2, 8, 9, 8)),
    "conv circular strided": (
        lambda: nn.Conv2d(8, 16, 3, stride=2, padding=(1, 2), padding_mode="circular"), (2, 8, 8, 9)),
    "conv same": (lambda: nn.Conv2d(8, 16, (3, 4), padding="same", dilation=2), (2, 8, 9, 8)),
    "conv same, replicate": (lambda: nn.Conv2d(8, 16, (3, 4), padding="same", padding_mode="replicate"), (2, 8, 9, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 16, 3, padding=1), (2, 8, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 8, (1, 3, 2), padding=(0, 1, 0)), (2, 4, 3, 5, 4)),
    "linear, wide": (lambda: nn.Linear(96, 128), (2, 5, 96)),
    "conv 3x3, wide": (lambda: nn.Conv2d(48, 64, 3, padding=1), (2, 48, 5, 4)),
    "embedding": (lambda: nn.Embedding(18, 12), (2, 7)),
    "fused projection": (lambda: Attend(12, 2, batch_first=True), (2, 5, 12)),
    "layer norm": (lambda: _norm(nn.LayerNorm(12)), (2, 5, 12)),
    "group norm": (lambda: _norm(nn.GroupNorm(2, 6)), (2, 6, 5, 4)),
    "rms norm": (lambda: _norm(nn.RMSNorm(12)), (2, 5, 12)),
}  # fmt: skip

EVERY = "*[0-9j]"
"""The layer of a test's model by its end, `model.0` or `model.0.in_proj`: `*` would pass by embeddings and norms."""

CONFIGURED: list[Method] = [
    LoRA(rank=4, alpha=2),
    LoRA(rank=3, alpha=5, rank_stabilised=True),
    LoRA(rank=3, alpha=2, tucker=True),
    LoHa(rank=2, alpha=3),
    LoHa(rank=3, alpha=2, tucker=True),
    LoKr(rank=1, alpha=2, factor=3),
    LoKr(rank=2, alpha=3, both=True, tucker=True),
    LoKr(rank=None, factor=8),
    OFT(block_size=4),
    OFT(block_size=4, rescaled=True, constraint=0.1),
    OFT(block_size=4, side="input"),
    OFT(block_size=3, side="input", neumann=5, rescaled=True, constraint=0.5),
    OFT(block_size=6, side="input", shared=True),
    BOFT(block_size=4, factors=2, rescaled=True, constraint=0.1),
    BOFT(block_size=2, factors=3),
    BOFT(block_size=2, factors=2, side="input"),
    BOFT(block_size=4, factors=1, side="input", rescaled=True),
    DoRA(LoRA(rank=3, alpha=2)),
    DoRA(LoRA(rank=3, alpha=2), axis="input"),
    DoRA(LoHa(rank=2, alpha=3)),
    DoRA(LoHa(rank=2, alpha=3), axis="input"),
    DoRA(LoKr(rank=1, alpha=2, factor=3)),
    DoRA(LoKr(rank=None), axis="input"),
    GLoRA(rank=3, alpha=2),
    IA3(),
    IA3(axis="input", absolute=True),
    Full(),
    Norm(),
]
"""Of every method that is no row of docs/methods.md at least one; where a method has a scale, it is not 1."""


def in_the_docs() -> list[Method]:
    """The configurations that the rows of docs/methods.md show in their second column, as code, parted by `;`."""
    page = (Path(__file__).parents[1] / "docs" / "methods.md").read_text("utf-8")
    table = page.partition("\n## Every method\n")[2].partition("\n## ")[0]
    shown = re.findall(r"^\| [^|]+ \| `([^|`]+)` \|", table, re.MULTILINE)
    known = {kind.__name__: kind for kind in METHODS}
    return [eval(text, {"__builtins__": {}}, known) for row in shown for text in row.split("; ")]


CONFIGURED.extend(in_the_docs())


def _site(layer: str) -> Site:
    site = Site.of(LAYERS[layer][0]())
    assert site is not None
    return site


SITES = {layer: _site(layer) for layer in LAYERS}
Test = Callable[..., None]


def _short(value: Method) -> str:
    """A name for a test: a method without the settings that it leaves alone."""
    changed = ((f.name, getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) != f.default)
    said = ",".join(f"{name}={_short(v) if isinstance(v, Method) else v}" for name, v in changed)
    return f"{type(value).__name__}({said})"


def _each(methods: list[Method]) -> Callable[[Test], Test]:
    return pytest.mark.parametrize("method", methods, ids=_short)


def _on_every_layer(test: Test) -> Test:
    """A test of a method and a layer as one of the method, on every layer that it acts on: thousands of tests would
    take longer to begin than to run. What fails says on which layers; that each refusal is right is tested by itself.
    """

    def on_all(method: Method, **more: Any) -> None:
        layers = [layer for layer, site in SITES.items() if method.check(site) is None]
        assert layers
        failed: list[Exception] = []
        for layer in layers:
            try:
                test(method=method, layer=layer, **more)
            except Exception as error:
                error.add_note(f"on the layer: {layer}")
                failed.append(error)
        if failed:
            raise ExceptionGroup(_short(method), failed)

    wanted = inspect.signature(test).parameters.values()
    made: Any = functools.update_wrapper(on_all, test)
    made.__signature__ = inspect.Signature([one for one in wanted if one.name != "layer"])
    return made


def every_pair(test: Test) -> Test:
    return _each(CONFIGURED)(_on_every_layer(test))


def every_merging_pair(test: Test) -> Test:
    return _each([m for m in CONFIGURED if m.merges])(_on_every_layer(test))


_ANYWHERE = [m for m in CONFIGURED if all(m.check(SITES[name]) is None for name in ("linear", "conv 3x3"))]
every_method = _each(_ANYWHERE)
every_merging_method = _each([m for m in _ANYWHERE if m.merges])


def build(layer: str) -> tuple[Any, Tensor]:
    """A model with one layer, and an input for it."""
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    return nn.Sequential(make()), torch.randint(0, 18, shape) if layer == "embedding" else torch.randn(shape)


def filled(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    """Random values in every tensor of an adapter, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters(model, name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def dense(model: Any, x: Tensor, changes: dict[str, float]) -> Tensor:
    """What base weight + sum of weight * scale * delta gives, by the base layer's own forward, in float64."""
    layer = model[0]
    assert isinstance(layer, AdapterLayer)
    base = copy.deepcopy(layer.base).double()
    with torch.no_grad():
        for slot in layer:
            weight, bias = _parameters(base, layer.site)
            pristine = layer.site.seen(_parameters(layer.base, layer.site)[0].detach().double())
            tensors, gain = slot.tensors(torch.float64), changes[slot.name] * slot.method.scale
            weight += gain * layer.site.seen(slot.method.delta(tensors, layer.site, pristine))
            if (change := slot.method.bias_delta(tensors)) is not None:
                bias += gain * change
        return base(x.double() if x.is_floating_point() else x)


def _parameters(module: Any, site: Site) -> tuple[Any, Any]:
    return module._parameters[site.parameter], module._parameters.get(site.bias)


def test_every_method_is_in_the_contract() -> None:
    assert {type(method) for method in CONFIGURED} == set(METHODS)


@every_pair
def test_a_fresh_adapter_changes_nothing(layer: str, method: Method) -> None:
    model, x = build(layer)
    before = model(x)
    attach(model, method, targets=EVERY)
    assert torch.equal(model(x), before)


@every_merging_pair
def test_live_equals_the_dense_formula(layer: str, method: Method) -> None:
    model, x = build(layer)
    base = model(x)
    attach(model, method, targets=EVERY, weight=0.7)
    filled(model)
    expected = dense(model, x, {"default": 0.7})
    assert (model(x) - base).abs().max() > 2e-3
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)


@every_merging_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_equals_live_and_unmerge_restores_the_weight_bitwise(
    layer: str, method: Method, dtype: torch.dtype
) -> None:
    model, x = build(layer)
    model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
    before = dict(model[0]._parameters)
    kept = {name: tensor.detach().clone() for name, tensor in before.items() if tensor is not None}
    attach(model, method, targets=EVERY)
    filled(model)
    tolerance = 2e-5 if dtype == torch.float32 else 0.05
    for weight in (1.0, 0.5, -1.0):
        set_weights(model, {"default": weight})
        live = merged = model(x)
        for _ in range(2):  # peft's bf16 weights drift: 1.9 % changed after 21 rounds
            merge(model)
            merge(model)
            merged = model(x)
            unmerge(model)
        assert merged is not live
        size = live.abs().max().item()
        torch.testing.assert_close(merged, live, rtol=tolerance, atol=tolerance * max(1, size))
    detach(model)
    assert all(model[0]._parameters[name] is tensor for name, tensor in before.items())
    assert all(torch.equal(before[name], tensor) for name, tensor in kept.items())


@every_merging_pair
def test_two_adapters_add_up_live_and_merged_in_any_order(layer: str, method: Method) -> None:
    model, x = build(layer)
    attach(model, method, name="a", targets=EVERY, weight=0.5)
    attach(model, second(layer), name="b", targets=EVERY, weight=-2.0)
    filled(model, "a")
    filled(model, "b", 2)
    expected = dense(model, x, {"a": 0.5, "b": -2.0})
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=2e-5)
    merge(model)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=2e-5)
    detach(model, "a")  # while merged: what stays is merged anew from the original weight
    torch.testing.assert_close(model(x).double(), dense_of_original(model, x, {"b": -2.0}), rtol=1e-5, atol=2e-5)


def second(layer: str) -> Method:
    """Another method that acts there: one that reads the base's output, where there is one."""
    others = (OFT(block_size=2), LoRA(rank=2, alpha=3), Norm())
    return next(method for method in others if method.check(_site(layer)) is None)


def dense_of_original(model: Any, x: Tensor, changes: dict[str, float]) -> Tensor:
    unmerge(model)
    expected = dense(model, x, changes)
    merge(model)
    return expected


@every_merging_method
def test_weights_may_change_between_merge_and_unmerge(method: Method) -> None:
    model, x = build("conv 3x3")
    base, kept = model(x), model[0].weight.detach().clone()
    attach(model, method, targets=EVERY)
    filled(model)
    merge(model)
    set_weights(model, {"default": 0.5})  # diffusers' fuse; set_adapters(.5); unfuse corrupts the base by 17 %
    torch.testing.assert_close(model(x).double(), dense_of_original(model, x, {"default": 0.5}), rtol=1e-5, atol=1e-5)
    set_weights(model, {"default": 0})
    assert torch.equal(model(x), base)
    unmerge(model)
    assert torch.equal(model[0].weight, kept)
    assert torch.equal(model(x), base)


@every_method
def test_the_change_is_linear_in_the_weight_and_none_at_zero(method: Method) -> None:
    model, x = build("conv strided")
    base = model(x)
    attach(model, method, targets=EVERY)
    filled(model)
    whole = model(x) - base
    for weight in (0.0, 0.25, -3.0):
        set_weights(model, {"default": weight})
        torch.testing.assert_close(model(x) - base, whole * weight, rtol=1e-4, atol=1e-5)
    set_weights(model, {"default": 0.0})
    assert torch.equal(model(x), base)


@every_merging_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_merge_refuses_what_is_not_finite_and_leaves_every_layer_as_it_was(method: Method, bad: float) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    kept = [layer.weight for layer in model]
    attach(model, method, targets=EVERY)
    filled(model)
    with torch.no_grad():
        parameters(model)[-1].view(-1)[0] = bad  # in the second layer: the first is merged by then
    with pytest.raises(StateError, match="NaN or infinity"):
        merge(model)
    assert [layer.weight for layer in model] == kept
    assert not any(layer.merged for layer in model)


@every_merging_method
def test_disabled_is_the_base_also_while_merged_and_restores_the_state(method: Method) -> None:
    model, x = build("conv strided")
    base = model(x)
    attach(model, method, targets=EVERY)
    filled(model)
    live = model(x)
    with disabled(model):
        assert torch.equal(model(x), base)
        with disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), live)
    merge(model)
    merged = model(x)
    with contextlib.suppress(ZeroDivisionError), disabled(model):
        assert torch.equal(model(x), base)
        raise ZeroDivisionError
    assert torch.equal(model(x), merged)
    assert model[0].merged


@every_pair
def test_only_adapter_tensors_learn_and_all_of_them_do(layer: str, method: Method) -> None:
    model, x = build(layer)
    model.requires_grad_(False)
    attach(model, method, targets=EVERY)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    filled(model)
    tensors = parameters(model)
    before = [tensor.detach().clone() for tensor in tensors]
    optimizer = torch.optim.SGD(tensors, lr=0.1)
    model(x).square().mean().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in tensors)
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())


@every_method
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_under_checkpointing(method: Method, reentrant: bool) -> None:
    model, x = build("linear")
    model.requires_grad_(False)
    attach(model, method, targets=EVERY)
    filled(model)
    x.requires_grad_()
    model(x).square().sum().backward()
    plain = [tensor.grad for tensor in parameters(model)]
    for tensor in parameters(model):
        tensor.grad = None
    out = checkpoint(model, x, use_reentrant=reentrant)
    assert isinstance(out, Tensor)
    out.square().sum().backward()
    for a, b in zip(plain, parameters(model), strict=True):
        assert a is not None
        assert b.grad is not None
        torch.testing.assert_close(a, b.grad)


@every_merging_pair
def test_bf16_activations_keep_their_dtype_and_fp32_masters_stay_fp32(layer: str, method: Method) -> None:
    model, x = build(layer)
    model = model.bfloat16()
    attach(model, method, targets=EVERY)
    filled(model)
    x = x.bfloat16() if x.is_floating_point() else x
    out = model(x)
    assert out.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in parameters(model)} == {torch.float32}
    expected = dense(model, x, {"default": 1.0})
    torch.testing.assert_close(out.double(), expected, rtol=0.03, atol=0.05)


@every_method
def test_autocast_gives_the_dtype_the_base_gives(method: Method) -> None:
    model, x = build("conv 3x3")
    attach(model, method, targets=EVERY)
    filled(model)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.03, atol=0.05)


@every_merging_pair
def test_infer_inverts_init_and_pairs_multiply_to_the_delta(layer: str, method: Method) -> None:
    model, _ = build(layer)
    site = _site(layer)
    weight = site.seen(_parameters(model[0], site)[0].detach())
    method = method.at(site)
    tensors = {k: torch.randn_like(v) for k, v in method.init(site, weight).items()}
    assert method.fits(tensors, site) is None
    assert [m for m in METHODS if m.recognises(set(tensors))] == [type(method)]
    inferred = type(method).infer(tensors, method.file_alpha)
    assert inferred.file_alpha == pytest.approx(method.file_alpha)
    assert inferred.scale == pytest.approx(method.scale)
    delta = method.delta(tensors, site, weight)
    assert delta.shape == site.shape
    total = weight.clone()
    method.accumulate(total, tensors, site, weight, -0.7)
    torch.testing.assert_close(total, weight - 0.7 * delta)
    if (pair := method.pair(tensors, site)) is not None:
        torch.testing.assert_close(pair[0] @ pair[1], delta.flatten(1))


@every_pair
def test_the_state_dict_is_that_of_the_base_alone(layer: str, method: Method) -> None:
    model, x = build(layer)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attach(model, method, targets=EVERY)
    filled(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    live = model(x)
    model.load_state_dict({key: value * 2 for key, value in before.items()}, strict=True)
    assert not torch.allclose(model(x), live)
    model.load_state_dict(before, strict=True)
    assert torch.equal(model(x), live)


@every_merging_method
def test_copies_and_pickles_act_the_same_and_share_nothing(method: Method) -> None:
    model, x = build("conv dilated")
    attach(model, method, targets=EVERY)
    filled(model)
    live = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), live)
        merge(twin)
        set_weights(twin, {"default": 3.0})
        detach(twin)
        assert torch.equal(model(x), live)
        assert twin[0].weight is not model[0].weight


@every_merging_method
def test_moves_and_casts_reach_base_adapters_and_the_kept_original(method: Method) -> None:
    model, x = build("conv 3x3")
    attach(model, method, targets=EVERY)
    filled(model)
    live = model.double()(x.double())
    assert live.dtype == torch.float64
    merge(model)
    model.float()
    torch.testing.assert_close(model(x), live.float())
    unmerge(model)
    assert model[0].weight.dtype == torch.float32
    torch.testing.assert_close(model(x), live.float())


@every_method
def test_detach_brings_the_very_modules_back_and_leaves_nothing(method: Method) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 16))
    modules, keys = list(model.modules()), list(model.state_dict())
    calls: list[int] = []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 4, 4, 4)
    for _ in range(3):
        attach(model, method, name="one", targets=EVERY)
        attach(model, method, name="on", targets=EVERY)
        model(x)
        detach(model, "one")
        assert adapters_of(model) == ["on"]
        detach(model, "on")
    assert list(model.modules()) == modules
    assert list(model.state_dict()) == keys
    assert len(calls) == 3  # hooks of the base (accelerate's offload) stay on it


def test_lora_costs_exactly_its_two_thin_products() -> None:
    n, inputs, outputs, rank = 64, 128, 96, 4
    model = nn.Sequential(nn.Linear(inputs, outputs))
    x = torch.randn(n, inputs)
    with FlopCounterMode(display=False) as base, torch.no_grad():
        model(x)
    attach(model, LoRA(rank=rank, alpha=1), targets=EVERY)
    with FlopCounterMode(display=False) as adapted, torch.no_grad():
        model(x)
    assert base.get_total_flops() == 2 * n * inputs * outputs
    assert adapted.get_total_flops() - base.get_total_flops() == 2 * n * rank * (inputs + outputs)
    set_weights(model, {"default": 0.0})
    with FlopCounterMode(display=False) as off, torch.no_grad():
        model(x)
    assert off.get_total_flops() == base.get_total_flops()


def test_lora_keeps_only_the_thin_activation_for_backward() -> None:
    """Beyond the base's input (shared, not copied) a layer keeps (n, rank); peft keeps an fp32 copy of x, too."""
    n, inputs, rank = 64, 128, 4
    model: Any = nn.Sequential(nn.Linear(inputs, 96)).bfloat16().requires_grad_(False)
    attach(model, LoRA(rank=rank, alpha=1), targets=EVERY)
    x = torch.randn(n, inputs, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    known = {t.untyped_storage().data_ptr() for t in (x, model[0].weight, model[0].bias)}
    cast_factors = 2 * rank * (inputs + 96)
    strength = 8  # a number in double precision
    assert sum(size for place, size in kept.items() if place not in known) == 2 * n * rank + cast_factors + strength


@every_method
def test_compiled_in_one_graph_no_strength_recompiles(method: Method) -> None:
    """Backend 'eager': what is tested is the tracing, in one graph, and its guards."""
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(8, 16), nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 16, 1))
    x = torch.randn(4, 8)
    attach(model, method, targets=EVERY)
    filled(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    with torch.compiler.set_stance("fail_on_recompile"):
        for weight in (0.5, 0.0, -2.0):
            set_weights(model, {"default": weight})
            torch.testing.assert_close(compiled(x), model(x))
