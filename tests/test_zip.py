"""Zipping: learnt coefficients bring the merged model nearer to each adapter alone, and they fold into LoRA."""

import json
import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from imgadapt import AdapterFile, DoRA, Full, LoHa, LoKr, LoRA, Norm, adapters, attach, collect, detach, load, save
from imgadapt.errors import ConfigError
from imgadapt.methods import Method
from imgadapt.sites import Site
from imgadapt.training import families, noise, zipping
from imgadapt.training.coefficients import Coefficients
from imgadapt.training.columns import Columns, folded
from imgadapt.training.families import FAMILIES, Family
from imgadapt.training.objective import Objective
from imgadapt.training.zipping import KEY, Source, ZipConfig, Zipped, zipped

tiny: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny.py"))))
QUICK = ZipConfig(steps=8, rate=0.05, batch=1, pictures=2, sampler_steps=1, side=16)


@pytest.fixture(autouse=True)
def _measured_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipping, "_HELD_OUT", 1)


def build(name: str, dtype: torch.dtype = torch.float32) -> Family:
    torch.manual_seed(0)
    pipeline = tiny.PIPELINES[name]()
    return FAMILIES[type(pipeline).__name__](pipeline, torch.device("cpu"), dtype)


def random_adapter(
    family: Family, seed: int, method: Method | Mapping[str, Method], targets: Sequence[str], size: float = 0.3
) -> AdapterFile:
    torch.manual_seed(seed)
    attach(family.pipeline, method, targets=targets)
    file = collect(family.pipeline)
    detach(family.pipeline)
    for part in file.parts.values():
        for key, tensor in part.tensors.items():
            tensor.copy_(size * torch.randn(tensor.shape) + (key in ("w_norm",)) * 0.1)
    return file


def delta(part: Any, site: Site) -> Tensor:
    t = {key: tensor.double() for key, tensor in part.tensors.items()}
    return part.method.scale * part.method.delta(t, site, None)


def site_of(part: Any) -> Site:
    return Site(part.shape, "conv" if len(part.shape) > 2 else "linear" if len(part.shape) > 1 else "norm", bias="bias")


