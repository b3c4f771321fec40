"""`imgadapt PROGRAM ...`: runs a program of converters/ or train_scripts/ by its path, from a wheel or a checkout."""

import logging
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from imgadapt import stopping
from imgadapt.shortage import lacking, of_the_system

PROGRAMS = {
    "demo": ("train_scripts/demo.py", "train a style on the embedded base, prove it, and write a report"),
    "train": ("train_scripts/train.py", "look at a folder of pictures, plan a training, and run it"),
    "style": ("train_scripts/style.py", "train a style on pictures with captions"),
    "dreambooth": ("train_scripts/dreambooth.py", "train a character or a thing, and keep the rest of its class"),
    "textual_inversion": ("train_scripts/textual_inversion.py", "train a new word, or a word and an adapter"),
    "check": ("train_scripts/check.py", "what a training would do, what it takes, and what is wrong with its pictures"),
    "zip": ("train_scripts/zip.py", "merge adapters by coefficients that are learnt from what each draws alone"),
    "methods": ("train_scripts/methods.py", "the methods of adapters: their settings, and what they do"),
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


_TRAINING = (
    "The last checkpoint is kept. Lower --resolution, --batch-size or --rank, or give --pieces, --checkpointing, "
    "--precision bf16 or --quantise nf4"
)
_DRAWING = "Lower --width and --height, draw fewer pictures at once, or give --dtype bf16"
_LAYERS = "Nothing is written. Give a lower --rank, or set OMP_NUM_THREADS=1: fewer layers are then worked on at a time"
LESS = {
    **dict.fromkeys(("demo", "train", "style", "dreambooth", "textual_inversion"), _TRAINING),
    "zip": "Nothing is written. Lower --resolution, --batch-size or --pictures, or give --precision bf16",
    **dict.fromkeys(("generate", "grid"), _DRAWING),
    **dict.fromkeys(("merge", "extract", "resize"), _LAYERS),
    "bake": "Nothing is written. Set OMP_NUM_THREADS=1: fewer layers are then worked on at a time",
    "ui": "Give a smaller --base, or --precision bf16",
    "": "Nothing is written; close other programs, or take a machine with more",
}
"""What helps where memory is out, by program."""
_NOISE = {
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),  # it takes its own way then
    "diffusers.quantizers.torchao.torchao_quantizer": ("Unable to import `torchao` Tensor objects",),
    "torch.utils._pytree": ("register_constant() on Enum",),  # which torchao calls
    "torchao": ("Failed to load", "Skipping import of cpp extensions"),  # kernels for other GPUs
}
"""Loggers of libraries -> what they say when they are imported, whoever imports them."""
Run = Callable[[Sequence[str]], None]
"""A program's main, which takes its arguments."""


def adapter(text: str) -> tuple[Path, float]:
    """What programs are given as `FILE` or `FILE:STRENGTH`; a colon inside the path itself is left alone."""
    path, colon, strength = text.rpartition(":")
    if os.path.exists(text):  # False, too, for what no file can be called
        return Path(text), 1.0
    try:
        return (Path(path), float(strength)) if colon else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def main() -> None:
    """Entry point of the command `imgadapt`."""
    stopping.at_once()  # nothing is written before the program itself begins
    _with_streams()
    _hush()
    found: list[Run] = []
    _end(_raised(lambda arguments: found.extend(_named(arguments)), sys.argv[1:]), None)
    for run in found:
        program(run, sys.argv[1:])


def _named(arguments: Sequence[str]) -> Iterator[Run]:
    """The program that the first of the arguments names, or none where all is said already."""
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
        _say(f"imgadapt: no program '{name}'" + (f", did you mean '{near[0]}'?" if near else ""))
        _say(_usage())
        raise SystemExit(2)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # advice on torchvision, which nothing here needs
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # bases are taken out of its cache; bitsandbytes would bring kernels
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    path = _folder() / PROGRAMS[name][0]
    sys.argv = [f"imgadapt {name}", *arguments[1:]]
    yield runpy.run_path(os.fspath(path), run_name="imgadapt_program")["main"]  # which is told its own name afterwards:
    # run_path hides sys.argv[0], which argparse shows in usages


