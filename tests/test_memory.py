"""Peak memory of a training step: byte counts by hand, and against what a real step takes."""

import importlib
import json
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imgadapt import DoRA, Full, LoHa, LoKr, LoRA, Method, attach, detach, parameters
from imgadapt.errors import ConfigError, StateError
from imgadapt.training import memory
from imgadapt.training.memory import OPTIMIZERS, estimate, resident

FP32 = 4
ROOT = Path(__file__).parent.parent
SHAPES = [torch.Size(shape) for shape in ((16, 320), (640, 16), (16, 320, 3, 3), (40,))]


def network(rank: int | None = None) -> Any:
    """Linear 6 -> 10, ReLU, linear 10 -> 4, frozen; with a LoRA of alpha 1 on both if a rank is given."""
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)).requires_grad_(False)
    if rank is not None:
        attach(model, LoRA(rank, 1.0), targets="*")
    return model


def step_of(model: Any, batch: int = 3) -> Any:
    return lambda: model(torch.zeros(batch, 6)).sum()


def unet_loss(unet: Any, batch: int, height: int = 8, width: int = 8) -> Any:
    def loss() -> Tensor:
        states = torch.zeros(batch, 77, unet.config.cross_attention_dim, dtype=unet.dtype)
        noisy = torch.zeros(batch, unet.config.in_channels, height, width, dtype=unet.dtype)
        return unet(noisy, torch.full((batch,), 500), states).sample.float().square().mean()

    return loss


def test_a_trained_layer_by_hand() -> None:
    model = network()
    trained = list(model[2].requires_grad_(True).parameters())
    found = estimate(model, trained, step_of(model))
    assert found.weights == (6 * 10 + 10) * FP32
    assert found.adapter == found.gradients == (10 * 4 + 4) * FP32
    assert found.optimizer == 2 * found.adapter
    # at the ReLU: the input (3, 6), which the caller holds, and what goes in and out, (3, 10)
    assert found.activations == (18 + 30 + 30) * FP32
    # the optimiser's step, with as much again as the gradients, takes more
    assert found.peak == found.weights + 3 * found.adapter + 2 * found.gradients == 280 + 528 + 352


def test_an_adapter_by_hand_where_alpha_is_not_the_rank() -> None:
    model = network(rank=2)
    found = estimate(model, parameters(model), step_of(model), optimizer="sgd")
    assert found.weights == (6 * 10 + 10 + 10 * 4 + 4) * FP32
    assert found.adapter == found.gradients == (2 * 6 + 10 * 2 + 2 * 10 + 4 * 2) * FP32
    assert found.optimizer == 0
    kept = 18 + 10 * 2 + 3 * 2 + 30  # input, scaled up, what down gives, ReLU: for the backward of the first layer
    second = 4 * 2 + 2 * 10  # gradients of the second layer's up (scaled) and down
    # when the second layer's base gives its gradient (3, 10), that of its adapter is there, and the loss with its own
    assert found.activations == (kept + second + 30 + 30 + 2) * FP32 == 656


def test_gradients_of_a_tensor_used_twice_are_summed_in_place() -> None:
    weight = nn.Parameter(torch.zeros(100))
    model = nn.ParameterList([weight])

    def loss() -> Tensor:
        h = model[0] * 2.0
        return (h * 3.0).sum() + (h * 5.0).sum()

    found = estimate(model, [weight], loss, optimizer="sgd")
    # 2 gradients of h, (100,), the loss and its gradient, and no third for their sum
    assert found.activations == (200 + 2) * FP32


def test_accumulation_keeps_the_gradients_during_the_forward() -> None:
    model = network()
    trained = list(model[2].requires_grad_(True).parameters())
    once = estimate(model, trained, step_of(model))
    again = estimate(model, trained, step_of(model), accumulate=True)
    assert again.activations == once.activations + once.gradients == 312 + 176


def test_averages_and_kept_modules_are_counted() -> None:
    model, encoder = network(rank=2), nn.Linear(5, 3).bfloat16()
    plain = estimate(model, parameters(model), step_of(model), base=1000)
    more = estimate(model, parameters(model), step_of(model), ema=True, kept=[encoder], base=1000)
    assert more.peak - plain.peak == plain.adapter + (5 * 3 + 3) * 2
    assert sum(more.parts.values()) == more.peak


def test_tied_weights_are_counted_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)).requires_grad_(False)
    model[1].weight = model[0].weight
    attach(model, LoRA(2, 1.0), targets="*")
    assert estimate(model, parameters(model), step_of(model)).weights == 36 * FP32


def test_convolutions_take_copies_on_the_cpu_only() -> None:
    model = nn.Conv2d(4, 8, 3, padding=1, bias=False)

    def loss() -> Tensor:
        return model(torch.zeros(2, 4, 6, 10)).sum()

    size = 2 * 6 * 10
    on_gpu = estimate(model, list(model.parameters()), loss, device="cuda")
    on_cpu = estimate(model, list(model.parameters()), loss)
    assert on_gpu.activations == (12 * size + 1) * FP32  # input, output and their sum
    assert on_cpu.activations == (12 * size + 8 * size + 8 * 4 * 9) * FP32


