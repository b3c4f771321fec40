"""Routers: strengths of each sample by time and prompt, and what they learn."""

import copy
import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import imgadapt
from imgadapt import Full, LoRA, PromptTuning
from imgadapt.errors import ConfigError, FormatError, ShapeError, StateError, TargetError
from imgadapt.routing import Arrow, Poly, Router, XLoRA, load_router, route, routed, save_router, unroute
from imgadapt.routing.arrow import prototype
from imgadapt.tensors import read_tensors, write_tensors
from imgadapt.training import objective
from imgadapt.training.config import TrainConfig
from imgadapt.training.data import scan
from imgadapt.training.families.load import FAMILIES
from imgadapt.training.material import Material
from imgadapt.training.routes import learn

tiny: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny.py"))))
TARGETS = ["attn2.to_q", "attn2.to_out.0", "resnets.*.conv1"]
KINDS = [Arrow(), Arrow(top_k=1, temperature=0.1), XLoRA(hidden=4), XLoRA(hidden=4, per_layer=True, top_k=1), Poly()]
each = pytest.mark.parametrize("router", KINDS, ids=str)


def model_with(*names: str) -> Any:
    """A UNet with trained adapters; the last is on fewer layers."""
    torch.manual_seed(0)
    model = tiny.unet().requires_grad_(False).eval()
    for k, name in enumerate(names):
        targets = TARGETS[:2] if k == len(names) - 1 else TARGETS
        imgadapt.attach(model, LoRA(rank=2 + k, alpha=1), name=name, targets=targets, trainable=False)
        with torch.no_grad():
            for tensor in (t for _, _, slot in imgadapt.live.slots(model, name) for t in slot.parameters()):
                tensor.normal_(std=0.3)
    return model


def ask(model: Any, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    noisy, context = torch.randn(3, 4, 8, 8, generator=g), torch.randn(3, 7, tiny.CLIP, generator=g)
    return model(noisy, torch.tensor([10, 500, 999]), encoder_hidden_states=context).sample


@each
@torch.no_grad()
def test_a_router_acts_is_read_back_and_leaves_nothing(router: Router, tmp_path: Path) -> None:
    model = model_with("a", "b", "c")
    imgadapt.set_weights(model, {"a": 0.3, "b": 1, "c": 0})
    before = ask(model)
    there = route(model, router, "c", "a", "b")
    torch.manual_seed(3)
    for parameter in there.parameters():
        parameter.normal_()
    acting = ask(model)
    assert (acting - before).abs().max() > 1e-4
    if there.told is not None:
        torch.testing.assert_close(there.told.sum(-1), torch.ones(there.told.shape[:2]))
    path = save_router(there.file(), tmp_path / "router.safetensors")
    unroute(model)
    assert torch.equal(ask(model), before)
    assert routed(model) is None
    assert not any(module._forward_pre_hooks for module in model.modules())
    read = load_router(path)
    assert (read.router, read.adapters) == (router, ("c", "a", "b"))
    route(model, read, "c", "a", "b")
    assert torch.equal(ask(model), acting)
    with imgadapt.disabled(model):
        assert not torch.equal(ask(model), acting)
    with pytest.raises(StateError, match="sample"):
        imgadapt.merge(model)


@torch.no_grad()
def test_fresh_ones_are_the_average_and_a_sample_has_its_own_strengths() -> None:
    model = model_with("a", "b")
    imgadapt.set_weights(model, {"a": 0.5, "b": 0.5})
    average = ask(model)
    for router in (XLoRA(hidden=4), XLoRA(hidden=4, per_layer=True), Poly()):
        route(model, router)
        torch.testing.assert_close(ask(model), average)
        unroute(model)
    there = route(model, XLoRA(hidden=4))
    torch.manual_seed(3)
    for parameter in there.parameters():
        parameter.normal_()
    acting = ask(model)
    told = there.told
    assert told is not None
    assert (told[0] - told[1]).abs().max() > 1e-3
    unroute(model)
    imgadapt.set_weights(model, {"a": told[:, 0, 0], "b": told[:, 0, 1]})
    torch.testing.assert_close(ask(model), acting)


def test_gates_learn_and_adapters_do_not() -> None:
    for router in (XLoRA(hidden=4), XLoRA(hidden=4, per_layer=True), Poly()):
        model = model_with("a", "b")
        imgadapt.set_weights(model, {"a": 1, "b": 0})
        wanted = ask(model).detach()
        there = route(model, router)
        model.enable_gradient_checkpointing()
        model.train()
        there.training = router.name == "poly"
        optimizer = torch.optim.Adam(there.parameters(), lr=0.1)
        losses: list[float] = []
        for _ in range(12):
            loss = (ask(model) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-4:]) < 0.5 * sum(losses[:4]), router
        assert all(p.grad is None for _, _, slot in imgadapt.live.slots(model) for p in slot.parameters())
        assert there.told is not None
        assert there.told[..., 0].mean() > 0.6


