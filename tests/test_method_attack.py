"""Settings, orders and files that methods were found wrong on."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from imgadapt import DoRA, Full, attach, collect, load, merge, parameters, save, swap, unmerge
from imgadapt.errors import ConfigError, FormatError, ImgadaptError, ShapeError, StateError
from imgadapt.file import AdapterFile
from imgadapt.formats import Part
from imgadapt.layer import AdapterLayer
from imgadapt.methods import (
    OSF,
    PSOFT,
    AdaLoRA,
    BitFit,
    Compacter,
    DeLoRA,
    FourierFT,
    GraLoRA,
    LoRA,
    Method,
    RandLoRA,
    SVDiff,
    TinyLoRA,
    VBLoRA,
    VeRA,
)
from imgadapt.sites import Site


def filled(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters(model, name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def build(*layers: nn.Module) -> Any:
    torch.manual_seed(0)
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
    return nn.Sequential(*layers)


def change(model: Any) -> Tensor:
    """What merging adds to the first layer's weight."""
    before = model[0].weight.detach().clone()
    merge(model)
    made = model[0].weight.detach() - before
    unmerge(model)
    return made


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("inner", [GraLoRA(rank=4, alpha=3, hybrid_rank=1), BitFit()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("layer", [lambda: nn.Linear(12, 24), lambda: nn.Conv2d(8, 16, 3, stride=2)])
def test_dora_has_the_whole_of_what_acts_in_two_ways(layer: Callable[[], nn.Module], inner: Method, axis: Any) -> None:
    model = build(layer())
    x = torch.randn(2, 12) if model[0].weight.ndim == 2 else torch.randn(2, 8, 7, 9)
    attach(model, DoRA(inner, axis=axis), targets="*", weight=0.7)
    filled(model)
    live = model(x)
    merge(model)
    torch.testing.assert_close(live, model(x), rtol=1e-4, atol=1e-5)


def test_dora_over_whole_weights_of_a_file_takes_the_difference() -> None:
    model = build(nn.Linear(6, 4))
    weight = model[0].weight.detach().clone()
    method = DoRA(Full(bias=False, absolute=True))
    value = torch.randn(4, 6)
    part = Part(method, {"diff": value, "magnitude": value.norm(dim=1)})
    attach(model, AdapterFile({"model.0": part}))
    torch.testing.assert_close(change(model), value - weight)


def test_a_fresh_difference_is_none_of_whole_weights(tmp_path: Path) -> None:
    model = build(nn.Linear(6, 4))
    attach(model, Full(absolute=True), targets="*")
    filled(model)
    wanted = change(model)
    save(collect(model), tmp_path / "a.safetensors", format="imgadapt")
    again = build(nn.Linear(6, 4))
    attach(again, load(tmp_path / "a.safetensors"))
    torch.testing.assert_close(change(again), wanted)


def _loaded(model: Any) -> Any:
    model.load_state_dict({key: torch.randn_like(value) for key, value in model.state_dict().items()})
    return model


def _unpickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("method", [SVDiff(), VeRA(rank=3), FourierFT(n_frequency=1)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("done", [copy.deepcopy, _unpickled, _loaded], ids=["copied", "pickled", "other weights"])
def test_compiled_code_has_the_constants_of_the_weights_now(method: Method, done: Callable[[Any], Any]) -> None:
    torch.compiler.reset()
    model, x = build(nn.Linear(8, 16)), torch.randn(4, 8)
    attach(model, method, targets="*")
    filled(model)
    model = done(model)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_constants_are_of_the_original_weight_when_attached_while_merged() -> None:
    torch.compiler.reset()
    model, x = build(nn.Linear(8, 16)), torch.randn(4, 8)
    attach(model, LoRA(rank=4), targets="*", name="a")
    filled(model, "a")
    merge(model)
    attach(model, SVDiff(), targets="*")
    filled(model)
    unmerge(model)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_what_is_kept_of_singular_vectors_is_not_after_the_weight_has_changed() -> None:
    model, x = build(nn.Embedding(18, 12)), torch.randint(0, 18, (2, 7))
    attach(model, SVDiff(), targets="0", trainable=False)
    with torch.no_grad():
        for slot in model[0]:
            slot.spectral.add_(0.1)
        model(x)
        model[0].weight.copy_(torch.randn(18, 12))
        live = model(x)
        merge(model)
        torch.testing.assert_close(live, model(x), rtol=1e-4, atol=1e-5)


def test_singular_vectors_are_made_once_for_a_weight_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """By merges, too, and where hooks that offload bring the weight anew for each forward."""
    calls: list[Site] = []
    made = SVDiff.constants
    monkeypatch.setattr(SVDiff, "constants", lambda self, site, weight: calls.append(site) or made(self, site, weight))
    model, x = build(nn.Linear(8, 16), nn.Linear(16, 8)), torch.randn(4, 8)
    attach(model, SVDiff(), targets="*")
    filled(model)
    live = model(x)
    merge(model)
    torch.testing.assert_close(model(x), live)
    unmerge(model)
    assert torch.equal(model(x), live)
    cpu_offload(model, torch.device("cpu"))
    assert torch.equal(model(x), live)
    assert len(calls) == 2


def test_a_bias_has_no_input_to_be_left_out() -> None:
    with pytest.raises(ConfigError, match="reads no input"):
        attach(build(nn.Linear(8, 16)), BitFit(), targets="*", dropout=0.1)


BANKED = [
    VBLoRA(rank=3, num_vectors=8, vector_length=4),
    TinyLoRA(rank=2, u=5),
    Compacter(rank=4, alpha=8),
    VeRA(rank=3, seed=None),
    DoRA(VBLoRA(rank=3, num_vectors=8, vector_length=4)),
]


@pytest.mark.parametrize("method", BANKED, ids=lambda m: type(m).__name__)
def test_swap_refuses_a_file_whose_layers_do_not_share_what_the_adapter_does(method: Method) -> None:
    model, x = build(nn.Linear(12, 12), nn.Linear(12, 12)), torch.randn(3, 12)
    attach(model, method, targets="*")
    filled(model)
    file = collect(model)
    before = model(x)
    swap(model, file)
    apart = {
        key: replace(part, tensors={n: t + k if n in method.common else t for n, t in part.tensors.items()})
        for k, (key, part) in enumerate(file.parts.items())
    }
    with pytest.raises(StateError, match="detach it and attach the file"):
        swap(model, AdapterFile(apart))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("method", "other"),
    [
        (DeLoRA(rank=2, bound=1.0), DeLoRA(rank=2, bound=8.0)),
        (VeRA(rank=3), VeRA(rank=3, d_initial=1.0)),
        (DoRA(VBLoRA(num_vectors=8, vector_length=4)), DoRA(VBLoRA(num_vectors=8, vector_length=4, init_std=0.01))),
    ],
    ids=lambda m: type(m).__name__,
)
def test_swap_takes_a_file_that_only_began_otherwise(method: Method, other: Method) -> None:
    (live, source), x = (build(nn.Linear(12, 12)) for _ in range(2)), torch.randn(3, 12)
    source.load_state_dict(live.state_dict())
    attach(live, method, targets="*")
    attach(source, other, targets="*")
    filled(source)
    swap(live, collect(source))
    torch.testing.assert_close(live(x), source(x))


@pytest.mark.parametrize("method", [VeRA(rank=3), RandLoRA(rank=3)], ids=lambda m: type(m).__name__)
def test_projections_that_a_file_lacks_or_has_flat_are_refused(method: Any) -> None:
    model = build(nn.Linear(6, 4))
    attach(model, method, targets="*")
    ((key, part),) = collect(model).parts.items()
    bare = replace(method, seed=None)
    strange = {name: torch.tensor(1.0) for name in method.frozen}
    for tensors in (dict(part.tensors), {**part.tensors, **strange}):
        with pytest.raises(ShapeError):
            attach(build(nn.Linear(6, 4)), AdapterFile({key: Part(bare, tensors)}))


@pytest.mark.parametrize("method", [PSOFT(rank=2), OSF(rank=2)], ids=lambda m: type(m).__name__)
def test_what_starts_from_a_matrix_is_refused_on_a_norm(method: Any) -> None:
    model = build(nn.Linear(6, 4))
    attach(model, method, targets="*")
    ((key, part),) = collect(model).parts.items()
    own = {name: tensor for name, tensor in part.tensors.items() if name not in method.frozen}
    with pytest.raises(ImgadaptError, match="it is norm"):
        attach(build(nn.LayerNorm(6)), AdapterFile({key: Part(method, own)}))


@pytest.mark.parametrize("start", [10**9, 2**63, 10**30])
def test_ranks_that_are_gone_are_not_filled_up_without_end(start: int, tmp_path: Path) -> None:
    model = build(nn.Linear(6, 4))
    attach(model, AdaLoRA(rank=2), targets="*")
    ((key, part),) = collect(model).parts.items()
    file = AdapterFile({key: replace(part, method=AdaLoRA(rank=2, start=start))})
    save(file, tmp_path / "a.safetensors", format="peft")  # as LoRA
    assert [type(part.method) for part in load(tmp_path / "a.safetensors").parts.values()] == [LoRA]


def test_projections_for_sizes_that_no_layer_has_are_not_made(tmp_path: Path) -> None:
    model = build(nn.Linear(6, 4))
    attach(model, RandLoRA(rank=2, seed=None), targets="*")
    ((key, part),) = collect(model).parts.items()
    file = AdapterFile({key: replace(part, shape=(2**15, 2**16))})
    with pytest.raises(FormatError):
        save(file, tmp_path / "a.safetensors", format="peft")


@pytest.mark.parametrize("method", [FourierFT(n_frequency=5, scaling=1e308), GraLoRA(rank=2, alpha=1e308)])
def test_a_strength_beyond_the_weights_numbers_does_not_merge(method: Method) -> None:
    model = build(nn.Linear(6, 4))
    attach(model, method, targets="*")
    filled(model)
    with pytest.raises(StateError, match="NaN or infinity"):
        merge(model)
    assert isinstance(model[0], AdapterLayer)
    assert not model[0].merged
