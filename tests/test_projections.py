"""Methods of projections that layers share, or that the weight gives: against peft, and what they cost."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, RandLoraConfig, VBLoRAConfig, VeraConfig, get_peft_model
from torch import Tensor, nn

from imgadapt import Method, attach, collect, load, parameters, save
from imgadapt.methods import RandLoRA, VBLoRA, VeRA


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
    "VBLORA": VBLoRAConfig(r=3, num_vectors=9, vector_length=4, topk=3, target_modules=LAYERS),
    "VBLORA, chosen": VBLoRAConfig(
        r=3, num_vectors=9, vector_length=4, topk=3, target_modules=LAYERS, save_only_topk_weights=True
    ),
}
OURS: dict[str, Method] = {
    "VERA": VeRA(rank=5),
    "RANDLORA": RandLoRA(rank=5, alpha=7),
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
