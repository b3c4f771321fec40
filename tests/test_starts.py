"""Where LoRA starts: nothing changes by it, and each start is what its paper says."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import LoraGAConfig
from torch import Tensor, nn
from torch.nn import functional as F

from imgadapt import DoRA, LoKr, LoRA, attach, collect, detach, load, merge, parameters, save
from imgadapt.errors import ConfigError
from imgadapt.file import AdapterFile, plan
from imgadapt.layer import AdapterLayer
from imgadapt.methods import Anchored
from imgadapt.sites import Site
from imgadapt.training import families, recipe, starts
from imgadapt.training.config import Start, TrainConfig
from imgadapt.training.job import Job
from imgadapt.training.starts import beginning, shown
from imgadapt.training.starts.place import top

RANK, ALPHA = 3, 2.0
MADE: tuple[Start, ...] = ("pissa", "olora", "orthogonal", "eva", "corda", "lora_ga")
BATCHES = 3


def tiny() -> Any:
    """Two linear layers and two convolutions, one of them strided, padded by mirrors and grouped."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 24), nn.GELU(), nn.Unflatten(1, (4, 2, 3)), nn.Conv2d(4, 8, 3, padding=1), nn.GELU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, padding_mode="reflect", groups=2), nn.Flatten(), nn.Linear(32, 10),
    ).requires_grad_(False)  # fmt: skip


def show(model: nn.Module) -> starts.Show:
    """Batches of inputs whose features are of unequal size, and the losses of turning them into others."""

    def batches() -> Iterator[Tensor]:
        for k in range(BATCHES):
            generator = torch.Generator().manual_seed(k)
            x = torch.randn(5, 12, generator=generator) * torch.linspace(0.3, 2, 12)
            yield (model(x) - x[:, :10].flip(1)).square().mean(1)

    return batches


def begun(start: Start, method: LoRA = LoRA(RANK, ALPHA)) -> tuple[Any, AdapterFile, str]:  # noqa: B008  frozen
    """(a model with the start on it, the start, what is said of it)."""
    model = tiny()
    attach(model, method, targets="*")
    file, said = starts.made(model, start, seed=3, show=show(model))
    beginning.put_on(model, file)
    return model, file, said


def inputs(layer: int) -> Tensor:
    """All that a layer reads, as rows; of a convolution its patches, group by group."""
    model, kept = tiny(), []
    model[layer].register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    for _ in show(model)():
        pass
    x, module = torch.cat(kept), model[layer]
    if isinstance(module, nn.Linear):
        return x
    x = F.pad(x, (1, 1, 1, 1), mode="reflect") if module.padding_mode == "reflect" else F.pad(x, (1, 1, 1, 1))
    groups = [F.unfold(part, 3, stride=module.stride) for part in x.chunk(module.groups, 1)]
    return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in groups])


def by_layer(file: AdapterFile, layer: int) -> dict[str, Tensor]:
    return {k.removeprefix("anchored_"): t.flatten(1) for k, t in file.parts[f"model.{layer}"].tensors.items()}


def product(t: dict[str, Tensor], end: str = "") -> Tensor:
    return t[f"up{end}"] @ t[f"down{end}"]


LAYERS = (0, 3, 5, 7)


@pytest.mark.parametrize("start", MADE)
def test_a_start_changes_nothing_to_the_bit_and_everything_learns(start: Start) -> None:
    model, file, _ = begun(start)
    x = torch.randn(4, 12)
    assert torch.equal(model(x), tiny()(x))
    assert torch.equal(model.bfloat16()(x.bfloat16()), tiny().bfloat16()(x.bfloat16()))
    model.float()
    (model(x) - torch.ones(4, 10)).square().mean().backward()
    grads = [p.grad for p in parameters(model)]
    silent = {"orthogonal": 0, "eva": len(file.parts)}.get(start, 0)  # EVA's down, whose up is zero
    assert sum(g is None or not g.any() for g in grads) == silent
    again = begun(start)[1]
    for name, part in file.parts.items():
        assert all(torch.equal(again.parts[name].tensors[key], t) for key, t in part.tensors.items())


