"""Two processes on one folder: the second trainer is told who is there; what both may write is one of both, whole."""

import errno
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from imgadapt import locking
from imgadapt.errors import OutputError
from imgadapt.playground.pictures import owners
from imgadapt.playground.trainings import launching
from imgadapt.playground.trainings.trainings import Record, Training
from imgadapt.playground.trainings.watching import Watch
from imgadapt.training import loop
from imgadapt.training.cache import Cache
from tests import children

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="children are forked"),
    pytest.mark.flaky(reruns=1, only_rerun=["Hung"]),  # see there; what was run again is said at the end
]

TRUTH = Path(__file__).parent / "ground_truth"
LORA, LOHA = (str(TRUTH / "lycoris" / f"{name}.safetensors") for name in ("lora", "loha"))
SETTINGS = (
    *("--steps", "2", "--checkpoint-every", "1", "--batch-size", "2", "--rank", "2", "--alpha", "1", "--no-report"),
    *(
        "--targets",
        "unet.mid_block*attn1.to_[qv]",
        "--resolution",
        "64",
        "--learning-rate",
        "0.01",
        "--warmup-steps",
        "0",
        "--log-with",
    ),
)


def forked(work: Callable[[], None]) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def holding(folder: Path) -> tuple[int, int]:
    """A child that has the lock until it is killed, or what it reads from is closed."""
    (told, tell), (wait, end) = os.pipe(), os.pipe()

    def hold() -> None:
        os.close(end)
        lock = locking.take(folder)
        os.write(tell, b".")
        os.read(wait, 1)
        lock.close()

    process = forked(hold)
    os.close(wait)
    assert os.read(told, 1) == b"."
    os.close(told)
    os.close(tell)
    return process, end


def test_a_lock_names_its_holder_and_is_free_after_a_kill_or_an_end(tmp_path: Path) -> None:
    for kill in (True, False):
        process, end = holding(tmp_path / "out")
        who = rf"process {process} on {socket.gethostname()}, since \d{{4}}-"
        with pytest.raises(OutputError, match=rf"out is being written to by {who}.*stop it, or choose another output"):
            locking.take(tmp_path / "out")
        assert f"process {process} " in (locking.holder(tmp_path / "out") or "")
        if kill:
            os.kill(process, signal.SIGKILL)
        os.close(end)
        assert ended(process) == (-signal.SIGKILL if kill else 0)
        assert locking.holder(tmp_path / "out") is None
    with locking.take(tmp_path / "out") as lock, locking.take(tmp_path / "out") as again:
        assert lock.held
        assert again.held


def test_a_lock_taken_twice_by_one_process_is_held_until_both_are_closed(tmp_path: Path) -> None:
    """A cell of a notebook that is run again: the new training has the lock before the old one is gone."""
    lock = locking.take(tmp_path)
    again = locking.take(tmp_path)

    def other() -> None:
        with pytest.raises(OutputError, match=f"being written to by process {os.getppid()} on "):
            locking.take(tmp_path)

    for one in (lock, again):
        assert ended(forked(other)) == 0
        one.close()
    assert ended(forked(other)) == 1
    locking.take(tmp_path).close()
    descriptors = len(os.listdir("/dev/fd"))
    with locking.take(tmp_path), locking.take(tmp_path):
        pass
    assert len(os.listdir("/dev/fd")) == descriptors


def test_a_lock_of_a_number_that_comes_again_is_not_taken_for_ours(tmp_path: Path) -> None:
    """Two containers on one disk have processes of one number, and may be called alike."""
    process, end = holding(tmp_path)
    said = (tmp_path / locking.NAME).read_text().replace(str(process), str(os.getpid()), 1)
    (tmp_path / locking.NAME).write_text(said)
    with pytest.raises(OutputError, match=f"process {os.getpid()} on"):
        locking.take(tmp_path)
    (tmp_path / locking.NAME).write_bytes(b"\xff[")
    with pytest.raises(OutputError, match="being written to by another process;"):
        locking.take(tmp_path)
    os.close(end)
    ended(process)


