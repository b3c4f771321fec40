"""The engine: caches, checkpoints, the steps of a run and what can go wrong in them, evaluation."""

import json
import math
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imgadapt.errors import Interrupted, OutputError, TrainingError
from imgadapt.training import checkpoint, learning, loop, noise, optimizers, recipe
from imgadapt.training.averaging import Averages
from imgadapt.training.cache import Cache
from imgadapt.training.config import OPTIMIZERS, TrainConfig
from imgadapt.training.evaluate import bootstrap
from imgadapt.training.log import Lines, read_lines
from imgadapt.training.loop import Run, Terms
from imgadapt.training.processes import Processes

# --- a training of two layers in milliseconds: y = x + up_b down_b x + up_a down_a x is to be x turned around


@dataclass
class Toy:
    """What a program gives to Run."""

    out: Path
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    seen: list[tuple[int, range]] = field(default_factory=list[tuple[int, range]])
    spare: Callable[[], str | None] = lambda: None
    states: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        usual = {"folder": "x", "output": self.out, "steps": 6, "log_with": [], "learning_rate": 0.01}
        self.config = TrainConfig.of({**usual, "warmup_steps": 0, "schedule": "constant", **self.settings})
        shapes = {"down": (2, 5), "up": (5, 2)}
        self.rows = [
            recipe.Tensor(layer, key, nn.Parameter(torch.zeros(shape) if key == "up" else torch.randn(shape)))
            for layer in ("unet.a.to_q", "unet.b.to_q")
            for key, shape in shapes.items()
        ]
        groups = recipe.groups(self.config, self.rows)
        self.optimizer = optimizers.build(self.config, groups)

    def loss(self, step: int, places: range) -> Terms:
        self.seen.append((step, places))
        x = noise.gaussian(0, step, torch.Size((len(places), 5)), places.start)
        down_a, up_a, down_b, up_b = (row.parameter for row in self.rows)
        y = x + x @ down_a.T @ up_a.T + x @ down_b.T @ up_b.T
        error = (y - x.flip(1)).square().mean(1)
        return Terms(error, error.detach(), torch.arange(places.start, places.stop), [f"{k}.png" for k in places])

    def run(self) -> Run:
        processes = Processes(cpu=True)
        return Run(self.config, self.rows, self.optimizer, self.config.identity({}), processes, self.spare)

    def go(self, loss: loop.Loss | None = None) -> Run:
        with self.run() as run:
            for step in run.steps():
                run.learn(step, loss or self.loss)
        return run

    @property
    def values(self) -> Tensor:
        return torch.cat([row.parameter.detach().flatten() for row in self.rows])

    @property
    def log(self) -> list[dict[str, Any]]:
        return read_lines(self.out / "log.jsonl")

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.out / "status.json").read_text())


# --- caches and checkpoints


def test_a_torn_cache_entry_is_made_again_and_a_whole_one_is_not(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path), []

    def make() -> dict[str, Tensor]:
        made.append(1)
        return {"latent": torch.arange(6.0), "mask": torch.ones(2)}

    for _ in range(3):
        assert torch.equal(cache.get(make, "a", "b")["latent"], torch.arange(6.0))
    assert len(made) == 1
    (entry,) = tmp_path.rglob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:-3])
    assert torch.equal(cache.get(make, "a", "b")["mask"], torch.ones(2))
    assert len(made) == 2
    cache.get(make, "a", "c")
    cache.get(make, "ab")
    assert len(made) == 4


def test_what_a_cache_keeps_is_not_read_to_be_sure_of_it_and_what_is_torn_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, made = Cache(tmp_path), []

    def make() -> dict[str, Tensor]:
        made.append(1)
        return {"latent": torch.arange(6.0)}

    monkeypatch.setattr("imgadapt.training.cache.read_tensors", lambda _: pytest.fail("read"))
    for _ in range(3):
        cache.ensure(make, "a", "b")
    assert len(made) == 1
    (entry,) = tmp_path.rglob("*.safetensors")
    whole = entry.read_bytes()
    for torn in (whole[:-1], whole[:20], b"", whole.replace(entry.stem.encode(), b"0" * 64)):
        entry.write_bytes(torn)
        cache.ensure(make, "a", "b")
        assert entry.read_bytes() == whole
    assert len(made) == 5