@pytest.mark.parametrize("start", MADE)
def test_what_is_learnt_is_merged_saved_and_read_back(start: Start, tmp_path: Path) -> None:
    model, _, _ = begun(start)
    x = torch.randn(4, 12)
    with torch.no_grad():
        for p in parameters(model):
            p.add_(torch.randn_like(p), alpha=0.1)
    live = model(x)
    assert (live - tiny()(x)).abs().max() > 0.01
    file = collect({"unet": model})
    for form in ("imgadapt", "diffusers"):
        path = save(file, tmp_path / f"{form}.safetensors", format=form)
        other = tiny()
        attach({"unet": other}, load(path))
        torch.testing.assert_close(other(x), live)
    again = load(tmp_path / "imgadapt.safetensors")
    assert all(torch.equal(again.parts[n].tensors[k], t) for n, p in file.parts.items() for k, t in p.tensors.items())
    merge(model)
    torch.testing.assert_close(model(x), live)


def test_as_lora_an_anchored_one_has_twice_the_rank_or_that_of_the_weight() -> None:
    model = nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 5))
    attach(model, Anchored(rank=4, alpha=2), targets="*")
    dotted = plan(collect({"unet": model}), "diffusers")
    assert {step.loss for step in dotted} == {"exact"}
    methods = [step.parts[step.layers[0]].method for step in dotted]
    assert [method.file_rank for method in methods] == [8, 5]
    assert [method.scale for method in methods] == [0.5, 0.5]


def test_dora_goes_over_an_anchored_one() -> None:
    model = nn.Sequential(nn.Linear(20, 16))
    x = torch.randn(3, 20)
    before = model(x)
    attach(model, DoRA(Anchored(rank=4, alpha=2)), targets="*")
    torch.testing.assert_close(model(x), before)


# --- of the weight


