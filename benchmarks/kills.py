"""kill -9 at random moments of trainings, merges and bakes: no checkpoint lost, no byte different at the end.

    python benchmarks/kills.py --kills 200 --writes 60

Trainings of each kind of `KINDS` are killed again and again, each time gone on with, and at last left to end. After
each kill every checkpoint has to be whole and the newest no older than before it; at the end every file has to be, byte
for byte, that of the same training which nobody disturbed. Merges and bakes are killed over an old file, which has to
be the old one or the new one. A child is forked from a process that has loaded all, so that most of its life is work;
it is killed at a moment drawn over how long it may take, start and last files included, or (every other time) right
before or after one of the calls that write files, whatever moment that is.
"""

import argparse
import json
import mmap
import os
import random
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from PIL import Image

from imgadapt import cli, demo
from imgadapt.errors import FormatError
from imgadapt.tensors import read_tensors
from imgadapt.training import checkpoint, evidence, families

STEPS = 8
EVERY = (
    *("--batch-size", "2", "--rank", "2", "--alpha", "1", "--log-with", "--no-report", "--steps", str(STEPS)),
    *("--checkpoint-every", "1", "--targets", "unet.mid_block*attn1.to_[qv]", "--learning-rate", "0.01"),
    *("--held-out-count", "1", "--evaluate-every", "3", "--warmup-steps", "3", "--dropout", "0.1", "--sample-prompts"),
)
KINDS: Mapping[str, tuple[str, Sequence[str]]] = {
    "adamw": ("style", ("--flip", "--crop", "random", "--crops", "2", "--caption-dropout", "0.3")),
    "prodigy": ("style", ("--optimizer", "prodigy", "--learning-rate", "1")),
    "schedule-free": ("style", ("--optimizer", "schedule-free")),
    "text encoder": ("style", ("--targets", "unet.mid_block*attn1.to_q", "text", "!text_encoder*layers.[!0]*")),
    "word": ("textual_inversion", ("--word", "<ohwx>", "--initial", "dog", "--adapter", "--caption", "a photo")),
    "mean": ("style", ("--ema", "0.9", "--rank-dropout", "0.3", "--module-dropout", "0.2")),
    "pieces": ("style", ("--batch-size", "3", "--pieces", "3", "--shuffle-tags", "--tag-dropout", "0.2")),
    "prior": (
        "dreambooth",
        ("--trigger", "ohwx", "--class-prompt", "an animal", "--preservation", "classic", "--class-count", "2"),
    ),
}
"""Program and settings, which win over `EVERY`."""
_KILLS = 7  # of one training, before it is left to end
_CALLS = frozenset(
    {"write", "writelines", "pwrite", "flush", "truncate", "open", "fsync", "replace", "rename", "unlink"}
)
"""Of the interpreter, by which files come about."""
_KEPT = ("cache", "checkpoints", "class", "samples", "tensorboard")  # folders whose files are not the result