def trained(steps: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {"a": nn.Parameter(torch.ones(3, 2)), "b": nn.Parameter(torch.ones(4))}
    states = {"optimizer": torch.optim.AdamW(list(tensors.values()), lr=0.1)}
    advance(tensors, states, 0, steps)
    return tensors, states


def advance(tensors: dict[str, Tensor], states: dict[str, Any], first: int, last: int) -> None:
    for step in range(first, last):
        sum(((p * (step + 1)).sin().sum() for p in tensors.values()), torch.zeros(())).backward()
        states["optimizer"].step()
        states["optimizer"].zero_grad()


def test_a_checkpoint_brings_tensors_and_states_back_to_the_bit(tmp_path: Path) -> None:
    tensors, states = trained(5)
    checkpoint.save(tmp_path, 5, tensors, states, {"seed": "0"})
    advance(tensors, states, 5, 9)
    fresh, again = trained(0)
    assert checkpoint.resume(tmp_path, fresh, again, {"seed": "0"}) == 5
    advance(fresh, again, 5, 9)
    assert all(torch.equal(tensors[name], fresh[name]) for name in tensors)


class State:
    def __init__(self, content: Any) -> None:
        self.content = content

    def state_dict(self) -> Any:
        return self.content

    def load_state_dict(self, state_dict: Any) -> None:
        self.content = state_dict


def test_states_of_every_shape_come_back_with_their_types(tmp_path: Path) -> None:
    inner = {"": torch.arange(3, dtype=torch.uint8)}
    content: dict[Any, Any] = {1: [1, 2.5, None, True, "x", (3, (4,))], "a.b": inner, "e": [], "n": {}}
    checkpoint.save(tmp_path, 1, {}, {"it": State(content)}, {})
    found = State(None)
    assert checkpoint.resume(tmp_path, {}, {"it": found}, {}) == 1
    tensor = found.content["a.b"].pop("")
    assert tensor.dtype == torch.uint8
    assert torch.equal(tensor, inner.pop(""))
    assert found.content == content
    with pytest.raises(TypeError, match=r"state\.it\.f: function cannot be kept in a checkpoint"):
        checkpoint.save(tmp_path, 2, {}, {"it": State({"f": trained})}, {})


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "told", "text"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_set_aside(tmp_path: Path, damage: str) -> None:
    tensors, states = trained(5)
    checkpoint.save(tmp_path, 5, tensors, states, {"seed": "0"})
    advance(tensors, states, 5, 6)
    newest = checkpoint.save(tmp_path, 6, tensors, states, {"seed": "0"})
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    told = newest.read_bytes().replace(b'"step":"6"', b'"step":"9"')
    damaged = {"cut": data[:-9], "flip": data, "empty": b"", "told": told, "text": b"<html>"}[damage]
    assert damaged != newest.read_bytes()
    newest.write_bytes(damaged)
    assert checkpoint.resume(tmp_path, *trained(0), {"seed": "0"}) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000005.safetensors", "step-0000006.torn"]


def test_when_no_checkpoint_is_whole_nothing_is_begun_anew(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, *trained(5), {}).write_bytes(b"torn")
    with pytest.raises(TrainingError, match="none of its 1 checkpoints is whole; remove the folder to start anew"):
        checkpoint.resume(tmp_path, *trained(0), {})


def test_only_the_newest_checkpoints_are_kept_and_other_settings_are_refused(tmp_path: Path) -> None:
    tensors, states = trained(1)
    for step in (1, 2, 10, 11):
        checkpoint.save(tmp_path / "checkpoints", step, tensors, states, {"rank": "4"})
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-0000010.safetensors", "step-0000011.safetensors"]
    with pytest.raises(TrainingError, match=r"other settings \(rank was 4, is 8\); choose another --output"):
        checkpoint.resume(tmp_path / "checkpoints", tensors, states, {"rank": "8"})


def test_pruning_never_takes_the_checkpoint_just_written(tmp_path: Path) -> None:
    tensors, states = trained(1)
    for step in (100, 200, 300):
        checkpoint.save(tmp_path, step, tensors, states, {})
    for step in (200, 300):
        path = tmp_path / f"step-{step:07d}.safetensors"
        path.write_bytes(path.read_bytes()[:-4])
    checkpoint.save(tmp_path, 150, tensors, states, {})
    assert checkpoint.resume(tmp_path, tensors, states, {}) == 150


# --- steps


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_learns_and_goes_on_to_the_bit(tmp_path: Path, optimizer: str, ema: float | None) -> None:
    """Torn off in step 3, with a checkpoint after step 2."""
    rate = {"prodigy": 1.0, "lion": 0.003}.get(optimizer, 0.02)
    options = {"min_8bit_size": 1} if optimizer == "adamw8bit" else {}  # or so small a state would be kept in fp32
    settings = {"optimizer": optimizer, "learning_rate": rate, "ema": ema, "checkpoint_every": 2, "steps": 5,
                "optimizer_options": options}  # fmt: skip
    whole, broken = Toy(tmp_path / "whole", settings), Toy(tmp_path / "broken", settings)
    start = whole.values.clone()
    run = whole.go()
    assert all(whole.values[k : k + 10].ne(start[k : k + 10]).any() for k in range(0, 40, 10))

    def torn(step: int, places: range) -> Terms:
        if step == 3:
            raise ZeroDivisionError
        return broken.loss(step, places)

    with pytest.raises(ZeroDivisionError):
        broken.go(torn)
    again = Toy(tmp_path / "broken", settings)
    after = again.go()
    assert after.first == 2
    assert again.seen[0][0] == 2
    assert torch.equal(again.values, whole.values)
    with run.averaged(), after.averaged():
        assert torch.equal(again.values, whole.values)
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in again.log] == [
        (line["step"], line["loss"], line["grad_norm"]) for line in whole.log
    ]
    if options:
        assert whole.optimizer.state[whole.rows[0].parameter]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("pieces", [2, 3, 9])
