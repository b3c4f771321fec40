"""Look at a folder of pictures, plan a training, say why, write all settings down, and run it.

    imgadapt train ./photos --base sdxl --kind character --trigger ohwx --class-prompt "a man"
    imgadapt train ./paintings --base demo --plan           # say what would be done, and stop

Every setting may be given as a flag, or in TOML (--config). OUTPUT/config.toml holds the whole plan; `imgadapt style`,
`dreambooth` and `textual_inversion` run such a file. Run again, it goes on where it stopped. `imgadapt check` takes the
same flags and says what is wrong with the pictures, and what memory and time it takes.
"""

import argparse
import os
import runpy
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from imgadapt.atomic import write_bytes
from imgadapt.cli import program
from imgadapt.errors import ConfigError
from imgadapt.training import flags, plan
from imgadapt.training.processes import Processes


def main(argv: Sequence[str]) -> None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--kind", choices=plan.PROGRAMS)
    kind, rest = first.parse_known_args(argv)
    parser = flags.parser(__doc__ or "", *[settings for _, settings in plan.PROGRAMS.values()])
    parser.add_argument("--kind", choices=plan.PROGRAMS, help="guessed when not given")
    parser.add_argument("--plan", action="store_true", help="say what would be done, and stop")
    args = parser.parse_args(rest)
    made = plan.of(flags.given(args, *[settings for _, settings in plan.PROGRAMS.values()]), kind.kind)
    print(f"{made.program} on {made.config.base}, into {made.config.output}:\n{made}", flush=True)
    if args.plan:
        return

    with Processes().hold(made.config.output):
        run(made)


def run(made: plan.Plan) -> None:
    """Write all settings down, and do what they say."""
    path = made.config.output / "config.toml"
    if path.exists() and list(made.config.output.glob("checkpoints/step-*")):
        before, now = flags.read_toml(path), flags.checked(tomllib.loads(flags.write_toml(made.config)), path)
        told = sorted((before.keys() | now.keys()) - made.config.WATCHED)  # of the others, the run knows what counts
        if changed := [key for key in told if before.get(key) != now.get(key)]:
            said = ", ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in changed[:3])
            raise ConfigError(f"{path} belongs to a run that has begun: {said}; choose another --output")
    write_bytes(path, flags.write_toml(made.config, made.why).encode())
    print(f"all settings: {path}\n", flush=True)
    runner = runpy.run_path(os.fspath(Path(__file__).with_name(f"{made.program}.py")), run_name="imgadapt_program")
    runner["main"](["--config", os.fspath(path)])


if __name__ == "__main__":
    program(main, sys.argv[1:])
