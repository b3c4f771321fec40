"""Printing: a merge's report as text, a block a component, and what in it should be looked at."""

from collections.abc import Iterator
from itertools import combinations

from imgadapt.combining.combine import DTYPES
from imgadapt.combining.recipe import MergeRecipe
from imgadapt.combining.report import Component, Report
from imgadapt.combining.rules import RULES
from imgadapt.errors import first_few, shortened

_MOST = 6  # inputs whose cosines are shown as a matrix
_LONGEST = 4000  # characters of a line
_HIGH, _ALIKE = 0.3, 0.98


def said(recipe: MergeRecipe) -> str:
    """`ties (density 0.3), core space, rank 16`."""
    options = ", ".join(f"{name} {value}" for name, value in recipe.options.items())
    amounts = {"rank": recipe.rank, "error": recipe.error, "energy": recipe.energy, "size": recipe.size}
    rest = [f"{name} {value:g}" + " MB" * (name == "size") for name, value in amounts.items() if value is not None]
    head = recipe.rule + (f" ({options})" if options else "")
    return ", ".join([head, *(["core space"] if recipe.space == "core" else []), *rest])


def lines(report: Report, *, baked: bool = False) -> Iterator[str]:
    """The report as text: the inputs, what each component has of them and became, and notes. baked: into a checkpoint,
    and so whole. Names in it are of files: nothing of them moves a terminal's cursor.
    """
    return (shortened(line, _LONGEST) for line in _lines(report, baked))


def _lines(report: Report, baked: bool) -> Iterator[str]:
    yield said(report.recipe)
    width = max(len(name) for name in report.inputs)
    for k, (name, entry) in enumerate(zip(report.inputs, report.recipe.inputs, strict=True), 1):
        about = report.about[k - 1] if report.about else ""
        yield f"  [{k}] {name:<{width}}  {entry.weight:>7g}  {about}"
    width_of = DTYPES[report.recipe.dtype or "fp32"].itemsize
    for component in report.components():
        yield from _component(component, 0 if baked else width_of)
    if report.skipped:
        yield f"skipped, their weight is 0: {first_few(list(report.skipped))}"
    for note in notes(report):
        yield f"NOTE {note}"


def _component(c: Component, width: int) -> Iterator[str]:
    """width: bytes of a number in the file; 0: no adapter is written."""
    several = len(c.norms) > 1
    counts = [f"{c.matched} layers" + (" matched" if several else "")]
    counts += [f"{n} only in [{k}]" for k, n in enumerate(c.alone, 1) if n]
    counts += [f"{c.skipped} skipped"] if c.skipped else []
    yield f"{c.name:<16}{', '.join(counts)}"
    norms = "  ".join(f"[{k}] {norm:.4g}" for k, norm in enumerate(c.norms, 1))
    yield f"  {'norm':<14}{norms}  (at weight 1)  merged {c.norm:.4g}"
    if several:
        yield from _cosines(c)
    if not width:
        return
    kept = [] if c.ranks is None else [f"rank {c.ranks[0]}" + (f" to {c.ranks[1]}" if c.ranks[1] > c.ranks[0] else "")]
    kept += [f"{c.whole} whole layers, {c.whole_numbers * width / 1e6:.1f} MB"] if c.whole else []
    yield f"  {'written':<14}{', '.join([*kept, f'residual {c.residual:.4f}'])}"


def _cosines(c: Component) -> Iterator[str]:
    k, there = len(c.norms), [norm > 0 for norm in c.norms]
    pairs = [(i, j) for i, j in combinations(range(k), 2) if there[i] and there[j]]
    if k <= 3:
        shown = "  ".join(f"[{i + 1}][{j + 1}] {float(c.cosines[i, j]):+.3f}" for i, j in pairs)
        yield f"  {'cosine':<14}{shown or 'nothing in common'}"
    elif k <= _MOST:
        for i in range(k):
            row = " ".join(f"{float(c.cosines[i, j]):+.3f}" if there[i] and there[j] else "     -" for j in range(k))
            yield f"  {'cosine' if i == 0 else '':<9}[{i + 1}]  {row}"
    elif pairs:
        low, high = (pick(pairs, key=lambda p: float(c.cosines[p])) for pick in (min, max))
        shown = "  ".join(f"[{i + 1}][{j + 1}] {float(c.cosines[i, j]):+.3f}" for i, j in (low, high))
        yield f"  {'cosine':<14}least and most of {len(pairs)}: {shown}"


def notes(report: Report) -> list[str]:
    """What in a report should be looked at, a sentence each with what can be done about it."""
    made: list[str] = []
    total, recipe = report.total, report.recipe
    k = len(report.inputs)
    if sum(n > 0 for n in report.layers) > 1 and total.matched == 0:
        made.append("the inputs share no layer: each keeps its own, as halves of B-LoRA are meant to")
    for number, (norm, name) in enumerate(zip(total.norms, report.inputs, strict=True), 1):
        if norm == 0 and report.layers[number - 1]:
            made.append(f"nothing of [{number}] {name} is in the result: its weights or its changes are 0")
    for i, j in combinations(range(k), 2):
        cosine = float(total.cosines[i, j])
        if cosine > _ALIKE:
            made.append(f"[{i + 1}] and [{j + 1}] are nearly the same (cosine {cosine:.3f}): one file twice?")
        if cosine < -_ALIKE:
            made.append(
                f"[{i + 1}] and [{j + 1}] are opposite (cosine {cosine:.3f}): is one the negative of the other?"
            )
    if report.residual > _HIGH:
        made.append(f"{report.residual:.0%} of the change's norm does not fit in what is kept: {_advice(recipe)}")
    if total.whole:
        width = DTYPES[recipe.dtype or "fp32"].itemsize
        made.append(
            f"{total.whole} layers are written whole, {total.whole_numbers * width / 1e6:.1f} MB: "
            f"--rank makes them small; in a checkpoint (`imgadapt bake`) they cost nothing"
        )
    return made


def _advice(recipe: MergeRecipe) -> str:
    if recipe.row.elements is not None and recipe.space == "delta":
        core = "--space core keeps the rank low by itself, " if recipe.row.in_core else ""
        return f"{core}a higher --rank keeps more, and a checkpoint (`imgadapt bake`) keeps all"
    return "a higher --rank keeps more, and without one the merge is exact"


def table() -> Iterator[str]:
    """The rules with their options, for --list."""
    for rule in RULES:
        yield f"{rule.name}: {rule.about} ({rule.source})"
        facts = [
            f"{rule.least} inputs" if rule.least == rule.most else f"{rule.least} inputs or more" * (rule.least > 1)
        ]
        facts += ["in this order" * rule.ordered, "--space core" * rule.in_core]
        if shown := ", ".join(filter(None, facts)):
            yield f"    {shown}"
        for name, option in rule.options.items():
            kinds = "|".join(option.choices) if option.choices else "true|false"
            numbers = isinstance(option.default, int | float) and not isinstance(option.default, bool)
            span = f"{option.least:g} to {option.most:g}" if numbers else kinds
            yield f"    --{name.replace('_', '-'):<14} {span}, {option.default} by default: {option.about}"