def test_a_batch_in_pieces_has_the_same_gradient(tmp_path: Path, pieces: int) -> None:
    whole, cut = Toy(tmp_path / "whole", {"batch_size": 5}), Toy(tmp_path / "cut", {"batch_size": 5, "pieces": pieces})
    whole.go()
    cut.go()
    torch.testing.assert_close(cut.values, whole.values, rtol=1e-5, atol=1e-6)
    assert [line["loss"] for line in cut.log] == pytest.approx([line["loss"] for line in whole.log], rel=1e-5)
    places = [list(places) for step, places in cut.seen if step == 0]
    assert len(places) == min(pieces, 5)
    assert [k for piece in places for k in piece] == list(range(5))
    assert cut.log[0]["t"] == whole.log[0]["t"] == [0, 1, 2, 3, 4]


def test_the_loss_that_is_trained_is_the_mean_over_the_batch(tmp_path: Path) -> None:
    toy = Toy(tmp_path, {"max_grad_norm": 1e9, "steps": 1, "batch_size": 3})
    toy.loss(0, range(3)).total.mean().backward()
    expected = math.sqrt(sum(float(r.parameter.grad.square().sum()) for r in toy.rows if r.parameter.grad is not None))
    toy.optimizer.zero_grad()
    toy.go()
    assert toy.log[0]["grad_norm"] == pytest.approx(expected, rel=1e-5)
    assert toy.log[0]["loss"] == pytest.approx(Toy(tmp_path / "b").loss(0, range(3)).raw.mean().item(), rel=1e-6)


def test_rates_warm_up_and_follow_their_schedule() -> None:
    def rates(schedule: str, *steps: int, **more: Any) -> list[float]:
        made = TrainConfig.of({"folder": "x", "steps": 110, "warmup_steps": 10, "schedule": schedule, **more})
        return [round(loop.rate(made, step), 6) for step in steps]

    assert rates("cosine", 0, 4, 9, 10, 60) == [0.1, 0.5, 1, 1, 0.5]
    assert 0 < rates("cosine", 109)[0] < 0.001
    assert rates("linear", 10, 60, 85, 109) == [1, 0.5, 0.25, 0.01]
    assert rates("constant", 0, 10, 109) == [0.1, 1, 1]
    assert rates("restarts", 10, 35, 60, 85, restarts=2) == [1, 0.5, 1, 0.5]
    assert rates("cosine", 0, warmup_steps=0) == [1]
    assert rates("cosine", 0, 109, warmup_steps=500) == [round(1 / 110, 6), 1]