def program(run: Run, arguments: Sequence[str]) -> None:
    """Run a program's main, and end with an exit status that says how it went, and where it went wrong with a line on
    stderr: 0: its output is there, whole; 1: an error; 128 + the signal's number: it was asked to end (130 for Ctrl-C,
    143 for SIGTERM, 129 for SIGHUP); 141: nobody reads what it prints.
    """
    _with_streams()
    asked, error = stopping.Stopping(), None
    with suppress(stopping.Stopped), asked:
        error = _raised(run, arguments)
    stopping.clear()
    _end(error, asked.number)


def _raised(run: Run, arguments: Sequence[str]) -> BaseException | None:
    try:
        run(arguments)
    except BaseException as error:
        return error
    return None


def _end(error: BaseException | None, stopped: int | None) -> None:
    """End the process, unless all went well. error: what a program raised; stopped: the signal that it was ended by."""
    status, lost = cast("Any", 0), _flushed()
    if stopped is not None:  # whatever came of it: an import that was cut short may have raised anything
        _say(f"imgadapt: stopped by {signal.Signals(stopped).name}")
        status = 128 + stopped
    elif isinstance(error, SystemExit):
        status = error.code
    elif error is not None and (lost is None or not isinstance(error, OSError)):
        status = _told(error)
        if status is None:
            raise error  # a fault of ours: all of it is shown
    if lost is not None and not status:
        status = _told(lost)
    if status:
        raise SystemExit(status)


def _told(error: BaseException) -> int | None:
    """Say on stderr what went wrong: the exit status; None: it is none of the errors that are foreseen."""
    from imgadapt.errors import ImgadaptError, Interrupted

    name = Path(sys.argv[0]).stem.rpartition(" ")[2]
    if isinstance(error, Interrupted):
        _say(f"imgadapt: {error}")
        return 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        _say("imgadapt: stopped")
        return 128 + signal.SIGINT
    if isinstance(error, BrokenPipeError):  # `imgadapt show ... | head`
        _leave(1)
        return 141
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != "imgadapt":
        _say(f"imgadapt: {error.name} is not installed: pip install 'imgadapt[{'ui' if name == 'ui' else 'train'}]'")
        return 1
    if isinstance(error, ImgadaptError):
        said = str(error)
    elif (short := lacking(error)) is not None:
        said = f"out of memory ({_first_line(short)}). {LESS.get(name, LESS[''])}"
    elif isinstance(error, OSError):
        said = of_the_system(error)
    elif isinstance(error, RecursionError):
        said = "something in the input is nested too deeply to be read"
    else:
        return None
    _say(f"imgadapt: error: {said}")
    return 1


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _say(text: str) -> None:
    """On stderr; where that is lost, the exit status tells."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _leave(2)


def _flushed() -> OSError | None:
    """Print all that was to be printed; why it could not be."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _leave(1)
        return error
    return None


def _leave(number: int) -> None:
    """Let a standard stream end nowhere, or Python complains when it closes it."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def _with_streams() -> None:
    """Standard streams that are closed lead nowhere, or the first files that are opened would get their numbers, and
    what libraries print. Without stdout nothing is begun.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(number, True)
    if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison] # it is, where it was closed
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison]
        _say("imgadapt: error: standard output is closed; let it end in a file or in /dev/null")
        raise SystemExit(1)


def _hush() -> None:
    """Leave out what libraries say of themselves when they are imported: it is nothing that a user could mend."""
    for name, said in _NOISE.items():
        logging.getLogger(name).addFilter(lambda record, said=said: not any(one in str(record.msg) for one in said))


def _folder() -> Path:
    """Where the programs lie: in the wheel, or beside the package in a checkout."""
    package = Path(__file__).parent
    inside = package / "_programs"
    return inside if inside.is_dir() else package.parent


def _usage() -> str:
    rows = "\n".join(f"  {name:<19}{text}" for name, (_, text) in PROGRAMS.items())
    return f"usage: imgadapt PROGRAM ...\n\n{rows}\n\n`imgadapt PROGRAM --help` says more."
