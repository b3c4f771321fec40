"""Files that are there whole or not at all, whatever is at their place and whoever was killed while writing them."""

import errno
import json
import os
import signal
import stat
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from imgadapt import AdapterFile, LoRA, load, save, stopping, together
from imgadapt.atomic import atomically, folder_atomically, make_folder, write_bytes
from imgadapt.errors import FormatError, OutputError
from imgadapt.formats import Part
from imgadapt.temporary import claimed, sweep

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links, modes and locks of files are Unix's")
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(work: Callable[[], object]) -> None:
    """Do it in a child, which kills itself where `dies` is called."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def half(path: Path) -> None:
    with atomically(path) as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def half_folder(path: Path) -> None:
    with folder_atomically(path) as inside:
        write_bytes(inside / "a", b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/second")
    (tmp_path / "far" / "second").symlink_to("file")
    for data in (b"created", b"replaced"):
        write_bytes(tmp_path / "link", data)
        assert os.readlink(tmp_path / "link") == "far/second"
        assert (tmp_path / "far" / "file").read_bytes() == data
    assert names(tmp_path / "far") == ["file", "second"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.mkdir(), "it is a folder; name a file"),
        (os.mkfifo, "it is no plain file, but a pipe or a device"),
        (lambda path: path.symlink_to("/dev/null"), "it is no plain file, but a pipe or a device"),
        (lambda path: path.symlink_to(path), "it is a link that leads to itself"),
        (lambda path: path.symlink_to("nowhere/file"), "nowhere/file, whose folder is not there"),
    ],
    ids=["folder", "pipe", "device", "loop", "dangling"],
)
def test_what_is_no_plain_file_is_refused_and_stays(make: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    make(path)
    before = path.lstat()
    with pytest.raises(OutputError) as caught:
        write_bytes(path, b"new")
    assert str(caught.value).startswith(f"cannot write {path}: ")
    assert said in str(caught.value)
    assert names(tmp_path) == ["x"]
    assert path.lstat().st_ino == before.st_ino
    assert path.lstat().st_mode == before.st_mode


def test_what_a_file_is_called_meanwhile_is_in_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(name: object, *arguments: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", os.fspath(name))  # pyright: ignore[reportArgumentType, reportCallIssue]

    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/file")
    monkeypatch.setattr(os, "open", denied)
    monkeypatch.setattr(os, "mkdir", denied)
    for path, whose in ((tmp_path / "x", ""), (tmp_path / "link", f"{tmp_path / 'far' / 'file'}: ")):
        with pytest.raises(OutputError) as caught:
            write_bytes(path, b"new")
        assert str(caught.value) == f"cannot write {path}: {whose}Permission denied; what was there is untouched"
    with pytest.raises(OutputError) as caught, folder_atomically(tmp_path / "folder"):
        pass
    assert str(caught.value) == f"cannot write {tmp_path / 'folder'}: Permission denied; what was there is untouched"


def test_modes_are_kept_given_or_the_users(tmp_path: Path) -> None:
    path = tmp_path / "x"
    mask = os.umask(0o022)
    try:
        write_bytes(path, b"1")
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        path.chmod(0o660)
        write_bytes(path, b"2")
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with atomically(path, mode=0o600) as file:
            assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600  # from the beginning: others must not read it
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(mask)


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "x"], ids=["longest", "of two bytes", "short"])
def test_names_may_be_as_long_as_the_disk_allows(name: str, tmp_path: Path) -> None:
    for data in (b"old", b"new"):
        write_bytes(tmp_path / name, data)
    assert (tmp_path / name).read_bytes() == b"new"
    assert names(tmp_path) == [name]
    with pytest.raises(OutputError, match="File name too long"):
        write_bytes(tmp_path / ("x" * 256), b"")


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_bytes(path, b"old")
    for _ in range(2):
        killed(lambda: half(path))
        assert path.read_bytes() == b"old"
        assert names(tmp_path) == [".x.0.tmp", "x"]  # the second has swept the first's
    write_bytes(path, b"new")
    assert names(tmp_path) == ["x"]
    assert path.read_bytes() == b"new"
    killed(lambda: half_folder(tmp_path / "y"))
    assert names(tmp_path) == [".y.0.tmp", "x"]
    with folder_atomically(tmp_path / "y") as inside:
        write_bytes(inside / "b", b"new")
    assert names(tmp_path) == ["x", "y"]
    assert names(tmp_path / "y") == ["b"]


def test_two_who_write_a_file_at_once_leave_each_other_alone(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with atomically(path) as first:
        first.write(b"first")
        with atomically(path) as second:
            assert names(tmp_path) == [".x.0.tmp", ".x.1.tmp"]
            second.write(b"second")
        assert path.read_bytes() == b"second"
        sweep(tmp_path)
        assert names(tmp_path) == [".x.0.tmp", "x"]
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["x"]


def test_a_sweep_takes_the_dead_ones_and_no_file_of_others(tmp_path: Path) -> None:
    killed(lambda: half(tmp_path / "one"))
    killed(lambda: half_folder(tmp_path / "two"))
    others = (".vim.tmp", "a.0.tmp", ".config", ".b.x.tmp")
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    with claimed(tmp_path / "live", os.mkdir):
        sweep(tmp_path)
        assert names(tmp_path) == sorted([".live.0.tmp", *others])


def test_where_there_are_no_locks_nothing_is_swept_and_all_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    monkeypatch.setattr("imgadapt.temporary.fcntl", None)
    killed(lambda: half(tmp_path / "x"))
    write_bytes(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert names(tmp_path) == [".x.0.tmp", "x"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_folder_whose_sync_fails_is_told_and_the_file_is_there(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = os.fsync

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        usual(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(
        OutputError, match=rf"x is written, but may .* its folder cannot be synced: {os.strerror(code)}"
    ):
        write_bytes(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"


def test_folders_that_cannot_be_made_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    for path in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(OutputError, match=f"cannot make the folder {path}: .*[Nn]ot a (folder|directory)"):
            make_folder(path)


def adapter(alpha: float, number: float) -> AdapterFile:
    return AdapterFile({LAYER: Part(LoRA(2, alpha), {"down": torch.full((2, 6), number), "up": torch.ones(5, 2)})})


def is_first_or_second(path: Path) -> bool:
    """Whether weights and alpha belong together."""
    (part,) = load(path).parts.values()
    kept = float(part.tensors["down"][0, 0]), part.method.scale
    assert kept in ((1.0, 0.5), (2.0, 4.0))
    return kept == (2.0, 4.0)


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("dies_at", range(6))
def test_pefts_weights_never_meet_another_alpha(
    exchanges: bool, dies_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each renaming. Where folders cannot be exchanged, there may be no adapter, but not a wrong one."""
    if not exchanges:
        monkeypatch.setattr(together, "_exchanged", lambda *_: False)
    path = save(adapter(1.0, 1.0), tmp_path / "x", format="peft")
    (path / "README.md").write_text("mine")
    left, usual = [dies_at], os.replace

    def replace(source: Path, target: Path) -> None:
        if not left[0]:
            os._exit(137)
        left[0] -= 1
        usual(source, target)

    child = os.fork()
    if not child:
        os.replace = replace
        try:
            save(adapter(8.0, 2.0), path, format="peft")
        finally:
            os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert (path / "README.md").read_text() == "mine"
    assert ended in (0, 137)
    if exchanges or ended == 0:
        assert is_first_or_second(path) == (ended == 0)
    else:
        with nullcontext() if (path / "adapter_config.json").exists() else pytest.raises(FormatError):
            is_first_or_second(path)
    save(adapter(8.0, 2.0), path, format="peft")
    assert is_first_or_second(path)
    assert names(path) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert names(tmp_path) == ["x"]
    assert json.loads((path / "adapter_config.json").read_text())["lora_alpha"] == 8


