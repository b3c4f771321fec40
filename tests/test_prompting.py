"""Learned prompts: what attention makes of them, and the verbs that act on them."""

import copy
import json
import math
import runpy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from peft import PromptEncoderConfig
from peft.tuners.p_tuning import PromptEncoder
from torch import Tensor

import imgadapt
from imgadapt import GatedPrompts, LoRA, PrefixTuning, PromptTuning, PTuning
from imgadapt.errors import ConfigError, FormatError, ShapeError, StateError, TargetError
from imgadapt.playground.drawing.stacks import Stack
from imgadapt.playground.library.matching import Places, match
from imgadapt.playground.requests import Use
from imgadapt.prompting import Prompting
from imgadapt.prompting import stack as prompts
from imgadapt.tensors import read_tensors, write_tensors
from imgadapt.training import recipe, spelling
from imgadapt.training.config import TrainConfig

tiny: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny.py"))))
KINDS = [PromptTuning(3), PTuning(3, hidden=5), PTuning(3, encoder="lstm", hidden=5), PrefixTuning(3), GatedPrompts(3)]
each = pytest.mark.parametrize("kind", KINDS, ids=lambda k: f"{k.name}-{getattr(k, 'encoder', '')}")


def unet(**changes: Any) -> Any:
    torch.manual_seed(0)
    return tiny.unet(**changes).requires_grad_(False).eval()