def test_the_log_has_each_step_and_the_status_where_it_is(tmp_path: Path) -> None:
    toy = Toy(tmp_path, {"steps": 4, "learning_rates": {"unet.b*": 0.002}})
    toy.go()
    assert [line["step"] for line in toy.log] == [0, 1, 2, 3]
    assert toy.log[0]["lr"] == 0.01
    assert len(toy.log[0]["losses"]) == 4
    assert sum(toy.log[0]["losses"]) / 4 == pytest.approx(toy.log[0]["raw"], abs=1e-5)
    status = toy.status
    assert (status["state"], status["step"], status["steps"]) == ("done", 4, 4)


def test_further_terms_are_logged_over_the_whole_batch(tmp_path: Path) -> None:
    toy = Toy(tmp_path, {"steps": 1, "pieces": 2})

    def loss(step: int, places: range) -> Terms:
        made = toy.loss(step, places)
        return Terms(made.total, made.raw, made.times, made.names, {"prior": torch.tensor([float(k) for k in places])})

    toy.go(loss)
    assert toy.log[0]["prior"] == 1.5


# --- what goes wrong


def nan(toy: Toy, at: int, place: int) -> loop.Loss:
    def loss(step: int, places: range) -> Terms:
        made = toy.loss(step, places)
        bad = torch.tensor([float("nan") if (step, k) == (at, place) else 1.0 for k in places])
        return Terms(made.total * bad, made.raw * bad, made.times, made.names)

    return loss


def test_a_loss_that_is_nan_names_picture_and_time_and_the_last_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    settings = {"checkpoint_every": 2, "pieces": 2}
    toy = Toy(tmp_path / "out", settings)
    said = r"not finite in step 3 \(2.png at t=2\); the last checkpoint is kept.*the adapter itself is finite"
    with pytest.raises(TrainingError, match=said):
        toy.go(nan(toy, 3, 2))
    assert toy.status["state"] == "failed"
    assert "2.png at t=2" in toy.status["reason"]
    assert [line["step"] for line in toy.log] == [0, 1, 2]
    again, whole = Toy(tmp_path / "out", settings), Toy(tmp_path / "whole", settings)
    assert again.go().first == 2
    whole.go()
    assert torch.equal(again.values, whole.values)


def test_a_tensor_of_the_adapter_that_is_nan_is_named(tmp_path: Path) -> None:
    toy = Toy(tmp_path)

    def loss(step: int, places: range) -> Terms:
        if step == 2:
            with torch.no_grad():
                toy.rows[2].parameter[0, 0] = math.inf
        return toy.loss(step, places)

    with pytest.raises(TrainingError, match=r"in step 2 \(.*\); .*not finite in the adapter: unet\.b\.to_q \(down\)"):
        toy.go(loss)


def test_a_gradient_that_is_not_finite_names_its_tensors_and_changes_nothing(tmp_path: Path) -> None:
    toy = Toy(tmp_path, {"checkpoint_every": 1})
    toy.rows[1].parameter.register_hook(lambda g: g / (0.0 if len(toy.seen) == 3 else 1.0))
    said = r"not finite in step 2, in 1 of 4 tensors: unet\.a\.to_q \(up\); the last checkpoint is kept"
    with pytest.raises(TrainingError, match=said):
        toy.go()
    assert toy.values.isfinite().all()
    assert Toy(tmp_path).run().first == 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["no graph", "zero mask"])
