"""AdaLoRA's budget, DyLoRA's order, LoRA-FA's frozen half, T-LoRA's ranks in time."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imgadapt import AdapterFile, LoRA, attach, collect, detach, load, merge, parameters, ready, save
from imgadapt.errors import ConfigError, FormatError, StateError, TargetError
from imgadapt.live import slots
from imgadapt.methods import AdaLoRA, DoRA, TLoRA
from imgadapt.moment import CLOCKS, Clock, clock_of
from imgadapt.sites import Site
from imgadapt.tensors import read_tensors
from imgadapt.training import fit, loop, rules
from imgadapt.training import plan as planning
from imgadapt.training.config import TrainConfig
from imgadapt.training.families.sketch import sketch
from imgadapt.untimed import untimed

Run = Callable[[str, Sequence[str]], None]


def config(**values: Any) -> TrainConfig:
    return TrainConfig.of({"folder": Path(), **values})


def filled(model: Any) -> None:
    with torch.no_grad():
        for parameter in parameters(model):
            parameter.copy_(torch.randn(parameter.shape) * 0.2)


def by_name(model: Any) -> dict[str, Any]:
    return {name: slot for name, _, slot in slots(model, "default")}


# --- AdaLoRA


def test_adalora_keeps_the_ranks_that_pefts_allocator_keeps() -> None:
    """On the same gradients, step by step: peft's masks as they fall, and the last one for good."""
    from peft import AdaLoraConfig, get_peft_model

    ours: Any = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 8)).requires_grad_(False)
    bare: Any = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 8))
    theirs: Any = get_peft_model(
        bare, AdaLoraConfig(init_r=6, target_r=3, tinit=4, tfinal=6, deltaT=2, total_step=20, target_modules=["0", "1"])
    )
    attach(ours, AdaLoRA(rank=6), targets="*")
    filled(ours)
    made = config(method="adalora", steps=20, target_rank=3, budget_phases=(0.2, 0.3), budget_every=2, orthogonality=0)
    rule = rules.of(made, ours)
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    for name, slot in by_name(ours).items():
        other = theirs.base_model.model[int(name[-1])]
        for key, end in (("adalora_a", "lora_A"), ("adalora_e", "lora_E"), ("adalora_b", "lora_B")):
            mine, their = getattr(slot, key), getattr(other, end)["default"]
            with torch.no_grad():
                their.copy_(mine.reshape(their.shape))
            pairs.append((mine, their))
    counts: list[int] = []
    for step in range(20):
        for mine, their in pairs:
            mine.grad = torch.randn(mine.shape)
            their.grad = mine.grad.reshape(their.shape).clone()
            with torch.no_grad():
                mine.sub_(0.1 * mine.grad)
                their.sub_(0.1 * their.grad)
        rule.shape()
        rule.after(step)
        theirs.base_model.update_and_allocate(step + 1)
        for mine, their in pairs:
            torch.testing.assert_close(mine, their.reshape(mine.shape), rtol=1e-6, atol=1e-7)
        counts.append(sum(int(slot.adalora_e.count_nonzero()) for slot in by_name(ours).values()))
    assert counts[3] == 12  # before
    assert counts[5] < 12  # on the way
    assert counts[-1] == 6  # 3 for each of 2
    file = rule.file(collect(ours))
    assert sum(part.method.file_rank or 0 for part in file.parts.values()) == 6
    assert {part.method.scale for part in file.parts.values()} == {1.0}
    x = torch.randn(5, 12)
    live = ours(x)
    detach(ours)
    attach(ours, file)
    torch.testing.assert_close(ours(x), live)


def test_adaloras_budget_at_the_rank_of_the_start_takes_nothing() -> None:
    """peft's allocator asks for the 0-th smallest there, and raises."""
    model: Any = nn.Sequential(nn.Linear(12, 24))
    attach(model, AdaLoRA(rank=4), targets="*")
    filled(model)
    rule = rules.of(config(method="adalora", steps=4, target_rank=4, budget_phases=(0, 0.5), budget_every=1), model)
    for step in range(4):
        for parameter in parameters(model):
            parameter.grad = torch.randn(parameter.shape)
        rule.after(step)
    assert by_name(model)["model.0"].adalora_e.count_nonzero() == 4
    with pytest.raises(ConfigError, match=r"target_rank is 5, and model\.0 has rank 4"):
        rules.hold(config(method="adalora", target_rank=5), model)


