"""What is short (memory, open files, a place to print, a home) is said in a line, and costs nothing that was saved."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from imgadapt import cli, load
from imgadapt.playground.desk import Desk
from imgadapt.shortage import lacking, of_the_system, out_of_memory
from imgadapt.training import evidence, probe
from tests import children

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="children are forked, and limited")

TRUTH = Path(__file__).parent / "ground_truth"
LORA, LOHA = (str(TRUTH / "lycoris" / f"{name}.safetensors") for name in ("lora", "loha"))
BASE = str(TRUTH / "base_unet_sd15_tiny.safetensors")
SETTINGS = (
    *("--steps", "2", "--checkpoint-every", "1", "--batch-size", "2", "--rank", "2", "--alpha", "1", "--no-report"),
    *("--targets", "unet.mid_block*attn1.to_[qv]", "--resolution", "64", "--learning-rate", "0.01"),
    *("--warmup-steps", "0", "--log-with"),
)
CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."
SHORT = [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), RuntimeError(CPU),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8589934592 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("can't start new thread"), OSError(errno.ENOMEM, "Cannot allocate memory"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
]  # fmt: skip


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail


def test_all_ways_to_say_that_memory_is_out_are_known() -> None:
    assert all(out_of_memory(error) for error in SHORT)
    others = [ValueError("out of memory"), RuntimeError("shapes differ"), OSError(errno.ENOSPC, "No space left")]
    assert not any(out_of_memory(error) for error in others)
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**50)
    assert out_of_memory(found.value)


@pytest.mark.parametrize("error", SHORT[:3], ids=lambda error: type(error).__name__)
def test_memory_that_is_out_when_the_files_are_written_is_a_line_and_the_training_is_kept(
    error: BaseException, folder: Path, tmp_path: Path, quick: Any
) -> None:
    main, log, out = children.main_of("style"), tmp_path / "said", tmp_path / "out"
    arguments = [str(folder), *SETTINGS, "--output", str(out)]

    def short() -> None:
        sys.argv = ["imgadapt style"]
        probe.take = raising(error)

    done = children.run(main, arguments, log, short)
    assert done.status == 1, done
    last = done.said.strip().splitlines()[-1]
    assert last.startswith("imgadapt: error: out of memory (")
    assert last.endswith(f"). {cli.LESS['style']}")
    assert "Traceback" not in done.said
    assert (out / "checkpoints" / "step-0000002.safetensors").is_file()
    assert not (out / "adapter.safetensors").exists()
    again = children.run(main, arguments, log)
    assert again.status == 0, again.said
    assert "going on after step 2" in again.printed
    assert load(out / "adapter.safetensors").parts


def wrapped(error: BaseException, *, told: bool = True) -> BaseException:
    """As diffusers raises what fails in an import of an import."""
    for what in ("models", "pipelines"):
        try:
            try:
                raise error
            except BaseException as cause:
                said = f"Failed to import {what} because of the following error (look up to see its traceback):\n"
                if told:
                    raise RuntimeError(said) from cause
                raise RuntimeError(said)  # noqa: B904
        except RuntimeError as outer:
            error = outer
    return error


@pytest.mark.parametrize("told", [True, False])
def test_memory_that_is_out_within_an_import_is_the_one_line(tmp_path: Path, told: bool) -> None:
    for error in SHORT:
        assert lacking(wrapped(error, told=told)) is error
    mended = ValueError("a fault of what was done about it")
    mended.__context__ = MemoryError()
    assert lacking(mended) is None
    done = children.run(raising(wrapped(MemoryError(), told=told)), [], tmp_path / "said")
    assert done.status == 1
    assert done.said == f"imgadapt: error: out of memory (MemoryError). {cli.LESS['']}\n"
    assert lacking(wrapped(ValueError("ours"), told=told)) is None


def test_memory_that_is_out_before_the_first_step_and_in_it_is_a_line(folder: Path, tmp_path: Path, quick: Any) -> None:
    main, out = children.main_of("style"), tmp_path / "out"
    arguments = [str(folder), *SETTINGS, "--output", str(out)]

    def before() -> None:
        evidence.held_out_losses = raising(RuntimeError(CPU))

    def within() -> None:
        torch.Tensor.backward = raising(RuntimeError(CPU))

    for short, wanted in ((before, "out of memory (["), (within, "out of memory in step 0, one picture at a time (")):
        done = children.run(main, arguments, tmp_path / "said", short)
        last = done.said.strip().splitlines()[-1]
        assert (done.status, last.startswith(f"imgadapt: error: {wanted}")) == (1, True), done
        assert "Traceback" not in done.said
        assert "the last checkpoint is kept" in last or "The last checkpoint is kept" in last or short is before


OUT = "out.safetensors"
PROGRAMS = {
    "merge": [f"{LORA}:0.8", LOHA, "--rank", "2", "-o", "OUT"],
    "bake": [BASE, LORA, "-o", "OUT"],
    "resize": [LORA, "OUT", "--rank", "1"],
    "convert": [LORA, "OUT", "--to", "diffusers"],
    "show": [LORA],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_memory_or_open_files_that_are_out_at_any_moment_are_a_line_and_the_old_file_stays(
    name: str, tmp_path: Path
) -> None:
    main, log, counted, out = children.main_of(name), tmp_path / "said", tmp_path / "counted", tmp_path / "to" / OUT
    out.parent.mkdir()
    arguments = [{"OUT": str(out)}.get(word, word) for word in PROGRAMS[name]]
    assert children.run(main, arguments, log, lambda: children.at_steps((), counted=counted)).status == 0
    steps, whole = int(counted.read_text()), out.read_bytes() if out.exists() else b""
    moments: list[Any] = [(children.at_steps, k, MemoryError()) for k in children.some(4, steps, 4)]
    moments += [(children.at_calls, k, OSError(errno.EMFILE, "Too many open files", "x")) for k in (1, 2, 4, 7)]
    told = 0
    for at, moment, error in moments:
        out.write_bytes(b"of before")
        done = children.run(main, arguments, log, lambda at=at, m=moment, e=error: at((m,), raising(e)))
        assert "Traceback" not in done.said, done.said
        assert [path.name for path in out.parent.iterdir()] == [OUT]
        assert done.status in (0, 1), done
        if done.status:
            wanted = "out of memory" if at is children.at_steps else "oo many "
            told += wanted in done.said.strip().splitlines()[-1]
        assert out.read_bytes() in (b"of before", whole if done.status or whole else b"of before")
    assert told >= 4


def test_a_file_that_memory_is_too_small_for_is_a_line(tmp_path: Path) -> None:
    """No more than the process has already, and half of the file."""
    layer, big = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_[qv]", tmp_path / "big.safetensors"
    save_file(
        {f"{layer}.lora_A.weight": torch.zeros(8192, 1280), f"{layer}.lora_B.weight": torch.zeros(1280, 8192)}, big
    )

    def limit() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = pages + big.stat().st_size // 2
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))

    for name in ("show", "convert", "merge"):
        arguments = [str(big), *{"convert": ["--to", "kohya"], "merge": ["-o", str(tmp_path / "out")]}.get(name, [])]
        done = children.run(children.main_of(name), arguments, tmp_path / "said", limit)
        assert done.status == 1, (name, done)
        assert "memory" in done.said.strip().splitlines()[-1]
        assert "Traceback" not in done.said, done.said
        assert not (tmp_path / "out").exists()


def test_what_is_nested_too_deeply_and_errors_of_the_system_are_a_line(tmp_path: Path) -> None:
    rows = {
        "nested too deeply": RecursionError("maximum recursion depth exceeded"),
        "`ulimit -n": OSError(errno.EMFILE, "Too many open files", "x"),
        "x: Input/output error": OSError(errno.EIO, "Input/output error", "x"),
        "take a machine with more": MemoryError(),
    }
    for wanted, error in rows.items():
        done = children.run(raising(error), [], tmp_path / "said")
        assert done.status == 1
        assert wanted in done.said
        assert done.said.startswith("imgadapt: error: ")
        assert done.said.count("\n") == 1
    done = children.run(raising(ZeroDivisionError("ours")), [], tmp_path / "said")
    assert (done.status, "Traceback" in done.said) == (99, True)  # a fault of ours is shown whole
    assert of_the_system(OSError(errno.ENOSPC, "No space left on device")).endswith(": No space left on device")


def test_the_desk_says_what_to_do_without_memory_and_goes_on() -> None:
    desk = Desk(4, 4, log=lambda text: None)
    for error in SHORT[:3]:
        with pytest.raises(Exception, match="out of memory: ask for a smaller picture"):
            desk.submit(raising(error)).result()
    assert desk.submit(lambda ticket: 7).result() == 7
    desk.close()


def shell(text: str, **env: str) -> "subprocess.CompletedProcess[str]":
    command = text.replace("IMGADAPT", f"{sys.executable} -m imgadapt")
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, env={**os.environ, **env})


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_cannot_be_printed_is_no_success(unbuffered: str) -> None:
    for name in ("--version", f"show {LORA}"):
        full = shell(f"IMGADAPT {name} >/dev/full", PYTHONUNBUFFERED=unbuffered)
        assert (full.returncode, full.stderr) == (
            1, "imgadapt: error: cannot write, a file or what is printed: No space left on device\n",
        )  # fmt: skip
    closed = shell("IMGADAPT --version >&-", PYTHONUNBUFFERED=unbuffered)
    assert closed.returncode == 1
    assert closed.stderr == "imgadapt: error: standard output is closed; let it end in a file or in /dev/null\n"
    assert shell("IMGADAPT --version 2>&-", PYTHONUNBUFFERED=unbuffered).stdout.startswith("imgadapt ")
    for end in ("2>&-", "2>/dev/full"):
        lost = shell(f"IMGADAPT none {end}", PYTHONUNBUFFERED=unbuffered)
        assert (lost.returncode, lost.stdout) == (2, "")


def test_a_file_is_not_written_into_where_a_closed_stream_was(tmp_path: Path) -> None:
    """The first file that is opened would have its number, and what libraries say would go into it."""
    out = tmp_path / "out.safetensors"
    done = shell(f"IMGADAPT convert {LORA} {out} --to diffusers 0<&- 2>&-")
    assert done.returncode == 0
    plain = tmp_path / "plain.safetensors"
    assert shell(f"IMGADAPT convert {LORA} {plain} --to diffusers").returncode == 0
    assert out.read_bytes() == plain.read_bytes()


def test_without_a_home_a_place_for_temporary_files_or_a_folder_to_be_in(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    gone = {"HOME": "/nonexistent", "TMPDIR": "/nonexistent", "XDG_CACHE_HOME": "/nonexistent"}
    done = shell(f"cd {tmp_path}; IMGADAPT resize {LORA} out.safetensors --rank 1", **gone)
    assert (done.returncode, done.stderr) == (0, "")
    assert load(out).parts
    removed = f"mkdir {tmp_path}/in; cd {tmp_path}/in; rmdir {tmp_path}/in; IMGADAPT"
    done = shell(f"{removed} resize {LORA} out --rank 1", **gone)
    assert done.returncode in (1, 2)  # 2: so Intel's library ends where it does not find itself
    assert done.stderr.count("\n") == 1
