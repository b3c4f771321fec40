"""What a run says while it goes on: a line a step, figures for TensorBoard or wandb, and a live status file."""

import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imgadapt.atomic import write_bytes
from imgadapt.errors import MissingExtra, OutputError
from imgadapt.training.config import TrainConfig


class Lines:
    """A file of JSON lines, each with its "step"; a resumed run drops the lines past its checkpoint first."""

    def __init__(self, path: Path, first: int) -> None:
        self.path = path
        try:
            lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
        except OSError as error:
            raise OutputError(f"cannot go on with {path}: {error.strerror}") from error
        kept = [line for line in lines if (step := _step(line)) is not None and step < first]
        write_bytes(path, "".join(f"{line}\n" for line in kept).encode())

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line.

        Raises:
            OutputError: the disk is full.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}; the last checkpoint is kept") from error

    def sync(self) -> None:
        """See that a power cut leaves what is written: before a checkpoint, from which a run goes on.

        Raises:
            OutputError: the disk has failed.
        """
        try:
            with self.path.open("ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}; the last checkpoint is kept") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of such a file; none where there is no file."""
    lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step(line) is not None]


def _step(line: str) -> int | None:
    """The step of a line; None for one that a crash tore."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def check(config: TrainConfig) -> None:
    """Raises MissingExtra where what a run is to be logged with is not installed."""
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    if "tensorboard" in config.log_with and not is_tensorboard_available():
        raise MissingExtra("tensorboard", "train")
    if "wandb" in config.log_with and not is_wandb_available():
        raise MissingExtra("wandb", "wandb")


class Figures:
    """TensorBoard and wandb, by accelerate's trackers; see `check`."""

    def __init__(self, config: TrainConfig, accelerator: Any) -> None:
        from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

        self._trackers: list[GeneralTracker] = []
        if not accelerator.is_main_process:
            return
        if "tensorboard" in config.log_with:
            self._trackers.append(TensorBoardTracker("tensorboard", logging_dir=config.output))
        if "wandb" in config.log_with:
            self._trackers.append(WandBTracker("imgadapt", name=config.output.name))
        settings = {k: v if isinstance(v, int | float | str) else str(v) for k, v in config.model_dump().items()}
        for tracker in self._trackers:
            tracker.start()
            tracker.store_init_configuration(settings)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step."""
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    def close(self) -> None:
        """Flush and close."""
        for tracker in self._trackers:
            tracker.finish()


class Status:
    """`status.json`: where a run is, for those who look in from outside; written at most once a second."""

    def __init__(self, path: Path, steps: int, batch: int) -> None:
        self.path, self.steps, self.batch = path, steps, batch
        self._start, self._first, self._last = time.monotonic(), 0, 0.0

    def begin(self, step: int) -> None:
        """The steps before were another process's."""
        self._start, self._first = time.monotonic(), step

    def write(self, state: str, step: int, figures: Mapping[str, Any], *, now: bool = False) -> None:
        """state: "training", "done", "stopped" or "failed". step: how many are done."""
        if not now and time.monotonic() - self._last < 1:
            return
        self._last = time.monotonic()
        seconds, done = self._last - self._start, step - self._first
        pace = {"seconds_a_step": seconds / done, "eta_seconds": seconds / done * (self.steps - step),
                "pictures_a_second": done * self.batch / seconds} if done and seconds else {}  # fmt: skip
        text = {"state": state, "step": step, "steps": self.steps, **{k: round(v, 3) for k, v in pace.items()}}
        content = {**text, "peak_memory_mb": peak_memory() // 10**6, "time": round(time.time()), **figures}
        write_bytes(self.path, (json.dumps(content, indent=1) + "\n").encode())


def peak_memory() -> int:
    """Bytes that this process had at most: of the GPU where there is one, else of the machine."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