def inputs(batch: int = 2, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    draw: Callable[..., Tensor] = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    return draw(batch, 4, 8, 8), torch.tensor([100, 700, 300])[:batch], draw(batch, 7, width)


def ask(model: Any, batch: int = 2, **further: Any) -> Tensor:
    noisy, times, context = inputs(batch)
    return model(noisy, times, context, **further).sample


def put_on(model: Any, kind: Any, **how: Any) -> None:
    """Attached, with numbers as trained ones have."""
    torch.manual_seed(2)
    imgadapt.attach(model, kind, **how)
    with torch.no_grad():
        for parameter in imgadapt.parameters(model, how.get("name", "default")):
            parameter.normal_()


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@each
@torch.no_grad()
def test_a_prompt_acts_by_its_strength_and_leaves_nothing(kind: Prompting, tmp_path: Path) -> None:
    model = unet()
    base, keys = ask(model), list(model.state_dict())
    put_on(model, kind)
    assert list(model.state_dict()) == keys
    full = ask(model)
    assert (full - base).abs().max() > 1e-3
    imgadapt.set_weights(model, {"default": 0.5})
    assert (ask(model) - full).abs().max() > 1e-4
    imgadapt.set_weights(model, {"default": 0})
    assert torch.equal(ask(model), base)
    imgadapt.set_weights(model, {"default": torch.tensor([0.0, 1.0])})  # guidance: not in the unconditional half
    torch.testing.assert_close(ask(model), torch.stack([base[0], full[1]]))
    imgadapt.set_weights(model, {"default": 1})
    assert torch.equal(ask(model), full)
    with imgadapt.disabled(model):
        assert torch.equal(ask(model), base)
    assert torch.equal(ask(copy.deepcopy(model)), full)

    path = imgadapt.save(imgadapt.collect(model), tmp_path / "prompt.safetensors")
    assert imgadapt.adapters(model) == ["default"]
    assert "default" in str(imgadapt.status(model))
    imgadapt.detach(model)
    assert torch.equal(ask(model), base)
    assert hooks(model) == 0
    assert not any("imgadapt" in key for key in model.__dict__)
    file = imgadapt.load(path)
    assert file.prompts is not None
    assert file.prompts.kind == kind
    imgadapt.attach(model, file)
    assert torch.equal(ask(model), full)
    assert not any(parameter.requires_grad for parameter in imgadapt.parameters(model))
    imgadapt.detach(model)
    imgadapt.attach(model, file, trainable=True)  # P-tuning's network goes on
    torch.testing.assert_close(ask(model), full)
    again = imgadapt.save(imgadapt.collect(model), tmp_path / "again.safetensors")
    if not isinstance(kind, PTuning):
        assert path.read_bytes() == again.read_bytes()


@each
def test_all_that_is_trained_has_a_gradient_and_it_is_that_without_checkpointing(kind: Prompting) -> None:
    model = unet().train()
    put_on(model, kind)
    trained = imgadapt.parameters(model)
    plain = torch.autograd.grad(ask(model).square().sum(), trained)
    assert all(gradient.abs().max() > 0 for gradient in plain)
    model.enable_gradient_checkpointing()
    for ours, wanted in zip(torch.autograd.grad(ask(model).square().sum(), trained), plain, strict=True):
        torch.testing.assert_close(ours, wanted)


@torch.no_grad()
def test_attention_is_that_of_the_papers() -> None:
    model = unet()
    attention = model.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    x, context = torch.randn(2, 5, 8), torch.randn(2, 7, tiny.CLIP)

    def wanted(extra: tuple[Tensor, Tensor] | None, bias: float, gated: Tensor | None) -> Tensor:
        def heads(t: Tensor) -> Tensor:
            return t.view(2, -1, 4, 2).transpose(1, 2)

        q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
        logits_bias = torch.zeros(7)
        if extra is not None:
            k, v = (torch.cat([a, b.expand(2, -1, -1)], 1) for a, b in ((k, extra[0]), (v, extra[1])))
            logits_bias = torch.cat([logits_bias, torch.full((3,), bias)])
        weights = (heads(q) @ heads(k).transpose(2, 3) / math.sqrt(2) + logits_bias).softmax(-1)
        made = weights @ heads(v)
        if gated is not None:
            k, v = (heads(p(gated.expand(2, -1, -1))) for p in (attention.to_k, attention.to_v))
            made = (
                made + 0.5 * gate.tanh()[:, None, None] * (heads(q) @ k.transpose(2, 3) / math.sqrt(2)).softmax(-1) @ v
            )
        return attention.to_out[0](made.transpose(1, 2).reshape(2, 5, 8))

    for kind in (PromptTuning(3), PrefixTuning(3), GatedPrompts(3)):
        put_on(model, kind, weight=0.5)
        one = prompts.attached({"unet": model}, "default")
        assert one is not None
        t = one.read(name, x)
        gate = t.get("gate", torch.zeros(4))
        extra = (t["keys"], t["values"]) if "keys" in t else None
        extra = (attention.to_k(t["tokens"]), attention.to_v(t["tokens"])) if "tokens" in t else extra
        sought = wanted(extra, torch.tensor(0.5).log().item(), t.get("prompt"))
        torch.testing.assert_close(attention(x, context), sought)
        own, attention.processor = attention.processor, AttnProcessor()  # without the fused kernel
        torch.testing.assert_close(attention(x, context), sought)
        attention.processor = own
        imgadapt.detach(model)


@torch.no_grad()
def test_a_mask_of_the_text_stays_one_and_learned_tokens_are_read() -> None:
    model = unet()
    noisy, times, context = inputs()
    kept = torch.ones(2, 7)
    kept[:, 5:] = 0
    for kind in (PromptTuning(3), PrefixTuning(3)):
        put_on(model, kind)
        masked = model(noisy, times, context, encoder_attention_mask=kept).sample
        torch.testing.assert_close(masked, model(noisy, times, context[:, :5]).sample)
        assert (masked - ask(model)).abs().max() > 1e-4
        imgadapt.detach(model)


@torch.no_grad()
def test_several_prompts_and_layers_act_together_in_any_order() -> None:
    outs: list[Tensor] = []
    for turn in range(3):
        model = unet()
        steps: list[Callable[[], None]] = [
            lambda model=model: put_on(model, PrefixTuning(2), name="prefix"),
            lambda model=model: put_on(model, GatedPrompts(2), name="gated", weight=-0.5),
            lambda model=model: put_on(model, LoRA(2), name="lora", targets=["attn2.to_k", "attn2.to_v", "to_out.0"]),
        ]
        for step in (*steps[turn:], *steps[:turn]):
            step()
        outs.append(ask(model))
        imgadapt.merge(model)
        torch.testing.assert_close(ask(model), outs[-1], rtol=1e-4, atol=1e-4)
        imgadapt.detach(model, "lora")
        imgadapt.detach(model)
        assert hooks(model) == 0
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outs[0], outs[2], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_targets_and_strengths_choose_attentions() -> None:
    model = unet()
    put_on(model, PrefixTuning(2), targets="down_blocks.*")
    file = imgadapt.collect(model)
    assert file.prompts is not None
    assert {key.split(".")[1] for key in file.prompts.tensors} == {"down_blocks"}
    down = ask(model)
    imgadapt.detach(model)
    put_on(model, PromptTuning(2), weight={"down_blocks.*": 1.0})
    assert (ask(model) - down).abs().max() > 1e-4
    imgadapt.set_weights(model, {"default": {"down_blocks.*": 0.0}})
    with imgadapt.disabled(model):
        base = ask(model)
    assert torch.equal(ask(model), base)
    with pytest.raises(TargetError, match="same tokens everywhere"):
        imgadapt.attach(model, PromptTuning(2), name="other", targets="down_blocks.*")
    with pytest.raises(TargetError, match="no cross-attention matches"):
        imgadapt.attach(model, PrefixTuning(2), name="other", targets="nowhere")


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd3", "flux", "sdxl"])
def test_pipelines_read_tokens_with_guidance(family: str) -> None:
    pipe = tiny.PIPELINES[family]()
    side = 64 if family == "flux" else 16
    how: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "height": side, "width": side}
    if family != "sdxl":
        how["max_sequence_length"] = 16

    def draw() -> Tensor:
        return torch.from_numpy(pipe("a cat", generator=torch.Generator().manual_seed(0), **how).images)

    base = draw()
    put_on(pipe, PromptTuning(2))
    assert (draw() - base).abs().max() > 1e-4
    if family != "sdxl":
        imgadapt.detach(pipe)
        with pytest.raises(TargetError, match="attend together"):
            imgadapt.attach(pipe, PrefixTuning(2))
        with pytest.raises(ConfigError, match="0 or 1"):
            imgadapt.attach(pipe, PromptTuning(2), weight=0.5)
        put_on(pipe, PromptTuning(2), weight=0.0)
    else:
        imgadapt.set_weights(pipe, {"default": 0.0})
    assert torch.equal(draw(), base)
    assert imgadapt.detach(pipe) is None
    assert torch.equal(draw(), base)


