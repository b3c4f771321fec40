"""Methods of projections that layers share, or that the weight gives: against peft, and what they cost."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, RandLoraConfig, TinyLoraConfig, VBLoRAConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from imgadapt import Method, attach, collect, load, parameters, save
from imgadapt.errors import ConfigError, TargetError
from imgadapt.methods import LoRAXS, RandLoRA, TinyLoRA, VBLoRA, VeRA
from imgadapt.methods.singular import largest


class Model(nn.Module):
    """Layers of three sizes, none the largest along both axes; each reads an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.tall, self.small = nn.Linear(24, 12), nn.Linear(12, 20), nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x[:, : layer.in_features]) for layer in (self.wide, self.tall, self.small)], 1)


LAYERS = ["wide", "tall", "small"]
CONFIGS: dict[str, Any] = {
    "VERA": VeraConfig(r=5, target_modules=LAYERS),
    "RANDLORA": RandLoraConfig(r=5, randlora_alpha=7, target_modules=LAYERS),
    "TINYLORA": TinyLoraConfig(u=5, target_modules=LAYERS),
    "TINYLORA, tied": TinyLoraConfig(u=5, weight_tying=1.0, target_modules=LAYERS),
    "VBLORA": VBLoRAConfig(r=3, num_vectors=9, vector_length=4, topk=3, target_modules=LAYERS),
    "VBLORA, chosen": VBLoRAConfig(
        r=3, num_vectors=9, vector_length=4, topk=3, target_modules=LAYERS, save_only_topk_weights=True
    ),
}
OURS: dict[str, Method] = {
    "VERA": VeRA(rank=5),
    "RANDLORA": RandLoRA(rank=5, alpha=7),
    "TINYLORA": TinyLoRA(rank=2, u=5),
    "VBLORA": VBLoRA(rank=3, num_vectors=9, vector_length=4),
}


