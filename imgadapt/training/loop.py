"""Run: what surrounds the steps of a training: resuming, checkpoints, rates, gradients, memory, log, interrupts."""

import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from imgadapt.errors import Interrupted, OutputError, TrainingError, first_few
from imgadapt.shortage import out_of_memory
from imgadapt.stopping import SIGNALS, Stopped, listened, put_off, say
from imgadapt.temporary import sweep
from imgadapt.training import checkpoint, learning, noise, recipe
from imgadapt.training.averaging import Averages
from imgadapt.training.config import TrainConfig
from imgadapt.training.log import Figures, Lines, Status, peak_memory
from imgadapt.training.processes import Processes
from imgadapt.training.rules import Rule

_WRITTEN = (".", "checkpoints", "snapshots", "samples", "class", "check", "cache/*")  # in the output


@dataclass(frozen=True)
class Terms:
    """The losses of some samples of a step, (n,) each.

    total: what is trained; raw: the plain error of the prediction. names: of the pictures. further: to be logged.
    """

    total: Tensor
    raw: Tensor
    times: Tensor
    names: Sequence[str]
    further: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


_NO_RULE = Rule()

Loss = Callable[[int, range], Terms]
"""Of a step and some places of its batch."""


class Run:
    """One training in `config.output`; use it as a context, so that signals stop it between steps.

    identity: what decides the result (see `TrainConfig.identity`); a checkpoint of another one is refused.
    rule: what is done in a step beside the loss and the optimiser.
    spare: called when memory is out and a batch cannot be cut further: saves some and says how, or returns None.

    Raises:
        TrainingError: the folder holds a run with other settings.
        OutputError: the folder cannot be written.
    """

    def __init__(
        self,
        config: TrainConfig,
        rows: Sequence[recipe.Tensor],
        optimizer: torch.optim.Optimizer,
        identity: Mapping[str, str],
        processes: Processes,
        spare: Callable[[], str | None] = lambda: None,
        rule: Rule = _NO_RULE,
    ) -> None:
        self.config, self.rows, self.optimizer, self.identity = config, rows, optimizer, dict(identity)
        self.processes, self.spare, self.rule, self.pieces = processes, spare, rule, config.pieces
        self.parameters = [row.parameter for row in rows]
        self.folder = config.output / "checkpoints"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if processes.main:
                _tidy(config.output)
        except OSError as error:
            raise OutputError(f"cannot write to {config.output}: {error.strerror}") from error
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=config.precision == "fp16")  # pyright: ignore[reportPrivateImportUsage]
        self.averages = Averages(config.ema, self.parameters, optimizer)
        self._states: dict[str, checkpoint.Stateful] = {"optimizer": optimizer, "scaler": self.scaler}
        self._states |= {**self.averages.states(), **rule.states()}
        self._tensors = {f"{k}": p for k, p in enumerate(self.parameters)}
        self._start = [parameter.detach().clone() for parameter in self.parameters]
        self.first = checkpoint.resume(self.folder, self._tensors, self._states, self.identity)
        if self.first >= learning.LOOKED_AT:
            self._start = []
        self.last: dict[str, float] = {}
        self._silent = 0  # steps without any gradient
        self._stop: int | None = None  # the signal that came to this process
        self._stopping: int | None = None  # that which ends the run, as all processes know it
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        main = self.processes.main
        self._log = Lines(self.config.output / "log.jsonl", self.first) if main else None
        self._figures = Figures(self.config, self.processes.accelerator)
        self._status = Status(self.config.output / "status.json", self.config.steps, self.config.batch_size)
        self._status.begin(self.first)
        self._begin = time.monotonic()
        for number in listened():
            self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._figures.close()
        if kind is not None and self.processes.main and not issubclass(kind, OutputError):
            state = "stopped" if issubclass(kind, Interrupted | KeyboardInterrupt) else "failed"
            self._status.write(state, int(self.last.get("step", self.first)), {"reason": str(value)}, now=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop is not None:  # asked twice: at once
            if put_off(number, frame):
                return
            before = self._handlers.get(number)
            if callable(before) and before is not signal.default_int_handler:
                before(number, frame)
            raise Stopped(number)
        self._stop = number
        if self.processes.main:
            say(f"imgadapt: {signal.Signals(number).name}: saving when this step, or the evaluation, is done; "
                "once more: at once")  # fmt: skip

    def steps(self) -> Iterator[int]:
        """The steps still to do, each with its learning rates set; checkpoints between them and at the end.

        Raises:
            Interrupted: a signal came; the step in progress is done and saved.
            TrainingError: nothing was learnt in the first 20 steps.
        """
        done, config = self.first, self.config
        quiet = not self.processes.main
        with tqdm(
            total=config.steps, initial=done, unit="step", desc="training", dynamic_ncols=True, disable=quiet
        ) as bar:
            while done < config.steps:
                for group in self.optimizer.param_groups:
                    self._set(group, done)
                yield done
                done += 1
                bar.update()
                bar.set_postfix(loss=f"{self.last.get('loss', math.nan):.4f}", refresh=False)
                if done == learning.LOOKED_AT:
                    if odd := learning.check(self.rows, self._start, config.learning_rate):
                        tqdm.write(f"imgadapt: {odd}")
                    self._start = []
                if self.processes.count == 1:
                    self._stopping = self._stop
                if done % config.checkpoint_every == 0 or done == config.steps or self._stopping:
                    self._save(done)
                if self._stopping and done < config.steps:
                    name = signal.Signals(self._stopping).name
                    told = f"stopped by {name}{'' if self._stop else ' to another process'} after step {done}"
                    raise Interrupted(f"{told}; run the same command to go on", self._stopping)
        if self.processes.main:
            self._status.write("done", done, {}, now=True)

    def _set(self, group: dict[str, Any], step: int) -> None:
        """The rate of a group; after its step "until", if it has one, its tensors stay, whatever the optimiser does."""
        over = step >= group.get("until", math.inf)
        group["lr"] = 0.0 if over else group["peak"] * rate(self.config, step)
        for parameter in group["params"] if over else ():
            parameter.requires_grad_(False)

    def _save(self, done: int) -> None:
        if self._log:
            self._log.sync()
        if self.processes.main:
            checkpoint.save(self.folder, done, self._tensors, self._states, self.identity)
        self.processes.wait()

    def learn(self, step: int, loss: Loss) -> None:
        """One step: the loss of its batch, in pieces, its gradient, and what the optimiser makes of it.

        Raises:
            TrainingError: a loss or a gradient is not finite, no gradient comes, or memory is out. The last checkpoint
                is kept.
        """
        self.rule.begin(step)
        try:
            terms = self._gradients(step, loss)
        finally:
            self.rule.end()
        for parameter in self.parameters:  # one that took no part has zero, in one process as in many
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.processes.sum(gradients)
        self.scaler.unscale_(self.optimizer)
        self.rule.shape()
        norm = torch.nn.utils.get_total_norm(gradients)
        self._check_gradients(step, float(norm))  # first: clipping by a norm that is not finite would spoil all of them
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, norm)
        self.rule.correct()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if math.isfinite(float(norm)):  # else the step is left out
            self.rule.after(step)
        self.averages.step()
        self.optimizer.zero_grad()
        self._record(step, terms, float(norm))

    def _gradients(self, step: int, loss: Loss) -> list[Terms]:
        """The step's gradients, in smaller pieces when memory is out: the same sum."""
        places = self.processes.share(self.config.batch_size)
        while True:
            try:
                return [self._piece(step, loss, piece) for piece in _cut(places, self.pieces)]
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:  # pyright: ignore[reportPrivateImportUsage]
                if not out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.optimizer.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._make_room(step, len(places), reason)

    def _make_room(self, step: int, count: int, reason: str) -> None:
        if self.pieces < count:
            self.pieces = min(count, 2 * self.pieces)
            said = f"its batch is computed in {self.pieces} pieces from now on, with the same result"
        else:
            said = self.spare()
        if said is None:
            raise TrainingError(
                f"out of memory in step {step}, one picture at a time ({reason}); the last checkpoint is kept. Lower "
                "--resolution or --rank, or give --precision bf16, --quantise nf4 or --optimizer adamw8bit"
            )
        tqdm.write(f"imgadapt: out of memory in step {step}: {said}")

    def _piece(self, step: int, loss: Loss, places: range) -> Terms:
        torch.manual_seed(noise.number(self.config.seed, step, places.start, "dropout"))
        terms = loss(step, places)
        bad = ~(terms.total.detach().isfinite() & terms.raw.isfinite())
        if bad.any():
            rows = [f"{n} at t={float(t):g}" for n, t, b in zip(terms.names, terms.times, bad, strict=True) if b]
            raise TrainingError(
                f"the loss is not finite in step {step} ({first_few(rows)}); the last checkpoint is kept. "
                f"Lower --learning-rate, or use --precision fp32; {self._broken()}"
            )
        scaled = self.scaler.scale(terms.total.sum() / self.config.batch_size)
        if scaled.requires_grad:  # else nothing that is trained took part, which is noticed by its gradient
            scaled.backward()
        detached = {name: value.detach() for name, value in terms.further.items()}
        return Terms(terms.total.detach(), terms.raw.detach(), terms.times, terms.names, detached)

    def _broken(self) -> str:
        rows = [str(row) for row in self.rows if not row.parameter.detach().isfinite().all()]
        return f"not finite in the adapter: {first_few(rows)}" if rows else "the adapter itself is finite"

    def _check_gradients(self, step: int, norm: float) -> None:
        if not math.isfinite(norm):
            rows = [str(r) for r in self.rows if r.parameter.grad is not None and not r.parameter.grad.isfinite().all()]
            if not self.scaler.is_enabled():
                raise TrainingError(
                    f"the gradient is not finite in step {step}, in {len(rows)} of {len(self.rows)} tensors: "
                    f"{first_few(rows)}; the last checkpoint is kept. Lower --learning-rate, or use --precision fp32"
                )
            if self.scaler.get_scale() < 1:  # it begins too high and is halved: that is how it is found
                raise TrainingError(
                    f"fp16 does not hold this base's gradients ({first_few(rows)}); use --precision bf16"
                )
        self._silent = self._silent + 1 if norm == 0 else 0
        if self._silent == 5:
            layers = first_few(list(dict.fromkeys(row.layer for row in self.rows)))
            raise TrainingError(
                f"no gradient has reached the adapter in 5 steps, up to step {step}: do its layers ({layers}) take "
                "part in the loss, and is the mask empty?"
            )

    def _record(self, step: int, terms: Sequence[Terms], norm: float) -> None:
        count, held = self.config.batch_size, [t for t in terms if len(t.total)]
        keys = sorted({key for t in held for key in t.further})
        sums = [
            sum((t.total.float().sum() for t in held), torch.zeros(())),
            sum((t.raw.float().sum() for t in held), torch.zeros(())),
        ]
        for key in keys:
            sums.append(sum((t.further[key].float().sum() for t in held if key in t.further), torch.zeros(())))
        sums += [torch.tensor(float(self._stop == n)) for n in SIGNALS]  # all stop after one step, or wait for ever
        whole = torch.stack([s.detach().to(self.processes.device) for s in sums])
        self.processes.sum([whole])
        loss, raw, *others = (whole[: -len(SIGNALS)] / count).tolist()
        if self.processes.count > 1:
            self._stopping = next((n for n, came in zip(SIGNALS, whole[-len(SIGNALS) :], strict=True) if came), None)
        rates = sorted({group["lr"] * group.get("d", 1.0) for group in self.optimizer.param_groups}, reverse=True)
        figures = {"loss": loss, "raw": raw, "lr": rates[0], "grad_norm": norm, **dict(zip(keys, others, strict=True))}
        self.last = {"step": step + 1, **figures}
        if self._log is not None:
            seconds = round(time.monotonic() - self._begin, 2)
            own = {"t": [round(float(x), 1) for t in held for x in t.times.cpu()],
                   "losses": [round(float(x), 6) for t in held for x in t.raw.float().cpu()]}  # fmt: skip
            said = {name: value if math.isfinite(value) else None for name, value in figures.items()}  # a skipped step
            self._log.write({"step": step, **said, "seconds": seconds, **own})
            self._figures.add(
                step, {**figures, **{f"lr/{k}": x for k, x in enumerate(rates)}, "memory_mb": peak_memory() / 1e6}
            )
            self._status.write("training", step + 1, {k: float(f"{v:.6g}") for k, v in figures.items()})

    @contextmanager
    def averaged(self) -> Generator[None]:
        """Within the block the adapter is what will be written: the running mean, where there is one."""
        with self.averages.shown():
            self.rule.shown()
            yield


def _tidy(output: Path) -> None:
    """Remove what a killed run left of files; only where runs write, for the folder may be anyone's, or a home."""
    for place in _WRITTEN:
        for folder in output.glob(place) if "*" in place else (output / place,):
            sweep(folder)


def rate(config: TrainConfig, step: int) -> float:
    """Share of the peak learning rate in a step: a linear warm-up, then the schedule, to zero at the end."""
    warmup = min(config.warmup_steps, config.steps)
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, config.steps - warmup)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "linear":
        return 1 - share
    if config.schedule == "restarts":
        share = share * config.restarts % 1
    return 0.5 * (1 + math.cos(math.pi * share))


def _cut(places: range, pieces: int) -> list[range]:
    """Places in so many nearly equal pieces; none is empty."""
    count = len(places)
    ends = [places.start + count * k // pieces for k in range(pieces + 1)]
    return [range(a, b) for a, b in pairwise(ends) if b > a]