def test_layers_that_adalora_leaves_no_rank_are_told() -> None:
    model: Any = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 8)).requires_grad_(False)
    attach(model, AdaLoRA(rank=4), targets="*")
    filled(model)
    made = config(method="adalora", steps=4, target_rank=2, budget_phases=(0, 0.5), budget_every=1, orthogonality=0)
    rule = rules.of(made, model)
    for step in range(4):
        assert list(rule.said()) == []
        for name, slot in by_name(model).items():
            for parameter in slot.parameters():
                parameter.grad = torch.randn(parameter.shape) * (name == "model.0")
        rule.after(step)
        if set(rule.file(collect(model)).parts) == {"model.0"}:
            break
    whole = "1 of 2 layers have no rank left and are not in the file: model.1"
    assert list(rule.said()) == [f"adalora: 4 of 8 ranks are left; {whole}"]


def test_adaloras_penalty_is_pefts() -> None:
    model: Any = nn.Sequential(nn.Linear(12, 24), nn.Conv2d(3, 8, 3))
    attach(model, AdaLoRA(rank=4), targets="*")
    filled(model)
    penalty = torch.zeros(())
    for slot in by_name(model).values():
        a, b, one = slot.adalora_a.flatten(1), slot.adalora_b, torch.eye(4)
        penalty = penalty + torch.norm(a @ a.T - one) + torch.norm(b.T @ b - one)
    wanted = torch.autograd.grad(0.3 * penalty / 4, [p for p in parameters(model) if p.ndim > 1])
    for parameter in parameters(model):
        parameter.grad = torch.zeros_like(parameter)
    rules.of(config(method="adalora", orthogonality=0.3), model).shape()
    for parameter, gradient in zip([p for p in parameters(model) if p.ndim > 1], wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("shape", [(24, 12), (8, 3, 3, 3)])
def test_adaloras_change_is_pefts_after_ranks_were_cut(shape: tuple[int, ...]) -> None:
    from peft import AdaLoraConfig, get_peft_model
    from peft.utils import set_peft_model_state_dict

    layer = nn.Linear(12, 24) if len(shape) == 2 else nn.Conv2d(3, 8, 3)
    site = Site.of(layer)
    assert site is not None
    method = AdaLoRA(rank=3, alpha=5, start=7)
    t = {name: torch.randn(size) for name, size in method.shapes(site).items()}
    peft = AdaLoRA.peft
    assert peft is not None
    written, fields = peft.write(method, t, shape)
    theirs: Any = get_peft_model(nn.Sequential(layer), AdaLoraConfig(target_modules=["0"], **fields))
    set_peft_model_state_dict(theirs, {f"base_model.model.0.{end}": tensor for end, tensor in written.items()})
    expected = theirs.base_model.model[0].get_delta_weight("default")
    torch.testing.assert_close(method.scale * method.delta(t, site, None), expected)
    back, tensors = peft.read(written, fields, shape)
    torch.testing.assert_close(back.scale * back.delta(tensors, site, None), expected)


def test_adalora_within_dora_has_no_budget_and_is_refused() -> None:
    """It was trained without one, and `target_rank` passed over."""
    model: Any = nn.Sequential(nn.Linear(12, 24))
    attach(model, DoRA(AdaLoRA(rank=4)), targets="*")
    with pytest.raises(ConfigError, match=r"model\.0 has adalora within dora, which has no budget"):
        rules.hold(config(method="dora(adalora(rank=4))", target_rank=2), model)


@pytest.mark.parametrize("fields", [{"init_r": 10**400}, {"lora_alpha": 10**400}, {"lora_alpha": float("nan")}])
def test_pefts_config_of_adalora_may_say_anything(fields: dict[str, Any]) -> None:
    t = {"lora_A": torch.zeros(3, 8), "lora_E": torch.zeros(3, 1), "lora_B": torch.zeros(12, 3)}
    peft = AdaLoRA.peft
    assert peft is not None
    with pytest.raises(FormatError, match="for a layer of rank 3"):
        peft.read(t, {"init_r": 5, **fields}, (12, 8))


def test_what_a_training_takes_counts_the_means_by_which_ranks_are_chosen() -> None:
    made = config(method="adalora(rank=2)", targets=["unet.mid_block*attn1.to_q"])
    found = fit.predicted(made, sketch("demo", torch.float32), (64, 64), bare=True)
    assert found.optimizer == 4 * found.adapter  # Adam's two, and these


# --- LoRA-FA


def test_lora_fa_corrects_ups_gradient_as_pefts_optimiser_does() -> None:
    """Up to bf16, in which peft's multiplies. Adam's first step is the sign, so a large epsilon shows the size;
    torch's is beside a root that is divided by sqrt(1 - beta).
    """
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_lorafa_optimizer

    x = torch.randn(7, 12)
    ours: Any = nn.Sequential(nn.Linear(12, 24)).requires_grad_(False)
    bare: Any = nn.Sequential(nn.Linear(12, 24))
    bare.load_state_dict(ours.state_dict())
    theirs: Any = get_peft_model(bare, LoraConfig(r=4, lora_alpha=2, target_modules=["0"]))
    attach(ours, LoRA(rank=4, alpha=2), targets="*")
    slot = by_name(ours)["model.0"]
    pair = theirs.base_model.model[0]
    with torch.no_grad():
        slot.up.copy_(torch.randn(24, 4))
        pair.lora_A["default"].weight.copy_(slot.down)
        pair.lora_B["default"].weight.copy_(slot.up)
    made = config(freeze_down=True)
    rules.hold(made, ours)
    assert parameters(ours) == [slot.up]
    assert not slot.down.requires_grad
    rule, optimizer = rules.of(made, ours), torch.optim.AdamW([slot.up], lr=1.0, eps=10.0 / 0.001**0.5, weight_decay=0)
    other: Any = create_lorafa_optimizer(theirs, 4, 2, 1.0)
    for group in other.param_groups:
        group["eps"] = 10.0
    before = slot.up.detach().clone()
    for model in (ours, theirs):
        model(x).square().mean().backward()
    rule.correct()
    optimizer.step()
    other.step()
    moved = slot.up.detach() - before
    assert moved.abs().max() > 0.001
    assert (moved - (pair.lora_B["default"].weight.detach() - before)).norm() < 0.01 * moved.norm()


def test_lora_fa_steps_as_the_whole_weight_would_within_downs_rows() -> None:
    """For plain descent: the weight's change is the projection of its own gradient onto the rows of down, on a
    convolution, too."""
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3)).requires_grad_(False)
    attach(model, LoRA(rank=4, alpha=2), targets="*")
    slot, x = by_name(model)["model.0"], torch.randn(2, 3, 6, 5)
    rules.hold(config(freeze_down=True), model)
    rule = rules.of(config(freeze_down=True), model)
    model(x).square().sum().backward()
    rule.correct()
    weight = model[0].weight.detach().clone().requires_grad_()
    torch.nn.functional.conv2d(x, weight, model[0].bias).square().sum().backward()
    assert weight.grad is not None
    down = slot.down.detach().flatten(1)
    onto = torch.linalg.pinv(down) @ down
    changed = slot.method.scale * slot.up.grad.flatten(1) @ down
    torch.testing.assert_close(changed, weight.grad.flatten(1) @ onto, rtol=1e-3, atol=1e-3)


