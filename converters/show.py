"""What is in an adapter file: tool, base, method, ranks, words, where its change is large, what would not fit a base.

imgadapt show style.safetensors
imgadapt show style.safetensors --layers --base sdxl
imgadapt show style.safetensors --json
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from imgadapt import demo, load
from imgadapt.arch import architectures
from imgadapt.cli import program
from imgadapt.errors import FormatError, first_few, shortened
from imgadapt.summary import NO_CONFIG, Summary, alpha_unsaid, misfits, summary

_MOST = 40  # lines of metadata


def _say(line: str) -> None:
    print(shortened(line, 1000))


def main(argv: Sequence[str]) -> None:
    names = ["demo", *(a.name for a in architectures())]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", action="store_true", help="a line a layer")
    parser.add_argument("--base", choices=names, help="say what would not go on a model of this kind")
    parser.add_argument("--no-norms", action="store_true", help="read names and shapes only")
    parser.add_argument("--json", action="store_true", help="all of it, for scripts")
    parser.add_argument("--pickle", action="store_true", help="read it even if it is a .pt or .bin, as data only")
    args = parser.parse_args(argv)

    file = load(args.file, strict=False, pickle=args.pickle)
    found = summary(file, norms=not args.no_norms)
    shapes = {"demo": demo.shape_of, **{a.name: a.shape_of for a in architectures()}}
    wrong = misfits(file, shapes[args.base]) if args.base else {}
    if args.json:
        print(json.dumps({**json.loads(found.as_json()), "misfits": wrong}, indent=1))
        _end(found, wrong)
        return

    size = sum(f.stat().st_size for f in ([args.file] if args.file.is_file() else args.file.iterdir()))
    _say(f"{args.file}: {size / 1e6:.2f} MB, {found.format} format")
    _say(f"base          {found.base or 'not one with a table'}")
    for component, count in Counter(row.layer.partition(".")[0] for row in found.rows).items():
        _say(f"{component:<14}{count} layers")
    kinds = Counter((row.method, row.rank, round(row.scale, 6)) for row in found.rows)
    for (method, rank, scale), count in kinds.most_common():
        said = "" if rank is None else f"rank {rank}, alpha {scale * rank:g} "
        _say(f"{method:<14}{said}(scale {scale:g}): {count} layers")
    for word, embedding in file.embeddings.items():
        shapes = ", ".join(f"{kind} {tuple(v.shape)}" for kind, v in embedding.vectors.items())
        _say(f"word          {word}: {shapes}")
    if found.trigger:
        _say(f"trigger       {', '.join(found.trigger)}")
    _say(f"parameters    {', '.join([f'{found.numbers:,}', *found.dtypes])}")
    if found.blocks:
        most = max((norm for norm in found.blocks.values() if math.isfinite(norm)), default=0.0) or 1.0
        for block, norm in found.blocks.items():
            _say(f"  {block:<40}{norm:9.4g} {'#' * round(20 * norm / most) if math.isfinite(norm) else 'BROKEN'}")
    if args.layers:
        for row in found.rows:
            shapes = ", ".join(f"{key} {shape}" for key, shape in row.shapes.items())
            _say(f"  {row.layer}: {row.method}, {f'norm {row.norm:.4g}, ' if row.norm is not None else ''}{shapes}")
    if alpha_unsaid(file):
        _say(f"NOTE          {NO_CONFIG}")
    for key, value in sorted(found.metadata.items())[:_MOST]:
        _say(f"metadata      {key} = {value if len(value) <= 80 else f'{value[:77]}...'}")
    if len(found.metadata) > _MOST:
        _say(f"metadata      and {len(found.metadata) - _MOST} more; --json has them all")
    if args.base:
        _say(f"on {args.base:<11}{'all of it fits' if not wrong else f'{len(wrong)} layers do not fit:'}")
        for layer, reason in list(wrong.items())[:10]:
            _say(f"  {layer}: {reason}")
    if found.unknown:
        reasons = [reason for reason in dict.fromkeys(found.unknown.values()) if reason]
        _say(f"UNKNOWN       {len(found.unknown)} keys: {first_few(list(found.unknown))}")
        for reason in reasons[:10]:
            _say(f"  {reason}")
    _end(found, wrong)


def _end(found: Summary, wrong: Mapping[str, str]) -> None:
    if found.broken:
        names = first_few([shortened(name) for name in found.broken])
        what = f"{len(found.broken)} layers or words hold NaN or infinity: {names}"
        raise FormatError(f"this adapter cannot draw: {what}. Train it again, or take an earlier checkpoint of it")
    if found.unknown or wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    program(main, sys.argv[1:])