def test_checkpointing_keeps_the_inputs_of_its_parts_only() -> None:
    layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()) for _ in range(8))

    def loss(through: bool) -> Tensor:
        x = torch.zeros(512, 64)
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False) if through else layer(x)
        return x.sum()

    whole = estimate(layers, list(layers.parameters()), lambda: loss(False), optimizer="sgd")
    parts = estimate(layers, list(layers.parameters()), lambda: loss(True), optimizer="sgd")
    one = 512 * 64 * FP32
    assert 17 * one <= whole.activations <= 20 * one  # two a layer, and the input
    assert 9 * one <= parts.activations <= 15 * one  # one a layer, two while it is computed anew, gradients


def test_the_demo_takes_less_with_checkpointing(pipe: Any) -> None:
    unet = pipe.unet.requires_grad_(False).train()
    attach(unet, LoRA(8, 4.0))
    try:
        plain = estimate(unet, parameters(unet), unet_loss(unet, 4))
        unet.enable_gradient_checkpointing()
        less = estimate(unet, parameters(unet), unet_loss(unet, 4))
    finally:
        unet.disable_gradient_checkpointing()
        unet.eval()
    assert less.activations < 0.6 * plain.activations
    assert less.weights == plain.weights


METHODS = [(LoRA(8, 4.0), 1.02), (DoRA(LoRA(4, 2.0)), 1.02), (LoHa(4, 2.0), 1.2), (LoKr(4, 2.0), 1.2), (Full(), 1.2)]


@pytest.mark.parametrize(("method", "most"), METHODS, ids=lambda value: getattr(value, "name", ""))
def test_fake_tensors_take_what_real_ones_do(method: Method, most: float) -> None:
    """Dense changes go into the weight of the base's call only where it is a plain tensor, which a fake one is not:
    here they are added apart, which takes up to an output more.
    """
    model: Any = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 16, 1), nn.Flatten(2), nn.Linear(240, 96), nn.SiLU()
    ).requires_grad_(False)
    attach(model, method, targets="*")

    def loss() -> Tensor:
        return model(torch.zeros(2, 16, 12, 20)).square().mean()

    found = estimate(model, parameters(model), loss)
    ledger = memory._Ledger(True)
    held = (tensor for dictionary in memory._dictionaries([model]) for tensor in dictionary.values())
    ledger.enter([tensor for tensor in held if isinstance(tensor, Tensor)], ())
    with ledger:
        loss().backward()
    assert 0.98 <= found.activations / ledger.peak <= most


def test_the_model_is_left_as_it_is() -> None:
    model = network(rank=2)
    before = [*model.parameters(), *(vars(m).get("gain") for m in model.modules())]
    values = [tensor.detach().clone() for tensor in model.parameters()]
    estimate(model, parameters(model), step_of(model))
    with pytest.raises(KeyError):
        estimate(model, parameters(model), lambda: {"no such": model(torch.zeros(3, 6))}["loss"])
    after = [*model.parameters(), *(vars(m).get("gain") for m in model.modules())]
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(values, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_on_meta_is_estimated_like_a_real_one() -> None:
    real = network(rank=2)
    with torch.device("meta"):
        empty = network(rank=2)
    assert all(parameter.is_meta for parameter in empty.parameters())
    wanted = estimate(real, parameters(real), step_of(real))
    assert estimate(empty, parameters(empty), step_of(empty)) == wanted


def test_bf16_halves_weights_and_not_the_adapter() -> None:
    wide, narrow = network(rank=2), network(rank=2)
    for layer in (narrow[0], narrow[2]):
        layer.base.to(torch.bfloat16)
    whole = estimate(wide, parameters(wide), step_of(wide))
    half = estimate(narrow, parameters(narrow), lambda: narrow(torch.zeros(3, 6, dtype=torch.bfloat16)).sum())
    assert (2 * half.weights, half.adapter, half.optimizer) == (whole.weights, whole.adapter, whole.optimizer)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_quantised_weights_are_counted_as_bitsandbytes_stores_them(storage: Any) -> None:
    bnb: Any = importlib.import_module("bitsandbytes")
    shape, weight = (96, 200), torch.randn(96, 200)
    if storage == "nf4":
        made = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False).to("cpu")
        state = made.quant_state
        kept = made.nbytes + state.absmax.nbytes + state.code.nbytes
    else:
        made = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
        kept = made.nbytes + 4 * shape[0]
    assert memory.STORAGES[storage].bytes(weight) == kept