@pytest.mark.parametrize("site", [Site((6, 5), bias="bias"), Site((6, 4, 3, 3), "conv", bias="bias")])
def test_columns_scale_each_input(site: Site) -> None:
    torch.manual_seed(1)
    t = {k: torch.randn(s, dtype=torch.float64) for k, s in Columns(3, bias=True).shapes(site).items()}
    plain = (t["up"] @ t["down"]).reshape(site.shape)
    wanted = plain.clone()
    for k in range(site.shape[1]):
        wanted[:, k] *= t["columns"][k]
    method = Columns(3, bias=True)
    assert torch.allclose(method.delta(t, site, None), wanted)
    made = method.operands(t, site, None)
    assert torch.allclose((made["up"] @ made["down"].flatten(1)).reshape(site.shape), wanted)
    assert torch.allclose((t["up"] @ folded(t["down"], t["columns"])).reshape(site.shape), wanted)
    assert torch.equal(made["bias"], t["bias"])
    fresh = method.init(site, None)
    assert method.fits(fresh, site) is None
    assert Columns.infer(fresh, None) == method


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_every_family_comes_nearer_to_each_adapter_alone(name: str) -> None:
    family = build(name)
    targets = ["attention"]
    files = [random_adapter(family, k, LoRA(rank=2 + k, alpha=3.0), targets, 0.15) for k in (1, 2)]
    sources = [Source("a", files[0], ["a fox", "a bee"], 1.0), Source("b", files[1], ["x"], 0.7)]
    told: list[tuple[str, int, int, float]] = []
    made = zipped(family, sources, QUICK, lambda *row: told.append(row))
    assert adapters(family.pipeline) == []
    assert min(made.before) > 0
    assert sum(made.after) < 0.97 * sum(made.before)
    assert [row for row in told if row[0] == "learning"][-1][1:3] == (8, 8)
    assert made.coefficients.keys() == files[0].parts.keys() == made.file.parts.keys()
    for layer, part in made.file.parts.items():
        assert part.shape is not None
        site = site_of(part)
        wanted = torch.zeros(site.shape, dtype=torch.float64)
        for i, (file, weight) in enumerate(zip(files, (1.0, 0.7), strict=True)):
            m = made.coefficients[layer][i].double()
            assert m.shape == (site.shape[1],)
            wanted += weight * delta(file.parts[layer], site) * m.view(1, -1, *site.ones)
        assert float((delta(part, site) - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
        if min(site.rows, site.fan_in) >= 7:
            assert part.method == LoRA(rank=7, alpha=7.0)


def test_what_is_written_predicts_as_what_was_learnt() -> None:
    """The folded file, put on the bare base, against the coefficients live; on convolutions and text encoders, too."""
    family = build("sdxl")
    files = [
        random_adapter(
            family,
            1,
            {"attention": LoRA(rank=2, alpha=1.0), "convolution": LoHa(rank=2, alpha=1.5)},
            ["attention", "convolution"],
            0.2,
        ),
        random_adapter(
            family,
            2,
            {
                "convolution": LoRA(rank=3, alpha=2.0, tucker=True),
                "*norm*": Norm(),
                "attention": LoKr(rank=2, alpha=1.0, factor=2),
            },
            ["attention", "convolution", "unet.*.norm1"],
            0.2,
        ),
        random_adapter(
            family, 3, LoRA(rank=2, alpha=4.0, bias=True), ["text_encoder.*.q_proj", "text_encoder_2.*fc1"], 0.2
        ),
    ]
    names = [f"alone {k}" for k in range(3)]
    for file, name in zip(files, names, strict=True):
        attach(family.pipeline, file, name=name, weight=0.0)
    coefficients = Coefficients(family, names, [0.8, -0.5, 1.0])
    with torch.no_grad():
        for m in coefficients.parameters:
            m.copy_(torch.rand_like(m) * 2)
    noisy = torch.randn(2, 4, 8, 8)
    times = torch.tensor([100, 700])

    def predict() -> Tensor:
        conditions = {**family.text(["a fox", "x"]), "sizes": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)}
        return family.predict(noisy, conditions, times).detach()

    live = predict()
    parts = coefficients.parts()
    detach(family.pipeline)
    bare = predict()
    attach(family.pipeline, AdapterFile(parts))
    file = predict()
    detach(family.pipeline)
    assert float((live - bare).abs().max()) > 0.05
    assert float((live - file).abs().max()) < 1e-4 * float((live - bare).abs().max())
    assert any(isinstance(part.method, Norm) for part in parts.values())
    assert any(isinstance(part.method, LoRA) and part.method.bias for part in parts.values())


def test_text_encoders_learn_too() -> None:
    family = build("sd1")
    both = ["unet.*attn2.to_k", "text_encoder.*.v_proj"]
    files = [random_adapter(family, k, LoRA(rank=2, alpha=4.0), both, 0.4) for k in (1, 2)]
    made = zipped(family, [Source("a", files[0], ["a fox"]), Source("b", files[1], ["a bee"])], QUICK)
    assert sum(made.after) < 0.97 * sum(made.before)
    moved = {n: float((m - 1).abs().max()) for n, own in made.coefficients.items() for m in own.values()}
    assert min(moved.values()) > 0.01
    assert any(name.startswith("text_encoder.") for name in moved)


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path: Path) -> None:
    family = build("sd1")
    files = [random_adapter(family, k, LoRA(rank=2, alpha=3.0), ["attention"]) for k in (1, 2)]
    sources = [Source("a", files[0], ["a fox"]), Source("b", files[1], ["a bee"])]

    def written(seed: int) -> bytes:
        config = ZipConfig(steps=2, rate=0.05, batch=1, pictures=1, sampler_steps=1, seed=seed)
        return save(zipped(family, sources, config).file, tmp_path / "x.safetensors").read_bytes()

    first = written(0)
    assert first == written(0)
    assert first != written(1)