def test_p_tuning_is_pefts_network() -> None:
    for encoder, theirs in (("mlp", "MLP"), ("lstm", "LSTM")):
        ours = PTuning(4, encoder=encoder, hidden=5)  # pyright: ignore[reportArgumentType] # one of both
        config = PromptEncoderConfig(
            encoder_hidden_size=5, num_virtual_tokens=4, token_dim=6, encoder_reparameterization_type=theirs,
            num_transformer_submodules=1, encoder_num_layers=1 if encoder == "lstm" else 2, encoder_dropout=0.0,
        )  # fmt: skip
        torch.manual_seed(0)
        peer = PromptEncoder(config).eval()
        state = peer.state_dict()
        heads = [key.split(".")[1] for key in state if key.startswith("mlp_head") and key.endswith("weight")]
        t = {"embedding": state["embedding.weight"]}
        for k, place in enumerate(heads):
            t |= {f"head_{k}": state[f"mlp_head.{place}.weight"], f"head_{k}_bias": state[f"mlp_head.{place}.bias"]}
        for way in ("", "_reverse") if encoder == "lstm" else ():
            for part in ("ih", "hh"):
                t[f"lstm_{part}{way}"] = state[f"lstm_head.weight_{part}_l0{way}"]
                t[f"lstm_{part}_bias{way}"] = state[f"lstm_head.bias_{part}_l0{way}"]
        wanted = peer(torch.arange(4)[None])[0]
        torch.testing.assert_close(ours.made(t)["tokens"], wanted)


def test_pefts_files_are_read_and_written(tmp_path: Path) -> None:
    model = unet()
    for kind in (PromptTuning(3), PTuning(3, hidden=4)):
        put_on(model, kind)
        full = ask(model)
        folder = imgadapt.save(imgadapt.collect(model), tmp_path / kind.name, format="peft")
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["peft_type"] == kind.name.upper()
        assert (config["num_virtual_tokens"], config["token_dim"]) == (3, tiny.CLIP)
        imgadapt.detach(model)
        imgadapt.attach(model, imgadapt.load(folder))
        assert torch.equal(ask(model), full)
        imgadapt.detach(model)
    put_on(model, PrefixTuning(3))
    with pytest.raises(FormatError, match="peft has no word for prefix_tuning"):
        imgadapt.save(imgadapt.collect(model), tmp_path / "prefix", format="peft")
    with pytest.raises(FormatError, match="kohya has no word"):
        imgadapt.save(imgadapt.collect(model), tmp_path / "prefix.safetensors", format="kohya")