@torch.no_grad()
def test_arrow_gives_a_layer_to_whom_its_input_is_like() -> None:
    for width, site_of in ((12, torch.nn.Linear(12, 20)), (8, torch.nn.Conv2d(8, 6, 3, padding=1))):
        parts = {"unet": torch.nn.ModuleDict({"layer": site_of})}
        for name in ("a", "b"):
            imgadapt.attach(parts, LoRA(rank=2), name=name, targets="layer")
            for tensor in imgadapt.parameters(parts, name):
                tensor.normal_()
        rows = imgadapt.live.slots(parts)
        for _, layer, slot in rows:
            found = prototype(slot, layer.site, None)
            delta = slot.method.delta(slot.tensors(), layer.site, None).flatten(1)
            right = torch.linalg.svd(delta).Vh[0].view(width, -1).sum(1)
            torch.testing.assert_close(found.abs(), right.abs(), rtol=1e-4, atol=1e-5)
    arrow = Arrow(temperature=0.5)
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    told = arrow.of_input(prototypes, torch.tensor([True, True, False]), torch.tensor([[2.0, 0.5], [0.1, -3.0]]))
    torch.testing.assert_close(told[:, :2], (torch.tensor([[2.0, 0.5], [0.1, 3.0]]) / 0.5).softmax(1))
    assert not told[:, 2].any()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model = model_with("a", "b")
    with pytest.raises(StateError, match="no adapter"):
        route(model, Arrow(), "a", "x")
    with pytest.raises(ConfigError, match="wanted 2"):
        route(model, Arrow(), "a")
    for make in (lambda: XLoRA(hidden=0), lambda: XLoRA(hidden=10**9), lambda: Arrow(top_k=0), lambda: Poly(0.0)):
        with pytest.raises(ConfigError):
            make()
    there = route(model, XLoRA(hidden=4))
    with pytest.raises(StateError, match="already"):
        route(model, Arrow())
    path = save_router(there.file(), tmp_path / "router.safetensors")
    imgadapt.detach(model, "b")
    with pytest.raises(StateError, match="unroute"):
        ask(model)
    unroute(model)
    with pytest.raises(StateError, match="no router"):
        unroute(model)
    with pytest.raises(ConfigError, match="wanted 2"):
        route(model, load_router(path))
    imgadapt.attach(model, Full(), name="b", targets="conv_in")
    with pytest.raises(ShapeError, match="is for 16 layers"):
        route(model, load_router(path), "a", "b")
    tensors, metadata = read_tensors(path)
    told = json.loads(metadata["imgadapt_router"])
    for wrong in ("", "[]", json.dumps({**told, "router": "x"}), json.dumps({**told, "settings": {"hidden": 1e9}})):
        write_tensors(tmp_path / "wrong.safetensors", tensors, {"imgadapt_router": wrong})
        with pytest.raises(FormatError, match="no router"):
            load_router(tmp_path / "wrong.safetensors")
    parts = {"unet": torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)})}
    for name in ("a", "b"):
        imgadapt.attach(parts, LoRA(2), name=name, targets="q")
    with pytest.raises(TargetError, match="time is not known"):
        route(parts, Arrow())


def test_a_router_learns_from_pictures(pipe: Any, tmp_path: Path) -> None:
    family = FAMILIES[type(pipe).__name__](pipe, torch.device("cpu"), torch.float32)
    for name in ("a", "b"):
        imgadapt.attach(pipe, LoRA(rank=2), name=name, targets="attn2.to_q", trainable=False)
        with torch.no_grad():
            for _, _, slot in imgadapt.live.slots(pipe, name):
                slot.tensors()["up"].normal_(std=0.1)
    there = route(pipe, XLoRA(hidden=4))
    config = TrainConfig.of({"folder": tmp_path / "some", "output": tmp_path / "out", "batch_size": 2})
    config.folder.mkdir()
    for path in sorted((imgadapt.demo.STYLE / "train").iterdir())[:6]:
        (config.folder / path.name).write_bytes(path.read_bytes())
    material = Material(config, family, scan(config.folder, None, None))
    material.prepare(quiet=True)
    asked = objective.of(config, family.schedule, family.sampling(8, 8))
    losses = learn(family, asked, material, there, steps=2)
    assert len(losses) == 2
    assert there.parameters()[2].any()
    assert not there.training
    unroute(pipe)
    with pytest.raises(ConfigError, match="nothing to train"):
        learn(family, asked, material, route(pipe, Arrow()), steps=2)
    unroute(pipe)
    imgadapt.detach(pipe)


