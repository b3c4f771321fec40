"""Runs that are killed, stopped or split, and end alike. The program runs in children of this process."""

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from imgadapt import load
from imgadapt.tensors import read_tensors
from imgadapt.training import checkpoint, loop

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="children are forked")

Run = Callable[[str, Sequence[str]], None]
# all that is random in a run, and all that has a state: two sizes of pictures, each batch in two pieces
SETTINGS = (
    *("--batch-size", "3", "--pieces", "2", "--rank", "2", "--alpha", "1", "--log-with", "--no-report"),
    *("--targets", "unet.mid_block*attn1.to_[qv]", "text", "!text_encoder*layers.[!0]*"),
    *(
        "--flip",
        "--crop",
        "random",
        "--crops",
        "2",
        "--caption-dropout",
        "0.3",
        "--shuffle-tags",
        "--tag-dropout",
        "0.2",
    ),
    *("--dropout", "0.1", "--rank-dropout", "0.3", "--module-dropout", "0.2", "--ema", "0.9"),
    *("--held-out-count", "1", "--evaluate-every", "2", "--warmup-steps", "3", "--noise-offset", "0.05"),
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pictures")
    for k, name in enumerate(("ant", "bee", "cat", "dog", "elk", "fox")):
        Image.effect_mandelbrot((64 + 16 * k, 64), (-2 + 0.2 * k, -1.5, 1, 1.5), 60).save(made / f"{name}.png")
        (made / f"{name}.txt").write_text(f"a {name}, big, red, on grass\n")
    return made


@pytest.fixture
def child(run: Run, quick: Any, tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Fork a process that runs the program `style`; `before` is called in it first. All are gone after the test."""
    started: list[int] = []

    def fork(arguments: Sequence[str], before: Callable[[], None] = lambda: None) -> int:
        made = os.fork()
        if made:
            started.append(made)
            return made
        status = 1
        try:
            log = (tmp_path / "said.txt").open("a", buffering=1)
            sys.stdout = sys.stderr = log
            before()
            run("style", arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    yield fork
    for process in started:
        try:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        except (ProcessLookupError, ChildProcessError):
            continue


def ended(process: int) -> int:
    """0, 1, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def lines(path: Path) -> list[dict[str, Any]]:
    """Without how long it took."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


def same(broken: Path, whole: Path) -> None:
    """Every file but caches, checkpoints and status is the same to the byte; each step was written down once."""
    names = [{p.relative_to(out).as_posix() for p in out.rglob("*.safetensors")} for out in (broken, whole)]
    kept = [{name for name in some if not name.startswith(("cache", "checkpoints"))} for some in names]
    assert kept[0] == kept[1] >= {"adapter.safetensors", "adapter.kohya.safetensors", "best.safetensors"}
    for name in kept[0]:
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    for name in ("log.jsonl", "evaluations.jsonl"):
        assert lines(broken / name) == lines(whole / name)
    steps = [line["step"] for line in lines(whole / "log.jsonl")]
    assert steps == list(range(len(steps)))
    assert json.loads((broken / "status.json").read_text())["state"] == "done"
    assert not list(broken.rglob("*.tmp"))
    assert not list(broken.rglob("*.torn"))


def newest_whole(out: Path) -> int:
    """Step of the newest checkpoint, which is whole, as all are."""
    steps = [0]
    for path in (out / "checkpoints").glob("step-*"):
        held, told = read_tensors(path)
        content = {key: value for key, value in told.items() if key != "sha256"}
        assert told["sha256"] == checkpoint.tensors_digest(held) + checkpoint._digest(content), path
        steps.append(int(told["step"]))
    return max(steps)


def killed_in(last: int) -> None:
    """In a child: kill -9 when the step's gradient is there and the optimiser has not stepped."""
    usual = loop.Run._check_gradients

    def check(self: loop.Run, step: int, norm: float) -> None:
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)
        usual(self, step, norm)

    loop.Run._check_gradients = check


@pytest.mark.parametrize(
    "optimizer",
    [("adamw", "--lora-plus", "4", "--learning-rate", "0.01"), ("prodigy", "--learning-rate", "1"),
     ("schedule-free", "--learning-rate", "0.01")],
    ids=lambda row: row[0],
)  # fmt: skip
def test_two_and_two_steps_with_a_kill_between_are_four_to_the_byte(
    pictures: Path, tmp_path: Path, child: Callable[..., int], optimizer: Sequence[str]
) -> None:
    whole, broken = tmp_path / "whole" / "out", tmp_path / "broken" / "out"
    arguments = [str(pictures), *SETTINGS, "--optimizer", *optimizer, "--steps", "4", "--checkpoint-every", "2"]
    arguments += ["--cache", str(tmp_path / "cache")]
    assert ended(child([*arguments, "--output", str(whole)])) == 0, (tmp_path / "said.txt").read_text()
    assert ended(child([*arguments, "--output", str(broken)], lambda: killed_in(3))) == -signal.SIGKILL
    assert newest_whole(broken) == 2
    assert [line["step"] for line in lines(broken / "log.jsonl")] == [0, 1, 2]
    assert ended(child([*arguments, "--output", str(broken)])) == 0, (tmp_path / "said.txt").read_text()
    assert "going on after step 2" in (tmp_path / "said.txt").read_text()
    same(broken, whole)
    parts = load(whole / "adapter.safetensors").parts
    assert {name.partition(".")[0] for name in parts} == {"unet", "text_encoder"}
    assert all(part.tensors["up"].abs().max() > 0 for part in parts.values())


def test_killed_at_twenty_random_moments_it_always_goes_on_and_ends_in_the_same_bytes(
    pictures: Path, tmp_path: Path, child: Callable[..., int]
) -> None:
    """Some of them while it starts and caches are filled, most from its first step on, with a checkpoint after each."""
    whole, broken, chance = tmp_path / "whole" / "out", tmp_path / "broken" / "out", random.Random(0)
    arguments = [str(pictures), *SETTINGS, "--learning-rate", "0.01", "--steps", "12", "--checkpoint-every", "1"]
    begin = time.monotonic()
    assert ended(child([*arguments, "--output", str(whole)])) == 0, (tmp_path / "said.txt").read_text()
    pace = lines_seconds(whole / "log.jsonl") / 12
    start = max(0.2, (time.monotonic() - begin) / 3)
    reached: list[int] = []
    for kill in range(20):
        began, tell = os.pipe()
        process = child([*arguments, "--output", str(broken)], lambda tell=tell: telling(tell))
        os.close(tell)
        if kill % 4:
            for _ in range(chance.choice((1, 2))):
                os.read(began, 1)  # its first or second step begins, or it has come to its end
            time.sleep(chance.uniform(0, pace))
        else:
            time.sleep(chance.uniform(0, start))
        os.close(began)
        os.kill(process, signal.SIGKILL)
        ended(process)
        reached.append(newest_whole(broken))
    assert reached == sorted(reached)
    assert len(set(reached)) > 3, reached
    assert ended(child([*arguments, "--output", str(broken)])) == 0, (tmp_path / "said.txt").read_text()
    same(broken, whole)


def lines_seconds(path: Path) -> float:
    return float(json.loads(path.read_text().splitlines()[-1])["seconds"])


def telling(tell: int) -> None:
    """In a child: say when a step begins."""
    usual = loop.Run.learn

    def learn(self: loop.Run, step: int, loss: loop.Loss) -> None:
        os.write(tell, b".")
        usual(self, step, loss)

    loop.Run.learn = learn


MOMENTS = [
    ("step-0000001.safetensors", "half written"), ("step-0000002.safetensors", "before"),
    ("step-0000003.safetensors", "after"), ("log.jsonl", "before"), ("evaluations.jsonl", "before"),
    ("step-0000004.safetensors", "after"), ("adapter.safetensors", "half written"),
    ("adapter.kohya.safetensors", "before"), ("best.safetensors", "half written"),
]  # fmt: skip


def test_killed_in_the_middle_of_each_file_it_goes_on_from_a_whole_one(
    pictures: Path, tmp_path: Path, child: Callable[..., int]
) -> None:
    whole, broken = tmp_path / "whole" / "out", tmp_path / "broken" / "out"
    arguments = [str(pictures), *SETTINGS, "--learning-rate", "0.01", "--steps", "4", "--checkpoint-every", "1"]
    arguments += ["--cache", str(tmp_path / "cache")]
    assert ended(child([*arguments, "--output", str(whole)])) == 0, (tmp_path / "said.txt").read_text()
    for name, moment in MOMENTS:
        before = newest_whole(broken)
        process = child([*arguments, "--output", str(broken)], lambda n=name, m=moment: dying(n, m))
        assert ended(process) == -signal.SIGKILL, (name, moment, (tmp_path / "said.txt").read_text())
        assert newest_whole(broken) >= before
        for path in (broken / "adapter.safetensors", broken / "best.safetensors"):
            assert not path.exists() or path.read_bytes() == (whole / path.name).read_bytes()
    assert ended(child([*arguments, "--output", str(broken)])) == 0, (tmp_path / "said.txt").read_text()
    same(broken, whole)


def dying(name: str, moment: str) -> None:
    """In a child: kill -9 while a file of this name is written, or before or after it is put in its place."""
    replace = os.replace

    def replacing(source: Path, target: Path) -> None:
        mine = Path(target).name == name
        if mine and moment == "half written":
            os.truncate(source, os.path.getsize(source) // 2)
        if mine and moment != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replacing


def one_of_two(index: int, port: int) -> None:
    """In a child: what `accelerate launch --cpu --num_processes 2` sets."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_two_processes_train_the_adapter_of_one_and_one_goes_on_where_two_were_stopped(
    pictures: Path, tmp_path: Path, child: Callable[..., int]
) -> None:
    """At the same batch, cut unevenly, to 1e-4 of the largest number of a tensor; a signal to one of two stops both."""
    whole, split = tmp_path / "whole" / "out", tmp_path / "split" / "out"
    arguments = [str(pictures), *SETTINGS, "--learning-rate", "0.01", "--steps", "4", "--checkpoint-every", "4"]
    arguments += ["--cache", str(tmp_path / "cache"), "--dropout", "0", "--rank-dropout", "0", "--module-dropout", "0"]
    arguments += ["--pieces", "1"]
    assert ended(child([*arguments, "--output", str(whole)])) == 0, (tmp_path / "said.txt").read_text()
    port = free_port()
    both = [
        child([*arguments, "--output", str(split)], lambda k=k: (one_of_two(k, port), signalled(k, 1))) for k in (0, 1)
    ]
    assert [ended(process) for process in both] == [1, 1]
    said = (tmp_path / "said.txt").read_text()
    assert "stopped by SIGTERM after step 2" in said
    assert "stopped by SIGTERM to another process after step 2" in said
    assert newest_whole(split) == 2
    assert ended(child([*arguments, "--output", str(split)])) == 0, (tmp_path / "said.txt").read_text()
    assert [line["step"] for line in lines(split / "log.jsonl")] == [0, 1, 2, 3]
    ours, theirs = (load(out / "adapter.safetensors").parts for out in (split, whole))
    for name, part in theirs.items():
        for key, tensor in part.tensors.items():
            assert (ours[name].tensors[key] - tensor).abs().max() <= 1e-4 * tensor.abs().max(), (name, key)
    for one, other in zip(lines(split / "log.jsonl"), lines(whole / "log.jsonl"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_two_processes_that_share_the_base_train_the_adapter_of_one(
    pictures: Path, tmp_path: Path, child: Callable[..., int]
) -> None:
    """FSDP2: each holds half of the frozen denoiser; evaluations and the proof of the files are made by both.

    To 1e-3 of a tensor's largest number: the first steps of AdamW are as large for tiny gradients, which are rounded
    otherwise in a sum of two halves.
    """
    whole, split = tmp_path / "whole" / "out", tmp_path / "split" / "out"
    arguments = [str(pictures), *SETTINGS, "--learning-rate", "0.01", "--steps", "2", "--checkpoint-every", "2"]
    arguments += ["--cache", str(tmp_path / "cache"), "--dropout", "0", "--rank-dropout", "0", "--module-dropout", "0"]
    arguments += ["--pieces", "1"]
    assert ended(child([*arguments, "--output", str(whole)])) == 0, (tmp_path / "said.txt").read_text()
    port = free_port()
    both = [child([*arguments, "--shard", "--output", str(split)], lambda k=k: one_of_two(k, port)) for k in (0, 1)]
    assert [ended(process) for process in both] == [0, 0], (tmp_path / "said.txt").read_text()
    ours, theirs = (load(out / "adapter.safetensors").parts for out in (split, whole))
    for name, part in theirs.items():
        for key, tensor in part.tensors.items():
            assert (ours[name].tensors[key] - tensor).abs().max() <= 1e-3 * tensor.abs().max(), (name, key)


def signalled(index: int, step: int) -> None:
    """In the second of two children: SIGTERM in a step."""
    usual = loop.Run._check_gradients

    def check(self: loop.Run, step: int, norm: float) -> None:
        if index == 1 and step == last:
            os.kill(os.getpid(), signal.SIGTERM)
        usual(self, step, norm)

    last, loop.Run._check_gradients = step, check


def test_a_run_of_other_settings_data_or_base_is_not_gone_on_with(
    pictures: Path, tmp_path: Path, run: Run, quick: Any
) -> None:
    mine = tmp_path / "pictures"
    mine.mkdir()
    for path in pictures.iterdir():
        (mine / path.name).write_bytes(path.read_bytes())
    arguments = [str(mine), "--output", str(tmp_path / "out"), "--batch-size", "2", "--log-with", "--no-report"]
    arguments += ["--targets", "unet.mid_block*attn1.to_v", "--rank", "2", "--steps", "2", "--checkpoint-every", "1"]
    arguments += ["--learning-rate", "0.01"]
    run("style", arguments)
    adapter = (tmp_path / "out" / "adapter.safetensors").read_bytes()
    for more, said in (
        (["--seed", "5"], 'seed was 0, is 5'), (["--rank", "3"], "rank was 2, is 3"),
        (["--steps", "3"], "steps was 2, is 3"),
        (["--targets", "unet.mid_block*attn1.to_k"], "targets was"), (["--resolution", "32"], "order was"),
        (["--caption", "x", "--trigger", "ohwx"], "data was"),
    ):  # fmt: skip
        with pytest.raises(loop.TrainingError, match=f"holds a run with other settings .*{said}"):
            run("style", [*arguments, *more])
    (mine / "ant.txt").write_text("another ant")
    with pytest.raises(loop.TrainingError, match="data was"):
        run("style", arguments)
    (mine / "ant.txt").write_text("a ant, big, red, on grass\n")
    (mine / "ant.png").rename(mine / "aunt.png")
    (mine / "ant.txt").rename(mine / "aunt.txt")
    with torch.no_grad():
        quick.unet.conv_in.bias[0] += 1
    try:
        with pytest.raises(loop.TrainingError, match="unet was"):
            run("style", arguments)
    finally:
        with torch.no_grad():
            quick.unet.conv_in.bias[0] -= 1
    assert (tmp_path / "out" / "adapter.safetensors").read_bytes() == adapter
