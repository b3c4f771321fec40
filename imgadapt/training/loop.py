"""Run: what surrounds the steps of a training: resuming, checkpoints, learning rate, bar, log, interrupts."""

import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TextIO

import torch
from torch import Tensor, nn
from tqdm import tqdm

from imgadapt.atomic import write_bytes
from imgadapt.errors import Interrupted, OutputError, TrainingError, first_few
from imgadapt.training import checkpoint
from imgadapt.training.config import TrainConfig


class Run:
    """One training in `config.output`; use it as a context, so that signals stop it between steps.

    identity: what decides the result (see `TrainConfig.identity`); a checkpoint of another one is refused.

    Raises:
        TrainingError: the folder holds a run with other settings.
        OutputError: the folder cannot be written.
    """

    def __init__(
        self,
        config: TrainConfig,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        identity: Mapping[str, str],
    ) -> None:
        self.config, self.parameters, self.optimizer, self.identity = config, parameters, optimizer, dict(identity)
        self.folder = config.output / "checkpoints"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write to {config.output}: {error.strerror}") from error
        self.first = checkpoint.resume(self.folder, parameters, optimizer, self.identity)
        self.log = Log(config.output / "log.jsonl", self.first)
        self._start = [parameter.detach().clone() for parameter in parameters] if self.first == 0 else None
        self._stop: str | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.log.open()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.log.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop is not None:  # asked twice: at once
            raise KeyboardInterrupt
        self._stop = signal.Signals(number).name

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine to zero at the last."""
        warmup = min(self.config.warmup_steps, self.config.steps)
        if step < warmup:
            return self.config.learning_rate * (step + 1) / warmup
        share = (step - warmup) / max(1, self.config.steps - warmup)
        return self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))

    def steps(self) -> Iterator[int]:
        """The steps still to do, each with its learning rate set; checkpoints between them and at the end.

        Raises:
            Interrupted: a signal came; the step in progress is done and saved.
            TrainingError: nothing was learnt in the first 20 steps.
        """
        done = self.first
        with tqdm(total=self.config.steps, initial=done, unit="step", desc="training", dynamic_ncols=True) as bar:
            while done < self.config.steps:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate(done)
                yield done
                done += 1
                bar.update()
                if self.log.last is not None:
                    bar.set_postfix(loss=f"{self.log.last:.4f}", refresh=False)
                if done == 20:
                    self._check_learning()
                if done % self.config.checkpoint_every == 0 or done == self.config.steps or self._stop:
                    checkpoint.save(self.folder, done, self.parameters, self.optimizer, self.identity)
                if self._stop and done < self.config.steps:
                    raise Interrupted(f"stopped by {self._stop} after step {done}; run the same command to go on")

    def record(self, step: int, losses: Tensor, timesteps: Tensor, names: Sequence[str]) -> None:
        """Log a step's losses, (batch,).

        Raises:
            TrainingError: one is NaN or infinite; the last checkpoint is kept.
        """
        values = losses.detach().float().cpu()
        if not torch.isfinite(values).all():
            bad = [f"{n} at t={int(t)}" for n, t, v in zip(names, timesteps, values, strict=True) if not v.isfinite()]
            raise TrainingError(
                f"the loss is not finite in step {step} ({first_few(bad)}); the last checkpoint is kept. "
                "Lower --learning-rate, or use --precision fp32"
            )
        self.log.write(step, values.mean().item(), self.optimizer.param_groups[0]["lr"])

    def _check_learning(self) -> None:
        if self._start is None:
            return
        moved = any(not torch.equal(a, b.detach()) for a, b in zip(self._start, self.parameters, strict=True))
        self._start = None
        if not moved:
            raise TrainingError("no adapter tensor changed in 20 steps; is the learning rate too small to count?")


class Log:
    """`log.jsonl`: a line a step; a resumed run drops the lines past its checkpoint first."""

    def __init__(self, path: Path, first: int) -> None:
        self.path, self.first = path, first
        self.last: float | None = None
        self._start = time.monotonic()
        self._file: TextIO | None = None

    def open(self) -> None:
        """Keep the lines of the steps before `first`, and go on after them.

        Raises:
            OutputError: the file cannot be written.
        """
        try:
            lines = self.path.read_text("utf-8", "replace").splitlines() if self.path.exists() else []
        except OSError as error:
            raise OutputError(f"cannot go on with {self.path}: {error.strerror}") from error
        kept = [line for line in lines if (step := _step(line)) is not None and step < self.first]
        write_bytes(self.path, "".join(f"{line}\n" for line in kept).encode())
        self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, loss: float, rate: float) -> None:
        """Add the line of a step."""
        self.last = loss
        if self._file is not None:
            seconds = round(time.monotonic() - self._start, 2)
            try:
                self._file.write(json.dumps({"step": step, "loss": loss, "lr": rate, "seconds": seconds}) + "\n")
            except OSError as error:
                raise OutputError(f"cannot write {self.path}: {error.strerror}; the last checkpoint is kept") from error

    def close(self) -> None:
        """Close the file; a full disk has been reported by `write`."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def _step(line: str) -> int | None:
    """The step of a log line; None for a line that a crash tore."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
