"""Fuzzing: `python tests/fuzz/run.py [NAME ...] --seconds 60` tries every target, each in a process of its own, guided
by the coverage of imgadapt's code where atheris is installed, else by chance. Inputs that fail are in found/NAME/ then.
"""

import argparse
import importlib
import io
import json
import math
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, redirect_stderr, suppress
from dataclasses import dataclass, field
from hashlib import sha1
from mmap import mmap
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.fuzz.target import Target  # noqa: E402

atheris: Any = None
"""The fuzzer, where it is installed, once a run wants it: code that is imported then is slower."""

LONGEST = 2**20
"""Bytes of an input."""
_HANGS = 60  # seconds until an input is one that never ends
_MEMORY = 2500 * 2**20  # bytes that an input may take
_HEAD = 24  # bytes of a tally's numbers


def targets() -> dict[str, Target]:
    """By name: those of all modules in this folder."""
    names = sorted(module.name for module in pkgutil.iter_modules([str(HERE)]))
    with _instrumented(), redirect_stderr(io.StringIO()):  # atheris names every module
        modules = [importlib.import_module(f"tests.fuzz.{name}") for name in names if name not in ("run", "target")]
    found = [target for module in modules for target in getattr(module, "TARGETS", ())]
    if len(by_name := {target.name: target for target in found}) < len(found):
        raise ValueError("two targets of one name")
    return by_name


def _instrument() -> None:
    global atheris
    with suppress(ImportError):  # there are wheels for Linux only
        atheris = importlib.import_module("atheris")


def _instrumented() -> Any:
    return nullcontext() if atheris is None else atheris.instrument_imports(include=["imgadapt"])


def regressions(name: str) -> list[Path]:
    """The inputs of a target that failed once."""
    folder = HERE / "regressions" / name
    return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


class Tally:
    """What a process has tried, in memory that outlives it: inputs, those taken, and the one it is at."""

    def __init__(self, path: Path) -> None:
        path.touch()
        os.truncate(path, _HEAD + LONGEST)
        with path.open("r+b") as file:
            self._map = mmap(file.fileno(), _HEAD + LONGEST)

    def _number(self, place: int) -> int:
        return int.from_bytes(self._map[8 * place : 8 * place + 8], "little")

    def _set(self, place: int, number: int) -> None:
        self._map[8 * place : 8 * place + 8] = number.to_bytes(8, "little")

    @property
    def tried(self) -> int:
        return self._number(0)

    @property
    def taken(self) -> int:
        return self._number(1)

    @property
    def current(self) -> bytes:
        return self._map[_HEAD : _HEAD + self._number(2)]

    def begin(self, data: bytes) -> None:
        self._set(0, self.tried + 1)
        self._set(2, len(data[:LONGEST]))
        self._map[_HEAD : _HEAD + len(data[:LONGEST])] = data[:LONGEST]

    def take(self) -> None:
        self._set(1, self.taken + 1)


def keep(folder: Path, data: bytes, why: str) -> None:
    """An input that failed, and beside it why."""
    folder.mkdir(parents=True, exist_ok=True)
    name = sha1(data).hexdigest()
    (folder / name).write_bytes(data)
    (folder / f"{name}.why").write_text(why, "utf-8", "backslashreplace")