def test_overlap_is_paid_for_where_it_is_asked() -> None:
    family = build("sd1")
    files = [random_adapter(family, k, LoRA(rank=2, alpha=3.0), ["attention"]) for k in (1, 2)]
    sources = [Source("a", files[0], ["a fox"]), Source("b", files[1], ["a bee"])]

    def overlap(much: float) -> float:
        config = ZipConfig(steps=8, rate=0.1, batch=1, pictures=1, sampler_steps=1, overlap=much)
        return zipped(family, sources, config).overlap

    free, paid = overlap(0.0), overlap(100.0)
    assert paid < 0.7 < free


def test_adapters_that_do_not_meet_keep_what_they_say_of_it() -> None:
    """Layers of one adapter only: nothing overlaps, and what the others' prompts ask for is still learnt."""
    family = build("sd1")
    files = [
        random_adapter(family, 1, LoRA(rank=2, alpha=3.0), ["attn1.to_*"]),
        random_adapter(family, 2, LoRA(rank=2, alpha=3.0), ["attn2.to_*"]),
    ]
    made = zipped(family, [Source("a", files[0], ["a fox"]), Source("b", files[1], ["a bee"])], QUICK)
    assert made.overlap == 0
    assert all(len(own) == 1 for own in made.coefficients.values())
    assert sum(made.after) < sum(made.before)


def test_bf16_bases_learn_in_fp32() -> None:
    family = build("sd1", torch.bfloat16)
    files = [random_adapter(family, k, LoRA(rank=2, alpha=3.0), ["attention"]) for k in (1, 2)]
    made = zipped(family, [Source("a", files[0], ["a fox"]), Source("b", files[1], ["a bee"])], QUICK)
    assert sum(made.after) < 0.97 * sum(made.before)
    assert all(m.dtype == torch.float32 for own in made.coefficients.values() for m in own.values())


def test_what_cannot_be_zipped_is_refused_and_the_base_left_bare() -> None:
    family = build("sd1")
    lora = random_adapter(family, 1, LoRA(rank=2, alpha=3.0), ["attention"])
    dora = random_adapter(family, 2, DoRA(LoRA(rank=2, alpha=3.0)), ["attention"])
    full = random_adapter(family, 3, Full(bias=False), ["attn1.to_q"])
    asked: list[tuple[list[Source], str]] = [
        ([Source("a", lora, ["x"])], "1 adapter to zip"),
        ([Source("a", lora, ["x"]), Source("b", lora, [])], "b has no prompts"),
        ([Source("a", lora, ["x"]), Source("b", AdapterFile({}), ["x"])], "b has no layers"),
        ([Source("a", lora, ["x"]), Source("b", dora, ["x"])], "is dora, whose change depends on the base"),
        ([Source("a", full, ["x"]), Source("b", full, ["x"])], "no columns to zip"),
    ]
    for sources, said in asked:
        with pytest.raises(ConfigError, match=said):
            zipped(family, sources, QUICK)
        assert adapters(family.pipeline) == []
    attach(family.pipeline, lora)
    with pytest.raises(ConfigError, match="has adapters on already"):
        zipped(family, [Source("a", lora, ["x"]), Source("b", lora, ["x"])], QUICK)
    assert adapters(family.pipeline) == ["default"]
    with pytest.raises(ConfigError, match="steps is 0"):
        ZipConfig(steps=0)


# the embedded base