def test_lora_fa_keeps_no_input_for_the_backward_pass() -> None:
    n, inputs, rank = 64, 128, 4

    def kept() -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(n, inputs, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(x)
        return sum(sizes.values())

    model: Any = nn.Sequential(nn.Linear(inputs, 96)).requires_grad_(False)
    attach(model, LoRA(rank=rank), targets="*")
    usual = kept()
    rules.hold(config(freeze_down=True), model)
    assert usual - kept() == 4 * n * inputs


@pytest.mark.parametrize("method", [LoRA(rank=2, tucker=True), DoRA(LoRA(rank=2)), AdaLoRA(rank=2)], ids=str)
def test_lora_fa_is_for_lora(method: Any) -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3))
    attach(model, method, targets="*")
    with pytest.raises(ConfigError, match="freeze_down is for lora"):
        rules.hold(config(freeze_down=True), model)


# --- DyLoRA


@pytest.mark.parametrize("method", [LoRA(rank=6, alpha=3), DoRA(LoRA(rank=6, alpha=3))], ids=str)
def test_in_a_step_of_nested_ranks_the_adapter_is_the_one_that_its_first_ranks_are(method: Any) -> None:
    x = torch.randn(3, 8, 9)
    model: Any = nn.Sequential(nn.Conv1d(8, 12, 3, padding=1)).requires_grad_(False)
    attach(model, method, targets="*")
    filled(model)
    whole, file = model(x), collect(model)
    rule = rules.of(config(nested_ranks="all"), model)
    seen: dict[int, Tensor] = {}
    slot = by_name(model)["model.0"]
    for step in range(30):
        rule.begin(step)
        out = model(x)
        out.square().mean().backward()
        rule.end()
        assert slot.down.grad is not None
        b = int(slot.down.grad.flatten(1).any(1).sum())
        assert not slot.down.grad[b:].any()
        assert not slot.up.grad[:, b:].any()
        seen[b] = out.detach()
        for parameter in parameters(model):
            parameter.grad = None
        assert torch.equal(model(x), whole)  # what is looked at between steps has all ranks
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]
    detach(model)
    for b, out in seen.items():
        part = file.parts["model.0"]
        shorter, tensors = part.method.only(part.tensors, torch.arange(b))
        assert shorter.file_rank == b
        attach(model, AdapterFile({"model.0": type(part)(shorter, tensors)}))
        torch.testing.assert_close(model(x), out)
        detach(model)