def place_of(error: BaseException) -> str:
    """Its type, and the last of our lines in its traceback: failures of one place are one failure."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if str(ROOT) in frame.filename and "site-packages" not in frame.filename]
    frame = (ours or frames)[-1]
    return f"{type(error).__name__} at {os.path.relpath(frame.filename, ROOT)}:{frame.lineno}"


def tried(target: Target, tally: Tally, found: Path) -> Callable[[bytes], None]:
    """A function that tries an input, and keeps the first that fails at each place."""
    failed: set[str] = set()

    def one(data: bytes) -> None:
        tally.begin(data)
        try:
            if target(data):
                tally.take()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if (place := place_of(error)) not in failed:
                failed.add(place)
                keep(found, data, f"{place}: {str(error)[:300]}\n{''.join(traceback.format_exception(error))}")

    return one


def mutations(seeds: Sequence[bytes], words: Sequence[bytes], chance: random.Random) -> Iterator[bytes]:
    """Seeds with some bytes changed, without end."""
    while True:
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((1, 1, 2, 4, 8))):
            at, length = chance.randint(0, len(data)), chance.choice((1, 2, 4, 8, 64))
            match chance.randrange(6):
                case 0 if data:
                    data[at % len(data)] ^= 1 << chance.randrange(8)
                case 1:
                    data[at : at + length] = chance.randbytes(length)
                case 2:
                    del data[at : at + length]
                case 3:
                    data[at:at] = data[at : at + length] * chance.choice((1, 3))
                case 4:
                    other = chance.choice(seeds)
                    begin = chance.randint(0, len(other))
                    data[at:] = other[begin:]
                case _:
                    data[at:at] = chance.choice(words) if words else bytes([chance.randrange(256)])
        yield bytes(data[:LONGEST])


@dataclass
class Options:
    """Of a run: seconds and inputs for each target, the folder that the corpora grow in, whether by chance alone."""

    seconds: float
    runs: int | None
    seed: int
    corpus: Path
    found: Path
    guided: bool


@dataclass
class Outcome:
    """What came of a target."""

    name: str
    tried: int = 0
    taken: int = 0
    seconds: float = 0.0
    coverage: int | None = None
    failures: list[str] = field(default_factory=list[str])


def _bytes(word: str) -> bytes:
    return word.encode("latin-1" if max(word) <= "\xff" else "utf-8")


def fuzz(target: Target, options: Options, tally: Tally) -> None:
    """Try inputs until time is over. Under atheris it ends the process."""
    corpus, words = options.corpus / target.name, [_bytes(word) for word in target.words]
    corpus.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    one = tried(target, tally, options.found / target.name)
    seeds = [*target.seeds(), *(path.read_bytes() for path in regressions(target.name))]
    with _instrumented():
        for seed in seeds:  # what imports late is imported now
            (corpus / sha1(seed).hexdigest()).write_bytes(seed)
            one(seed)
    longest = min(LONGEST, max([4096, *(2 * len(seed) for seed in seeds)]))
    end = max(began + options.seconds, time.monotonic() + 1)
    if not options.guided:
        inputs = mutations([path.read_bytes() for path in corpus.iterdir()], words, random.Random(options.seed))
        while time.monotonic() < end and (options.runs is None or tally.tried < options.runs):
            one(next(inputs))
        return
    listed = corpus.parent / f"{target.name}.words"
    listed.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in words or [b"\0"]))
    flags = [f"-max_len={longest}", f"-timeout={_HANGS}", "-rss_limit_mb=0"]
    flags += [f"-dict={listed}", f"-seed={options.seed}", f"-artifact_prefix={tempfile.gettempdir()}/"]
    flags += [] if options.runs is None else [f"-runs={options.runs}"]
    known = tally.tried + 1 + len([*corpus.iterdir()])  # it begins with nothing, and with what the folder has

    def until_the_end(data: bytes) -> None:
        one(data)
        if time.monotonic() > end and tally.tried > known:  # -max_total_time has whole seconds, and takes one more
            os._exit(0)

    atheris.Setup([sys.argv[0], *flags, str(corpus)], until_the_end, enable_python_coverage=True)
    atheris.Fuzz()


def _child(target: Target, options: Options, tally: Tally, log: Path, scratch: Path) -> int:
    """The id of a process that fuzzes."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
        os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
        file = os.open(log, os.O_WRONLY | os.O_CREAT)
        for output in (1, 2):
            os.dup2(file, output)
        most = _MEMORY + _data()
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        fuzz(target, options, tally)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _data() -> int:
    """Bytes of data that this process has, which a child of fork begins with."""
    status = Path("/proc/self/status")
    found = re.search(r"VmData:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def run(chosen: Sequence[Target], options: Options, jobs: int) -> list[Outcome]:
    """Fuzz each of these, so many at a time; those that were done, if stopped by Ctrl-C."""
    waiting, outcomes = list(chosen), list[Outcome]()
    running: dict[int, tuple[Target, Tally, Path, float]] = {}
    quick = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz_", dir=quick) as temporary:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    target = waiting.pop(0)
                    scratch = Path(temporary, target.name)
                    scratch.mkdir()
                    tally, log = Tally(Path(temporary, f"{target.name}.tally")), Path(temporary, f"{target.name}.log")
                    child = _child(target, options, tally, log, scratch)
                    running[child] = target, tally, log, time.monotonic()
                child, status = _ended(running, options)
                outcomes.append(one := _outcome(*running.pop(child), status, options.found))
                print(f"{one.name}: {one.tried:,} inputs, {len(one.failures)} failed", flush=True)
                shutil.rmtree(Path(temporary, outcomes[-1].name), ignore_errors=True)
        except KeyboardInterrupt:
            for child, (target, tally, log, began) in running.items():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                outcomes.append(_outcome(target, tally, log, began, 0, options.found))
    return outcomes


def _ended(running: dict[int, tuple[Target, Tally, Path, float]], options: Options) -> tuple[int, int]:
    """(process, status) of the next to end; one that hangs is ended."""
    while True:
        for child, (_, _, _, began) in running.items():
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended and time.monotonic() - began > options.seconds + 3 * _HANGS:
                os.kill(child, signal.SIGKILL)
                ended, status = os.waitpid(child, 0)
            if ended:
                return child, status
        time.sleep(0.05)


def _outcome(target: Target, tally: Tally, log: Path, began: float, status: int, found: Path) -> Outcome:
    said = log.read_text("utf-8", "replace") if log.exists() else ""
    covered = re.findall(r"cov: (\d+)", said)
    if status:
        keep(found / target.name, tally.current, f"the process ended with {status}\n{said[-3000:]}")
    started = time.time() - (time.monotonic() - began)
    folder = found / target.name
    reasons = [path for path in folder.glob("*.why") if path.stat().st_mtime >= started - 1] if folder.is_dir() else []
    failures = [f"{path.stem[:8]} {path.read_text('utf-8', 'replace').splitlines()[0]}" for path in sorted(reasons)]
    cover = int(covered[-1]) if covered else None
    return Outcome(target.name, tally.tried, tally.taken, time.monotonic() - began, cover, failures)


def table(outcomes: Sequence[Outcome], guided: bool) -> str:
    rows = [f"{'target':<24}{'tried':>10}{'taken':>7}{'per s':>8}{'covered':>9}{'failed':>8}"]
    for one in sorted(outcomes, key=lambda one: one.name):
        share, speed = f"{one.taken / max(1, one.tried):.0%}", f"{one.tried / max(0.001, one.seconds):,.0f}"
        covered = "-" if one.coverage is None else f"{one.coverage:,}"
        rows.append(f"{one.name:<24}{one.tried:>10,}{share:>7}{speed:>8}{covered:>9}{len(one.failures):>8}")
        rows += [f"    {failure}" for failure in one.failures]
    how = "guided by coverage (atheris)" if guided else "by chance, without atheris"
    return "\n".join([*rows, f"{sum(one.tried for one in outcomes):,} inputs, {how}"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="targets, as --list shows them; none: all")
    parser.add_argument("--seconds", type=float, default=30, help="for each target")
    parser.add_argument("--runs", type=int, help="inputs for each target, at most")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets at a time")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 2**31)
    parser.add_argument(
        "--corpus", type=Path, help="folder of inputs that cover something, which grows from run to run"
    )
    parser.add_argument("--found", type=Path, default=HERE / "found", help="folder for inputs that fail")
    parser.add_argument("--unguided", action="store_true", help="by chance, as without atheris")
    parser.add_argument("--list", action="store_true", help="print the targets' names only")
    asked = parser.parse_args(arguments)
    if not (asked.unguided or asked.list):
        _instrument()
    if not asked.list:
        print("importing the targets, which may take half a minute ...", flush=True)
    known = targets()
    if asked.list:
        print("\n".join(known))
        return 0
    if strange := [name for name in asked.names if name not in known]:
        parser.error(f"no target {', '.join(strange)}; there are: {', '.join(known)}")
    guided = atheris is not None
    with tempfile.TemporaryDirectory(prefix="fuzz_corpus_") as temporary:
        corpus = (asked.corpus or Path(temporary)).absolute()
        options = Options(asked.seconds, asked.runs, asked.seed, corpus, asked.found.absolute(), guided)
        chosen = [known[name] for name in asked.names or known]
        rounds = math.ceil(len(chosen) / max(1, asked.jobs))
        told = (
            f"{asked.seconds:g} s for each, {asked.jobs} at a time: {rounds * asked.seconds / 60:.1f} minutes or more"
        )
        print(f"targets: {len(chosen)}, {told}", flush=True)
        outcomes = run(chosen, options, asked.jobs)
    print(table(outcomes, guided))
    counts = options.found / "counts.json"
    counts.parent.mkdir(parents=True, exist_ok=True)
    total: dict[str, int] = json.loads(counts.read_text()) if counts.exists() else {}
    for one in outcomes:
        total[one.name] = total.get(one.name, 0) + one.tried
    counts.write_text(json.dumps(total, indent=1))
    print(f"in all runs, by {counts}: {sum(total.values()):,} inputs")
    return 1 if any(one.failures for one in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