@torch.no_grad()
def test_strengths_that_are_set_meanwhile_are_not_passed_over() -> None:
    for router in (XLoRA(hidden=4), Arrow()):
        model = model_with("a", "b")
        route(model, router)
        ask(model)
        imgadapt.set_weights(model, {"a": 0.25})
        with pytest.raises(StateError, match="its strength was set"):
            ask(model)
        unroute(model)
        assert {slot.weight for _, _, slot in imgadapt.live.slots(model, "a")} == {0.25}


def test_a_copy_in_the_middle_of_a_training_is_routed_too() -> None:
    model = model_with("a", "b")
    route(model, XLoRA(hidden=4))
    full = ask(model)
    other = copy.deepcopy(model)
    assert torch.equal(ask(other), full)
    unroute(other)
    assert not torch.equal(ask(other), full)
    assert torch.equal(ask(model), full)


@torch.no_grad()
def test_arrow_looks_again_at_adapters_that_were_swapped() -> None:
    model = model_with("a", "b")
    file = imgadapt.collect(model, "b")
    route(model, Arrow(temperature=0.1))
    ask(model)
    for part in file.parts.values():
        for tensor in part.tensors.values():
            tensor.normal_()
    imgadapt.swap(model, file, name="b")
    swapped = ask(model)
    unroute(model)
    route(model, Arrow(temperature=0.1))
    assert torch.equal(ask(model), swapped)


@torch.no_grad()
def test_texts_are_read_as_they_are_given() -> None:
    model = tiny.pixart().eval()  # its texts are projected: 10 numbers, and 8 where attention reads them
    for name in ("a", "b"):
        imgadapt.attach(model, LoRA(2), name=name)
    there = route(model, XLoRA(hidden=4))
    assert there.sizes.context == 10
    sizes: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    model(torch.randn(1, 4, 8, 8), torch.randn(1, 7, 10), torch.tensor([500]), sizes)
    pipe = tiny.sd3()
    for name in ("a", "b"):
        imgadapt.attach(pipe, LoRA(2), name=name, targets="attn.to_q")
    told: list[Tensor] = []
    for order in (0, 1):  # a learned prompt before it or after
        for step in (0, 1):
            torch.manual_seed(4)
            if step == order:
                imgadapt.attach(pipe, PromptTuning(4, spread=9.0), name="prompt")
            else:
                there = route(pipe, XLoRA(hidden=4))
        torch.manual_seed(5)
        there.parameters()[2].normal_()
        how: dict[str, Any] = {"num_inference_steps": 1, "height": 16, "width": 16, "max_sequence_length": 16}
        pipe("a cat", output_type="latent", generator=torch.Generator().manual_seed(0), **how)
        assert there.told is not None
        told.append(there.told)
        unroute(pipe)
        imgadapt.detach(pipe, "prompt")
    assert torch.equal(*told)


def test_hostile_routers_are_refused(tmp_path: Path) -> None:
    model = model_with("a", "b")
    path = save_router(route(model, XLoRA(hidden=4)).file(), tmp_path / "router.safetensors")
    average = ask(model)
    unroute(model)
    tensors, metadata = read_tensors(path)
    path = tmp_path / "other.safetensors"
    write_tensors(path, {**tensors, "router.out": tensors["router.out"] * torch.nan}, metadata)
    with pytest.raises(FormatError, match="NaN"):
        load_router(path)
    write_tensors(path, {**tensors, "router.more": torch.ones(3)}, metadata)
    with pytest.raises(ShapeError, match="more is"):
        route(model, load_router(path))
    write_tensors(path, {name: tensor.half() for name, tensor in tensors.items()}, metadata)
    route(model, load_router(path))
    torch.testing.assert_close(ask(model), average)