@dataclass
class Found:
    """What came of all kills. kills: how many came before the end, by how far the work was."""

    kills: Counter[str] = field(default_factory=Counter[str])
    trainings: int = 0
    torn: list[str] = field(default_factory=list[str])
    lost: list[str] = field(default_factory=list[str])
    different: list[str] = field(default_factory=list[str])
    failed: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class Whole:
    """A training that nobody disturbed. seconds, calls: what it took, of `_CALLS`."""

    out: Path
    seconds: float
    calls: int


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of trainings [200]")
    parser.add_argument("--writes", type=int, default=60, help="kills of merges and of bakes [60]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # threads do not survive a fork
    share_the_base()
    began, chance, found = time.monotonic(), random.Random(args.seed), Found()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        pictures(home / "pictures")
        trainings(home, args.kills, chance, found)
        print(f"trainings of {len(KINDS)} kinds: {found.trainings}; kills: {found.kills.total()}")
        print(f"  {_counted(found.kills)}", flush=True)
        writes = Found()
        for name in ("merge", "bake"):
            outputs(home, name, args.writes // 2, chance, writes)
        print(f"merges and bakes: kills: {writes.kills.total()}")
        print(f"  {_counted(writes.kills)}")
    for what in ("torn", "lost", "different", "failed"):
        rows = getattr(found, what) + getattr(writes, what)
        print(f"{what}: {len(rows)}", *rows[:20], sep="\n  ")
    print(f"{found.trainings} trainings came to their end; {time.monotonic() - began:.0f} s")
    if any(getattr(one, what) for one in (found, writes) for what in ("torn", "lost", "different", "failed")):
        raise SystemExit(1)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def share_the_base() -> None:
    """One embedded base for this process and all that are forked from it; adapters measured at one noise level."""
    pipeline = demo.pipeline()

    def load(base: str, **options: Any) -> families.Family:
        assert base == "demo"
        return families.StableDiffusion(pipeline, torch.device("cpu"), torch.float32)

    families.load = load
    evidence.held_out_losses = partial(evidence.held_out_losses, timesteps=1)


def pictures(folder: Path) -> None:
    folder.mkdir()
    for k, name in enumerate(("ant", "bee", "cat", "dog", "elk")):
        Image.effect_mandelbrot((64 + 16 * k, 64), (-2 + 0.2 * k, -1.5, 1, 1.5), 60).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name}, big, red, on grass\n")


def trainings(home: Path, kills: int, chance: random.Random, found: Found) -> None:
    """Each kind in turn, killed some times, until there were that many kills."""
    whole: dict[str, Whole] = {}
    while found.kills.total() < kills:
        kind = [*KINDS][found.trainings % len(KINDS)]
        if kind not in whole:
            whole[kind] = whole_of(kind, home)
        out = home / f"{kind} {found.trainings}" / "out"
        broken(kind, home, out, whole[kind], min(_KILLS, kills - found.kills.total()), chance, found)
        found.trainings += 1


def whole_of(kind: str, home: Path) -> Whole:
    """Twice: once for the time it takes, once for the calls."""
    out, again = home / kind / "out", home / f"{kind} again" / "out"
    seconds = undisturbed(home, kind, partial(started, kind, home, out))
    with mmap.mmap(-1, 8) as told:  # shared with the child
        undisturbed(home, kind, partial(started, kind, home, again, lambda: doomed(0, told)))
        calls = int.from_bytes(told[:8], "little")
    if files(out) != files(again):
        raise SystemExit(f"{kind}: two undisturbed trainings make other files")
    return Whole(out, seconds, calls)


def undisturbed(home: Path, name: str, start: Callable[[], int]) -> float:
    """Seconds that it takes."""
    began = time.monotonic()
    if ended(start()) != 0:
        raise SystemExit(f"{name} does not work undisturbed:\n{(home / 'said.txt').read_text()}")
    return time.monotonic() - began


def killed(start: Callable[[Callable[[], None]], int], seconds: float, calls: int, chance: random.Random) -> int:
    """Kill a child at a moment of so many seconds, or before or after one of so many calls; how it ended."""
    if chance.randrange(2):
        call = chance.randint(1, max(1, calls))
        return ended(start(lambda: doomed(call)))
    process = start(lambda: None)
    time.sleep(chance.uniform(0, seconds))
    os.kill(process, signal.SIGKILL)
    return ended(process)


def broken(kind: str, home: Path, out: Path, whole: Whole, kills: int, chance: random.Random, found: Found) -> None:
    newest, wanted = 0, files(whole.out)
    for _ in range(kills):
        left = 0.3 + 0.7 * (STEPS - newest) / STEPS  # a start and an end are in all of them
        start = partial(started, kind, home, out)
        end = killed(start, whole.seconds * left, round(whole.calls * left), chance)
        step = _newest_whole(out, found)
        if end == -signal.SIGKILL:
            place = "before the first checkpoint" if step == 0 else "in the last files" if step == STEPS else "between"
            found.kills[place] += 1
        elif end != 0:
            found.failed.append(f"{kind}: it ended with {end} in {out}: {last(home)}")
        if step < newest:
            found.lost.append(f"{kind}: after step {newest} it goes on from {step} in {out}")
        newest = max(newest, step)
        found.torn += [f"{path}" for path in out.rglob("*.torn")]
        found.different += [f"{out / name}" for name, data in files(out).items() if data != wanted.get(name)]
        if end == 0:
            break
    if (end := ended(started(kind, home, out))) != 0:
        found.failed.append(f"{kind}: it does not go on ({end}) in {out}: {last(home)}")
    made = files(out)
    found.different += [f"{out / name}" for name in {*made, *wanted} if made.get(name) != wanted.get(name)]
    found.different += [f"{out / name}" for name in _LINES if lines(out / name) != lines(whole.out / name)]
    found.failed += [f"{path} is left" for path in out.rglob("*.tmp")]


_LINES = ("log.jsonl", "evaluations.jsonl")


def lines(path: Path) -> list[dict[str, Any]]:
    """Without how long it took."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


def files(out: Path) -> dict[str, bytes]:
    """Adapters and snapshots of a run, as far as they are there."""
    paths = [path for path in out.rglob("*.safetensors") if path.relative_to(out).parts[0] not in _KEPT]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def _newest_whole(out: Path, found: Found) -> int:
    steps = [0]
    for path in (out / "checkpoints").glob("step-*.safetensors"):
        try:
            held, told = read_tensors(path)
        except FormatError as error:
            found.torn.append(str(error))
            continue
        content = {key: value for key, value in told.items() if key != "sha256"}
        if told["sha256"] != checkpoint.tensors_digest(held) + checkpoint._digest(content):
            found.torn.append(str(path))
        else:
            steps.append(int(told["step"]))
    return max(steps)


def started(kind: str, home: Path, out: Path, before: Callable[[], None] = lambda: None) -> int:
    """A child that trains."""
    program, more = KINDS[kind]
    arguments = [str(home / "pictures"), *EVERY, *more, "--output", str(out)]
    return forked(program, arguments, home, before)


def forked(program: str, arguments: Sequence[str], home: Path, before: Callable[[], None] = lambda: None) -> int:
    """A child that runs a program; what it says goes to a file. Its exit status is 0, or it failed."""
    if process := os.fork():
        return process
    try:
        sys.stdout = sys.stderr = (home / "said.txt").open("w", buffering=1)
        before()
        runpy.run_path(str(cli._folder() / cli.PROGRAMS[program][0]), run_name="killed")["main"](arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def doomed(call: int, told: mmap.mmap | None = None) -> None:
    """In a child: kill -9 before or after one of `_CALLS`, by its number; told: gets their count."""
    done = 0

    def look(frame: FrameType, event: str, what: Any) -> None:
        nonlocal done
        if event.startswith("c_") and what.__name__ in _CALLS and not isinstance(what.__self__, str):
            done += 1
            if done == call:
                os.kill(os.getpid(), signal.SIGKILL)
            if told is not None:
                told[:8] = done.to_bytes(8, "little")

    sys.setprofile(look)


def ended(process: int) -> int:
    """0, 1, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def last(home: Path) -> str:
    said = (home / "said.txt").read_text().splitlines()
    return said[-1] if said else "(nothing said)"


def outputs(home: Path, name: str, kills: int, chance: random.Random, found: Found) -> None:
    """One program, killed over an old file."""
    adapters = [Path(demo.__file__).parent / "adapters" / f"{one}.safetensors" for one in ("ink", "duotone")]
    new, out, base = home / name / "new.safetensors", home / name / "out.safetensors", home / "base.safetensors"
    if not base.exists():  # a checkpoint in one file: a folder is only written where none is
        unet = Path(demo.__file__).parent / "pipeline" / "unet"
        base.write_bytes(next(unet.glob("*.safetensors")).read_bytes())
    arguments = (
        [str(base), str(adapters[1])] if name == "bake" else ["--rule", "svd", "--rank", "8", *map(str, adapters)]
    )
    arguments += ["--skip-missing"] if name == "bake" else []
    seconds = undisturbed(home, name, partial(forked, name, [*arguments, "--output", str(new)], home))
    with mmap.mmap(-1, 8) as told:
        start = partial(forked, name, [*arguments, "--output", str(out)], home)
        undisturbed(home, name, lambda: start(lambda: doomed(0, told)))
        calls = int.from_bytes(told[:8], "little")
    for _ in range(kills):
        out.write_bytes(b"what was there before")
        end = killed(start, seconds, calls, chance)
        state = {b"what was there before": "old", new.read_bytes(): "new"}.get(out.read_bytes(), "broken")
        if end == -signal.SIGKILL:
            found.kills[f"{name}: the {state} file"] += 1
        if state == "broken" or end not in (0, -signal.SIGKILL) or (end == 0 and state == "old"):
            found.different.append(f"{name}: {out} is {state}, exit {end}")
    if ended(start()) != 0 or out.read_bytes() != new.read_bytes():
        found.different.append(f"{name}: {out} after all kills")


if __name__ == "__main__":
    main(sys.argv[1:])
