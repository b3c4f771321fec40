"""Amounts: the arguments of programs that say how much of each layer is kept."""

import argparse
from typing import Any

from imgadapt.combining.keep import LAYER_RULES, Keep
from imgadapt.errors import ConfigError

FROM_OTHERS = """kohya's --dynamic_method sv_ratio, sv_cumulative, sv_fro are --sv-ratio, --sv-cumulative, --sv-fro, and
its --new_rank is --max-rank beside them, else --rank; its resize gives each layer one rank more than those say.
LyCORIS: threshold is --threshold, ratio X is --sv-ratio 1/X, quantile is --sv-cumulative, and one rank less there."""


AMOUNTS = ("rank", "error", "energy", "size", *LAYER_RULES)
"""What they are called once parsed."""


def add_amounts(parser: argparse.ArgumentParser) -> None:
    """The arguments of `Keep`."""
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


def asked(args: Any) -> Keep:
    """Raises ConfigError: see `Keep`."""
    rules = {rule: getattr(args, rule) for rule in LAYER_RULES if getattr(args, rule) is not None}
    if len(rules) > 1:
        raise ConfigError(f"{' and '.join(rules)}: one rule gives each layer its rank")
    rule = next(iter(rules), None)
    return Keep(
        args.rank, args.rank_conv, args.error, args.energy, args.size, rule, rules.get(rule or "", 0.0), args.max_rank
    )
