"""Runs every program on small inputs, one after the other in one process, as `imgadapt NAME ...` would.

    python programs.py PICTURES OUTPUT

`demo` is left out: it is `style` with more steps, and `ui`, which the test starts itself.
"""

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import Any

from imgadapt import cli
from imgadapt.demo import PIPELINE

PICTURES, OUT = sys.argv[1:]
QUICK = ("--steps", "2", "--batch-size", "2", "--warmup-steps", "0", "--log-with", "tensorboard")
LORA = ("--rank", "2", "--alpha", "1", "--targets", "attn2.to_*")
ZIP = ("--steps", "1", "--pictures", "1", "--sampler-steps", "1", "--prompts-a", "a fox", "--prompts-b", "a cat")
STYLE, KOHYA = f"{OUT}/style/adapter.safetensors", f"{OUT}/k.safetensors"
COMMANDS = (
    ("check", PICTURES, "--no-step", "--steps", "2"),
    ("train", PICTURES, *QUICK, *LORA, "--output", f"{OUT}/train", "--no-report"),
    ("style", PICTURES, *QUICK, *LORA, "--output", f"{OUT}/style", "--no-report"),
    ("dreambooth", PICTURES, *QUICK, *LORA, "--output", f"{OUT}/dream", "--no-report", "--trigger", "ohwx"),
    ("textual_inversion", PICTURES, "--word", "<x>", *QUICK, "--output", f"{OUT}/word", "--no-report"),
    ("generate", "a fox", "--adapter", f"{STYLE}:0.8", "--steps", "2", "--output", f"{OUT}/fox.png"),
    ("grid", "a fox", "--adapter", STYLE, "--x", "weight=0,1", "--steps", "2", "--output", f"{OUT}/grid.zip"),
    ("show", STYLE),
    ("methods",),
    ("convert", STYLE, KOHYA, "--to", "kohya"),
    ("merge", STYLE, f"{KOHYA}:-0.5", "--output", f"{OUT}/m.safetensors"),
    ("zip", STYLE, KOHYA, *ZIP, "-o", f"{OUT}/z.safetensors"),
    ("bake", str(PIPELINE), STYLE, "--output", f"{OUT}/baked"),
    ("extract", f"{OUT}/baked", str(PIPELINE), f"{OUT}/e.safetensors", "--rank", "2"),
    ("resize", STYLE, f"{OUT}/r.safetensors", "--rank", "1"),
)  # fmt: skip
HUB = ("style", PICTURES, "--base", "someone/some-model", "--output", f"{OUT}/hub")
"""What is not on this machine: an error."""


def main() -> None:
    left_out = cli.PROGRAMS.keys() - {command[0] for command in COMMANDS}
    if left_out != {"demo", "ui"}:
        raise SystemExit(f"not run: {left_out}")
    for command in COMMANDS:
        status, said = run(command)
        if status:
            raise SystemExit(f"{' '.join(command)}: {status}\n{said}")
        print("ran", command[0], flush=True)
    status, said = run(HUB)
    print("ran", HUB[0], status, said, flush=True)


def run(command: Sequence[str]) -> tuple[Any, str]:
    """Its exit status, and what it printed."""
    sys.argv, said = ["imgadapt", *command], io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            cli.main()
    except SystemExit as end:
        return end.code, said.getvalue()
    return 0, said.getvalue()


if __name__ == "__main__":
    main()
