"""What is odd about the pictures and captions of a training, and what to do about it: nothing here stops a run."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from imgadapt.errors import first_few, printable
from imgadapt.training import leavings
from imgadapt.training.captions import says
from imgadapt.training.data import Example
from imgadapt.training.finding import Finding, Level, paths_of
from imgadapt.training.looks import Looks, bits, grouped, look, members

SHAPE = 2.0  # sides' ratio of the longest bucket
UNEVEN = 1.5  # between concepts, in pictures an epoch
BLURRED = 1.25  # times enlarged
_KINDS = {"JPEG": (".jpg", ".jpeg", ".jfif"), "MPO": (".jpg", ".jpeg", ".jfif"), "TIFF": (".tif", ".tiff")}


def examine(
    examples: Sequence[Example],
    folder: Path,
    *,
    tokens: Callable[[str], int] | None = None,
    limit: int | None = None,
    resolution: int,
    trigger: str | None = None,
    alpha_counts: bool = False,
    elsewhere: Sequence[Path] = (),
) -> list[Finding]:
    """All that is odd about the pictures of a folder, errors first.

    tokens: the number of tokens of a text, with those at its ends. limit: how many of them the model reads.
    resolution: side in pixels of the square that a picture's area should have at least. alpha_counts: transparent
    pixels are a mask. elsewhere: folders below that serve another end (held out pictures, pictures of the class).

    Raises:
        DataError: a picture cannot be opened any more.
    """
    looks = [look(example.path) for example in examples]
    found = [
        *(_length(examples, tokens, limit, trigger) if tokens and limit else ()),
        *_words(examples, trigger),
        *_same(examples, looks),
        *_size(examples, resolution),
        *_kind(examples, looks, alpha_counts=alpha_counts),
        *_balance(examples),
        *leavings.unused(examples, folder, elsewhere),
    ]
    order: list[Level] = ["error", "warning", "note"]
    told = [replace(finding, text=printable(finding.text)) for finding in found]
    return sorted(told, key=lambda finding: order.index(finding.level))


# --- captions


def _length(
    examples: Sequence[Example], tokens: Callable[[str], int], limit: int, trigger: str | None
) -> Iterator[Finding]:
    long = [(e, text, tokens(text)) for e in examples for text in e.captions]
    long = [(e, text, count) for e, text, count in long if count > limit]
    if long:
        example, text, count = max(long, key=lambda row: row[2])
        lost = " ".join(text.split(" ")[_kept(text, tokens, limit) :])
        yield Finding(
            "warning",
            f"{len(long)} captions are longer than the {limit} tokens that the model reads; of {example.path.name} the "
            f"last {count - limit} are cut, from {_short(lost)!r}; shorten them, or put what matters first",
            paths_of(e for e, _, _ in long),
        )
    without = [e for e, text, _ in long if trigger and not says(_start(text, tokens, limit), trigger)]
    if without:
        yield Finding(
            "error",
            f"in {len(without)} captions the trigger {trigger!r} is among what is cut; put it first",
            paths_of(without),
        )


def _start(text: str, tokens: Callable[[str], int], limit: int) -> str:
    return " ".join(text.split(" ")[: _kept(text, tokens, limit)])


def _kept(text: str, tokens: Callable[[str], int], limit: int) -> int:
    """How many words of a text fit."""
    words = text.split(" ")
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens(" ".join(words[:middle])) <= limit else (low, middle - 1)
    return low


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[:most].rstrip() + "…"


def _words(examples: Sequence[Example], trigger: str | None) -> Iterator[Finding]:
    texts = {e.captions for e in examples}
    if len(examples) > 1 and len(texts) == 1 and trigger is None and len(next(iter(texts))) == 1:
        (text,) = next(iter(texts))
        said = f"all captions are {_short(text)!r}" if text else "no picture has a caption"
        yield Finding(
            "note",
            f"{said}: all that the pictures share is bound to it; describe what differs between them in captions, "
            "or give a trigger",
        )
    if (empty := [e for e in examples if "" in e.captions]) and len(empty) < len(examples):
        yield Finding("warning", f"{len(empty)} pictures have no words; write captions beside them", paths_of(empty))


# --- pictures


def _same(examples: Sequence[Example], looks: Sequence[Looks]) -> Iterator[Finding]:
    by_bytes: dict[str, list[int]] = defaultdict(list)
    for k, example in enumerate(examples):
        by_bytes[example.digest].append(k)
    copies = [group for group in by_bytes.values() if len(group) > 1]
    # one of each, so that a copy is not told as looking alike too
    once = [group[0] for group in by_bytes.values() if looks[group[0]].hashes]
    plain, mirrored = (bits([hashes[side] for k in once if (hashes := looks[k].hashes)]) for side in (0, 1))
    near = grouped(plain, plain)
    turned = grouped(plain, mirrored, apart=near)
    for groups, text in (
        (copies, "are the same file; each copy counts as a picture: remove all but one"),
        (members(near, once), "look alike; keep the best, so that training does not see them more often than others"),
        (members(turned, once), "are mirror images; keep one of each, and let flip do the rest if sides do not matter"),
    ):
        if groups:
            named = [" = ".join(examples[k].path.name for k in group[:4]) for group in groups]
            paths = paths_of(examples[k] for group in groups for k in group)
            yield Finding("warning", f"{len(paths)} pictures {text}: {first_few(named)}", paths)


def _size(examples: Sequence[Example], resolution: int) -> Iterator[Finding]:
    small = {e: factor for e in examples if (factor := resolution / math.sqrt(e.width * e.height)) > 1}
    if small:
        worst = max(small, key=lambda e: small[e])
        side = int(resolution / small[worst])
        yield Finding(
            "warning" if small[worst] > BLURRED else "note",
            f"{len(small)} pictures are below {resolution}x{resolution} and would be enlarged, {worst.path.name} "
            f"({worst.width}x{worst.height}) {small[worst]:.2f} times; use larger ones, or a resolution of {side}",
            paths_of(small),
        )
    long = {e: sides for e in examples if (sides := max(e.width, e.height) / min(e.width, e.height)) > SHAPE}
    if long:
        worst = max(long, key=lambda e: long[e])
        yield Finding(
            "warning",
            f"{len(long)} pictures are longer than {SHAPE:g}:1; of {worst.path.name} ({worst.width}x{worst.height}) "
            f"{1 - SHAPE / long[worst]:.0%} would be cut away; crop them yourself",
            paths_of(long),
        )


def _kind(examples: Sequence[Example], looks: Sequence[Looks], *, alpha_counts: bool) -> Iterator[Finding]:
    odd: tuple[tuple[Level, str, Callable[[Example, Looks], bool]], ...] = (
        (
            "warning",
            "are animated; only the first frame is trained: save the frames you want",
            lambda _, x: x.moves,
        ),
        ("warning", "are CMYK; their colours are guessed: save them as RGB", lambda _, x: x.mode == "CMYK"),
        ("note", "have 16 bits a channel; the 8 upper ones are used", lambda _, x: x.deep),
        (
            "note",
            "are turned as their EXIF says; see that they are upright on the contact sheet",
            lambda _, x: x.turned,
        ),
        ("note", "are of another kind than their names say; they are read as what they are", _misnamed),
        (
            "note",
            "have transparent pixels, which are laid over white; let transparency be the mask if they should not count",
            lambda e, _: e.alpha and not alpha_counts,
        ),
    )
    for level, text, is_so in odd:
        if some := [e for e, x in zip(examples, looks, strict=True) if is_so(e, x)]:
            yield Finding(level, f"{_count(some)} {text}", paths_of(some))
    if (bare := [e for e in examples if not e.mask]) and len(bare) < len(examples):
        yield Finding("note", f"{_count(bare)} have no mask, unlike the others; all of them counts", paths_of(bare))


def _misnamed(example: Example, looks: Looks) -> bool:
    return example.path.suffix.lower() not in _KINDS.get(looks.kind, (f".{looks.kind.lower()}",))


# --- folders


def _balance(examples: Sequence[Example]) -> Iterator[Finding]:
    pictures = Counter(e.path.parent.name for e in examples if e.concept)
    seen = Counter(e.path.parent.name for e in examples if e.concept for _ in range(e.repeats))
    if len(seen) > 1:
        (most, many), (least, few) = seen.most_common()[0], seen.most_common()[-1]
        if many > UNEVEN * few:
            better = max(1, round(many / pictures[least]))
            yield Finding(
                "warning",
                f"an epoch has {many} pictures of {most} and {few} of {least} (repeats included); to balance them, "
                f"begin the name of {least} with {better}_",
            )


def _count(examples: Sequence[Example]) -> str:
    return f"{len(examples)} pictures ({first_few([e.path.name for e in examples])})"
