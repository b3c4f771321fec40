"""Quantised bases: adapters act on them, read them, merge into them and leave them, with numbers.

Not here, for want of a CPU implementation: torchao's int4 weight-only layouts of version 2 (plain and preshuffled need
the CUDA library mslk, tile_packed_to_4d CUDA itself, plain_int32 XPU). Their CPU sibling, of torchao's prototypes,
stands in for them: like them it can neither be dequantised by torchao nor made anew.
"""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imgadapt import OFT, DoRA, LoHa, LoKr, LoRA, adapters, attach, detach, merge, parameters, set_weights, unmerge
from imgadapt import dequantize as storages
from imgadapt import layer as layers
from imgadapt.dequantize import follow, restore, weight_of
from imgadapt.errors import StateError
from imgadapt.layer import AdapterLayer
from imgadapt.methods import Method

HIDDEN, OUTPUTS = 96, 64
BF16 = torch.bfloat16


def _replaced(model: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    return nn.Sequential(*(make(layer) for layer in model))


def _four_bit(model: Any, dtype: torch.dtype, *, double: bool, kind: str = "nf4") -> Any:
    bnb: Any = pytest.importorskip("bitsandbytes")

    def make(layer: nn.Linear) -> nn.Module:
        own = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, compute_dtype=dtype, compress_statistics=double, quant_type=kind
        )
        own.load_state_dict(layer.state_dict())
        return own.to(dtype).to("cpu")  # which quantises

    return _replaced(model, make)


def _eight_bit(model: Any, dtype: torch.dtype) -> Any:
    bnb: Any = pytest.importorskip("bitsandbytes")

    def make(layer: nn.Linear) -> nn.Module:
        own = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
        own.load_state_dict(layer.state_dict())
        return own.to("cpu")

    return _replaced(model, make)


def _gguf(model: Any, dtype: torch.dtype, *, kind: str) -> Any:
    gguf: Any = pytest.importorskip("gguf")
    utils: Any = pytest.importorskip("diffusers.quantizers.gguf.utils")
    quant = gguf.GGMLQuantizationType[kind]

    def make(layer: nn.Linear) -> nn.Module:
        own = utils.GGUFLinear(layer.in_features, layer.out_features, True, compute_dtype=dtype)
        own.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
        if kind == "Q4_K":
            stored = _q4_k(layer.out_features, layer.in_features)
        else:
            stored = gguf.quants.quantize(layer.weight.detach().numpy(), quant)
        own.weight = utils.GGUFParameter(torch.from_numpy(stored), quant_type=quant)
        return own

    return _replaced(model, make)