def test_what_cannot_be_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = unet()
    base = ask(model)
    rows: list[tuple[dict[str, Any], str]] = [({"weight": -1.0}, "0 or more"), ({"dropout": 0.1}, "no dropout")]
    rows.append(({"weight": float("nan")}, "finite"))
    for wrong, why in rows:
        with pytest.raises(ConfigError, match=why):
            imgadapt.attach(model, PromptTuning(2), **wrong)
    for make in (lambda: PromptTuning(0), lambda: PromptTuning(10**9), lambda: PTuning(hidden=10**9)):
        with pytest.raises(ConfigError):
            make()
    put_on(model, PromptTuning(2))
    with pytest.raises(StateError, match="taken"):
        imgadapt.attach(model, GatedPrompts(2))
    with pytest.raises(ConfigError, match="0 or more"):
        imgadapt.set_weights(model, {"default": -0.5})
    imgadapt.set_weights(model, {"default": torch.ones(3)})
    with pytest.raises(StateError, match="weights for 3 samples"):
        ask(model)
    file = imgadapt.collect(model)
    with pytest.raises(StateError, match="not swapped"):
        imgadapt.swap(model, file)
    imgadapt.detach(model)
    assert torch.equal(ask(model), base)
    with pytest.raises(ShapeError, match="another base"):
        imgadapt.attach(unet(cross_attention_dim=6), file)
    imgadapt.save(file, tmp_path / "a.safetensors")
    tensors, metadata = read_tensors(tmp_path / "a.safetensors")
    for told in ("", "{}", '{"kind": "prompt_tuning", "tokens": 1e30}', '{"kind": "prompt_tuning", "tokens": 7}', "["):
        write_tensors(tmp_path / "b.safetensors", tensors, {**metadata, "imgadapt_prompts": told})
        with pytest.raises(FormatError):
            imgadapt.load(tmp_path / "b.safetensors")


def test_settings_of_a_training_say_prompts(tmp_path: Path) -> None:
    config = TrainConfig.of({"folder": tmp_path, "output": tmp_path / "out", "method": "gated_prompts(tokens=2)"})
    model = {"unet": unet()}
    recipe.put_on(config, model)
    rows = recipe.tensors(model)
    assert {row.key for row in rows} == {"prompt", "gate"}
    assert len({row.layer for row in rows}) == len(prompts.readers(model, GatedPrompts(2)))
    assert torch.equal(ask(model["unet"]), ask(unet()))  # fresh gates are shut
    with pytest.raises(ConfigError, match="has no field 'rank'"):
        spelling.method("prompt_tuning(rank=2)", {})
    mixed = config.model_copy(update={"method": "lora", "methods": {"to_q": "prompt_tuning"}})
    with pytest.raises(ConfigError, match="only be the main one"):
        recipe.put_on(mixed, {"unet": unet()})


def test_what_changes_no_weight_is_not_merged_with_what_does(tmp_path: Path) -> None:
    model = unet()
    put_on(model, PromptTuning(2), name="prompt")
    put_on(model, LoRA(2), name="lora", targets="to_q")
    for name in ("prompt", "lora"):
        imgadapt.save(imgadapt.collect(model, name), tmp_path / f"{name}.safetensors")
    entries = tuple(imgadapt.Entry(tmp_path / f"{name}.safetensors") for name in ("lora", "prompt"))
    with pytest.raises(ConfigError, match="learned prompt"):
        imgadapt.combine(imgadapt.MergeRecipe(entries))
    imgadapt.detach(model, "lora")
    for call in (imgadapt.merge, imgadapt.unmerge):
        with pytest.raises(
            TargetError, match=r"^'prompt' is a learned prompt: that changes no weight and does not merge"
        ):
            call(model)
    imgadapt.detach(model)
    with pytest.raises(TargetError, match="nothing is attached"):
        imgadapt.merge(model)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[4]], ids=lambda k: k.name)
def test_a_copy_in_the_middle_of_a_training_stands_alone(kind: Prompting) -> None:
    model = unet()
    put_on(model, kind)
    full = ask(model)
    other = copy.deepcopy(model)
    imgadapt.set_weights(other, {"default": 0})
    assert not torch.equal(ask(other), full)
    imgadapt.detach(other)
    assert hooks(other) == 0
    assert torch.equal(ask(model), full)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS[2:], ids=lambda k: k.name)
def test_pixart_reads_them_beside_its_texts_mask(kind: Prompting) -> None:
    torch.manual_seed(0)
    model = tiny.pixart().eval()
    noisy, times, context = inputs(width=10)
    kept = torch.tensor([[1.0] * 7, [1.0] * 4 + [0.0] * 3])

    def draw(context: Tensor = context, kept: Tensor = kept) -> Tensor:
        sizes: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        return model(noisy, context, times, sizes, encoder_attention_mask=kept).sample

    base = draw()
    put_on(model, kind)
    full = draw()
    assert (full - base).abs().max() > 1e-4
    torch.testing.assert_close(full[1:], draw(context[:, :4], kept[:, :4])[1:])
    imgadapt.set_weights(model, {"default": torch.tensor([0.0, 1.0])})
    torch.testing.assert_close(draw(), torch.stack([base[0], full[1]]))
    imgadapt.detach(model)
    assert torch.equal(draw(), base)