def test_a_quantised_weight_is_whole_while_it_is_used() -> None:
    model = nn.Sequential(nn.Linear(96, 64, bias=False)).requires_grad_(False)
    attach(model, LoRA(2, 1.0), targets="*")
    plain = estimate(model, parameters(model), lambda: model(torch.zeros(3, 96)).sum())
    packed = estimate(model, parameters(model), lambda: model(torch.zeros(3, 96)).sum(), storage="nf4")
    assert packed.weights == 96 * 64 // 2 + 96 * FP32 + 64
    whole = 96 * 64 * FP32
    # at the base's product: input (3, 96), scaled up (64, 2), output (3, 64)
    assert packed.activations == (288 + 128 + 192) * FP32 + whole
    assert plain.activations < whole


def state_bytes(optimizer: Any, parameter: nn.Parameter) -> int:
    rows = optimizer.state[parameter].items()
    return sum(v.nbytes for k, v in rows if isinstance(v, Tensor) and v.ndim and not k.startswith("qmap"))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd", "adamw8bit"])
def test_states_of_optimizers_are_those_of_the_libraries(name: str) -> None:
    made = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    if name == "adamw8bit":
        optimizer: Any = importlib.import_module("bitsandbytes").optim.AdamW8bit(made)
    else:
        kinds = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor, "sgd": torch.optim.SGD}
        optimizer = kinds[name](made, lr=0.01)
    optimizer.step()
    assert [OPTIMIZERS[name].state(p.shape) for p in made] == [state_bytes(optimizer, p) for p in made]


def test_states_of_other_optimizers_were_measured() -> None:
    """prodigyopt 1.1.2, lion-pytorch 0.2.5, schedulefree 1.4.1, came-pytorch 0.1.3, without their scalars."""
    measured = {
        "prodigy": [81920, 163840, 737280, 640],
        "lion": [20480, 40960, 184320, 160],
        "schedule_free": [40960, 81920, 368640, 320],
        "came": [23168, 46208, 430080, 320],
    }
    assert {name: [OPTIMIZERS[name].state(shape) for shape in SHAPES] for name in measured} == measured


def test_errors_say_what_is_wrong() -> None:
    model = network(rank=2)
    trained, loss = parameters(model), step_of(model)
    with pytest.raises(ConfigError, match=r"optimizer is 'adam'; its memory is known for adamw, "):
        estimate(model, trained, loss, optimizer="adam")
    with pytest.raises(ConfigError, match="storage is 'nf3'"):
        estimate(model, trained, loss, storage="nf3")  # pyright: ignore[reportArgumentType] the error is what is tested
    with pytest.raises(StateError, match="nothing is trainable"):
        estimate(model, [], loss)
    with pytest.raises(StateError, match="1 of the 5 trainable tensors are not the model's"):
        estimate(model, [*trained, nn.Parameter(torch.zeros(3))], loss)
    with pytest.raises(StateError, match="needs values"):
        estimate(model, trained, lambda: loss() * float(torch.ones(3).sum()))
    detach(model)
    model[0].requires_grad_(True)
    with pytest.raises(StateError, match="the loss does not depend"):
        estimate(model, list(model[0].parameters()), lambda: torch.zeros(3).sum())
    model[2].requires_grad_(True)
    with pytest.raises(StateError, match="no gradient reaches"):
        estimate(model, list(model[0].parameters()), lambda: model[2](torch.zeros(3, 10)).sum())


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_embedded_base_takes_what_was_predicted(tmp_path: Path) -> None:
    """In fresh processes, whose allocator gives freed memory back: see benchmarks/memory.py."""
    figures = tmp_path / "figures.json"
    program = ROOT / "benchmarks" / "memory.py"
    command = [sys.executable, "-W", "ignore", str(program), "--only", "demo 16", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(figures.read_text())["demo 16"]
    assert rows["measured peak"] == pytest.approx(rows["predicted peak"], rel=0.15)
    assert rows["predicted activations and gradients"] > 80 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("name", "weights", "activations"), [("sdxl 256 bf16", 5.13, 0.53), ("flux 1024 bf16 checkpointing", 23.8, 2.4)]
)
def test_a_plan_at_real_size_takes_no_memory(name: str, weights: float, activations: float) -> None:
    """In GB. Weights: 2.567e9 and 11.9e9 parameters in bf16; activations: as predicted when this was written."""
    program = ROOT / "benchmarks" / "memory.py"
    code = (
        "import json, runpy, sys\n"
        "from imgadapt.training.memory import process, resident\n"
        f"made = runpy.run_path({str(program)!r})\n"
        "before = process()\n"
        f"found = made['predict'](made['CASES'][{name!r}])\n"
        "print(json.dumps([found.weights, found.activations, resident('VmHWM') - before]))\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found[0] / 1e9 == pytest.approx(weights, rel=0.01)
    assert found[1] / 1e9 == pytest.approx(activations, rel=0.15)
    assert found[2] < 100e6


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_resident_memory_grows_with_a_tensor() -> None:
    with mmap.mmap(-1, 2**26) as fresh:  # not from what the process has and does not use
        before = resident()
        tensor = torch.frombuffer(fresh, dtype=torch.float32).fill_(1)
        assert resident() - before > 0.9 * tensor.nbytes
        del tensor
    assert resident("VmHWM") >= resident() - 2**22