def trained(model: Any, seed: int = 3) -> Any:
    """Random values in all that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters() if isinstance(model, PeftModel) else parameters(model):
            if tensor.requires_grad:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


def theirs(kind: str) -> Any:
    return trained(get_peft_model(Model(), CONFIGS[kind]))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_file_of_peft_acts_as_it_does_there(kind: str, tmp_path: Path) -> None:
    x = torch.randn(3, 24)
    model = theirs(kind)
    model.save_pretrained(tmp_path)
    file = load(tmp_path / "adapter_model.safetensors")
    ours: Any = Model()
    attach(ours, file)
    torch.testing.assert_close(ours(x), model(x))
    for layer in LAYERS:
        slot = next(iter(getattr(ours, layer)))
        change = slot.method.scale * slot.method.delta(slot.tensors(), getattr(ours, layer).site, None)
        torch.testing.assert_close(change, getattr(model.base_model.model, layer).get_delta_weight("default"))


@pytest.mark.parametrize("kind", OURS)
def test_peft_acts_as_we_do_on_a_file_of_ours(kind: str, tmp_path: Path) -> None:
    x = torch.randn(3, 24)
    model: Any = Model()
    attach(model, OURS[kind], targets="*")
    expected = trained(model)(x)
    save(collect(model), tmp_path / "file", format="peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # RandLoRA's projections, once for each layer
        again = PeftModel.from_pretrained(Model(), str(tmp_path / "file"))
    torch.testing.assert_close(again(x), expected)


def test_a_weight_that_rounding_takes_below_zero_is_zero_and_nan_in_peft(tmp_path: Path) -> None:
    model = theirs("VBLORA, chosen")
    logits = model.base_model.model.wide.vblora_logits_A["default"]
    with torch.no_grad():
        logits.fill_(-40)[..., 2:4] = torch.tensor([-1.2633347511291504, 0.34998318552970886])
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 24)
    assert PeftModel.from_pretrained(Model(), str(tmp_path))(x).isnan().any()
    ours: Any = Model()
    attach(ours, load(tmp_path / "adapter_model.safetensors"))
    torch.testing.assert_close(ours(x), model(x))


@pytest.mark.parametrize("method", [LoRAXS(rank=3), TinyLoRA(rank=2, u=3)], ids=str)
def test_a_file_brings_its_directions_to_a_base_whose_svd_has_others(method: Method, tmp_path: Path) -> None:
    x = torch.randn(3, 24)
    model: Any = Model()
    base = model(x)
    attach(model, method, targets="*")
    change = trained(model)(x) - base
    save(collect(model), tmp_path / "file.safetensors", format="imgadapt")
    other: Any = Model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    base = other(x)
    attach(other, load(tmp_path / "file.safetensors"))
    torch.testing.assert_close(other(x) - base, change, rtol=1e-4, atol=1e-5)


def test_directions_of_a_large_weight_are_those_of_its_svd() -> None:
    torch.manual_seed(0)
    w = torch.randn(320, 480) + 80 * torch.linalg.qr(torch.randn(320, 4)).Q @ torch.randn(4, 480) / 480**0.5
    u, s, v = largest(w, 4)
    torch.testing.assert_close(s, torch.linalg.svdvals(w)[:4], rtol=1e-4, atol=0)
    torch.testing.assert_close(w @ v.t(), u * s, rtol=1e-2, atol=1e-2)


def test_layers_share_one_copy_of_projections_from_a_seed() -> None:
    model: Any = nn.Sequential(*(nn.Linear(64, 48) for _ in range(5)), nn.Linear(32, 96)).bfloat16()
    attach(model, VeRA(rank=16), targets="*")
    for layer in model:
        layer(torch.randn(2, layer.base.in_features, dtype=torch.bfloat16))
    made = [next(iter(layer))._made for layer in model]
    places = {tensor.data_ptr() for one in made for tensor in (*one.tensors.values(), *one.narrow.values())}
    assert len(places) == 2 * (2 + 1)  # of each size down in fp32 and bf16, up in fp32
    small, large = made[-1].tensors["vera_down"], made[0].tensors["vera_down"]
    torch.testing.assert_close(small * 32**0.5, large[:, :32] * 64**0.5)  # the first columns


def flops(method: Method, tokens: int, width: int) -> float:
    """Of a forward and a backward with the gradient of the input, in those of the frozen layer."""
    model = nn.Sequential(nn.Linear(width, width)).requires_grad_(False)
    attach(model, method, targets="*")
    x = torch.randn(tokens, width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops() / (4 * tokens * width**2)


def test_vera_has_no_product_for_the_gradient_of_what_is_random() -> None:
    rank, width = 32, 256
    assert flops(VeRA(rank=rank), 64, width) == pytest.approx(1 + 5 * rank / (2 * width))  # LoRA: 6


def test_randlora_s_delta_is_cheaper_than_its_two_products() -> None:
    """Forward: the build, and the one product; backward: the weight's gradient, and that of `small`."""
    width, tokens = 256, 512
    found = flops(RandLoRA(rank=32), tokens, width)
    assert found == pytest.approx(1 + 1 / 2 + width / tokens)
    assert found < 3.5  # peft: both products, both of the input's gradient, one of small's


@pytest.mark.parametrize(
    "make",
    [
        lambda: VeRA(seed=10**30),
        lambda: VeRA(seed=-1),
        lambda: VeRA(rank=0),
        lambda: RandLoRA(seed=True),
        lambda: RandLoRA(alpha=float("nan")),
        lambda: VBLoRA(topk=300),
        lambda: VBLoRA(vector_length=2.0),  # pyright: ignore[reportArgumentType]
        lambda: TinyLoRA(u=0),
        lambda: LoRAXS(rank="3"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_settings_that_cannot_be_are_refused(make: Callable[[], Method]) -> None:
    with pytest.raises(ConfigError):
        make()


def test_projections_larger_than_any_layer_s_are_refused_before_they_are_drawn() -> None:
    with pytest.raises(TargetError, match="more than any layer's"):
        attach(nn.Sequential(nn.Linear(12, 24)), VeRA(rank=10**9), targets="0")