def test_saving_in_a_users_program_leaves_nothing_behind_in_it(tmp_path: Path) -> None:
    """No handler of signals, no open file, nothing to remove when it ends; in any thread, whatever comes of it."""

    def state() -> object:
        return [signal.getsignal(n) for n in signal.valid_signals()], len(os.listdir("/dev/fd")), sys.unraisablehook

    def work() -> None:
        for form in ("diffusers", "peft", "peft"):
            save(adapter(1.0, 1.0), tmp_path / form, format=form)
        with pytest.raises(OutputError):
            save(adapter(1.0, 1.0), tmp_path)
        with pytest.raises(ZeroDivisionError), atomically(tmp_path / "x"):
            raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError), folder_atomically(tmp_path / "y"):
            raise ZeroDivisionError

    work()
    before = state()
    work()
    assert state() == before
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()
    assert state() == before
    assert not stopping._going
    assert not stopping._unbroken
    assert names(tmp_path) == ["diffusers", "peft"]


def test_a_folder_is_written_whole_where_the_folder_one_is_in_is_gone(tmp_path: Path) -> None:
    path = save(adapter(1.0, 1.0), tmp_path / "x", format="peft")

    def work() -> None:
        (tmp_path / "in").mkdir()
        os.chdir(tmp_path / "in")
        os.rmdir(tmp_path / "in")
        save(adapter(8.0, 2.0), path, format="peft")
        os._exit(7)

    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert is_first_or_second(path)