def test_of_nested_ranks_the_last_alone_learns_if_that_is_asked() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 12)).requires_grad_(False)
    attach(model, LoRA(rank=5), targets="*")
    filled(model)
    rule, slot = rules.of(config(nested_ranks="last"), model), by_name(model)["model.0"]
    drawn: set[int] = set()
    for step in range(30):
        rule.begin(step)
        model(torch.randn(3, 8)).square().mean().backward()
        rule.end()
        rule.shape()
        rows, columns = slot.down.grad.any(1).nonzero(), slot.up.grad.any(0).nonzero()
        assert torch.equal(rows, columns)
        assert rows.numel() == 1
        drawn.add(int(rows))
        for parameter in parameters(model):
            parameter.grad = None
    assert drawn == {0, 1, 2, 3, 4}


# --- T-LoRA


def ranks(method: TLoRA, t: float, total: int = 1000) -> int:
    return int((total - t) * (method.rank - method.min_rank) / total) + method.min_rank


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How many of T-LoRA's ranks act, for each sample, in each layer that is asked."""
    seen: list[list[int]] = []
    usual = ready._gains

    def gains(site: Any, pairs: Any, h: Tensor) -> Tensor:
        for adapter in pairs:
            halves = 2 if adapter.method.orthogonal else 1
            counts = (adapter.ranks.sum(1) / halves).int().tolist()
            seen.append(counts if len(counts) > 1 else counts * len(h))
        return usual(site, pairs, h)

    monkeypatch.setattr(ready, "_gains", gains)
    return seen


def test_tlora_has_the_ranks_of_the_time_at_each_step_of_a_pipeline(pipe: Any, watched: list[list[int]]) -> None:
    method = TLoRA(rank=8, min_rank=2)
    attach(pipe, method, targets="unet.mid_block*attn1.to_q")
    times: list[float] = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: times.append(float(args[1])), with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipe("a fox", num_inference_steps=5, output_type="latent")
    hook.remove()
    assert len(times) == len(watched) > 4
    assert [set(row) for row in watched] == [{ranks(method, t)} for t in times]
    assert all(len(row) == 2 for row in watched)  # guidance
    assert len({row[0] for row in watched}) > 3


