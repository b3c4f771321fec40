"""Trial: two real steps on the largest bucket, in a process of their own, for what they take and how long they last.

In a process of its own, because the system ends one that is out of memory, and so that its peak is of nothing else.
"""

import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from imgadapt.errors import ImgadaptError, TrainingError
from imgadapt.training import families, fit, framing, memory, optimizers, recipe
from imgadapt.training.averaging import Averages
from imgadapt.training.buckets import View
from imgadapt.training.config import DreamBoothConfig, InversionConfig, TrainConfig
from imgadapt.training.data import Example
from imgadapt.training.processes import Processes

_CONFIGS = {kind.__name__: kind for kind in (TrainConfig, DreamBoothConfig, InversionConfig)}


@dataclass(frozen=True)
class Trial:
    """What was measured. device: its name; peak: bytes, None where the system does not tell.

    Seconds: picture, to make a latent of one of the largest bucket; caption, to encode one; step; look, to predict one
    picture without learning.
    """

    device: str
    peak: int | None
    picture: float
    caption: float
    step: float
    look: float


def run(config: TrainConfig, view: View) -> Trial:
    """Try a config on a picture of the largest bucket, in a process of its own.

    Raises:
        TrainingError: memory is out, the loss is not finite, or the base cannot be loaded; the message says which.
    """
    example = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(view.example).items()}
    asked = {"kind": type(config).__name__, "config": config.model_dump(mode="json"), "example": example,
             "size": view.size}  # fmt: skip
    command = [sys.executable, "-m", "imgadapt.training.trial"]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Trial(**json.loads(done.stdout.splitlines()[-1]))
    said = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode in (-9, 137):
        said = "it was killed, as systems do when memory is out"
    raise TrainingError(f"a real step was tried, and failed: {said}")


def measure(config: TrainConfig, view: View) -> Trial:
    """Try a config in this process.

    Raises:
        TrainingError: memory is out, or the loss is not finite.
        ConfigError: see `families.load`, `recipe.put_on`.
    """
    device = Processes().device
    family = families.load(
        config.base, device=device, dtype=families.DTYPES[config.precision], quantise=config.quantise
    )
    count, text = fit.micro_batch(config), view.example.captions[0]
    try:
        latent, picture = _timed(device, lambda: family.encode_image(framing.frame(view).pixels))
        states, caption = _timed(device, lambda: family.encode_text(text))
        noisy = latent[None].repeat(count, 1, 1, 1)
        fixed = {**family.blank(count), **{k: v[None].repeat(count, *[1] * v.ndim) for k, v in states.items()}}
        with fit.learner(config, family) as trained:
            parameters = [row.parameter for row in trained.rows]
            family.away(text=not trained.live)
            optimizer = optimizers.build(config, recipe.groups(config, list(trained.rows)))
            averages = Averages(config.ema, parameters, optimizer)

            def step() -> float:
                value = math.nan
                for _ in range(math.ceil(config.batch_size / count)):
                    encode = (lambda: family.text([text] * count)) if trained.live else (lambda: fixed)
                    loss = fit.loss(config, family, noisy, encode)
                    value = float(loss.detach())
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                averages.step()
                optimizer.zero_grad()
                return value

            tells = _begin(device)
            step()  # the first loads kernels, and makes the optimiser's state
            value, seconds = _timed(device, step)
            peak = _peak(device) if tells else None
            with torch.no_grad():
                zeros = torch.zeros(count, device=device)
                _, look = _timed(device, lambda: family.predict(noisy, fixed, zeros))
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TrainingError("out of memory") from error
    if not math.isfinite(value):
        raise TrainingError(f"the loss is not finite in {config.precision}; use bf16 or fp32, and is the base whole?")
    return Trial(_name(device), peak, picture, caption, seconds, look / count)


T = TypeVar("T")


def _timed(device: torch.device, work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    made = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return made, time.perf_counter() - start


def _begin(device: torch.device) -> bool:
    """Begin to measure the peak anew; False where that cannot be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # VmHWM is then what it is now
    except OSError:
        return False
    return True


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory.resident("VmHWM")


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def main() -> None:
    """What `run` starts."""
    asked = json.load(sys.stdin)
    row: dict[str, Any] = asked["example"]
    row |= {"path": Path(row["path"]), "mask": Path(row["mask"]) if row["mask"] else None}
    row["captions"] = tuple(row["captions"])
    view = View(Example(**row), (asked["size"][0], asked["size"][1]))
    made = measure(_CONFIGS[asked["kind"]].of(asked["config"]), view)
    print(json.dumps(dataclasses.asdict(made)))


if __name__ == "__main__":
    try:
        main()
    except ImgadaptError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