def test_without_any_gradient_a_run_stops_and_names_its_layers(tmp_path: Path, kind: str, precision: str) -> None:
    toy = Toy(tmp_path, {"steps": 30, "precision": precision})

    def loss(step: int, places: range) -> Terms:
        made = toy.loss(step, places)
        total = made.total.detach() if kind == "no graph" else made.total * 0
        return Terms(total, made.raw, made.times, made.names)

    said = r"no gradient has reached the adapter in 5 steps, up to step 4: .*unet\.a\.to_q, unet\.b\.to_q.*mask empty"
    with pytest.raises(TrainingError, match=said):
        toy.go(loss)


def test_a_run_that_learns_nothing_is_stopped_though_weight_decay_moves_its_tensors(tmp_path: Path) -> None:
    toy = Toy(tmp_path, {"steps": 30, "weight_decay": 0.1})
    for row in toy.rows:
        row.parameter.requires_grad_(row.key == "down")

    def loss(step: int, places: range) -> Terms:  # a gradient for `down`, as if from what is not part of the change
        made = toy.loss(step, places)
        return Terms(made.total + toy.rows[0].parameter.sum(), made.raw, made.times, made.names)

    before = toy.values.clone()
    said = r"nothing was learnt in 20 steps: the change of unet\.a\.to_q, unet\.b\.to_q is still zero; .*\(0.01\)"
    with pytest.raises(TrainingError, match=said):
        toy.go(loss)
    assert not torch.equal(before, toy.values)
    with pytest.raises(TrainingError, match=r"nothing was learnt in 20 steps.*1e-30"):
        Toy(tmp_path / "small", {"steps": 30, "learning_rate": 1e-30}).go()
    Toy(tmp_path / "fair", {"steps": 30, "learning_rate": 1e-6}).go()


def test_a_layer_that_learns_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = Toy(tmp_path, {"steps": 21})
    toy.rows[3].parameter.requires_grad_(False)
    toy.go()
    said = capsys.readouterr()
    assert "after 20 steps the change of 1 of 2 layers is still zero: unet.b.to_q" in said.out + said.err


def test_layers_without_a_tensor_that_starts_at_zero_are_judged_by_all_they_have() -> None:
    rows = [recipe.Tensor("word", "vectors", nn.Parameter(torch.ones(2))), *Toy(Path("x")).rows]
    start = [row.parameter.detach().clone() for row in rows]
    assert learning.still(rows, start) == ["word", "unet.a.to_q", "unet.b.to_q"]
    with torch.no_grad():
        for k in (0, 1, 4):  # the word; down of a; up of b
            rows[k].parameter.add_(1e-3)
    assert learning.still(rows, start) == ["unet.a.to_q"]