def asked(pipe: Any, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    own = pipe.unet.config
    return (
        torch.randn(n, own.in_channels, 8, 8, generator=generator),
        torch.randn(n, 5, own.cross_attention_dim, generator=generator),
    )


@pytest.mark.parametrize("orthogonal", [True, False])
def test_tlora_with_a_time_for_each_sample_is_each_sample_alone(pipe: Any, orthogonal: bool) -> None:
    unet, (x, states) = pipe.unet, asked(pipe, 3)
    times = torch.tensor([20, 480, 999])
    with torch.no_grad():
        base = unet(x, times, states).sample
        attach(pipe, TLoRA(rank=4, alpha=2, orthogonal=orthogonal), targets=["unet.mid_block*", "!*time_emb*"])
        assert torch.equal(unet(x, times, states).sample, base)
        filled(pipe)
        together = unet(x, times, states).sample
        alone = [unet(x[k : k + 1], times[k], states[k : k + 1]).sample for k in range(3)]
        other = unet(x[:1], 999, states[:1]).sample
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert (other - alone[0]).abs().max() > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
def test_tlora_computed_anew_in_the_backward_pass_has_the_ranks_of_its_forward(pipe: Any, reentrant: bool) -> None:
    """Two forwards at other times, and then one backward pass, as where the rest of a class is kept."""
    unet, (x, states) = pipe.unet, asked(pipe, 2)
    attach(pipe, TLoRA(rank=4), targets="unet.mid_block*attn*")
    filled(pipe)
    x.requires_grad_()

    def gradients() -> list[Tensor]:
        early, late = (unet(x, torch.tensor(t), states).sample for t in ([5, 300], [990, 700]))
        return list(torch.autograd.grad(early.square().mean() + late.abs().mean(), parameters(pipe)))

    plain = gradients()
    unet.enable_gradient_checkpointing(lambda f, *a: checkpoint(f, *a, use_reentrant=reentrant))
    unet.train()
    try:
        if reentrant:
            for parameter in parameters(pipe):
                parameter.grad = None
            early, late = (unet(x, torch.tensor(t), states).sample for t in ([5, 300], [990, 700]))
            (early.square().mean() + late.abs().mean()).backward()
            again = [parameter.grad for parameter in parameters(pipe)]
        else:
            again = gradients()
    finally:
        unet.disable_gradient_checkpointing()
        unet.eval()
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)


def test_sanas_time_is_multiplied_as_its_pipeline_does() -> None:
    from diffusers import SanaTransformer2DModel

    with torch.device("meta"):
        usual, other = (
            SanaTransformer2DModel(num_layers=1, sample_size=4, timestep_scale=scale) for scale in (1.0, 0.001)
        )
    assert [clock_of(model) for model in (usual, other)] == [Clock("timestep", 1000), Clock("timestep", 1)]
    assert clock_of(nn.Linear(2, 2)) is None


def test_a_forward_that_fails_leaves_no_time_behind(pipe: Any) -> None:
    attach(pipe, TLoRA(rank=4), targets="unet.mid_block*attn1.to_q")
    filled(pipe)
    (slot,) = by_name(pipe).values()
    x, states = asked(pipe, 1)
    with pytest.raises(RuntimeError), torch.no_grad():
        pipe.unet(x, 900, states[..., :-1])
    assert slot.moment.acting(slot.method, 1) is None


def test_a_plan_does_not_put_tlora_on_text_encoders(folder: Path) -> None:
    usual = {"folder": folder, "base": "sd1", "trigger": "ohwx", "class_prompt": "a man"}
    assert "text" in planning.of(usual, "character").config.targets
    made = planning.of({**usual, "method": "tlora(rank=4)"}, "character").config
    assert (made.targets, made.learning_rates) == (["transformer"], {})


