"""Adapters among what else acts on a model: offloading, casting, compiling, copies, several processes."""

import copy
import ctypes
import gc
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_submodules
from diffusers import UNet2DConditionModel
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from imgadapt import (
    IA3,
    OFT,
    DoRA,
    Dropout,
    Full,
    LoHa,
    LoRA,
    Norm,
    attach,
    collect,
    detach,
    disabled,
    load,
    merge,
    parameters,
    save,
    set_weights,
    swap,
    unmerge,
)
from imgadapt.errors import ConfigError, FormatError, StateError
from imgadapt.methods import Method
from imgadapt.sites import Site

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


WAYS: dict[str, Method] = {
    "pair": LoRA(rank=3, alpha=2),
    "dense": LoHa(rank=6, alpha=3),
    "dense with bias": Full(),
    "act": OFT(block_size=4),
    "turn": IA3(axis="input"),
    "pair and act": DoRA(LoRA(rank=3, alpha=2)),
}
every_way = pytest.mark.parametrize("method", WAYS.values(), ids=WAYS)


class Net(nn.Module):
    """A convolution, two linear layers and a norm, all called once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 8, bias=False)])
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            h = block(h).sin()
        return self.norm(h)


def net() -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return Net(), torch.randn(3, 4, 5, 6)


def filled(model: Any, name: str = "default", std: float = 0.2, seed: int = 1) -> None:
    """Random values in every tensor of an adapter, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters(model, name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def adapted(method: Method, model: Any, weight: float = 0.7) -> Any:
    attach(model, method, targets="*", weight=weight, trainable=False)
    filled(model)
    return model


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Tokens(nn.Module):
    """An embedding and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 8)])

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for block in self.blocks:
            h = block(h).sin()
        return h


def sequentially(model: nn.Module) -> None:
    cpu_offload(model, CPU)


def by_leaf(model: nn.Module) -> None:
    apply_group_offloading(model, CPU, CPU, "leaf_level")


def by_block(model: nn.Module) -> None:
    apply_group_offloading(model, CPU, CPU, "block_level", num_blocks_per_group=1)


def at_once(model: nn.Module) -> None:
    cpu_offload_with_hook(model, CPU)


def no_accelerate(model: nn.Module) -> None:
    remove_hook_from_submodules(model)


def no_groups(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "_diffusers_hook"):
            module._diffusers_hook.remove_hook(_GROUP_OFFLOADING, recurse=False)


Change = Callable[[nn.Module], None]
every_offload = pytest.mark.parametrize(
    ("offload", "remove"),
    [(at_once, no_accelerate), (sequentially, no_accelerate), (by_leaf, no_groups), (by_block, no_groups)],
    ids=["model", "sequential", "leaf group", "block group"],
)
with_norm = pytest.mark.parametrize("method", [*WAYS.values(), Norm()], ids=[*WAYS, "norm"])


@with_norm
@every_offload
@pytest.mark.parametrize("before", [True, False], ids=["attached before", "attached after"])
@torch.no_grad()
def test_offloading_changes_no_value_and_goes_away_again(
    method: Method, offload: Change, remove: Change, before: bool
) -> None:
    model, x = net()
    base = model(x)
    expected = adapted(method, copy.deepcopy(model))(x)
    assert (expected - base).abs().max() > 1e-3
    if before:
        adapted(method, model)
        offload(model)
    else:
        offload(model)
        adapted(method, model)
    offloaded = {p.device for p in model.blocks[0]._parameters.values()}
    assert offloaded == {torch.device("meta" if offload is sequentially else "cpu")}
    for _ in range(2):
        close(model(x), expected)
    set_weights(model, {"default": 0.0})
    assert torch.equal(model(x), base)
    set_weights(model, {"default": 0.7})
    attach(model, LoRA(rank=2, alpha=3), name="later", targets="conv")
    detach(model, "later")
    close(model(x), expected)
    twin = copy.deepcopy(collect(model))
    detach(model)
    assert torch.equal(model(x), base)
    attach(model, twin, weight=0.7)
    close(model(x), expected)
    remove(model)
    assert {p.device for p in model.parameters()} == {CPU}
    close(model(x), expected)
    merge(model)
    close(model(x), expected)
    detach(model)
    assert torch.equal(model(x), base)
    assert not any(hasattr(module, hook) for module in model.modules() for hook in ("_hf_hook", "_old_forward"))


UNDOING: dict[str, Callable[[Any], Any]] = {
    "unmerge": unmerge,
    "strength": lambda model: set_weights(model, {"default": 0.0}),
    "detach": detach,
    "disabled": lambda model: disabled(model).__enter__(),
}


@pytest.mark.parametrize("what", UNDOING)
def test_a_model_offloaded_while_merged_is_not_unmerged_but_asks_for_its_weights(what: str) -> None:
    model, x = net()
    adapted(WAYS["pair"], model)
    merge(model)
    sequentially(model)
    merged = model(x)
    with pytest.raises(StateError, match="offload"):
        UNDOING[what](model)
    assert torch.equal(model(x), merged)
    no_accelerate(model)
    assert torch.equal(model(x), merged)


@every_way
@pytest.mark.parametrize("before", [True, False], ids=["attached before", "attached after"])
def test_a_merge_while_the_weights_are_offloaded_is_refused_and_changes_nothing(method: Method, before: bool) -> None:
    model, x = net()
    if before:
        adapted(method, model)
        sequentially(model)
    else:
        sequentially(model)
        adapted(method, model)
    live = model(x)
    with pytest.raises(StateError, match="offloaded"):
        merge(model)
    assert torch.equal(model(x), live)
    assert not any(layer.merged for layer in (model.conv, *model.blocks))


@pytest.fixture(scope="session")
def _tiny() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ).requires_grad_(False)


@pytest.fixture
def unet(_tiny: Any) -> Any:
    """A UNet of 8 and 16 channels of its own."""
    return copy.deepcopy(_tiny)


TARGETS = ["transformer", "convolution", "time_embedding.*"]


def adapted_unet(method: Method, unet: Any, std: float = 0.1) -> Any:
    attach(unet, method, targets=TARGETS, weight=0.7)
    filled(unet, std=std)
    return unet


def run(unet: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x, context = torch.randn(2, 4, 8, 12, generator=generator), torch.randn(2, 5, 12, generator=generator)
    return unet(x.to(dtype), 500, context.to(dtype)).sample


UNET_WAYS: dict[str, Method] = {
    "pair": LoRA(rank=3, alpha=2),
    "dense": LoHa(rank=4, alpha=3),
    "act": OFT(block_size=4),
    "pair and act": DoRA(LoRA(rank=3, alpha=2)),
}
every_unet_way = pytest.mark.parametrize("method", UNET_WAYS.values(), ids=UNET_WAYS)


@every_unet_way
@pytest.mark.parametrize("before", [True, False], ids=["attached before", "attached after"])
@torch.no_grad()
def test_weights_stored_as_fp8_act_as_bf16_and_adapters_stay_fp32(method: Method, before: bool, unet: Any) -> None:
    unet = unet.bfloat16()
    for module in unet.modules():  # values that fp8 has: storing them loses nothing
        if isinstance(module, nn.Linear | nn.Conv2d):
            for parameter in module.parameters():
                parameter.data = parameter.data.to(torch.float8_e4m3fn).to(torch.bfloat16)
    base = run(unet, torch.bfloat16)
    expected = run(adapted_unet(method, copy.deepcopy(unet), 0.3), torch.bfloat16)
    assert (expected - base).abs().max() > 0.1
    if before:
        adapted_unet(method, unet, 0.3)
    unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    if not before:
        adapted_unet(method, unet, 0.3)
        assert unet.mid_block.resnets[0].conv1.weight.dtype == torch.float8_e4m3fn
    for _ in range(2):
        out = run(unet, torch.bfloat16)
        assert out.dtype == torch.bfloat16
        close(out, expected, 0.03)
        assert {tensor.dtype for tensor in parameters(unet)} == {torch.float32}


def as_fp8(model: nn.Module) -> None:
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.bfloat16)


@every_way
@pytest.mark.parametrize("offload", [sequentially, by_leaf])
@torch.no_grad()
def test_casting_and_offloading_go_together_in_any_order(method: Method, offload: Change) -> None:
    model, ids = Tokens().bfloat16(), torch.randint(0, 9, (3, 4))
    for parameter in model.parameters():
        parameter.copy_(parameter.to(torch.float8_e4m3fn))

    def attached(model: nn.Module) -> None:
        embedding = ["embed"] if method.check(Site((8, 9), "embedding")) is None else []
        attach(model, method, targets=["blocks.*", *embedding], trainable=False)
        filled(model, std=0.3)

    base, twin = model(ids), copy.deepcopy(model)
    attached(twin)
    expected = twin(ids)
    assert (expected - base).abs().max() > 0.1
    for order in permutations([as_fp8, offload, attached]):
        twin = copy.deepcopy(model)
        for change in order:
            change(twin)
        for _ in range(2):
            close(twin(ids), expected, 0.02)
        set_weights(twin, {"default": 0.0})
        assert torch.equal(twin(ids), base)
        detach(twin)
        assert torch.equal(twin(ids), base)


@every_unet_way
def test_a_checkpointed_unet_has_the_gradients_of_a_plain_one(method: Method, unet: Any) -> None:
    unet = adapted_unet(method, unet).train()
    run(unet).square().mean().backward()
    plain = [tensor.grad for tensor in parameters(unet)]
    for tensor in parameters(unet):
        tensor.grad = None
    unet.enable_gradient_checkpointing()
    run(unet).square().mean().backward()
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in plain)
    for gradient, tensor in zip(plain, parameters(unet), strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-5, atol=1e-8)


@every_unet_way
def test_autocast_of_a_unet_is_near_fp32_forward_and_backward(method: Method, unet: Any) -> None:
    unet = adapted_unet(method, unet)
    expected = run(unet)
    expected.square().mean().backward()
    exact = torch.cat([tensor.grad.flatten() for tensor in parameters(unet) if tensor.grad is not None])
    for tensor in parameters(unet):
        tensor.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        out = run(unet)
    assert out.dtype == torch.bfloat16
    close(out.float(), expected, 0.06)
    out.float().square().mean().backward()
    assert {tensor.grad.dtype for tensor in parameters(unet) if tensor.grad is not None} == {torch.float32}
    rough = torch.cat([tensor.grad.flatten() for tensor in parameters(unet) if tensor.grad is not None])
    assert rough.shape == exact.shape
    assert (rough - exact).norm() / exact.norm() < 0.05


def retrained(method: Method, seed: int, targets: Any = "*") -> Any:
    """A file of another training, for Net."""
    model, _ = net()
    attach(model, method, targets=targets)
    filled(model, seed=seed)
    return collect(model)


SMALLER: dict[str, Method] = {
    "pair": LoRA(rank=2, alpha=5),
    "dense": LoHa(rank=5, alpha=1),
    "dense with bias": Full(),
    "act": OFT(block_size=4),
    "turn": IA3(axis="input"),
    "pair and act": DoRA(LoRA(rank=2, alpha=4 / 3)),  # its scale is in the graph; another compiles anew
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rank", ["same", "smaller"])
def test_a_swapped_in_file_acts_as_one_freshly_attached(way: str, rank: str) -> None:
    method = WAYS[way] if rank == "same" else SMALLER[way]
    model, x = net()
    base = model(x)
    adapted(WAYS[way], model)
    first = model(x)
    file = retrained(method, 2)
    fresh, _ = net()
    attach(fresh, file, weight=0.7)
    expected = fresh(x)
    swap(model, file)
    close(model(x), expected)
    assert not torch.allclose(expected, first, atol=1e-3)
    merge(model)
    close(model(x), expected)
    swap(model, retrained(WAYS[way], 1))  # while merged: as it was at first, merged
    close(model(x), first)
    unmerge(model)
    close(model(x), first)
    swap(model, retrained(method, 2, "blocks.0"))  # of fewer layers: the others are off
    detach(fresh)
    attach(fresh, retrained(method, 2, "blocks.0"), weight=0.7)
    close(model(x), fresh(x))
    assert list(collect(model).parts) == ["model.blocks.0"]
    set_weights(model, {"default": 0.0})
    assert torch.equal(model(x), base)
    set_weights(model, {"default": 0.7})
    swap(model, file)
    close(model(x), expected)


def _nan() -> Any:
    file = retrained(LoRA(rank=3, alpha=2), 2)
    file.parts["model.blocks.1"].tensors["up"][0, 0] = float("nan")
    return file


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a larger rank": (lambda: retrained(LoRA(rank=4, alpha=2), 2), StateError, "does not fit"),
    "another method": (lambda: retrained(OFT(block_size=4), 2), StateError, "the file has oft, the adapter is lora"),
    "DoRA": (lambda: retrained(DoRA(LoRA(rank=3, alpha=2)), 2), StateError, "the file has dora, the adapter is lora"),
    "tucker": (lambda: retrained(LoRA(rank=3, alpha=2, tucker=True), 2), StateError, "does not fit"),
    "NaN": (_nan, FormatError, "NaN"),
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_a_swap_that_cannot_be_is_refused_and_all_is_as_before(case: str, merged: bool) -> None:
    make, error, message = REFUSED[case]
    model, x = net()
    adapted(WAYS["pair"], model)
    if merged:
        merge(model)
    live, before = model(x), collect(model).parts
    with pytest.raises(error, match=message):
        swap(model, make())
    assert torch.equal(model(x), live)
    after = collect(model).parts
    assert [part.method for part in before.values()] == [part.method for part in after.values()]
    for key, part in before.items():
        assert all(torch.equal(tensor, after[key].tensors[name]) for name, tensor in part.tensors.items())


def test_a_swap_of_other_layers_or_into_nothing_is_refused() -> None:
    model, x = net()
    attach(model, WAYS["pair"], targets="blocks.*", weight=0.7)
    filled(model)
    live = model(x)
    with pytest.raises(StateError, match=r"1 of the file's 3 layers are not in 'default' \(model.conv\)"):
        swap(model, retrained(WAYS["pair"], 2))
    with pytest.raises(StateError, match="no adapter other on this model"):
        swap(model, retrained(WAYS["pair"], 2), name="other")
    assert torch.equal(model(x), live)


def test_a_swap_whose_merge_is_not_finite_leaves_the_old_one_merged() -> None:
    model, x = net()
    adapted(WAYS["pair"], model, weight=1e10)
    filled(model, std=1e-11)
    merge(model)
    live = model(x)
    file = retrained(WAYS["pair"], 2)
    file.parts["model.blocks.1"].tensors["up"].mul_(1e30)  # finite, in the last layer only
    with pytest.raises(StateError, match="NaN or infinity"):
        swap(model, file)
    assert torch.equal(model(x), live)
    unmerge(model)
    close(model(x), live)


@pytest.mark.parametrize("way", WAYS)
def test_no_strength_and_no_swap_recompiles(way: str) -> None:
    """Backend 'eager': what is tested is the tracing, in one graph, and its guards."""
    torch.compiler.reset()
    model, x = net()
    attach(model, WAYS[way], targets="*")
    filled(model)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    compiled(x)
    files = [retrained(SMALLER[way], 2), retrained(WAYS[way], 3), retrained(SMALLER[way], 4, "blocks.0")]
    seen: list[Tensor] = []
    with torch.compiler.set_stance("fail_on_recompile"):
        for file in files:
            for weight in (0.5, 0.0, -2.0):
                set_weights(model, {"default": weight})
                close(compiled(x), model(x))
            swap(compiled, file)
            seen.append(compiled(x))
            close(seen[-1], model(x))
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)
    assert not torch.allclose(seen[0], seen[2], atol=1e-3)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductors_code_takes_strengths_and_swaps_as_inputs() -> None:
    torch.compiler.reset()
    model, x = nn.Sequential(nn.Linear(8, 12)), torch.randn(3, 8)
    files: list[Any] = []
    for method in (WAYS["pair"], SMALLER["pair"]):
        attach(model, method, targets="*", trainable=False)
        filled(model, seed=len(files))
        files.append(collect(model))
        detach(model)
    attach(model, files[0])
    compiled: Any = torch.compile(model, fullgraph=True)
    close(compiled(x), model(x))
    with torch.compiler.set_stance("fail_on_recompile"):
        for weight in (0.0, -2.0):
            set_weights(model, {"default": weight})
            close(compiled(x), model(x))
        swap(model, files[1])
        close(compiled(x), model(x))


@every_unet_way
def test_copies_and_pickles_of_an_adapted_unet_act_the_same_and_share_nothing(
    method: Method, unet: Any, tmp_path: Path
) -> None:
    adapted_unet(method, unet)
    expected = run(unet)
    torch.save(unet, tmp_path / "unet.pt")
    for twin in (copy.deepcopy(unet), torch.load(tmp_path / "unet.pt", weights_only=False)):
        assert torch.equal(run(twin), expected)
        detach(twin)
        assert torch.equal(run(unet), expected)


def test_an_adapted_unet_saves_exactly_its_base_and_from_pretrained_loads_it(unet: Any, tmp_path: Path) -> None:
    base = {key: value.clone() for key, value in unet.state_dict().items()}
    out = run(unet)
    adapted_unet(LoRA(rank=3, alpha=2), unet)
    unet.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == base.keys()
    assert all(torch.equal(saved[key], value) for key, value in base.items())
    again: Any = UNet2DConditionModel.from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(run(again), out)


@every_unet_way
def test_assigning_a_state_dict_gives_the_base_those_tensors_under_its_adapters(method: Method, unet: Any) -> None:
    torch.manual_seed(5)
    state = {key: torch.randn_like(value) * 0.1 for key, value in unet.state_dict().items()}
    other = copy.deepcopy(unet)
    other.load_state_dict(state, strict=True)
    expected = run(adapted_unet(method, other))
    for tensor in parameters(adapted_unet(method, unet)):
        tensor.requires_grad_(False)  # operands are kept from one forward to the next
    tensors = collect(other)  # DoRA's magnitudes are those of the other weights
    run(unet)
    swap(unet, tensors)
    unet.load_state_dict(state, strict=True, assign=True)
    close(run(unet), expected)
    layer = unet.mid_block.attentions[0].proj_in
    assert layer.weight.data_ptr() == state["mid_block.attentions.0.proj_in.weight"].data_ptr()
    merge(unet)
    with pytest.raises(StateError, match="unmerge first"):
        unet.load_state_dict(state, strict=True, assign=True)
    unmerge(unet)
    close(run(unet), expected)


def test_lora_attached_on_meta_equals_lora_attached_to_loaded_weights() -> None:
    loaded, x = net()
    state = {key: value.clone() for key, value in loaded.state_dict().items()}
    with torch.device("meta"):
        model = Net()
    torch.manual_seed(7)
    attach(model, LoRA(rank=3, alpha=2), targets="*", weight=0.7)
    torch.manual_seed(7)
    attach(loaded, LoRA(rank=3, alpha=2), targets="*", weight=0.7)
    assert {tensor.device for tensor in parameters(model)} == {CPU}
    assert all(torch.equal(a, b) for a, b in zip(parameters(model), parameters(loaded), strict=True))
    model.load_state_dict(state, strict=True, assign=True)
    filled(model)
    filled(loaded)
    assert torch.equal(model(x), loaded(x))
    merge(model)
    close(model(x), loaded(x))


def test_dora_on_meta_asks_for_the_weights_first() -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(StateError, match=r"model.conv: dora starts from the weight, but .* load them first"):
        attach(model, DoRA(LoRA(rank=2)), targets="*")
    assert type(model.conv) is nn.Conv2d


Results = dict[str, dict[str, list[Tensor]]]


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What tests/two_processes.py made in each of two."""
    folder = tmp_path_factory.mktemp("processes")
    program = Path(__file__).with_name("two_processes.py")
    started = [subprocess.Popen([sys.executable, "-W", "ignore", program, str(rank), folder]) for rank in range(2)]
    try:
        assert [process.wait(60) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("method", ["lora", "oft", "dora"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_processes_on_half_batches_train_as_one_on_the_whole(
    wrapper: str, method: str, processes: list[Results]
) -> None:
    alone = processes[0][f"alone {method}"]
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(alone["before"], alone["after"], strict=True))
    for results in processes:
        made = results[f"{wrapper} {method}"]
        for what in ("before", "after", "out"):
            assert len(made[what]) == len(alone[what]) > 0
            for ours, theirs in zip(made[what], alone[what], strict=True):
                close(ours, theirs)


@pytest.mark.parametrize("method", ["lora", "oft", "dora"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_collect_gives_whole_plain_tensors_in_every_process(
    wrapper: str, method: str, processes: list[Results]
) -> None:
    for results in processes:
        made = results[f"{wrapper} {method}"]
        assert len(made["collected"]) == len(made["after"])
        for ours, theirs in zip(made["collected"], made["after"], strict=True):
            close(ours, theirs)


SAMPLED: dict[str, Method] = {**WAYS, "norm": Norm(), "turn of blocks": OFT(block_size=4, side="input")}


@pytest.mark.parametrize("method", SAMPLED.values(), ids=SAMPLED)
def test_each_sample_has_its_own_strength(method: Method) -> None:
    model, x = net()
    x = x + torch.arange(3.0).reshape(3, 1, 1, 1)
    numbers = torch.tensor([1.0, 0.0, -0.5])
    base = model(x)
    adapted(method, model)
    set_weights(model, {"default": numbers})
    out = model(x)
    doubled = model(torch.cat([x, x.flip(1)]))
    with pytest.raises(StateError, match="weights for 3 samples, and this layer gets 4"):
        model(torch.cat([x, x[:1]]))
    with pytest.raises(StateError, match="differs from sample to sample"):
        merge(model)
    close(model(x), out)
    close(doubled[:3], out)
    for k, number in enumerate(numbers.tolist()):
        set_weights(model, {"default": number})
        close(out[k : k + 1], model(x[k : k + 1]))
        close(doubled[k + 3 : k + 4], model(x.flip(1)[k : k + 1]))
    close(out[1], base[1])
    assert (out - base)[[0, 2]].abs().amax((1, 2)).min() > 1e-3


def test_strengths_per_sample_stand_beside_one_number_and_other_methods() -> None:
    model, x = net()
    for name, method in (("a", WAYS["pair"]), ("b", LoRA(rank=2, alpha=3)), ("c", WAYS["act"])):
        attach(model, method, targets="*", name=name)
        filled(model, name)
    set_weights(model, {"a": torch.tensor([1.0, 0.0, 0.5]), "b": 0.3, "c": torch.tensor([0.0, 2.0, 1.0])})
    out = model(x)
    for k, (a, c) in enumerate([(1.0, 0.0), (0.0, 2.0), (0.5, 1.0)]):
        set_weights(model, {"a": a, "c": c})
        close(out[k : k + 1], model(x[k : k + 1]))


def test_strengths_per_sample_act_on_an_embedding() -> None:
    model, x = nn.Sequential(nn.Embedding(9, 8)), torch.randint(0, 9, (2, 5))
    for method in (WAYS["pair"], WAYS["dense"], WAYS["act"]):
        attach(model, method, targets="0")
        filled(model)
        set_weights(model, {"default": torch.tensor([0.5, -1.0])})
        out = model(x)
        for k, number in enumerate((0.5, -1.0)):
            set_weights(model, {"default": number})
            close(out[k : k + 1], model(x[k : k + 1]))
        detach(model)


DROPPED: dict[str, Dropout] = {
    "input": Dropout(input=0.3),
    "rank": Dropout(rank=0.3),
    "module": Dropout(module=0.5),
}
LINEAR_WAYS = {name: method for name, method in WAYS.items() if name != "dense with bias"}


@pytest.mark.parametrize("dropout", DROPPED.values(), ids=DROPPED)
@pytest.mark.parametrize("method", LINEAR_WAYS.values(), ids=LINEAR_WAYS)
def test_dropout_acts_in_training_only_and_never_in_a_merge(method: Method, dropout: Dropout) -> None:
    if dropout.rank and not method.ranked:
        pytest.skip("no ranks")
    model, x = net()
    attach(model, method, targets="*", dropout=dropout)
    filled(model)
    model.eval()
    whole = model(x)
    assert torch.equal(model(x), whole)
    merge(model)
    weight = model.conv.weight.clone()
    unmerge(model)
    model.train()
    assert max((model(x) - whole).abs().max() for _ in range(20)) > 1e-3
    merge(model)
    assert torch.equal(model.conv.weight, weight)
    close(model(x), whole)


@pytest.mark.parametrize("name", ["input", "rank"])
@torch.no_grad()
def test_on_average_dropout_changes_nothing_for_lora(name: str) -> None:
    model, x = nn.Sequential(nn.Linear(12, 8)), torch.randn(3, 12)
    base = model(x)
    attach(model, LoRA(rank=4, alpha=2), targets="*", dropout=DROPPED[name])
    filled(model, std=0.5)
    whole = model.eval()(x)
    model.train()
    draws = torch.stack([model(x) for _ in range(4000)])
    noise = draws.std(0) / len(draws) ** 0.5
    assert noise.min() > 1e-4
    assert ((draws.mean(0) - whole) / noise).abs().max() < 4.5
    assert (whole - base).abs().max() > 20 * noise.max()


@torch.no_grad()
def test_module_dropout_gives_the_base_as_often_as_asked() -> None:
    for method in WAYS.values():
        model, x = nn.Sequential(nn.Linear(12, 8)), torch.randn(3, 12)
        base = model(x)
        attach(model, method, targets="*", dropout=Dropout(module=0.9))
        filled(model)
        whole = model.eval()(x)
        model.train()
        outs = [model(x) for _ in range(300)]
        left_out = sum(torch.allclose(out, base, atol=1e-6) for out in outs)
        assert 250 <= left_out <= 289  # 270, and four standard deviations
        assert left_out + sum(torch.allclose(out, whole, atol=1e-5) for out in outs) == 300


def test_rank_dropout_without_ranks_is_refused() -> None:
    model, _ = net()
    with pytest.raises(ConfigError, match="ia3 has no ranks that rank dropout could leave out"):
        attach(model, IA3(), targets="*", dropout=Dropout(rank=0.1))
    assert type(model.conv) is nn.Conv2d


def _resident() -> int:
    """Bytes of memory that this process holds."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_hundred_rounds_of_attaching_merging_and_detaching_leak_nothing(pipe: Any, tmp_path: Path) -> None:
    attach(pipe, LoRA(rank=8), targets=["to_q", "proj_in"])
    path = save(collect(pipe), tmp_path / "adapter.safetensors", format="kohya")
    detach(pipe)
    sizes: list[int] = []
    for _ in range(11):
        sizes.append(_resident())
        for _ in range(10):
            attach(pipe, load(path))
            merge(pipe)
            detach(pipe)
    assert sizes[-1] - sizes[1] < 5 * 2**20


def test_a_tied_embedding_of_t5_is_adapted_where_it_is_called() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 24, "num_layers": 2}
    model: Any = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")).eval().requires_grad_(False)
    ids = torch.randint(0, 32, (2, 7))
    kept, modules = {k: v.clone() for k, v in model.state_dict().items()}, list(model.modules())
    base = model(ids).last_hidden_state
    attach(model, LoRA(rank=2, alpha=3), targets=["text", "embed_tokens"], weight=0.7)
    filled(model)
    parts = collect(model).parts
    assert len(parts) == 2 * 7 + 1
    live = model(ids).last_hidden_state
    assert (live - base).abs().max() > 0.01
    merge(model)
    close(model(ids).last_hidden_state, live)
    unmerge(model)
    assert model.encoder.embed_tokens.weight is model.shared.weight
    set_weights(model, {"default": {"embed_tokens": 1.0}})
    part = parts["text_encoder.encoder.embed_tokens"]
    change = part.method.scale * part.method.delta(part.tensors, model.encoder.embed_tokens.site, None)
    expected = model(inputs_embeds=(kept["shared.weight"] + change.t())[ids]).last_hidden_state
    close(model(ids).last_hidden_state, expected)
    assert model.state_dict().keys() == kept.keys()
    detach(model)
    assert list(model.modules()) == modules
    assert torch.equal(model(ids).last_hidden_state, base)


class Twice(nn.Module):
    """One embedding and one linear layer, each at two places, called once and twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(9, 8)
        self.embed_tokens = self.shared
        self.blocks = nn.ModuleList([nn.Linear(8, 8)] * 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](self.embed_tokens(ids)).sin())


def test_a_module_at_two_places_is_adapted_once_at_both() -> None:
    model, ids = Twice(), torch.randint(0, 9, (2, 5))
    modules, keys, base = list(model.modules()), list(model.state_dict()), model(ids)
    attach(model, LoRA(rank=2, alpha=3), targets=["*", "shared"], weight=0.7)
    filled(model)
    assert list(collect(model).parts) == ["model.shared", "model.blocks.0"]
    assert model.shared is model.embed_tokens
    assert model.blocks[0] is model.blocks[1]
    live = model(ids)
    twin = copy.deepcopy(model)
    assert twin.shared is twin.embed_tokens
    assert torch.equal(twin(ids), live)
    merge(model)
    close(model(ids), live)
    assert (live - base).abs().max() > 0.01
    assert list(model.state_dict()) == keys
    detach(model)
    assert list(model.modules()) == modules
    assert torch.equal(model(ids), base)