def hungry(toy: Toy, most: Callable[[], int], error: Callable[[], Exception]) -> loop.Loss:
    """A loss that has memory for so many samples, and notices late, in the backward."""

    def loss(step: int, places: range) -> Terms:
        made = toy.loss(step, places)
        if len(places) > most():
            raise error()
        return made

    return loss


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),  # pyright: ignore[reportPrivateImportUsage]
        lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
        MemoryError,
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_cuts_the_batch_with_the_same_result(
    tmp_path: Path, error: Callable[[], Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, short = Toy(tmp_path / "whole", {"batch_size": 7}), Toy(tmp_path / "short", {"batch_size": 7})
    whole.go()
    run = short.go(hungry(short, lambda: 2, error))
    assert run.pieces == 4
    torch.testing.assert_close(short.values, whole.values, rtol=1e-5, atol=1e-6)
    assert [line["loss"] for line in short.log] == pytest.approx([line["loss"] for line in whole.log], rel=1e-5)
    assert max(len(places) for step, places in short.seen if step > 0) == 2
    said = capsys.readouterr()
    assert "out of memory in step 0: its batch is computed in 4 pieces from now on" in said.out + said.err


def test_when_a_batch_cannot_be_cut_activations_are_computed_twice_and_then_it_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spared: list[int] = []

    def spare() -> str | None:
        spared.append(1)
        return "activations are computed twice from now on" if len(spared) == 1 else None

    error = lambda: torch.OutOfMemoryError("CUDA out of memory")  # noqa: E731  # pyright: ignore[reportPrivateImportUsage]
    toy, whole = Toy(tmp_path / "a", spare=spare), Toy(tmp_path / "whole")
    toy.go(hungry(toy, lambda: len(spared), error))
    whole.go()
    assert toy.seen[-1][1] == range(3, 4)
    torch.testing.assert_close(toy.values, whole.values, rtol=1e-5, atol=1e-6)
    said = capsys.readouterr()
    assert "out of memory in step 0: activations are computed twice" in said.out + said.err
    poor = Toy(tmp_path / "b", {"checkpoint_every": 1})
    with pytest.raises(
        TrainingError,
        match=r"out of memory in step 2, one picture at a time \(CUDA out of memory\); the last checkpoint",
    ):
        poor.go(hungry(poor, lambda: 4 if poor.seen[-1][0] < 2 else 0, error))
    assert Toy(tmp_path / "b").run().first == 2


def test_other_errors_are_not_taken_for_lack_of_memory(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    with pytest.raises(RuntimeError, match="sizes do not match"):
        toy.go(hungry(toy, lambda: 0, lambda: RuntimeError("sizes do not match")))
    assert toy.status["state"] == "failed"


def test_fp16_skips_steps_whose_gradient_overflows_and_its_scale_is_gone_on_with(tmp_path: Path) -> None:
    """As fp16 does, the gradient is infinite while the scale is above 4000."""
    settings = {"precision": "fp16", "steps": 12, "checkpoint_every": 6}

    def overflowing(toy: Toy, run: Run) -> Toy:
        scale = run.scaler.get_scale
        toy.rows[1].parameter.register_hook(lambda g: g if scale() <= 4000 else g * math.inf)
        return toy

    whole = Toy(tmp_path / "whole", settings)
    with whole.run() as run:
        overflowing(whole, run)
        for step in run.steps():
            run.learn(step, whole.loss)
    assert run.scaler.get_scale() == 2048
    assert [line["grad_norm"] is None for line in whole.log] == [True] * 5 + [False] * 7
    assert "Infinity" not in (tmp_path / "whole" / "log.jsonl").read_text()
    assert whole.optimizer.state[whole.rows[1].parameter]["step"] == 7
    broken = Toy(tmp_path / "broken", settings)
    with broken.run() as run:
        overflowing(broken, run)
        for step in run.steps():
            if step == 7:
                break
            run.learn(step, broken.loss)
    again = Toy(tmp_path / "broken", settings)
    with again.run() as run:
        assert (run.first, run.scaler.get_scale()) == (6, 2048)
        for step in overflowing(again, run) and run.steps():
            run.learn(step, again.loss)
    assert torch.equal(again.values, whole.values)


def test_fp16_that_never_fits_is_an_error_and_not_a_run_that_skips_all(tmp_path: Path) -> None:
    toy = Toy(tmp_path, {"precision": "fp16", "steps": 100})
    toy.rows[1].parameter.register_hook(lambda g: g * math.inf)
    with pytest.raises(TrainingError, match=r"fp16 does not hold .*\(unet\.a\.to_q \(up\)\); use --precision bf16"):
        toy.go()
    assert len(toy.log) < 40


# --- signals, full disks, logs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    toy = Toy(tmp_path / "out", {"checkpoint_every": 100})

    def loss(step: int, places: range) -> Terms:
        if step == 2:
            os.kill(os.getpid(), number)
        return toy.loss(step, places)

    with pytest.raises(Interrupted, match=rf"stopped by {number.name} after step 3; run the same command to go on"):
        toy.go(loss)
    assert signal.getsignal(number) == before
    assert toy.status["state"] == "stopped"
    again, whole = Toy(tmp_path / "out", {"checkpoint_every": 100}), Toy(tmp_path / "whole")
    assert again.go().first == 3
    whole.go()
    assert torch.equal(again.values, whole.values)


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    toy = Toy(tmp_path, {"checkpoint_every": 100})

    def loss(step: int, places: range) -> Terms:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    with pytest.raises(KeyboardInterrupt):
        toy.go(loss)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert toy.status["state"] == "stopped"


def test_a_signal_in_the_last_step_ends_nothing_early(tmp_path: Path) -> None:
    toy = Toy(tmp_path, {"steps": 2})

    def loss(step: int, places: range) -> Terms:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return toy.loss(step, places)

    toy.go(loss)
    assert toy.status["state"] == "done"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_last_checkpoint_and_leaves_no_stray_file(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = Toy(tmp_path / "out", {"checkpoint_every": 1})

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    def loss(step: int, places: range) -> Terms:
        if step == 3:
            monkeypatch.setattr(os, call, full)
        return toy.loss(step, places)

    told = r"cannot write .*(step-0000004.*|log\.jsonl): No space left.*(is untouched|is kept)"
    with pytest.raises(OutputError, match=told):
        toy.go(loss)
    monkeypatch.undo()
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == ["step-0000002.safetensors", "step-0000003.safetensors"]
    again, whole = Toy(tmp_path / "out", {"checkpoint_every": 1}), Toy(tmp_path / "whole")
    assert again.go().first == 3
    whole.go()
    assert torch.equal(again.values, whole.values)


def test_what_a_killed_run_left_unfinished_is_removed(tmp_path: Path) -> None:
    for name in (
        "checkpoints/.step-0000007.safetensors.0a.tmp",
        ".log.jsonl.1b.tmp",
        "cache/ab/.abc.safetensors.2c.tmp",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "mine.tmp").write_bytes(b"kept")
    Toy(tmp_path).run()
    assert [path.name for path in tmp_path.rglob("*.tmp")] == ["mine.tmp"]


def test_a_power_cut_after_a_checkpoint_costs_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, save, synced, lost = os.fsync, checkpoint.save, dict[int, int](), list[int]()

    def syncing(descriptor: int) -> None:
        fsync(descriptor)
        about = os.fstat(descriptor)
        synced[about.st_ino] = about.st_size

    def saving(*rest: Any) -> None:
        about = (tmp_path / "log.jsonl").stat()
        lost.append(about.st_size - synced.get(about.st_ino, 0))
        save(*rest)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(checkpoint, "save", saving)
    toy = Toy(tmp_path, {"checkpoint_every": 2})
    toy.go()
    assert len(toy.log) == 6
    assert lost == [0, 0, 0]


def test_an_output_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match=r"cannot write to .*file: "):
        Toy(tmp_path / "file").run()


def test_lines_past_the_checkpoint_and_torn_ones_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1}\n{"no": 1}\n\xff\n{"step": 2}\n{"step": 3, "lo')
    lines = Lines(path, 2)
    lines.write({"step": 2, "new": True})
    assert read_lines(path) == [{"step": 0}, {"step": 1}, {"step": 2, "new": True}]


# --- averages and evaluation


@pytest.mark.parametrize("optimizer", ["adamw", "schedule-free"])
def test_means_are_shown_and_taken_away_again_to_the_bit(tmp_path: Path, optimizer: str) -> None:
    toy = Toy(tmp_path, {"optimizer": optimizer, "ema": 0.5 if optimizer == "adamw" else None, "steps": 30})
    run, values, means = toy.run(), list[Tensor](), torch.zeros(())
    with run:
        for step in run.steps():
            run.learn(step, toy.loss)
            values.append(toy.values.clone())
    before = toy.values.clone()
    with run.averaged():
        shown = toy.values.clone()
    assert torch.equal(toy.values, before)
    assert not torch.equal(shown, before)
    if optimizer == "adamw":
        means = Toy(tmp_path / "x").values
        for n, value in enumerate(values):
            decay = min(0.5, (1 + n) / (10 + n))
            means = decay * means + (1 - decay) * value
        torch.testing.assert_close(shown, means, rtol=1e-5, atol=1e-6)
    assert Averages(None, [], torch.optim.AdamW([nn.Parameter(torch.ones(1))])).states() == {}


def test_the_bootstrap_interval_covers_what_it_should() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for k in range(100):
        gaps = torch.randn(40, 1, generator=generator) + 0.5
        mean, low, high = bootstrap(torch.zeros(40, 1), gaps, draws=1000, seed=k)
        assert low < mean < high
        hits += low <= 0.5 <= high
    assert 88 <= hits <= 100