def test_tlora_leaves_no_hooks_and_stays_out_of_where_no_time_is_known(pipe: Any) -> None:
    def hooks() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in pipe.unet.modules())

    before = hooks()
    attach(pipe, TLoRA(rank=2), targets="unet.mid_block*attn*", name="one")
    attach(pipe, TLoRA(rank=3), targets="unet.mid_block*attn*", name="two")
    attach(pipe, LoRA(rank=3), targets="unet.mid_block*attn*", name="three")
    with pytest.raises(StateError, match=r"one \(tlora\) acts with another rank at each timestep and cannot be merged"):
        merge(pipe)
    detach(pipe, "one")
    assert hooks() == before + 2
    detach(pipe, "two")
    assert hooks() == before
    detach(pipe)
    with pytest.raises(TargetError, match="text_encoder knows no timestep"):
        attach(pipe, TLoRA(rank=2), targets="text")
    assert hooks() == before

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.proj(x)

    with pytest.raises(TargetError, match="how Odd is told its timestep is not known yet"):
        attach(Odd(), TLoRA(rank=2), targets="*")


@pytest.mark.parametrize("orthogonal", [True, False])
def test_tloras_average_is_nearest_over_the_times_and_says_what_it_lacks(orthogonal: bool) -> None:
    site = Site((24, 12))
    method = TLoRA(rank=5, alpha=2, min_rank=2, power=1.5, orthogonal=orthogonal)
    t = {name: torch.randn(shape) for name, shape in method.shapes(site).items()}
    o = method.operands(t, site, None)
    masks = method.acting((torch.arange(4000) + 0.5) / 4000)
    deltas = torch.einsum("or,nr,ri->noi", o["up"], masks, o["down"])
    made, tensors, lost, whole = method.averaged(t, site)
    delta = made.delta(tensors, site, None)
    torch.testing.assert_close(delta, deltas.mean(0), rtol=1e-2, atol=1e-2)
    assert made.scale == method.scale
    assert lost == pytest.approx(float((deltas - delta).square().sum((1, 2)).mean()), rel=1e-2)
    assert whole == pytest.approx(float(deltas.square().sum((1, 2)).mean()), rel=1e-2)


# --- runs

SETTINGS = ("--batch-size", "2", "--targets", "unet.mid_block*attn1.to_[qv]", "--log-with", "--no-report")