def _q4_k(rows: int, columns: int) -> Any:
    """Blocks of 256 as llama.cpp has them (two fp16 scales, 12 bytes of 6-bit scales, 128 of nibbles): no Python
    package makes them, so their bits are random.
    """
    draw = np.random.default_rng(0)
    blocks = draw.integers(0, 256, (rows * columns // 256, 144), dtype=np.uint8)
    blocks[:, :4] = np.array([1e-4, 7e-4], np.float16).view(np.uint8)  # d, dmin: values within about 0.05
    return blocks.reshape(rows, -1)


def _torchao(model: Any, dtype: torch.dtype, *, kind: str) -> Any:
    quantization: Any = pytest.importorskip("torchao.quantization")
    if kind == "int4 packed":
        int4: Any = pytest.importorskip("torchao.prototype.quantization.int4")
        config = int4.PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)
    else:
        config = {
            "int8": lambda: quantization.Int8WeightOnlyConfig(set_inductor_config=False),
            "int8 in groups": lambda: quantization.Int8WeightOnlyConfig(
                granularity=quantization.PerGroup(32), set_inductor_config=False
            ),
            "int4 in int8": lambda: quantization.IntxWeightOnlyConfig(
                weight_dtype=torch.int4,  # pyright: ignore[reportAttributeAccessIssue] # made when torch is imported
                granularity=quantization.PerGroup(32),
                mapping_type=quantization.MappingType.ASYMMETRIC,
            ),
            "float8": lambda: quantization.Float8WeightOnlyConfig(set_inductor_config=False),
        }[kind]()
    model = copy.deepcopy(model).to(dtype)
    quantization.quantize_(model, config)
    return model


def _cast(model: Any, dtype: torch.dtype) -> Any:
    hooks: Any = pytest.importorskip("diffusers.hooks")
    model = copy.deepcopy(model).to(dtype)
    hooks.apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    return model


@dataclass(frozen=True)
class Kind:
    """One storage: how a model of two layers gets it, and what it is worth.

    coarse: ‖dequantised - weight‖ / ‖weight‖, at most, as quantised by the library; None: not made from a weight.
    merges: whether it can be merged into.
    backward: whether the base passes gradients on to its input.
    dtype: of the computation, where a test takes but one.
    """

    make: Callable[[Any, torch.dtype], Any]
    coarse: float | None
    merges: bool = True
    backward: bool = True
    dtype: torch.dtype = torch.float32


KINDS = {
    "nf4": Kind(lambda m, d: _four_bit(m, d, double=False), 0.1),
    "nf4 double": Kind(lambda m, d: _four_bit(m, d, double=True), 0.1, dtype=BF16),
    "fp4 double": Kind(lambda m, d: _four_bit(m, d, double=True, kind="fp4"), 0.15),
    "bnb int8": Kind(_eight_bit, 0.01),
    "gguf Q8_0": Kind(lambda m, d: _gguf(m, d, kind="Q8_0"), 0.01),
    "gguf Q4_0": Kind(lambda m, d: _gguf(m, d, kind="Q4_0"), 0.1, dtype=BF16),
    "gguf Q4_K": Kind(lambda m, d: _gguf(m, d, kind="Q4_K"), None, merges=False),
    "torchao int8": Kind(lambda m, d: _torchao(m, d, kind="int8"), 0.01),
    "torchao int8 in groups": Kind(lambda m, d: _torchao(m, d, kind="int8 in groups"), 0.01),
    "torchao int4 in int8": Kind(lambda m, d: _torchao(m, d, kind="int4 in int8"), 0.1),
    "torchao int4 packed": Kind(lambda m, d: _torchao(m, d, kind="int4 packed"), 0.1, merges=False, backward=False),
    "torchao float8": Kind(lambda m, d: _torchao(m, d, kind="float8"), 0.04, dtype=BF16),
    "float8 cast": Kind(_cast, 0.04, dtype=BF16),
}
MERGING = [name for name, kind in KINDS.items() if kind.merges]

METHODS: list[Method] = [
    LoRA(rank=4, alpha=2),
    LoHa(rank=2, alpha=3),
    LoKr(rank=2, alpha=3, factor=8),
    OFT(block_size=8),
    OFT(block_size=8, side="input"),
    DoRA(LoRA(rank=4, alpha=2)),
]
ADDITIVE = METHODS[:3]

TOLERANCE = {torch.float32: 1e-5, BF16: 0.01}
"""‖out - expected‖ / ‖expected‖; in bf16 the base's own rounding is 0.002."""

every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name} {getattr(m, 'side', '')}".strip())


def plain(inputs: int = 64) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)).requires_grad_(False)


def build(kind: str, dtype: torch.dtype | None = None) -> tuple[Any, Tensor]:
    """A quantised model, and an input for it; of Q4_K, whose blocks are of 256, one layer only."""
    dtype = dtype or KINDS[kind].dtype
    inputs, model = (256, plain(256)[:1]) if kind == "gguf Q4_K" else (64, plain())
    return KINDS[kind].make(model, dtype).requires_grad_(False), torch.randn(3, 5, inputs, dtype=dtype)