@pytest.mark.parametrize("fails", [False, True])
def test_the_largest_singular_values_are_those_of_an_exact_decomposition(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Tensor) -> Any:  # as it does on the inputs of a convolution of the embedded base's
        raise torch.linalg.LinAlgError("failed to converge")

    if fails:
        monkeypatch.setattr(torch.linalg, "eigh", fail)
    for shape in ((9, 30), (30, 9)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        u, s, v = top(matrix, 4)
        exact = torch.linalg.svd(matrix.double(), full_matrices=False)
        torch.testing.assert_close(s, exact[1][:4])
        torch.testing.assert_close((u * s) @ v, (exact[0][:, :4] * exact[1][:4]) @ exact[2][:4])
    u, s, v = top(torch.zeros(3, 5), 2)
    assert not torch.cat([u.flatten(), s, v.flatten()]).any()


def peft_on(base: Any, start: Any, rank: int, alpha: Any, **further: Any) -> Any:
    """peft's LoRA on the first layer of a model."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=start, **further)
    return get_peft_model(base, config)


def peft_linear(start: Any, rank: int, alpha: float) -> Any:
    return peft_on(nn.Sequential(tiny()[0]), start, rank, alpha)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_pissa_and_olora_take_out_of_the_weight_what_peft_takes(start: Start) -> None:
    for rank, alpha in ((3, 2.0), (3, 3.0)):
        theirs: Any = peft_linear(start, rank, alpha).base_model.model[0]
        t = by_layer(begun(start, LoRA(rank, alpha))[1], 0)
        a, b = theirs.lora_A.default.weight, theirs.lora_B.default.weight
        torch.testing.assert_close(product(t, "_0"), b @ a)
        residual = tiny()[0].weight - alpha / rank * product(t, "_0")
        torch.testing.assert_close(theirs.base_layer.weight.detach(), residual)


def test_pissa_is_the_best_of_its_rank_on_convolutions_too() -> None:
    _, file, _ = begun("pissa")
    for layer in LAYERS:
        weight = tiny()[layer].weight.flatten(1)
        rest = torch.linalg.svdvals(weight)[RANK:].norm()
        left = weight - ALPHA / RANK * product(by_layer(file, layer), "_0")
        torch.testing.assert_close(left.norm(), rest)


def test_the_first_gradients_are_those_of_pefts_pissa() -> None:
    theirs: Any = peft_linear("pissa", RANK, ALPHA)
    a, b = theirs.base_model.model[0].lora_A.default.weight, theirs.base_model.model[0].lora_B.default.weight
    model: Any = nn.Sequential(tiny()[0])
    attach(model, Anchored(RANK, ALPHA), targets="*")
    (slot,) = model[0]
    slot.fill(slot.method, Anchored.started(a.detach(), b.detach()))
    x = torch.randn(6, 12)
    torch.testing.assert_close(model(x), theirs(x))
    for one in (model, theirs):
        (one(x) - 1).square().mean().backward()
    torch.testing.assert_close(slot.anchored_down.grad, a.grad)
    torch.testing.assert_close(slot.anchored_up.grad, b.grad)
    assert slot.anchored_down_0.grad is None


def test_a_rank_that_the_weight_does_not_have_starts_as_loras_do() -> None:
    model: Any = nn.Sequential(nn.Linear(12, 10, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(10, 1) @ torch.randn(1, 12))
    attach(model, LoRA(3), targets="*")
    file, _ = starts.made(model, "pissa")
    t = by_layer(file, 0)
    torch.testing.assert_close(product(t), model[0].weight.detach())
    assert t["down"].any(1).all()
    assert not t["up"][:, 1:].any()


def test_orthogonal_is_pefts_but_for_a_rotation_of_the_ranks() -> None:
    _, file, _ = begun("orthogonal", LoRA(4))
    t = by_layer(file, 0)
    q, _ = torch.linalg.qr(torch.randn(4, 4))
    assert not product(t).any()
    theirs: Any = peft_linear("orthogonal", 4, 4).base_model.model[0]
    a, b = theirs.lora_A.default.weight.detach(), theirs.lora_B.default.weight.detach()
    assert (b @ a).abs().max() < 1e-7  # theirs is zero but for rounding
    assert torch.linalg.matrix_rank(b) == torch.linalg.matrix_rank(t["up"] @ q) == 2
    assert torch.linalg.matrix_rank(a) == torch.linalg.matrix_rank(q.t() @ t["down"]) == 2
    assert 0.5 < float(t["up"].norm() / b.norm()) < 2
    g = torch.randn(24, 12)

    def step(up: Tensor, down: Tensor) -> Tensor:
        return (up - 0.1 * g @ down.t()) @ (down - 0.1 * up.t() @ g)

    torch.testing.assert_close(step(t["up"], t["down"]), step(t["up"] @ q, q.t() @ t["down"]))


# --- of what layers read


def test_moments_are_those_of_all_inputs_whatever_is_gathered_at_a_time() -> None:
    model = tiny()
    attach(model, LoRA(RANK), targets="*")
    found = starts.places(model)
    for most in (1, 10**9):
        for (place, moment), layer in zip(starts.moments(found, show(model), most=most), LAYERS, strict=True):
            x = inputs(layer)
            torch.testing.assert_close(moment, x.t() @ x / len(x))
            assert place.name == f"model.{layer}"
    assert not any(layer._forward_pre_hooks for layer in model if isinstance(layer, AdapterLayer))


def test_eva_spans_the_top_singular_vectors_of_all_inputs() -> None:
    model = tiny()
    attach(model, LoRA(RANK, ALPHA), targets="*")
    parts = starts.eva(starts.places(model), show(model), rho=1)
    for layer in LAYERS:
        part = parts[f"model.{layer}"]
        down, (_, s, v) = part.tensors["down"].flatten(1), torch.linalg.svd(inputs(layer))
        assert part.method == LoRA(RANK, ALPHA)
        assert not part.tensors["up"].any()
        torch.testing.assert_close(down @ down.t(), torch.eye(RANK))
        torch.testing.assert_close((down @ v[:RANK].t()).abs(), torch.eye(RANK), atol=2e-3, rtol=0)
        x = inputs(layer)
        torch.testing.assert_close((x @ down.t()).norm(), s[:RANK].norm())


def test_eva_gives_ranks_to_the_layers_that_they_explain_most_of() -> None:
    _, file, said = begun("eva")
    values = {layer: torch.linalg.svdvals(inputs(layer)).square() for layer in LAYERS}
    shares = [(float(share), k) for k, own in values.items() for share in own[: 2 * RANK] / own.sum()]
    best = [layer for _, layer in sorted(shares, reverse=True)[: RANK * len(LAYERS)]]
    ranks = {layer: best.count(layer) for layer in LAYERS if layer in best}
    assert {name: part.method.file_rank for name, part in file.parts.items()} == {
        f"model.{layer}": rank for layer, rank in ranks.items()
    }
    assert len(set(ranks.values())) > 1
    assert {part.method.scale for part in file.parts.values()} == {ALPHA / RANK}
    assert said == f"ranks from {min(ranks.values())} to {max(ranks.values())}, in {len(ranks)} of 4 layers"


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_takes_the_parts_of_the_weight_in_the_order_of_what_they_do_to_the_inputs(mode: Any) -> None:
    model = tiny()
    attach(model, LoRA(RANK, ALPHA), targets="*")
    parts = starts.corda(starts.places(model), show(model), mode=mode)
    for layer in LAYERS:
        x, weight = inputs(layer).double(), tiny()[layer].weight.flatten(1).double()
        c = x.t() @ x / len(x)
        c = c + 0.01 * c.diagonal().mean() * torch.eye(len(c))
        u, s, v = torch.linalg.svd(weight @ c, full_matrices=False)
        torch.testing.assert_close((u * s) @ v @ c.inverse(), weight)
        own = slice(RANK) if mode == "ipm" else slice(len(s) - RANK, None)
        wanted = (u[:, own] * s[own]) @ v[own] @ c.inverse()
        t = by_layer(AdapterFile(parts), layer)
        got = ALPHA / RANK * product(t, "_0").double()
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


# --- of gradients


def test_gradients_are_those_of_the_weights() -> None:
    model = tiny().requires_grad_(True)
    sum(losses.sum() for losses in show(model)()).backward()  # pyright: ignore[reportAttributeAccessIssue] # not 0
    wanted = [model[layer].weight.grad.flatten(1) / (5 * BATCHES) for layer in LAYERS]
    model.requires_grad_(False)
    attach(model, LoRA(RANK), targets="*")
    for most in (1, 10**9):
        got = [gradient for _, gradient in starts.gradients(starts.places(model), show(model), most=most)]
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)
    assert all(p.grad is None for p in parameters(model))
    assert [len(layer.slots) for layer in model if isinstance(layer, AdapterLayer)] == [1] * 4


def test_the_first_step_of_lora_ga_is_nearest_to_that_of_the_whole_weight() -> None:
    model = tiny()
    attach(model, LoRA(RANK), targets="*")
    wanted = {place.name: g for place, g in starts.gradients(starts.places(model), show(model))}

    def likeness(start: Start | None) -> float:
        stepped = tiny()
        attach(stepped, LoRA(RANK), targets="*")
        if start:
            beginning.put_on(stepped, starts.made(stepped, start, show=show(stepped))[0])
        optimizer = torch.optim.SGD(parameters(stepped), lr=1e-3)
        sum(losses.sum() for losses in show(stepped)()).backward()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        rows = [
            F.cosine_similarity(-layer_delta(part), wanted[name].flatten(), dim=0)
            for name, part in collect(stepped).parts.items()
        ]
        return float(torch.stack(rows).mean())

    def layer_delta(part: Any) -> Tensor:
        assert part.shape is not None
        site = Site(part.shape, "conv" if len(part.shape) > 2 else "linear")
        return part.method.delta({k: t.double() for k, t in part.tensors.items()}, site, None).float().flatten()

    ours, theirs = likeness("lora_ga"), likeness(None)
    best = torch.stack([torch.linalg.svdvals(g)[: 2 * RANK].norm() / g.norm() for g in wanted.values()]).mean()
    assert ours == pytest.approx(float(best), abs=0.01)  # no step of rank 2r is nearer
    assert theirs < ours - 0.2


def test_pefts_lora_ga_multiplies_by_singular_values_where_the_paper_does_not() -> None:
    model = tiny()
    attach(model, LoRA(RANK), targets="*")
    (gradient,) = [g for place, g in starts.gradients(starts.places(model), show(model)) if place.name == "model.0"]
    t = by_layer(starts.made(model, "lora_ga", show=show(model))[0], 0)
    c = 24**0.25 / 4
    torch.testing.assert_close(t["up_0"].t() @ t["up_0"], c**2 * torch.eye(RANK), atol=1e-5, rtol=0)
    torch.testing.assert_close(t["down_0"] @ t["down_0"].t(), c**2 * torch.eye(RANK), atol=1e-5, rtol=0)
    base: Any = nn.Sequential(tiny()[0])
    base[0]._peft_loraga_grad = gradient
    theirs: Any = peft_on(base, "lora_ga", RANK, RANK, lora_ga_config=LoraGAConfig()).base_model.model[0]
    s = torch.linalg.svdvals(gradient)
    torch.testing.assert_close(theirs.lora_B.default.weight.norm(dim=0), c * s[RANK : 2 * RANK])
    torch.testing.assert_close(theirs.lora_A.default.weight.norm(dim=1), torch.ones(RANK))


# --- of what quantising took


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_loftq_makes_up_for_what_quantising_took(storage: Any) -> None:
    pytest.importorskip("bitsandbytes")
    from imgadapt.training.families.quantise import quantise

    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64)), nn.Sequential(nn.Linear(64, 32)))
    x = torch.randn(9, 64)
    exact = nn.Sequential(*model)
    whole = exact(x)
    originals: dict[str, Tensor] = {}
    assert quantise(model, storage, device=torch.device("cpu"), dtype=torch.float32, originals=originals) == 2
    assert {name: tuple(w.shape) for name, w in originals.items()} == {"0.0": (48, 64), "1.0": (32, 64)}
    rough = model(x)
    attach(model, LoRA(16, 8), targets="*")
    held = {f"model.{name}": weight for name, weight in originals.items()}
    file, said = starts.made(model, "loftq", originals=held)
    beginning.put_on(model, file)
    for place in starts.places(model):
        if place.name in held:
            part = file.parts[place.name]
            gap = held[place.name] - place.weight()
            values = torch.linalg.svdvals(gap)
            before, after = starts.lost(place, part, held[place.name])
            size = held[place.name].norm()
            assert before == pytest.approx(float(gap.norm() / size), rel=1e-4)
            assert after == pytest.approx(float(values[16:].norm() / size), rel=1e-3)  # the best of that rank
            assert after < 0.7 * before
    assert not file.parts["model.0.1"].tensors["up"].any()  # it is not quantised
    assert "of 2 layers" in said
    if storage == "nf4":  # int8 also rounds what goes in
        assert (model(x) - whole).norm() < 0.7 * (rough - whole).norm()


# --- in a training


def settings(folder: Path, **values: Any) -> TrainConfig:
    usual = {"folder": folder, "output": folder / "out", "steps": 4, "batch_size": 2, "warmup_steps": 0, "rank": 2}
    targets = ["unet.mid_block*attn1.to_q", "unet.mid_block*resnets.0.conv1"]
    return TrainConfig.of({**usual, "targets": targets, "log_with": [], "report": False, "alpha": 1, **values})


def go(config: TrainConfig, steps: int | None = None) -> dict[str, Tensor]:
    """Train, up to so many steps; the tensors of the adapter as it is then."""
    from imgadapt.training.loop import Terms

    job = Job(config)

    def loss(step: int, places: range) -> Terms:
        batch = job.material.batch(step, places)
        asked = job.objective.ask(batch.latents, config.seed, step, places, config.batch_size)
        guess = job.family.predict(asked.noisy, batch.conditions, asked.times)
        losses = job.objective.losses(guess, batch.latents, asked.noise, asked.times, batch.mask)
        return Terms(losses.weighted, losses.raw, asked.times, batch.names)

    with job.run() as run:
        for step in run.steps():
            run.learn(step, loss)
            if step + 1 == steps:
                run._save(step + 1)
                break
    made = {f"{n}.{k}": t for n, p in collect(job.family.pipeline).parts.items() for k, t in p.tensors.items()}
    detach(job.family.pipeline)
    return made


@pytest.mark.parametrize("start", ["corda", "eva"])
def test_a_run_that_stops_goes_on_to_the_same_bits_from_the_start_that_it_kept(
    start: Start, folder: Path, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(folder, start=start, start_samples=3)
    whole = go(config)
    halved = config.model_copy(update={"output": tmp_path / "halved"})
    go(halved, 2)
    kept = tmp_path / "halved" / "checkpoints" / "start.safetensors"
    assert kept.exists()

    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("it is kept")

    with monkeypatch.context() as patched:
        patched.setattr(beginning, "made", again)
        resumed = go(halved)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
    kept.write_bytes(kept.read_bytes()[:-9])  # torn: it is made again, the same
    assert all(torch.equal(tensor, whole[key]) for key, tensor in go(halved).items())


def test_rules_hold_what_has_started_too(folder: Path, quick: Any) -> None:
    job = Job(settings(folder, start="orthogonal", freeze_down=True, lora_plus=4, learning_rate=1e-4))
    assert {row.key for row in job.trained} == {"up"}
    assert {group["lr"] for group in job.optimizer.param_groups} == {4e-4}
    detach(job.family.pipeline)
    job = Job(settings(folder, start="pissa", lora_plus=4, learning_rate=1e-4))
    rates = {row.key: g["lr"] for row in job.trained for g in job.optimizer.param_groups if _in(row.parameter, g)}
    assert rates == {"anchored_down": 1e-4, "anchored_up": 4e-4}
    detach(job.family.pipeline)


def _in(parameter: Any, group: Any) -> bool:
    return any(one is parameter for one in group["params"])


def test_samples_are_at_times_that_are_stratified_over_all_of_them(folder: Path, quick: Any) -> None:
    job, seen = Job(settings(folder, batch_size=4, pieces=2)), list[float]()
    detach(job.family.pipeline)
    predict: Callable[..., Tensor] = job.family.predict

    def spied(noisy: Tensor, conditions: Any, times: Tensor) -> Tensor:
        seen.extend(times.tolist())
        return predict(noisy, conditions, times)

    job.family.predict = spied  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        losses = list(shown.stratified(job.family, job.objective, job.material, samples=10, seed=0)())
    assert [len(one) for one in losses] == [2, 2, 2, 2, 2]
    assert sorted(int(t / job.objective.schedule.total * 10) for t in seen) == list(range(10))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method": "lokr", "start": "pissa", "alpha": None}, "start is for plain lora"),
        ({"method": "lora(tucker=True)", "start": "eva"}, "start is for plain lora"),
        ({"start": "loftq"}, "give --quantise"),
        ({"start": "lora_ga", "precision": "fp16"}, "use bf16"),
    ],
)
def test_a_start_that_cannot_be_says_why(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe.methods(settings(Path("x"), **values))


def test_starts_refuse_what_they_cannot_read() -> None:
    with pytest.raises(ConfigError, match="'start_samples' has no effect without start = eva, corda or lora_ga"):
        settings(Path("x"), start_samples=3, start="pissa")
    model = nn.Sequential(nn.Embedding(18, 12))
    attach(model, LoRA(2), targets="*[0-9]")
    with pytest.raises(
        ConfigError, match=r"start = eva looks at what linear layers and convolutions read, and model\.0"
    ):
        starts.eva(starts.places(model), lambda: iter(()))
    attach(model, LoKr(2), name="other", targets="*[0-9]")
    with pytest.raises(ConfigError, match="a start is for plain LoRA"):
        starts.places(model, name="other")
    with pytest.raises(ConfigError, match=r"rho is 0\.5"):
        starts.eva([], lambda: iter(()), rho=0.5)
    with pytest.raises(ConfigError, match="it must be 'ipm' or 'kpm'"):
        starts.corda([], lambda: iter(()), mode="pmk")  # pyright: ignore[reportArgumentType]


def test_a_base_that_is_quantised_gives_the_weights_that_it_had() -> None:
    pytest.importorskip("bitsandbytes")
    originals: dict[str, Tensor] = {}
    family = families.load("demo", quantise="nf4", originals=originals)
    plain = families.load("demo")
    assert originals
    for name, weight in list(originals.items())[:5]:
        assert torch.equal(weight, plain.pipeline.unet.get_submodule(name.removeprefix("unet.")).weight)
    recipe.put_on(settings(Path("x"), start="loftq", quantise="nf4", targets=["attention"]), family.pipeline)
    _, said = starts.made(family.pipeline, "loftq", originals=originals)
    before, after = (float(share) for share in re.findall(r"([0-9.]+)%", said))
    assert 5 < after < before < 12