@pytest.mark.parametrize(
    "rule",
    [
        ("--method", "adalora(rank=4)", "--target-rank", "2", "--budget-every", "1", "--budget-phases", "0", "0.4",
         "--ema", "0.9"),
        ("--rank", "4", "--nested-ranks", "all"),
        ("--rank", "4", "--freeze-down", "--start", "orthogonal"),
        ("--method", "tlora(rank=4)", "--checkpointing"),
    ],
    ids=lambda rule: rule[1] if "(" in rule[1] else rule[2],
)  # fmt: skip
def test_two_and_three_steps_with_a_stop_between_are_five_to_the_byte(
    folder: Path, tmp_path: Path, run: Run, quick: Any, rule: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = [str(folder), *SETTINGS, *rule, "--steps", "5", "--checkpoint-every", "2", "--learning-rate", "0.01"]
    arguments += ["--cache", str(tmp_path / "cache")]
    run("style", [*arguments, "--output", str(whole)])
    usual, stopped = loop.Run._check_gradients, [False]

    def check(self: loop.Run, step: int, norm: float) -> None:
        if step == 3 and not stopped[0]:
            stopped[0] = True
            raise ZeroDivisionError
        usual(self, step, norm)

    monkeypatch.setattr(loop.Run, "_check_gradients", check)
    with pytest.raises(ZeroDivisionError):
        run("style", [*arguments, "--output", str(broken)])
    run("style", [*arguments, "--output", str(broken)])
    assert stopped == [True]
    parts = load(whole / "adapter.safetensors").parts
    other = load(broken / "adapter.safetensors").parts
    assert parts.keys() == other.keys()
    for name, part in parts.items():
        assert all(torch.equal(tensor, other[name].tensors[key]) for key, tensor in part.tensors.items())
    held = [sorted(path.name for path in place.glob("*.safetensors")) for place in (whole, broken)]
    assert held[0] == held[1]
    if "adalora(rank=4)" in rule:
        assert sum(part.method.file_rank or 0 for part in parts.values()) == 2 * 2
    if "--freeze-down" in rule:
        trained, _ = read_tensors(broken / "checkpoints" / "step-0000005.safetensors")
        assert [tuple(t.shape)[1] for name, t in trained.items() if name.startswith("tensor.")] == [4, 4]  # both are up
    status = json.loads((broken / "status.json").read_text())
    assert status["state"] == "done"


def test_an_export_whose_layers_lost_all_ranks_is_told_of_after_the_training(
    folder: Path, tmp_path: Path, run: Run, quick: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """It was an error when all was trained."""
    settings = [*SETTINGS, "--method", "adalora(rank=2)", "--steps", "2", "--budget-phases", "0", "0"]
    settings += ["--learning-rate", "0.3", "--warmup-steps", "0"]
    monkeypatch.setattr(
        rules.Budget, "_kept", lambda self, _: {n: torch.ones(2) * n.endswith("to_v") for n in self._slots}
    )
    run("style", [str(folder), *settings, "--exports", "q=*to_q", "v=*to_v", "--output", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "exports: the layers of q have no ranks left, and no file" in said
    assert "\nadalora: 2 of 4 ranks are left; 1 of 2 layers have no rank left and are not in the file: unet.mid" in said
    made = {path.name for path in (tmp_path / "out").glob("adapter.*")}
    assert made == {"adapter.safetensors", "adapter.kohya.safetensors", "adapter.v.safetensors"}


def test_tlora_as_one_lora_and_nested_ranks_cut_by_the_programs(
    pipe: Any, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    attach(pipe, TLoRA(rank=4, alpha=2), targets=["unet.mid_block*to_q", "unet.mid_block*conv1"])
    filled(pipe)
    save(collect(pipe), tmp_path / "timed.safetensors", format="imgadapt")
    detach(pipe)
    attach(pipe, load(tmp_path / "timed.safetensors"))
    with pytest.raises(FormatError, match="acts with another rank at each timestep: --average-times"):
        save(collect(pipe), tmp_path / "no.safetensors", format="kohya")
    run(
        "convert",
        [str(tmp_path / "timed.safetensors"), str(tmp_path / "k.safetensors"), "--to", "kohya", "--average-times"],
    )
    assert re.search(r"one LoRA for all times: [1-9]\d\.\d% of the change is lost", capsys.readouterr().out)
    parts = load(tmp_path / "k.safetensors").parts
    assert {part.method for part in parts.values()} == {LoRA(rank=8, alpha=4)}
    run("resize", [str(tmp_path / "k.safetensors"), str(tmp_path / "r.safetensors"), "--first", "3"])
    for name, part in load(tmp_path / "r.safetensors").parts.items():
        assert part.method == LoRA(rank=3, alpha=1.5)
        assert torch.equal(part.tensors["down"], parts[name].tensors["down"][:3])
    detach(pipe)
    with pytest.raises(ConfigError, match="no layer of the adapter depends on the time"):
        untimed(load(tmp_path / "k.safetensors"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own, at a hook that sees an output
def test_tlora_is_compiled_in_one_graph_and_no_time_recompiles_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model whose time runs from 0 to 1 backwards, as Lumina's and Z-Image's does."""

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 6)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.proj(x)

    monkeypatch.setitem(CLOCKS, "Tiny", Clock("timestep", 1, backwards=True))
    model: Any = Tiny()
    x = torch.randn(2, 3, 8)
    attach(model, TLoRA(rank=5, min_rank=1, orthogonal=False), targets="proj")
    filled(model)
    slot = by_name(model)["model.proj"]
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(x, torch.tensor([0.5, 0.5]))
    with torch.compiler.set_stance("fail_on_recompile"):
        for times in ([1.0, 0.0], [0.25, 0.8]):
            out = compiled(x, torch.tensor(times))
            for k, share in enumerate(times):
                count = int(share * 4 + 1e-6) + 1
                up, down = slot.tlora_up[:, :count], slot.tlora_down[:count]
                torch.testing.assert_close(out[k], model.proj.base(x[k]) + x[k] @ (up @ down).t())
                torch.testing.assert_close(model(x, torch.tensor(times))[k], out[k])
    torch.testing.assert_close(model.proj(x), model.proj.base(x) + x @ (slot.tlora_up @ slot.tlora_down).t())