def trained(family: Family, seed: int, prompts: Sequence[str], colour: Sequence[float]) -> AdapterFile:
    """A few steps towards flat pictures of one colour."""
    torch.manual_seed(seed)
    attach(family.pipeline, LoRA(rank=2, alpha=4.0), targets=["attn2.to_*", "attn1.to_v"])
    tensors = [p for p in family.denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tensors, lr=1e-2)
    latents = family.encode_image(torch.tensor(colour)[:, None, None].expand(3, 64, 64).clone())[None].expand(
        2, -1, -1, -1
    )
    states = torch.cat([family.text([prompt])["states"] for prompt in prompts])
    objective = Objective(family.schedule)
    for step in range(6):
        asked = objective.ask(latents, noise.number(seed, "trained"), step, range(2), 2)
        guess = family.predict(asked.noisy, {"states": states}, asked.times)
        optimizer.zero_grad()
        objective.losses(guess, latents, asked.noise, asked.times).weighted.mean().backward()
        optimizer.step()
    file = collect(family.pipeline)
    detach(family.pipeline)
    return file


def test_the_program_beats_the_plain_sum_on_the_embedded_base(
    quick: Any, run: Callable[[str, Sequence[str]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = families.load("demo")
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    save(trained(family, 1, ["a fox", "a dog"], (0.8, -0.5, -0.5)), a, format="kohya")
    save(trained(family, 2, ["a tree", "a leaf"], (-0.5, -0.5, 0.8)), b, format="kohya")
    prompts = ["--prompts-a", "a fox", "a dog", "--prompts-b", "a tree", "a leaf"]
    few = ["--steps", "6", "--batch-size", "1", "--pictures", "1", "--sampler-steps", "2", "--learning-rate", "0.1"]
    run("zip", [str(a), f"{b}:0.9", "--base", "demo", *prompts, *few, "--output", str(c)])
    said = capsys.readouterr().out
    made = load(c)
    assert made.format == "kohya"
    assert {part.method for part in made.parts.values()} == {LoRA(rank=4, alpha=4.0)}
    record = json.loads(made.metadata[KEY])
    before, after = sum(record["error_of_the_sum"]), sum(record["error"])
    assert 0 < after < 0.9 * before
    assert f"{1 - after / before:.0%} less than the sum" in said
    assert after < sum(record["error_of_the_sum_scaled"])
    assert record["prompts"] == [["a fox", "a dog"], ["a tree", "a leaf"]]
    assert [row["weight"] for row in json.loads(made.metadata["merged_from"])] == [1.0, 0.9]
    assert len(record["layers"]) == len(made.parts)
    assert f"c.safetensors: {len(made.parts)} layers, ranks 4 to 4, kohya" in said
    attach(quick, made)  # and it is an adapter like any other
    detach(quick)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["A"], "1 adapters; zip merges 2 to 6"),
        (["A", "A", "--prompts-a", "x"], "has no prompts: give some of what it was trained on, --prompts-b"),
        (
            ["A", "A", "--prompts-a", "x", "--prompts-b", "x", "--prompts-c", "x"],
            "--prompts-c is given, and there are 2",
        ),
    ],
)
def test_the_program_says_what_it_wants(
    run: Callable[[str, Sequence[str]], None], arguments: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        run("zip", [*arguments, "--output", "x.safetensors"])


def test_statistics_are_of_each_adapter() -> None:
    own = {"x": {0: torch.tensor([1.0, 3.0]), 1: torch.tensor([0.5, 0.5])}, "y": {1: torch.tensor([2.5])}}
    made = Zipped(AdapterFile({}), [2.0, 3.0], [1.0, 1.5], [4.0, 4.0], 0.5, [1.5, 1.5], 0.25, own).statistics()
    assert made["coefficients"][0] == {"mean": 2.0, "deviation": 1.0, "least": 1.0, "most": 3.0}
    assert made["coefficients"][1]["mean"] == pytest.approx(3.5 / 3, rel=1e-3)
    assert made["layers"]["y"] == [{"mean": 2.5, "deviation": 0.0}]
