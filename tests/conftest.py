"""Fixtures that several files share."""

import gc
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ["MKL_DISABLE_FAST_MM"] = "1"  # before torch: MKL's locks are not given back in a child of fork

import pytest
import torch
from PIL import Image

from imgadapt import adapters, cli, demo, detach

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start
torch.set_num_threads(1)  # tensors are tiny here: threads would only wait for one another

OFFLINE = Path(__file__).with_name("offline")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(OFFLINE), os.environ.get("PYTHONPATH"))))
if getattr(sys.modules.get("sitecustomize"), "__file__", "") != str(OFFLINE / "sitecustomize.py"):  # xdist's have it
    runpy.run_path(str(OFFLINE / "sitecustomize.py"))


def _in_memory(descriptor: int) -> None:
    """What is synced stays in memory: no test here pulls the plug (tests/faults does), and thousands would wait."""
    os.fstat(descriptor)  # it fails of a closed one, as they do


for call in ("fsync", "fdatasync"):
    setattr(os, call, _in_memory)


def pytest_collection_finish() -> None:
    """What is imported and collected stays: the collector of garbage does not go through it, nor copy it in a fork."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def _network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where attempts to reach the network are written down."""
    path = tmp_path_factory.mktemp("network") / "attempts"
    path.touch()
    os.environ["IMGADAPT_NETWORK"] = str(path)
    return path


@pytest.fixture(autouse=True)
def _offline(_network: Path) -> Iterator[None]:
    """No test, and no program that it starts, tries to reach the network: not even where the failure is caught."""
    yield
    if attempts := _network.read_text("utf-8", "replace"):
        _network.write_text("")
        pytest.fail(f"the network was asked:\n{attempts}", pytrace=False)


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """What is preloaded to see libraries that are not Python; None where there is no compiler."""
    if not sys.platform.startswith("linux") or shutil.which("cc") is None:
        return None
    made = tmp_path_factory.mktemp("native") / "native.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", made, OFFLINE / "native.c"], check=True)
    return made


@pytest.fixture
def alone(native: Path | None, tmp_path: Path) -> dict[str, str]:
    """The environment of someone who has never used anything, and told no library to be quiet."""
    quiet = ("HF_", "HUGGINGFACE_", "GRADIO_", "DO_NOT_TRACK", "DISABLE_TELEMETRY", "XDG_", "WANDB_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(quiet)}
    home = tmp_path / "home"
    home.mkdir()
    more = {"HOME": str(home), "IMGADAPT_NETWORK": str(tmp_path / "attempts"), "HF_HUB_OFFLINE": "0"}
    return kept | more | ({"LD_PRELOAD": str(native)} if native else {})


# whoever started the tests may have had them leave signals alone, as `nohup` and `&` do, and programs inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def _loaded() -> Any:
    return demo.pipeline()


@pytest.fixture
def pipe(_loaded: Any) -> Iterator[Any]:
    """The embedded base, bare again after the test."""
    yield _loaded
    if adapters(_loaded):
        detach(_loaded)


@pytest.fixture
def quick(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Trainings in this process share one embedded base in fp32, and are measured at one noise level, not at eight."""
    from imgadapt.training import evidence, families

    def load(base: str, **options: Any) -> families.Family:
        if base != "demo" or options.get("dtype", torch.float32) != torch.float32 or options.get("quantise"):
            return opened(base, **options)
        if adapters(pipe):
            detach(pipe)
        return families.StableDiffusion(pipe, torch.device("cpu"), torch.float32)

    opened = families.load
    monkeypatch.setattr(families, "load", load)
    monkeypatch.setattr(evidence, "held_out_losses", partial(evidence.held_out_losses, timesteps=1))
    yield pipe
    pipe.unet.disable_gradient_checkpointing()
    pipe.unet.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five small pictures of unequal shape with captions."""
    made = tmp_path / "pictures"
    made.mkdir()
    for k, name in enumerate(("ant", "bee", "cat", "dog", "elk")):
        Image.effect_mandelbrot((64 + 8 * k, 64), (-2 + 0.2 * k, -1.5, 1, 1.5), 60).save(made / f"{name}.png")
        (made / f"{name}.txt").write_text(f"a {name}\n")
    return made


@pytest.fixture
def run() -> Callable[[str, Sequence[str]], None]:
    """Call a program's main in this process: errors are raised as they are."""

    def call(name: str, arguments: Sequence[str]) -> None:
        namespace = runpy.run_path(str(cli._folder() / cli.PROGRAMS[name][0]), run_name="tested")
        namespace["main"](arguments)

    return call