def test_converting_says_what_is_lost_or_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program: Any = runpy.run_path(str(Path(__file__).parents[1] / "converters" / "convert.py"))["main"]
    model = unet()
    for kind in (PTuning(2, hidden=3), PrefixTuning(2)):
        put_on(model, kind)
        imgadapt.save(imgadapt.collect(model), tmp_path / f"{kind.name}.safetensors")
        imgadapt.detach(model)
    program([str(tmp_path / "p_tuning.safetensors"), str(tmp_path / "to.safetensors"), "--to", "peft"])
    said = capsys.readouterr().out
    assert "0 layers -> peft: p_tuning" in said
    assert "the network that makes them in training is left out" in said
    assert imgadapt.load(tmp_path / "to.safetensors").prompts is not None
    for form in ("peft", "kohya"):
        with pytest.raises(FormatError, match="no word for prefix_tuning"):
            program([str(tmp_path / "prefix_tuning.safetensors"), "--plan", "--to", form])
    tensors, _ = read_tensors(tmp_path / "to.safetensors")
    write_tensors(tmp_path / "to.safetensors", tensors, {"peft_config": '{"peft_type": []}'})
    with pytest.raises(FormatError, match="one table for all layers"):
        imgadapt.load(tmp_path / "to.safetensors")


class Files:
    """What the playground's stack asks of a library."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, id: str) -> Any:
        return SimpleNamespace(path=self.folder / f"{id}.safetensors", fault="", name=id)

    def file(self, id: str) -> Any:
        return imgadapt.load(self.folder / f"{id}.safetensors")


@torch.no_grad()
def test_the_playground_draws_with_them_as_the_library_does(tmp_path: Path) -> None:
    model = unet()
    base, parts = ask(model), {"unet": model}
    for kind in (PrefixTuning(2), GatedPrompts(2)):
        put_on(model, kind)
        put_on(model, LoRA(2), name="lora", targets="attn2.to_k")
        file = replace(imgadapt.collect(model, "lora"), prompts=imgadapt.collect(model).prompts)
        imgadapt.save(file, tmp_path / f"{kind.name.replace('_', '')}.safetensors")
        imgadapt.detach(model)
    names = ["prefixtuning", "gatedprompts"]

    def wanted(weights: Any) -> Tensor:
        for name in names:
            imgadapt.attach(model, imgadapt.load(tmp_path / f"{name}.safetensors"), name=name)
        imgadapt.set_weights(model, weights)
        out = ask(model)
        imgadapt.detach(model)
        return out

    at = {"down_blocks.*": 1.0, "mid_block.*": 0.0, "up_blocks.*": 0.0}
    sought = wanted({"prefixtuning": 0.5, "gatedprompts": 1.0}), wanted({"prefixtuning": at, "gatedprompts": 0.0})
    rows = [wanted({"prefixtuning": 0.3, "gatedprompts": -1.0})[0], sought[0][1]]
    places = Places.of("tiny", SimpleNamespace(components=parts))
    assert match(imgadapt.load(tmp_path / "prefixtuning.safetensors"), places).verdict == "all"
    other = Places.of("wider", SimpleNamespace(components={"unet": unet(cross_attention_dim=6)}))
    assert match(imgadapt.load(tmp_path / "prefixtuning.safetensors"), other).verdict == "some"

    stack = Stack(parts, Files(tmp_path), 2, Counter())  # pyright: ignore[reportArgumentType] # it asks no more

    def uses(prefix: float, gated: float, **how: Any) -> list[Use]:
        return [Use(adapter="prefixtuning", weight=prefix, **how), Use(adapter="gatedprompts", weight=gated)]

    stack.bring(uses(0.5, 1.0))
    assert torch.equal(ask(model), base)
    stack.act([uses(0.5, 1.0)], 0, by_sample=False)
    torch.testing.assert_close(ask(model), sought[0])
    stack.act([uses(0.3, -1.0), uses(0.5, 1.0)], 0, by_sample=True)
    torch.testing.assert_close(ask(model), torch.stack(rows))
    stack.act([uses(0.5, 0.0, start=1)], 0, by_sample=False)
    assert torch.equal(ask(model), base)
    stack.bring(how := uses(1.0, 0.0, blocks="INALL"))
    stack.act([how], 0, by_sample=False)
    torch.testing.assert_close(ask(model), sought[1])
    stack.rest()
    assert torch.equal(ask(model), base)
    with pytest.raises(ConfigError, match="0 or more"):
        stack.bring(uses(-0.5, 1.0))
