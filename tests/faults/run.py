"""Faults of the disk: `python tests/faults/run.py [NAME ...] [--all]` lets every call fail that an operation makes to
the disk, in every way, and prints a table of what came of it. Needs Linux and a C compiler.

NAME: what an operation's name begins with; none: the selection that `tests/test_faults.py` runs.
"""

import argparse
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.faults.driver import Mode, Tally  # noqa: E402

OURS, MEMORY = "IMGADAPT_FAULTS", "/dev/shm"
FIRST = (
    "save kohya",
    "save peft folder",
    "checkpoint",
    "cache",
    "merge",
    "bake, a file",
    "a data set",
    "album, a picture kept",
    "read: load",
    "read: a checkpoint",
)
DEAR = 24  # calls of an operation that takes long which are tried, without --all


def preloaded(arguments: Sequence[str], folder: Path) -> int:
    """The exit status of this program with the failing disk under it."""
    library = folder / "shim.so"
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        raise SystemExit("needs Linux and a C compiler, cc")
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", library, HERE / "shim.c", "-ldl", "-lpthread"], check=True
    )
    in_memory = MEMORY if os.access(MEMORY, os.W_OK) else None  # where syncing takes no time
    with tempfile.TemporaryDirectory(prefix="faults_", dir=in_memory) as tried:
        more = {OURS: tried, "LD_PRELOAD": os.fspath(library), "OMP_NUM_THREADS": "1"}
        more["MKL_DISABLE_FAST_MM"] = "1"  # its locks are not given back in a child of fork
        done = subprocess.run([sys.executable, __file__, *arguments], env={**os.environ, **more}, check=False)
    return done.returncode


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--all", action="store_true", help="every operation, at every call")
    parser.add_argument("--most", type=int, default=0, help="calls of an operation that are tried [all]")
    parser.add_argument("--modes", nargs="+", choices=[mode.name for mode in Mode], help="ways to fail [all]")
    args = parser.parse_args(arguments)
    if OURS not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            return preloaded(arguments, Path(folder))

    import torch

    from tests.faults.driver import Driver, table
    from tests.faults.operations import Inputs, Operation, programs, reading, rooms, saving, trainings

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
    folder = Path(os.environ[OURS])
    (folder / "inputs").mkdir()
    (folder / "tried").mkdir()

    def operations() -> Iterator[Operation]:
        inputs = Inputs(folder / "inputs")
        yield from saving()
        for group in (programs, rooms, reading, trainings):
            yield from group(inputs)

    wanted = tuple(args.names) or ("" if args.all else FIRST)
    modes = [Mode[name] for name in args.modes] if args.modes else [*Mode]
    driver, tallies = Driver(folder / "tried"), list[Tally]()
    gc.collect()
    gc.freeze()  # children share it
    for operation in operations():
        if operation.name.startswith(wanted):
            most = args.most or (DEAR if operation.dear and not args.all else 0)
            tallies.append(driver.tried(operation, modes=modes, most=most))
            print(table(tallies[-1:]).splitlines()[-1], flush=True)
            for line in tallies[-1].wrong[:12]:
                print(f"    {line}", flush=True)
    print(table(tallies))
    wrong = sum(len(one.wrong) for one in tallies)
    print(f"{sum(one.faults for one in tallies)} faults in {len(tallies)} operations, {wrong} wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