def filled(model: Any, name: str = "default") -> None:
    """Random values in every tensor, as if trained: changes of about a fifth of the weight's size."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters(model, name):
            parameter += torch.randn(parameter.shape, generator=generator) * 0.05


def dense(model: Any, x: Tensor, strength: float) -> Tensor:
    """Dequantised weight + strength * scale * delta, layer by layer in float64."""
    y = x.double()
    for layer in model:
        weight, bias = weight_of(layer.base).detach().double(), layer.bias.detach().double()
        for slot in layer:
            weight = weight + strength * slot.method.scale * slot.method.delta(
                slot.tensors(torch.float64), layer.site, weight
            )
        y = F.linear(y, weight, bias)
    return y


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to b."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Several would wait for one another longer than these layers take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """bitsandbytes logs each cast of an activation."""
    caplog.set_level("ERROR", logger="bitsandbytes")


@every_kind
@every_dtype
def test_the_values_are_those_the_base_computes_with(kind: str, dtype: torch.dtype) -> None:
    model, x = build(kind, dtype)
    for _ in range(2):  # a forward may move what belongs to the weight (bitsandbytes' int8 scales)
        for layer, original in zip(model, plain(x.shape[-1]), strict=False):
            values = weight_of(layer)
            assert values.shape == (layer.out_features, layer.in_features)
            assert not values.requires_grad
            if (coarse := KINDS[kind].coarse) is not None:
                assert 0 < distance(values, original.weight) < coarse
        first = model[0]
        expected = F.linear(x.double(), weight_of(first).double(), first.bias.double())
        assert distance(first(x), expected) < TOLERANCE[dtype]


@every_kind
@every_method
def test_a_fresh_adapter_changes_nothing_and_detaching_leaves_nothing(kind: str, method: Method) -> None:
    model, x = build(kind)
    before, modules = model(x), list(model.modules())
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    weights = [layer.weight for layer in model]
    attach(model, method, targets="*")
    assert torch.equal(model(x), before)
    filled(model)
    assert not torch.equal(model(x), before)
    assert list(model.state_dict()) == list(kept)
    assert all(_same(value, kept[key]) for key, value in model.state_dict().items())
    detach(model)
    assert list(model.modules()) == modules
    assert all(layer.weight is weight for layer, weight in zip(model, weights, strict=True))
    assert torch.equal(model(x), before)


@every_kind
@every_dtype
@every_method
def test_live_equals_the_dequantised_dense_formula(kind: str, dtype: torch.dtype, method: Method) -> None:
    model, x = build(kind, dtype)
    base = model(x)
    attach(model, method, targets="*", weight=0.7)
    filled(model)
    assert distance(model(x), base) > 0.03
    assert distance(model(x), dense(model, x, 0.7)) < TOLERANCE[dtype]


@every_kind
@every_method
def test_every_adapter_tensor_gets_the_gradient_of_the_dense_formula(kind: str, method: Method) -> None:
    model, x = build(kind)
    if not KINDS[kind].backward:
        if method == OFT(block_size=8, side="input"):
            pytest.skip("torchao's int4 kernel for the CPU has no backward, which a turned input needs")
        model = model[:1]  # nor can it pass a gradient on to a layer below
    attach(model, method, targets="*")
    filled(model)
    model(x).float().square().mean().backward()
    live = [tensor.grad for tensor in parameters(model)]
    for tensor in parameters(model):
        tensor.grad = None
    dense(model, x, 1.0).square().mean().backward()
    tolerance = 0.05 if x.dtype == BF16 else 1e-4
    for gradient, tensor in zip(live, parameters(model), strict=True):
        assert gradient is not None
        assert tensor.grad is not None
        assert distance(gradient, tensor.grad) < tolerance
    assert all(layer.weight.grad is None for layer in model)


@every_kind
@pytest.mark.parametrize("method", ADDITIVE, ids=lambda method: method.name)
def test_additive_methods_never_read_the_weight(kind: str, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("dequantised")

    model, x = build(kind)
    for module in (layers, storages):
        monkeypatch.setattr(module, "values_of", refuse)
        monkeypatch.setattr(module, "weight_of", refuse)
    attach(model, method, targets="*")
    filled(model)
    out = model(x)
    if KINDS[kind].backward:
        out.sum().backward()


@pytest.mark.parametrize("kind", MERGING)
@every_method
def test_merged_is_live_up_to_the_storage_and_unmerge_is_bitwise(kind: str, method: Method) -> None:
    model, x = build(kind)
    base = model(x)
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    weights = [layer.weight for layer in model]
    attach(model, method, targets="*", weight=0.7)
    filled(model)
    live = model(x)
    coarse = KINDS[kind].coarse
    assert coarse is not None
    for _ in range(2):
        merge(model)
        for layer, weight in zip(model, weights, strict=True):
            assert type(layer.weight) is type(weight)
            assert layer.weight.dtype == weight.dtype
            assert 1e-4 < layer.requantised < 3 * coarse  # LoHa's deltas have outliers, which coarsen a block
        merged = model(x)
        error = max(layer.requantised for layer in model)
        assert error / 4 < distance(merged, live) < 3 * error + TOLERANCE[x.dtype]  # two layers' errors
        assert torch.equal(model(x), merged)
        unmerge(model)
        assert all(layer.weight is weight for layer, weight in zip(model, weights, strict=True))
        assert all(_same(value, kept[key]) for key, value in model.state_dict().items())
        assert torch.equal(model(x), live)
    detach(model)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("kind", MERGING)
def test_the_reported_error_is_that_of_the_stored_sum(kind: str) -> None:
    model, _ = build(kind)
    attach(model, LoRA(rank=4, alpha=2), targets="*")
    filled(model)
    layer = model[0]
    slot = layer.slot("default")
    total = weight_of(layer.base).float() + slot.method.scale * slot.method.delta(slot.tensors(), layer.site, None)
    merge(model)
    assert layer.requantised == pytest.approx(distance(weight_of(layer.base), total), rel=1e-3)


@pytest.mark.parametrize("kind", MERGING)
def test_strengths_and_adapters_change_while_merged(kind: str) -> None:
    model, x = build(kind)
    base = model(x)
    attach(model, LoRA(rank=4, alpha=2), name="one", targets="*")
    filled(model, "one")
    merge(model)
    first = model(x)
    attach(model, LoHa(rank=2, alpha=3), name="two", targets="*")
    filled(model, "two")
    set_weights(model, {"two": 0.5})  # the merge of `attach` was of fresh tensors
    both = model(x)
    assert distance(both, first) > 0.02
    set_weights(model, {"two": 0.0})
    assert torch.equal(model(x), first)
    detach(model, "one")
    detach(model, "two")
    assert adapters(model) == []
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("kind", [name for name in KINDS if name not in MERGING])
def test_a_storage_that_cannot_be_made_says_so_and_is_left_as_it_was(kind: str) -> None:
    model, x = build(kind)
    attach(model, LoRA(rank=4, alpha=2), targets="*")
    filled(model)
    live, weight = model(x), model[0].weight
    with pytest.raises(StateError, match=r"(GGUF Q4_K|Int4OpaqueTensor).*keep the adapter live"):
        merge(model)
    assert not model[0].merged
    assert model[0].weight is weight
    assert torch.equal(model(x), live)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", MERGING)
def test_a_merge_that_is_not_finite_leaves_the_base(kind: str, bad: float) -> None:
    model, x = build(kind)
    base = model(x)
    attach(model, LoRA(rank=4, alpha=2), targets="*")
    filled(model)
    with torch.no_grad():
        parameters(model)[-1].view(-1)[0] = bad
    with pytest.raises(StateError, match="NaN or infinity"):
        merge(model)
    detach(model)
    assert torch.equal(model(x), base)


def test_a_weight_beyond_float8_is_refused() -> None:
    model, _ = build("float8 cast")
    attach(model, LoRA(rank=4, alpha=2), targets="*")
    filled(model)
    set_weights(model, {"default": 1e5})
    with pytest.raises(StateError, match=r"beyond the range of its storage \(Parameter of torch.float8_e4m3fn\)"):
        merge(model)


def test_a_plain_merge_reports_no_error() -> None:
    model = plain()
    attach(model, LoRA(rank=4, alpha=2), targets="*")
    merge(model)
    assert [layer.requantised for layer in model] == [None, None]


def test_the_cpu_layout_of_four_bits_is_read() -> None:
    """A forward in eval mode packs the weight anew where the CPU has AVX512-BF16; here it is packed by hand."""
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    for kind in ("nf4", "nf4 double"):
        model, _ = build(kind, torch.float32)
        weight = model[0].weight
        before = weight_of(model[0])
        weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
        for _ in range(2):
            assert distance(weight_of(model[0]), before) < 0.003  # it rounds the scales to bf16
        fresh, error = restore(model[0], weight, before)
        assert error is not None
        assert error < 0.003
        assert fresh.quant_state.dtype == torch.float32  # pyright: ignore[reportAttributeAccessIssue] # Params4bit
        assert weight.quant_state.packing_format_for_cpu


def test_four_bits_not_yet_quantised_merge_only_after_the_move() -> None:
    bnb: Any = pytest.importorskip("bitsandbytes")
    for layer in (bnb.nn.Linear4bit(64, 32), bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)):
        model = nn.Sequential(layer).requires_grad_(False)
        assert weight_of(layer).dtype == torch.float32
        attach(model, LoRA(rank=4, alpha=2), targets="*")
        with pytest.raises(StateError, match="move the model to its device"):
            merge(model)


def test_a_base_in_eight_bits_is_itself_again_in_eval_mode() -> None:
    """There it quantises activations, too: about 1 %, but the same ones as before."""
    model, x = build("bnb int8")
    model.eval()
    base = model(x)
    attach(model, LoRA(rank=4, alpha=2), targets="*")
    filled(model)
    live = model(x)
    assert distance(live, dense(model, x, 1.0)) < 0.02
    merge(model)
    assert distance(model(x), live) < 0.02
    unmerge(model)
    assert torch.equal(model(x), live)
    detach(model)
    assert torch.equal(model(x), base)


def test_a_kept_torchao_weight_follows_the_model_in_place() -> None:
    model, _ = build("torchao int8")
    weight = model[0].weight
    follow(weight, torch.empty(1, device="meta"))
    assert model[0].weight is weight
    assert (weight.is_meta, weight.qdata.is_meta, weight.scale.is_meta) == (True, True, True)
    assert isinstance(weight, nn.Parameter)


@pytest.mark.parametrize("method", [LoRA(rank=4, alpha=2), OFT(block_size=8), DoRA(LoRA(rank=3, alpha=2))], ids=str)
def test_a_convolution_in_float8(method: Method) -> None:
    hooks: Any = pytest.importorskip("diffusers.hooks")
    model: Any = nn.Sequential(nn.Conv2d(16, 24, (3, 5), padding=1)).to(BF16).requires_grad_(False)
    hooks.apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=BF16)
    x = torch.randn(2, 16, 9, 7, dtype=BF16)
    base = model(x)
    attach(model, method, targets="*")
    assert torch.equal(model(x), base)
    filled(model)
    layer, live = model[0], model(x)
    assert isinstance(layer, AdapterLayer)
    slot = layer.slot("default")
    assert slot is not None
    weight = weight_of(layer.base).double()
    weight = weight + slot.method.scale * slot.method.delta(slot.tensors(torch.float64), layer.site, weight)
    bias: Any = layer.bias
    assert distance(live, F.conv2d(x.double(), weight, bias.double(), padding=1)) < 0.01
    merge(model)
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert layer.requantised is not None
    assert 0.01 < layer.requantised < 0.04
    assert distance(model(x), live) < 0.05
    unmerge(model)
    assert torch.equal(model(x), live)


class Own(Tensor):
    """A storage of which nothing is known but that it dequantises itself."""

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor).float() / 8


def test_a_tensor_that_dequantises_itself_is_read_and_not_written() -> None:
    layer = nn.Linear(4, 3, bias=False).requires_grad_(False)
    layer._parameters["weight"] = nn.Parameter(torch.arange(12.0).view(3, 4).as_subclass(Own), requires_grad=False)
    assert torch.equal(weight_of(layer), torch.arange(12.0).view(3, 4) / 8)
    with pytest.raises(StateError, match="stored as Own"):
        restore(layer, layer.weight, torch.zeros(3, 4))


def test_an_unknown_quantisation_is_named() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 6, bias=False))
    model[0].weight = nn.Parameter(torch.ones(6, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(StateError, match=r"Linear: its weight is a Parameter of torch.int8"):
        weight_of(model[0])
    attach(model, LoRA(rank=2, alpha=1), targets="*")
    with pytest.raises(StateError, match=r"Parameter of torch.int8"):
        merge(model)


def test_float8_with_scales_of_its_own_is_not_taken_for_its_values() -> None:
    layer = nn.Linear(8, 6, bias=False)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    layer.register_parameter("weight_scale_inv", nn.Parameter(torch.ones(1)))
    with pytest.raises(StateError, match=r"scales \(weight_scale_inv\)"):
        weight_of(layer)


def test_importing_imgadapt_imports_no_library_of_quantisation() -> None:
    code = "import sys, imgadapt; print({'bitsandbytes', 'torchao', 'gguf', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def _same(a: Any, b: Any) -> bool:
    """Bitwise; torchao's tensors through what they consist of."""
    if hasattr(a, "__tensor_flatten__"):
        return type(a) is type(b) and all(_same(getattr(a, n), getattr(b, n)) for n in a.__tensor_flatten__()[0])
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))
    return a == b


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
