"""attach, detach, set_weights, collect on pipelines, mappings and single modules; what they refuse, and how."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import imgadapt
from imgadapt import OFT, AdapterFile, Full, LoRA, layer
from imgadapt.errors import ConfigError, FormatError, ShapeError, StateError, TargetError
from imgadapt.formats import Part
from imgadapt.layer import AdapterLayer
from imgadapt.live import slots
from imgadapt.methods import BitFit, Method, Norm, TrainableTokens


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 6)
        self.to_k = nn.Linear(8, 6)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.to_q(x) + self.to_k(x))


def filled(model: Any, name: str = "default") -> None:
    with torch.no_grad():
        for parameter in imgadapt.parameters(model, name):
            parameter.normal_(std=0.2)


def test_every_public_name_is_there_and_listed() -> None:
    for name in imgadapt.__all__:
        assert getattr(imgadapt, name) is not None
    methods = set(imgadapt.methods.__all__) & set(imgadapt.__all__)
    assert set(imgadapt._HOMES) | {"methods"} | methods == set(imgadapt.__all__)
    assert callable(imgadapt.attach)
    assert callable(imgadapt.merge)


def test_targets_choose_layers_and_the_star_is_all_a_method_can_act_on() -> None:
    model = Net()
    imgadapt.attach(model, LoRA(rank=2, alpha=1), targets=["to_q", "conv"])
    assert [n for n, m in model.named_modules() if isinstance(m, AdapterLayer)] == ["to_q", "conv"]
    imgadapt.detach(model)
    imgadapt.attach(model, LoRA(rank=2, alpha=1), targets="*")
    assert [n for n, m in model.named_modules() if isinstance(m, AdapterLayer)] == ["to_q", "to_k", "conv"]


def test_no_match_says_what_there_is() -> None:
    with pytest.raises(TargetError, match=r"no layer matches targets=\['to_x'\]; there are 4: model.to_q, model.to_k"):
        imgadapt.attach(Net(), LoRA(), targets="to_x")


def test_a_taken_name_is_refused_before_anything_changes() -> None:
    model = Net()
    imgadapt.attach(model, LoRA(rank=2), targets="to_q")
    with pytest.raises(StateError, match="the name 'default' is taken"):
        imgadapt.attach(model, LoRA(rank=2), targets="to_k")
    assert isinstance(model.to_k, nn.Linear)


def test_unknown_names_are_refused_by_name() -> None:
    model = Net()
    imgadapt.attach(model, LoRA(rank=2), name="mine", targets="*")
    for call in (imgadapt.detach, imgadapt.parameters, imgadapt.collect):
        with pytest.raises(StateError, match=r"no adapter .*min.* on this model; it has: mine"):
            call(model, "min")
    with pytest.raises(StateError, match="no adapter min on this model"):
        imgadapt.set_weights(model, {"min": 1.0})
    with pytest.raises(TargetError, match="nothing is attached"):
        imgadapt.merge(Net())


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 10**400, "1", None, True, {}])
def test_a_weight_must_be_a_finite_number(weight: Any) -> None:
    model = Net()
    with pytest.raises(ConfigError, match="weight is"):
        imgadapt.attach(model, LoRA(rank=2), targets="*", weight=weight)
    assert not any(isinstance(m, AdapterLayer) for m in model.modules())
    imgadapt.attach(model, LoRA(rank=2), targets="*")
    with pytest.raises(ConfigError, match="weight is"):
        imgadapt.set_weights(model, {"default": weight})


def test_block_weights_are_globs_the_first_match_wins_and_the_rest_is_off() -> None:
    model = Net()
    imgadapt.attach(model, LoRA(rank=2, alpha=1), targets="*", weight={"to_q": 0.5, "model.to_*": 2.0})
    slots = {n: m.slot("default") for n, m in model.named_modules() if isinstance(m, AdapterLayer)}
    assert {n: slot.weight for n, slot in slots.items() if slot} == {"to_q": 0.5, "to_k": 2.0, "conv": 0.0}


def test_set_weights_that_cannot_be_merged_leave_all_as_before() -> None:
    model = Net()
    imgadapt.attach(model, LoRA(rank=2, alpha=1), targets="*")
    filled(model)
    imgadapt.merge(model)
    merged = model.to_q.weight.clone()
    with torch.no_grad():
        imgadapt.parameters(model)[2].fill_(1e38)  # to_k: finite, but not at weight 1e30
    with pytest.raises(StateError, match="NaN or infinity"):
        imgadapt.set_weights(model, {"default": 1e30})
    imgadapt.unmerge(model)
    assert {slot.weight for m in model.modules() if isinstance(m, AdapterLayer) for slot in m} == {1.0}
    assert merged.isfinite().all()


def test_collect_then_attach_is_the_same_adapter_and_a_copy() -> None:
    model, x = Net(), torch.randn(5, 8)
    imgadapt.attach({"unet": model}, LoRA(rank=2, alpha=3), targets=["to_q", "to_k"], weight=0.5)
    filled({"unet": model})
    live = model(x)
    file = imgadapt.collect({"unet": model})
    assert list(file.parts) == ["unet.to_q", "unet.to_k"]
    imgadapt.detach({"unet": model})
    imgadapt.attach({"unet": model}, file, weight=0.5)
    assert torch.equal(model(x), live)
    with torch.no_grad():
        imgadapt.parameters({"unet": model})[0].zero_()
    assert file.parts["unet.to_q"].tensors["down"].abs().max() > 0


def test_layers_that_the_model_lacks_are_counted_and_named() -> None:
    file = AdapterFile({f"unet.block.{k}": Part(LoRA(2), LoRA(2).init(_site(), None)) for k in range(5)})
    with pytest.raises(
        TargetError, match=r"5 of the file's 5 layers are not in this model \(unet.block.0, .* and 2 more\)"
    ):
        imgadapt.attach({"unet": Net()}, file)


def _site() -> Any:
    from imgadapt.sites import Site

    return Site((6, 8))


def test_a_shape_that_does_not_fit_names_layer_and_both_shapes_and_changes_nothing() -> None:
    from imgadapt.sites import Site

    model = Net()
    parts = {
        "unet.to_q": Part(LoRA(2), LoRA(2).init(Site((6, 8)), None)),
        "unet.to_k": Part(LoRA(2), LoRA(2).init(Site((6, 9)), None)),
    }
    with pytest.raises(
        ShapeError, match=r"unet.to_k: down is \(2, 9\), this layer takes \(2, 8\); is the file for another"
    ):
        imgadapt.attach({"unet": model}, AdapterFile(parts))
    assert isinstance(model.to_q, nn.Linear)


@pytest.mark.parametrize(("rank", "alpha"), [(0, None), (-1, 1.0), (4, 0.0), (4, -1.0), (4, float("nan"))])
def test_a_lora_of_impossible_size_is_refused(rank: int, alpha: float | None) -> None:
    with pytest.raises(ConfigError, match="must be"):
        LoRA(rank=rank, alpha=alpha)


def test_a_pipeline_takes_adapters_on_unet_and_text_encoder(pipe: Any, tmp_path: Path) -> None:
    generator = torch.Generator
    draw = lambda: torch.tensor(  # noqa: E731
        pipe(
            ["a fox", "a red apple"], num_inference_steps=2, generator=generator().manual_seed(1), output_type="np"
        ).images
    )
    base = draw()
    imgadapt.attach(pipe, LoRA(rank=3, alpha=2), targets=["transformer", "convolution", "text"])
    assert torch.equal(draw(), base)
    filled(pipe)
    live = draw()
    assert (live - base).abs().max() > 0.05
    file = imgadapt.collect(pipe)
    assert len([n for n in file.parts if n.startswith("text_encoder.text_model.encoder.layers.")]) == 12
    imgadapt.merge(pipe)
    assert (draw() - live).abs().max() < 1e-4
    imgadapt.detach(pipe)
    assert torch.equal(draw(), base)
    for form in ("diffusers", "kohya"):
        imgadapt.attach(pipe, imgadapt.load(imgadapt.save(file, tmp_path / "x.safetensors", format=form)))
        assert torch.equal(draw(), live)
        imgadapt.detach(pipe)


@pytest.mark.parametrize(
    ("method", "targets", "kind"),
    [(Norm(), "transformer", "norm"), (TrainableTokens((2, 5)), "transformer", "embedding"),
     (BitFit(), "to_q*", "conv"), (LoRA(rank=2), "norm*", "conv")],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
def test_targets_that_hold_nothing_for_a_method_are_answered_with_some_that_do(
    pipe: Any, method: Method, targets: str, kind: str
) -> None:
    with pytest.raises(TargetError) as caught:
        imgadapt.attach(pipe, method, targets=[targets])
    (offered,) = re.findall(r'--targets "(.*?)" \(targets= in Python\) names such$', str(caught.value))
    imgadapt.attach(pipe, method, targets=[offered])
    rows = slots(pipe)
    assert rows[0][1].site.kind == kind
    file = imgadapt.collect(pipe)
    imgadapt.detach(pipe)
    with pytest.raises(TargetError, match=r"wanted embedding: this model has none$"):
        imgadapt.attach(pipe.unet, TrainableTokens((2, 5)), targets="transformer")
    assert len(file.parts) == len(rows) > 0


def test_memory_is_flat_over_a_hundred_loads(tmp_path: Path) -> None:
    import gc

    model = Net()
    imgadapt.attach({"unet": model}, LoRA(rank=2), targets="*")
    path = imgadapt.save(imgadapt.collect({"unet": model}), tmp_path / "x.safetensors")
    imgadapt.detach({"unet": model})
    count: dict[int, int] = {}
    for k in range(100):
        imgadapt.attach({"unet": model}, imgadapt.load(path))
        imgadapt.merge({"unet": model})
        imgadapt.detach({"unet": model})
        if k in (2, 99):
            gc.collect()
            count[k] = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    assert count[99] <= count[2]


def states(model: nn.Module) -> list[tuple[bool, bool, tuple[str, ...]]]:
    wrappers = [m for m in model.modules() if isinstance(m, AdapterLayer)]
    return [(m.merged, m.enabled, tuple(slot.name for slot in m)) for m in wrappers]


def test_a_failed_attach_to_a_merged_model_leaves_it_as_it_was() -> None:
    model, x = Net(), torch.randn(5, 8)
    imgadapt.attach({"unet": model}, LoRA(rank=2), name="a", targets="*")
    filled({"unet": model}, "a")
    imgadapt.merge({"unet": model})
    before, out = states(model), model(x)
    file = imgadapt.collect({"unet": model}, "a")
    file.parts["unet.to_k"].tensors["up"].fill_(torch.nan)
    with pytest.raises(FormatError, match=r"unet\.to_k: up has NaN"):
        imgadapt.attach({"unet": model}, file, name="b")
    file.parts["unet.to_k"].tensors["up"].fill_(1e30)
    with pytest.raises(StateError, match="NaN or infinity"):
        imgadapt.attach({"unet": model}, file, name="b", weight=1e30)
    assert states(model) == before
    assert torch.equal(model(x), out)


def test_any_error_in_the_middle_rolls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    imgadapt.attach(model, LoRA(rank=2), targets="*")
    calls: list[int] = []
    whole = layer.merged

    def third_fails(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return whole(*args)

    monkeypatch.setattr(layer, "merged", third_fails)
    with pytest.raises(MemoryError):
        imgadapt.merge(model)
    assert not any(merged for merged, _, _ in states(model))


def test_disabled_survives_what_is_done_inside_it() -> None:
    model, x = Net(), torch.randn(5, 8)
    base, weight = model(x), model.to_q.weight
    imgadapt.attach(model, LoRA(rank=2), targets="*")
    filled(model)
    imgadapt.merge(model)
    with imgadapt.disabled(model):
        with pytest.raises(StateError, match="disabled here"):
            imgadapt.merge(model)
        imgadapt.detach(model)
    assert torch.equal(model(x), base)
    assert model.to_q.weight is weight


def test_cancelling_adapters_are_detached_while_merged_without_a_merge_between() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).half()
    weight = model[0].weight
    for name, sign in (("a", 1.0), ("b", -1.0)):
        imgadapt.attach(model, LoRA(rank=1), name=name, targets="*", weight=sign * 6e4)
        with torch.no_grad():
            for parameter in imgadapt.parameters(model, name):
                parameter.fill_(2.0)
    imgadapt.merge(model)
    imgadapt.detach(model)  # one alone would be infinite in fp16
    assert model[0].weight is weight


def test_weights_are_not_loaded_into_a_merged_layer() -> None:
    model = Net()
    state = model.state_dict()
    imgadapt.attach(model, LoRA(rank=2), targets="*")
    imgadapt.merge(model)
    with pytest.raises(StateError, match="unmerge first"):
        model.load_state_dict(state)


def test_one_layer_at_two_places_is_adapted_once_and_acts_at_both() -> None:
    shared = nn.Linear(4, 4)
    model, x = nn.Sequential(shared, nn.ReLU(), shared), torch.randn(3, 4)
    base = model(x)
    imgadapt.attach(model, LoRA(rank=1), targets="*")
    filled(model)
    assert model[0] is model[2]
    assert list(imgadapt.collect(model).parts) == ["model.0"]
    assert not torch.allclose(model(x), base)
    imgadapt.detach(model)
    assert (model[0], model[2]) == (shared, shared)


def test_layers_that_fused_kernels_would_not_call_are_no_targets() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16), nn.MultiheadAttention(8, 2))
    imgadapt.attach(model, LoRA(rank=1), targets="*")
    assert [n for n, m in model.named_modules() if isinstance(m, AdapterLayer)] == ["0", "2"]
    assert list(imgadapt.collect(model).parts) == ["model.0", "model.2.in_proj"]


def test_a_convolution_with_a_forward_of_its_own_is_no_target() -> None:
    class Causal(nn.Conv1d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.pad(input, (2, 0)))

    with pytest.raises(TargetError, match="there are 0"):
        imgadapt.attach(nn.Sequential(Causal(3, 4, 3)), LoRA(rank=1), targets="*")


@pytest.mark.parametrize("targets", [["to_q", "to_qq"], ["transformer", "convolutoin"], ["to_q", "!unet.md*"]])
def test_every_target_must_match_something(targets: list[str]) -> None:
    with pytest.raises(TargetError, match="no layer matches targets="):
        imgadapt.attach(Net(), LoRA(rank=1), targets=targets)


def test_a_mistyped_block_weight_is_an_error_not_a_zero() -> None:
    with pytest.raises(ConfigError, match=r"weight names unet\.up_blokcs\.\*, which no layer"):
        imgadapt.attach({"unet": Net()}, LoRA(rank=1), targets="*", weight={"unet.up_blokcs.*": 1.0})


def test_a_compiled_model_is_named_as_itself() -> None:
    model = torch.compile(Net(), backend="eager")
    imgadapt.attach({"unet": model}, LoRA(rank=1), targets="to_q")
    assert list(imgadapt.collect({"unet": model}).parts) == ["unet.to_q"]
    imgadapt.detach({"unet": model})


@pytest.mark.parametrize("component", [False, True], ids=["one file", "a pipeline's folder"])
def test_merging_in_place_keeps_no_copy_and_restores_from_the_checkpoint(tmp_path: Path, component: bool) -> None:
    from safetensors.torch import save_file

    model, x = Net().bfloat16(), torch.randn(5, 8).bfloat16()
    place = tmp_path / "unet" / "model.safetensors" if component else tmp_path / "model.safetensors"
    place.parent.mkdir(exist_ok=True)
    save_file(model.state_dict(), place)
    weight, kept, base = model.to_q.weight, model.to_q.weight.clone(), model(x)
    imgadapt.attach({"unet": model}, {"to_q": LoRA(rank=2, alpha=3), "conv": OFT(2), "to_k": Full()})
    filled({"unet": model})
    live = model(x)
    imgadapt.merge({"unet": model}, originals=tmp_path if component else place)
    assert model.to_q.weight is weight
    assert not torch.equal(weight, kept)
    torch.testing.assert_close(model(x), live, rtol=0.05, atol=0.05)
    imgadapt.set_weights({"unet": model}, {"default": 0.5})
    assert not torch.equal(weight, kept)
    with imgadapt.disabled({"unet": model}):
        assert torch.equal(model(x), base)
    imgadapt.detach({"unet": model})
    assert torch.equal(weight, kept)
    assert torch.equal(model(x), base)


def test_a_checkpoint_of_other_weights_is_refused_before_anything_changes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = Net()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["to_k.weight"][0, 0] += 1e-3
    save_file(state, tmp_path / "x.safetensors")
    imgadapt.attach(model, LoRA(rank=2), targets=["to_q", "to_k"])
    filled(model)
    kept = model.to_q.weight.clone()
    with pytest.raises(StateError, match=r"has other weights for 1 layers: model\.to_k"):
        imgadapt.merge(model, originals=tmp_path / "x.safetensors")
    assert torch.equal(model.to_q.weight, kept)
    assert not any(merged for merged, _, _ in states(model))
    with pytest.raises(StateError, match="wanted safetensors to restore weights from"):
        imgadapt.merge(model, originals=tmp_path / "none.safetensors")


def test_ranks_methods_and_alphas_of_their_own_for_patterns() -> None:
    model = Net()
    imgadapt.attach(model, {"to_q": LoRA(rank=3, alpha=1), "to_*": LoRA(rank=1), "conv": OFT(2)})
    file = imgadapt.collect(model)
    methods = {name: part.method for name, part in file.parts.items()}
    assert methods == {"model.to_q": LoRA(3, 1), "model.to_k": LoRA(1), "model.conv": OFT(2)}
    with pytest.raises(TargetError, match="the methods for to_v match none"):
        imgadapt.attach(model, {"to_q": LoRA(), "to_v": LoRA()}, name="b", targets="to_q")


def test_a_status_says_what_is_where_and_how_strong() -> None:
    model = Net()
    imgadapt.attach(model, {"to_q": LoRA(rank=3, alpha=1), "conv": OFT(2)}, name="mine", weight={"to_q": 0.5})
    filled(model, "mine")
    rows = {row.layer: row for row in imgadapt.status(model)}
    part = imgadapt.collect(model, "mine").parts["model.to_q"]
    delta = part.method.scale * part.method.delta(part.tensors, _site(), None)
    assert rows["model.to_q"].norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert [(r.rank, r.weight, r.state) for r in rows.values()] == [(3, 0.5, "live"), (None, 0.0, "off")]
    imgadapt.merge(model)
    said = str(imgadapt.status(model)).splitlines()
    assert said[0].split() == ["adapter", "component", "method", "rank", "scale", "weight", "layers", "norm", "state"]
    assert said[1].split()[:5] == ["mine", "model", "lora,", "oft", "3"]
    assert said[1].endswith("merged, off")
    assert str(imgadapt.status(Net())) == "no adapters"


def test_an_adapter_of_a_file_is_frozen_unless_it_is_to_be_trained() -> None:
    model = Net()
    imgadapt.attach(model, LoRA(rank=1), targets="to_q")
    file = imgadapt.collect(model)
    assert all(p.requires_grad for p in imgadapt.parameters(model))
    imgadapt.attach(model, file, name="b")
    imgadapt.attach(model, file, name="c", trainable=True)
    assert not any(p.requires_grad for p in imgadapt.parameters(model, "b"))
    assert all(p.requires_grad for p in imgadapt.parameters(model, "c"))


def test_a_detach_that_cannot_merge_the_rest_anew_leaves_every_layer_as_it_was() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    imgadapt.attach(model, LoRA(rank=2), name="a", targets="*")
    imgadapt.attach(model, Full(), name="b", targets="*")
    filled(model, "a")
    imgadapt.merge(model)
    out = model(x)
    with torch.no_grad():
        imgadapt.parameters(model, "b")[2].fill_(torch.inf)  # of the second layer, unseen by the merge so far
    with pytest.raises(StateError, match="lower a strength, or detach it"):
        imgadapt.detach(model, "a")
    assert states(model) == [(True, True, ("a", "b"))] * 2
    assert torch.equal(model(x), out)


def test_a_merge_in_place_that_fails_is_live_and_says_so(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = Net()
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    kept = model.to_k.weight.clone()
    imgadapt.attach(model, LoRA(rank=2), targets=["to_q", "to_k"])
    filled(model)
    imgadapt.merge(model, originals=tmp_path / "x.safetensors")
    with torch.no_grad():
        imgadapt.parameters(model)[3].fill_(torch.nan)
    with pytest.raises(StateError, match="NaN or infinity"):
        imgadapt.set_weights(model, {"default": 0.5})
    assert [row.state for row in imgadapt.status(model)] == ["merged", "live"]
    assert [row.weight for row in imgadapt.status(model)] == [1.0, 1.0]
    assert torch.equal(model.to_k.weight, kept)


def test_a_checkpoint_that_changed_meanwhile_unmerges_nothing(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, x = Net(), torch.randn(5, 8)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    imgadapt.attach(model, LoRA(rank=2), targets=["to_q", "to_k"])
    filled(model)
    imgadapt.merge(model, originals=tmp_path / "x.safetensors")
    out = model(x)
    (tmp_path / "x.safetensors").write_bytes(b"short")
    for call in (imgadapt.unmerge, lambda m: imgadapt.disabled(m).__enter__(), imgadapt.detach):
        with pytest.raises(StateError, match="has changed since the merge"):
            call(model)
        assert torch.equal(model(x), out)
        assert states(model) == [(True, True, ("default",))] * 2


def test_tied_weights_are_not_merged_in_place(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    save_file({key: value.clone() for key, value in model.state_dict().items()}, tmp_path / "x.safetensors")
    imgadapt.attach(model, LoRA(rank=2), targets="0")
    with pytest.raises(StateError, match=r"model\.0 share their weight with other layers"):
        imgadapt.merge(model, originals=tmp_path / "x.safetensors")


@pytest.mark.parametrize("adapter", [LoRA, None, "x.safetensors", {}, {"to_q": 3}])
def test_what_is_no_adapter_is_refused_by_name(adapter: Any) -> None:
    with pytest.raises(ConfigError, match="is no adapter; wanted"):
        imgadapt.attach(Net(), adapter)
    with pytest.raises(ConfigError, match="it maps names of adapters to strengths"):
        imgadapt.set_weights(Net(), 0.5)  # pyright: ignore[reportArgumentType] # what a user might write


def test_a_large_bf16_weight_is_merged_as_if_in_fp32_and_rounded_once() -> None:
    """Products in bf16 of a high and a low half each; the merged weight lies in pages of its own (over 4 MB)."""
    model = nn.Sequential(nn.Linear(1100, 2100)).to(torch.bfloat16).requires_grad_(False)
    for name, rank in (("a", 4), ("b", 16)):
        imgadapt.attach(model, LoRA(rank=rank, alpha=3), name=name, targets="*")
        filled(model, name)
    weight: Any = model[0].weight
    layer: Any = model[0]
    exact = weight.float() + sum(0.7 * slot.method.scale * slot.up @ slot.down for slot in layer)
    imgadapt.set_weights(model, {"a": 0.7, "b": 0.7})
    imgadapt.merge(model)
    once = (exact.to(torch.bfloat16).float() - exact).norm()
    assert (layer.weight.float() - exact).norm() <= 1.001 * once
    imgadapt.unmerge(model)
    assert model[0].weight is weight
