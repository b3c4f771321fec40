"""Cut an adapter down to lower ranks: a rank for all layers, a rule for each, or an error or a size for the whole.

imgadapt resize style.safetensors style.r8.safetensors --rank 8
imgadapt resize style.safetensors style.small.safetensors --size 20     # megabytes; ranks go where they count most
imgadapt resize style.safetensors style.small.safetensors --error 0.05       # of the whole change's norm
imgadapt resize style.safetensors style.small.safetensors --sv-ratio 20 --max-rank 32

kohya's resize_lora.py: --dynamic_method sv_ratio, sv_cumulative, sv_fro are --sv-ratio, --sv-cumulative, --sv-fro, and
--new_rank is --max-rank beside them, else --rank. Its ranks are one higher: it adds one to a count that is right.
LyCORIS: threshold is --threshold, quantile is --sv-cumulative (and one lower there), ratio X is --sv-ratio 1/X.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from imgadapt import load, save
from imgadapt.cli import program
from imgadapt.combining.base import open_base
from imgadapt.combining.combine import DTYPES
from imgadapt.combining.keep import LAYER_RULES, Keep
from imgadapt.combining.resizing import resize
from imgadapt.errors import ConfigError
from imgadapt.formats import FORMATS


def asked(args: argparse.Namespace) -> Keep:
    """How much is kept."""
    rules = {rule: getattr(args, rule) for rule in LAYER_RULES if getattr(args, rule) is not None}
    if len(rules) > 1:
        raise ConfigError(f"{' and '.join(rules)}: one rule gives each layer its rank")
    rule = next(iter(rules), None)
    return Keep(
        args.rank, args.rank_conv, args.error, args.energy, args.size, rule, rules.get(rule or "", 0.0), args.max_rank
    )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="an adapter of any tool")
    parser.add_argument("output", type=Path, help="the file to write")
    amount = parser.add_argument_group("how much is kept (one of)")
    amount.add_argument("--rank", type=int, help="of every layer")
    amount.add_argument("--error", type=float, help="relative Frobenius error of the whole")
    amount.add_argument("--energy", type=float, help="part of the squared norm of the whole")
    amount.add_argument("--size", type=float, help="megabytes of the file")
    amount.add_argument("--sv-ratio", dest="ratio", type=float, help="singular values of at least the largest / this")
    amount.add_argument("--sv-cumulative", dest="cumulative", type=float, help="the first that sum up to this part")
    amount.add_argument("--sv-fro", dest="fro", type=float, help="the first with this part of the layer's norm")
    amount.add_argument("--threshold", type=float, help="singular values of at least this")
    parser.add_argument("--rank-conv", type=int, help="with --rank: of convolutions with a kernel above 1")
    parser.add_argument("--max-rank", type=int, help="no layer is given more")
    parser.add_argument("--base", type=Path, help="the base, for DoRA, OFT and others that read its weights")
    parser.add_argument("--keep-others", action="store_true", help="without it: leave those as they are")
    parser.add_argument("--format", choices=[form.name for form in FORMATS], help="to write; default: the input's")
    parser.add_argument("--dtype", choices=[*DTYPES], help="of the tensors; default: theirs")
    parser.add_argument("--json", action="store_true", help="the report, for scripts")
    args = parser.parse_args(argv)

    keep = asked(args)
    if args.output.resolve() == args.input.resolve():
        raise ConfigError(f"{args.output} is the input; wanted another name")
    base = open_base(args.base) if args.base else None
    with tqdm(disable=args.json, unit="layer", leave=False, dynamic_ncols=True) as bar:

        def step(what: str, done: int, of: int) -> None:
            bar.total, bar.n = of, done
            bar.set_description(what, refresh=False)
            bar.update(0)

        made, report = resize(
            load(args.input), keep, name=args.input.name, base=base, others=args.keep_others, progress=step
        )
    path = save(made, args.output, format=args.format, dtype=DTYPES.get(args.dtype))
    if args.json:
        print(json.dumps({**report.as_json(), "written": str(path)}, indent=1))
        return
    sizes = [one.stat().st_size / 1e6 if one.is_file() else 0.0 for one in (args.input, path)]
    print(f"{args.input}: {keep.said()}")
    print("\n".join(report.lines()))
    print(f"{path}" + (f": {sizes[1]:.2f} MB of {sizes[0]:.2f}" if all(sizes) else ""))


if __name__ == "__main__":
    program(main, sys.argv[1:])
