"""Merge adapters by learnt coefficients, so that each goes on doing what it does alone (ZipLoRA).

    imgadapt zip style.safetensors fox.safetensors --base demo --prompts-a "a cat" "a house" --prompts-b "a fox" \\
        --output both.safetensors

Prompts are of the kind that each adapter was trained on. Each draws a few pictures of its own, and a number for each
input channel of each layer is learnt, with which all together predict of those what each alone does. The result is an
ordinary LoRA of the sum of the ranks. Printed are the errors against each adapter alone, on pictures and noise that
nothing was learnt from: of none of them (so what each does), of the plain sum, of the sum times
the one factor that does best there, and of the result.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase

import torch
from tqdm import tqdm

from imgadapt import load, save
from imgadapt.cli import program
from imgadapt.combining.asking import entry_of
from imgadapt.combining.files import digest_of, told_apart
from imgadapt.errors import ConfigError
from imgadapt.formats import FORMATS
from imgadapt.training import families
from imgadapt.training.zipping import Source, ZipConfig, Zipped, zipped

MOST = 6  # adapters that have a letter
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def sources(args: argparse.Namespace) -> list[Source]:
    """The adapters with their prompts.

    Raises:
        ConfigError: one has no prompts, or there are prompts of none; or too few or too many.
    """
    if not 2 <= len(args.adapters) <= MOST:
        raise ConfigError(f"{len(args.adapters)} adapters; zip merges 2 to {MOST}")
    prompts = {letter: getattr(args, f"prompts_{letter}") for letter in ascii_lowercase[:MOST]}
    own = dict(zip(prompts, args.adapters, strict=False))
    if missing := [letter for letter in own if not prompts[letter]]:
        raise ConfigError(
            f"{own[missing[0]]} has no prompts: give some of what it was trained on, --prompts-{missing[0]}"
        )
    if extra := [letter for letter, given in prompts.items() if given and letter not in own]:
        raise ConfigError(f"--prompts-{extra[0]} is given, and there are {len(own)} adapters")
    made: list[Source] = []
    entries = [entry_of(text) for text in own.values()]
    names = told_apart([entry.path for entry in entries])
    for letter, entry, name in zip(own, entries, names, strict=True):
        path = Path(entry.path)
        made.append(Source(name, load(path), prompts[letter], entry.weight, digest_of(path)))
    return made


def report(adapters: Sequence[Source], made: Zipped) -> list[str]:
    """A line for each adapter, and one for all."""
    names = ("none", "sum", f"sum x {made.scale:g}", "learnt")
    every = (made.without, made.before, made.scaled, made.after)
    lines = [f"{'error to each alone':<28}{''.join(f'{n:>11}' for n in names)}   coefficients: mean, deviation, range"]
    for source, *errors, m in zip(adapters, *every, made.statistics()["coefficients"], strict=False):
        spread = f"{m['mean']:.2f}  {m['deviation']:.2f}  {m['least']:.2f} to {m['most']:.2f}"
        lines.append(f"{source.name[:27]:<28}{_errors(errors)}   {spread}")
    without, total, scaled, learnt = (math.fsum(errors) for errors in every)
    share = f"{1 - learnt / total:.0%} less than the sum" if total else "nothing to gain: they do not touch each other"
    errors = _errors([without, total, scaled, learnt])
    lines.append(f"{'all':<28}{errors}   {share}; columns overlap {made.overlap:.2f} (1: the sum's)")
    if learnt >= scaled and total:
        lines.append("learning found nothing better than one factor for all: give more --steps, or --learning-rate")
    return lines


def _errors(errors: Sequence[float]) -> str:
    return "".join(f"{error:>11.3e}" for error in errors)


def main(argv: Sequence[str]) -> None:
    usual = ZipConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", metavar="FILE[:STRENGTH]", help=f"two or more, {MOST} at most")
    parser.add_argument("--base", default="demo", help="'demo', a diffusers folder, or a checkpoint file [demo]")
    for k, letter in enumerate(ascii_lowercase[:MOST]):
        about = f"of adapter {k + 1}" if k < 2 else argparse.SUPPRESS
        parser.add_argument(f"--prompts-{letter}", nargs="+", default=[], metavar="PROMPT", help=about)
    parser.add_argument("--output", "-o", type=Path, required=True, help="the file to write")
    parser.add_argument("--steps", type=int, default=usual.steps, help=f"learning steps [{usual.steps}]")
    parser.add_argument("--learning-rate", type=float, default=usual.rate, help=f"at the start [{usual.rate}]")
    parser.add_argument("--overlap", type=float, default=usual.overlap, help=f"what it counts [{usual.overlap}]")
    parser.add_argument("--batch-size", type=int, default=usual.batch, help=f"samples of each [{usual.batch}]")
    parser.add_argument("--pictures", type=int, default=usual.pictures, help=f"that each draws [{usual.pictures}]")
    parser.add_argument("--sampler-steps", type=int, default=usual.sampler_steps, help=f"[{usual.sampler_steps}]")
    parser.add_argument("--resolution", type=int, help="side of the pictures in pixels; default: the base's")
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--precision", choices=[*PRECISIONS], default="fp32", help="of the base [fp32]")
    parser.add_argument("--checkpointing", action="store_true", help="less memory: activations are computed twice")
    parser.add_argument("--format", choices=[form.name for form in FORMATS], help="to write; default: the inputs'")
    args = parser.parse_args(argv)

    adapters = sources(args)
    if any(args.output.resolve() == Path(entry_of(text).path).resolve() for text in args.adapters):
        raise ConfigError(f"{args.output} is an input; wanted another name")
    config = ZipConfig(
        args.steps, args.learning_rate, args.overlap, args.batch_size, args.pictures, args.sampler_steps,
        args.resolution, args.seed,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    family = families.load(args.base, device=device, dtype=PRECISIONS[args.precision])
    if args.checkpointing:
        denoiser: torch.nn.Module = family.denoiser
        denoiser.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue] # diffusers' models have it
        denoiser.train()  # it is done in training only; no layer of these models has dropout of its own
    with tqdm(leave=False, dynamic_ncols=True) as bar:

        def step(what: str, done: int, of: int, loss: float) -> None:
            bar.total, bar.n = of, done
            bar.set_description(what, refresh=False)
            bar.set_postfix_str("" if math.isnan(loss) else f"error {loss:.3f} of the sum's", refresh=False)
            bar.update(0)

        made = zipped(family, adapters, config, step)
    print("\n".join(report(adapters, made)))
    path = save(made.file, args.output, format=args.format)
    ranks = sorted({part.method.file_rank or 0 for part in made.file.parts.values()})
    print(f"{path}: {len(made.file.parts)} layers, ranks {ranks[0]} to {ranks[-1]}, {load(path).format}")


if __name__ == "__main__":
    program(main, sys.argv[1:])
