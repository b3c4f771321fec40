"""diffusers loads what imgadapt writes, and the other way round, with the same picture."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils.save_and_load import get_peft_model_state_dict

from imgadapt import AdapterFile, attach, demo, detach, load, save
from imgadapt.arch import canonical
from imgadapt.formats import FORMATS, Format, Part
from imgadapt.methods import LoRA
from imgadapt.targets import Targets, components, find

Picture = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def loaded() -> Any:
    """A pipeline of our own: diffusers leaves traces on those it loaded adapters into."""
    return demo.pipeline()


@pytest.fixture
def pipe(loaded: Any) -> Iterator[Any]:
    yield loaded
    detach(loaded)
    loaded.unload_lora_weights()


def draw(pipe: Any) -> Picture:
    """A picture in [0, 1], (64, 96, 3)."""
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}
    return pipe("a fox", height=64, width=96, generator=torch.Generator().manual_seed(3), **options).images[0]


@pytest.fixture(scope="module")
def bare(loaded: Any) -> Picture:
    return draw(loaded)


def distance(one: Picture, other: Picture) -> float:
    return float(np.abs(one - other).max())


def adapter(pipe: Any, targets: Targets, alphas: Sequence[float]) -> AdapterFile:
    """Random layers of mixed ranks, none equal to its alpha, strong enough to be seen."""
    parts: dict[str, Part] = {}
    for i, (name, site) in enumerate((layer.name, layer.site) for layer in find(components(pipe), targets)):
        method = LoRA(rank=(4, 2, 7)[i % 3], alpha=alphas[i % len(alphas)])
        tensors = method.init(site, None)
        tensors["up"] = torch.randn(tensors["up"].shape) * 0.1
        parts[canonical(name)] = Part(method, tensors)
    return AdapterFile(parts)


# diffusers 0.42.1 drops a kohya file's alphas where they differ between attention or text layers: `get_peft_kwargs`
# makes alpha patterns such as `attn1.processor.to_k_lora.down.weight`, which match no layer, and peft warns
ALPHAS = {"diffusers": (2.0, 1.0, 12.0, 2.0), "kohya": (3.0,)}


@pytest.mark.parametrize("form", [form for form in FORMATS if form.name in ALPHAS], ids=lambda form: form.name)
@pytest.mark.parametrize(
    ("targets", "count"),
    [(["convolution", "text"], 76), ("*", 294)],
    ids=["convolutions and text encoder", "every layer of both"],
)
def test_diffusers_draws_the_same_picture_with_what_imgadapt_wrote(
    form: Format, targets: Targets, count: int, pipe: Any, bare: Picture, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    file = adapter(pipe, targets, ALPHAS[form.name])
    assert len(file.parts) == count
    attach(pipe, file)
    ours = draw(pipe)
    detach(pipe)
    assert distance(ours, bare) > 0.1
    path = save(file, tmp_path / "ours.safetensors", format=form.name)
    pipe.load_lora_weights(path)
    assert distance(draw(pipe), ours) <= 1e-3


CONFIGS: dict[str, dict[str, Any]] = {
    "mixed": {
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.2"],
        "rank_pattern": {"conv1": 2, r"^mid_block\..*to_q": 8},
        "alpha_pattern": {"to_v": 9, r"down_blocks\.1.*conv1": 5},
    },
    "rank-stabilised": {"target_modules": ["to_q", "conv2"], "use_rslora": True},
}


@pytest.mark.parametrize(
    ("config", "older"),
    [("mixed", False), ("mixed", True), ("rank-stabilised", False)],
    ids=lambda value: value if isinstance(value, str) else ("as peft spells", "as training scripts spell")[value],
)
def test_imgadapt_draws_the_same_picture_with_what_diffusers_wrote(
    config: str, older: bool, pipe: Any, bare: Picture, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    made = LoraConfig(r=4, lora_alpha=2, init_lora_weights=False, **CONFIGS[config])
    words = LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules=["q_proj", "fc1"])
    for module, settings in ((pipe.unet, made), (pipe.text_encoder, words)):
        module.add_adapter(settings)
    theirs = draw(pipe)
    assert distance(theirs, bare) > 0.1
    states: list[Any] = [get_peft_model_state_dict(module) for module in (pipe.unet, pipe.text_encoder)]
    if older:
        states = [convert_state_dict_to_diffusers(state) for state in states]
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=states[0],
        text_encoder_lora_layers=states[1],
        unet_lora_adapter_metadata=made.to_dict(),
        text_encoder_lora_adapter_metadata=words.to_dict(),
    )
    pipe.unload_lora_weights()
    assert distance(draw(pipe), bare) == 0
    file = load(tmp_path / "pytorch_lora_weights.safetensors")
    assert (file.format, file.unknown) == ("diffusers", {})
    assert sum(len(part.tensors) for part in file.parts.values()) == sum(len(state) for state in states)
    attach(pipe, file)
    assert distance(draw(pipe), theirs) <= 1e-3
