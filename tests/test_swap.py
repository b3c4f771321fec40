"""Blocks that wait in RAM: the same gradients and pictures, and nothing of them on the device between their turns."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imgadapt import DoRA, LoRA, attach, collect, detach, disabled, parameters
from imgadapt.errors import ConfigError
from imgadapt.training.swap import Swap, repeated

TINY = runpy.run_path(str(Path(__file__).with_name("tiny.py")))
CPU = torch.device("cpu")


def gradients(family: Any) -> list[Tensor]:
    """Of the adapter, for a fixed question."""
    torch.manual_seed(2)
    channels = family.latent_shape[0]
    noisy = torch.randn(2, channels, 8, 8)
    conditions = {key: torch.randn_like(value) for key, value in dict(family.blank(2)).items()}
    times = torch.tensor([100, 700])
    family.predict(noisy, conditions, times).square().mean().backward()
    found = [p.grad.clone() for p in parameters(family.pipeline) if p.grad is not None]
    for parameter in parameters(family.pipeline):
        parameter.grad = None
    return found


def family(name: str) -> Any:
    """The family of a tiny base with a changed DoRA on it."""
    from imgadapt.training import families

    torch.manual_seed(0)
    pipe = TINY[name]()
    made = families.FAMILIES[type(pipe).__name__](pipe, CPU, torch.float32)
    attach(pipe, DoRA(LoRA(rank=2, alpha=1)))
    with torch.no_grad():
        for parameter in parameters(pipe):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    denoiser: Any = made.denoiser
    denoiser.enable_gradient_checkpointing()
    made.denoiser.train()
    return made


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_swapped_blocks_give_the_same_gradients_and_predictions_and_are_away_between(name: str) -> None:
    one = family(name)
    before = gradients(one)
    with torch.no_grad():
        conditions = one.blank(2)
        noisy, times = torch.randn(2, one.latent_shape[0], 8, 8), torch.tensor([100, 700])
        wanted = one.predict(noisy, conditions, times)
        with disabled(one.pipeline):
            bare = one.predict(noisy, conditions, times)
    blocks = repeated(one.denoiser)
    frozen = [p for block in blocks for p in block.parameters() if not p.requires_grad]
    sizes = sum(p.numel() for p in frozen)
    swap = Swap(one.denoiser, len(blocks), CPU)
    assert swap.bytes == 4 * sizes > 0
    assert all(p.numel() == 0 for p in frozen)
    for _ in range(2):
        after = gradients(one)
        assert len(after) == len(before) > 0
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        here = [block for block in blocks if any(p.numel() for p in block.parameters() if not p.requires_grad)]
        assert len(here) <= 1  # the one that the backward ended with
    with torch.no_grad():
        assert torch.equal(one.predict(noisy, conditions, times), wanted)
        with disabled(one.pipeline):
            assert torch.equal(one.predict(noisy, conditions, times), bare)
    assert all(p.numel() == 0 for p in frozen)
    assert len(collect(one.pipeline).parts) > 0
    detach(one.pipeline)


def test_what_cannot_be_swapped_is_said() -> None:
    one = family("sd1")
    with pytest.raises(ConfigError, match=r"swap_blocks is 99; UNet2DConditionModel has \d+ blocks to swap"):
        Swap(one.denoiser, 99, CPU)
    one.denoiser.disable_gradient_checkpointing()
    with pytest.raises(ConfigError, match="swap_blocks needs --checkpointing"):
        Swap(one.denoiser, 1, CPU)
    with pytest.raises(ConfigError, match="swap_blocks is 1; Linear has 0 blocks"):
        Swap(nn.Linear(2, 2), 1, CPU)