def test_where_there_are_no_locks_nobody_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*arguments: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("imgadapt.locking.fcntl.flock", unable)
    assert not locking.take(tmp_path).held
    assert locking.holder(tmp_path) is None


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_a_second_training_in_a_folder_is_refused_and_touches_nothing(folder: Path, tmp_path: Path, quick: Any) -> None:
    log, out = tmp_path / "first", tmp_path / "out"
    mains = {name: children.main_of(name) for name in ("style", "train")}
    arguments = [str(folder), *SETTINGS, "--output", str(out)]
    (told, tell), (wait, end) = os.pipe(), os.pipe()

    def waiting() -> None:
        os.close(end)
        usual = loop.Run.learn

        def learn(self: loop.Run, step: int, loss: loop.Loss) -> None:
            os.write(tell, b".")
            if step == 1:
                os.read(wait, 1)
            usual(self, step, loss)

        loop.Run.learn = learn

    first = children.started(mains["train"], arguments, log, waiting)
    os.close(tell)
    os.close(wait)
    assert os.read(told, 1) + os.read(told, 1) == b"..", Path(f"{log}.err").read_text()
    before = contents(out)
    for name, main in mains.items():
        done = children.run(main, arguments, tmp_path / "second")
        assert done.status == 1, done
        last = done.said.strip().splitlines()[-1]
        assert last.startswith(f"imgadapt: error: {out} is being written to by process {first} on "), (name, last)
    training = Training(Record("id", "mine", "", 0.0, {}, 2), Watch(out, None), lambda own: None)  # pyright: ignore[reportArgumentType] # no album
    with pytest.raises(OutputError, match=f"mine is being trained by process {first} on .*did not start"):
        training.launch([sys.executable, "-c", "raise SystemExit"], "cpu")
    assert contents(out) == before
    assert not (out / launching.CONSOLE).exists()
    os.close(end)
    done = children.ended(first, log)
    assert done.status == 0, done.said
    assert (out / "adapter.safetensors").is_file()


def test_two_merges_into_one_file_end_well_and_it_is_one_of_the_two(tmp_path: Path) -> None:
    main, out = children.main_of("merge"), tmp_path / "to" / "out.safetensors"
    asked = [[f"{LORA}:{weight}", LOHA, "--rank", "2", "-o"] for weight in ("0.5", "0.8")]
    whole: list[bytes] = []
    for k, arguments in enumerate(asked):
        assert children.run(main, [*arguments, str(tmp_path / f"{k}.safetensors")], tmp_path / "said").status == 0
        whole.append((tmp_path / f"{k}.safetensors").read_bytes())
    assert whole[0] != whole[1]
    for turn in range(4):
        both = [
            children.started(main, [*arguments, str(out)], tmp_path / f"said {k}")
            for k, arguments in enumerate([*asked, *asked])
        ]
        for k, process in enumerate(both):
            done = children.ended(process, tmp_path / f"said {k}")
            assert done.status == 0, (turn, done.said)
        assert out.read_bytes() in whole
        assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_processes_on_one_cache_all_read_what_was_made(tmp_path: Path) -> None:
    def work() -> None:
        cache = Cache(tmp_path)
        for k in range(60):
            got = cache.get(lambda k=k: {"x": torch.full((40,), float(k))}, str(k))
            if not torch.equal(got["x"], torch.full((40,), float(k))):
                os._exit(2)

    assert [ended(process) for process in [forked(work) for _ in range(4)]] == [0] * 4
    assert len(list(tmp_path.rglob("*.safetensors"))) == 60
    assert not list(tmp_path.rglob("*.tmp"))


def test_no_owner_is_lost_while_the_list_of_another_playground_is_shortened(tmp_path: Path) -> None:
    file = tmp_path / ".owners"
    file.write_text("".join(f"old{k} them\n" for k in range(2500)))

    def add(who: int) -> None:
        for k in range(80):
            owners.add(file, f"new{who}-{k}", f"me{who}")

    def shorten() -> None:
        for _ in range(20):
            owners._shorten(file, {"old1"})

    assert [ended(process) for process in [forked(work) for work in (partial(add, 0), shorten, partial(add, 1))]] == [
        0,
        0,
        0,
    ]
    names = {f"new{who}-{k}": f"me{who}" for who in (0, 1) for k in range(80)}
    assert owners.read(file, [*names, "old1"]) == {**names, "old1": "them"}


def test_waiting_for_a_lock_of_a_few_lines_ends_when_they_are_done(tmp_path: Path) -> None:
    done: list[str] = []

    def second() -> None:
        with locking.alone(tmp_path / "lock"):
            done.append("second")

    with locking.alone(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        done.append("first")
    thread.join()
    assert done == ["first", "second"]
