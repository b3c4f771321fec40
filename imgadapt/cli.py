"""`imgadapt PROGRAM ...`: runs a program of converters/ or train_scripts/ by its path, from a wheel or a checkout."""

import os
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

PROGRAMS = {
    "demo": ("train_scripts/demo.py", "train a style on the embedded base, prove it, and write a report"),
    "train": ("train_scripts/train.py", "look at a folder of pictures, plan a training, and run it"),
    "style": ("train_scripts/style.py", "train a style on pictures with captions"),
    "dreambooth": ("train_scripts/dreambooth.py", "train a character or a thing, and keep the rest of its class"),
    "textual_inversion": ("train_scripts/textual_inversion.py", "train a new word, or a word and an adapter"),
    "check": ("train_scripts/check.py", "what a training would do, what it takes, and what is wrong with its pictures"),
    "zip": ("train_scripts/zip.py", "merge adapters by coefficients that are learnt from what each draws alone"),
    "generate": ("train_scripts/generate.py", "draw prompts with a base and adapters"),
    "grid": ("train_scripts/grid.py", "draw a grid over weights, seeds, prompts, ..., and compare it with the base"),
    "ui": ("ui/app.py", "the playground: draw with adapters, compare, merge and train them, in a browser"),
    "show": ("converters/show.py", "what is in an adapter file"),
    "convert": ("converters/convert.py", "write an adapter in another tool's format"),
    "merge": ("converters/merge.py", "merge adapters into one, by a rule or a recipe; verify one that was"),
    "bake": ("converters/bake.py", "write a checkpoint with adapters in it"),
    "resize": ("converters/resize.py", "cut an adapter down to lower ranks"),
    "extract": ("converters/extract.py", "make an adapter of what a fine-tuned checkpoint changed"),
}


def adapter(text: str) -> tuple[Path, float]:
    """What programs are given as `FILE` or `FILE:STRENGTH`; a colon inside the path itself is left alone."""
    path, colon, strength = text.rpartition(":")
    if Path(text).exists():
        return Path(text), 1.0
    try:
        return (Path(path), float(strength)) if colon else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def main() -> None:
    """Entry point of the command `imgadapt`."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    if arguments[0] in ("-V", "--version"):
        from imgadapt import __version__

        print(f"imgadapt {__version__}")
        return
    name = arguments[0]
    if name not in PROGRAMS:
        near = get_close_matches(name, PROGRAMS, n=1)
        print(f"imgadapt: no program '{name}'" + (f", did you mean '{near[0]}'?" if near else ""), file=sys.stderr)
        print(_usage(), file=sys.stderr)
        raise SystemExit(2)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # advice on torchvision, which nothing here needs
    path = _folder() / PROGRAMS[name][0]
    sys.argv = [f"imgadapt {name}", *arguments[1:]]
    try:
        namespace = runpy.run_path(os.fspath(path), run_name="imgadapt_program")  # it is told its own name afterwards:
        program(namespace["main"], arguments[1:])  # run_path hides sys.argv[0], which argparse shows in usages
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.partition(".")[0] == "imgadapt":
            raise
        extra = "ui" if name == "ui" else "train"
        print(f"imgadapt: {missing} is not installed: pip install 'imgadapt[{extra}]'", file=sys.stderr)
        raise SystemExit(1) from error


def program(run: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> None:
    """Run a program's main: an error of imgadapt is one line on stderr and exit status 1, Ctrl-C is 130,
    SIGTERM 143.
    """
    from imgadapt.errors import ImgadaptError, Interrupted

    signal.signal(signal.SIGTERM, _stopped)
    try:
        run(arguments)
    except Interrupted as error:
        print(f"imgadapt: {error}", file=sys.stderr)
        raise SystemExit(130) from None
    except ImgadaptError as error:
        print(f"imgadapt: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("imgadapt: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `imgadapt show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it closes it
        raise SystemExit(141) from None


def _stopped(number: int, frame: object) -> None:
    """SIGTERM takes what is half written away, as Ctrl-C does. (Training saves its state first, by its own handler.)"""
    raise SystemExit(128 + number)


def _folder() -> Path:
    """Where the programs lie: in the wheel, or beside the package in a checkout."""
    package = Path(__file__).parent
    inside = package / "_programs"
    return inside if inside.is_dir() else package.parent


def _usage() -> str:
    rows = "\n".join(f"  {name:<19}{text}" for name, (_, text) in PROGRAMS.items())
    return f"usage: imgadapt PROGRAM ...\n\n{rows}\n\n`imgadapt PROGRAM --help` says more."
