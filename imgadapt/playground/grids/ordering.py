"""Ordering: in which batches a grid is drawn: few changes of adapters, full batches, and the base's own sums.

How many pictures a batch has changes the last bits of sums. So pictures of one stack at the same strengths are batched,
in the same places whatever the strengths: a weight of 0 has the base's sums, to the bit. Where those are few, several
strengths share a batch, but for strengths of 0.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from imgadapt.playground.drawing.stacks import off
from imgadapt.playground.drawing.studio import alike
from imgadapt.playground.requests import GenerateRequest, Use

MOST = 8
"""Pictures of a batch. On the embedded base 8 take 0.8 of the time of two batches of 4, and 16 would save a sixth more;
but nothing is to be seen, and kept when it is stopped, until a batch is drawn.
"""


def batches(requests: Sequence[GenerateRequest], together: Callable[[GenerateRequest], int]) -> list[list[int]]:
    """Indices of requests that are drawn together, in the order of drawing. together: how many may be, at most."""
    things = {thing: k for k, thing in enumerate(dict.fromkeys(_thing(request) for request in requests))}
    groups: dict[object, list[int]] = {}
    for k, request in enumerate(requests):
        groups.setdefault((_ids(request), alike(request)), []).append(k)
    stacks = {ids: k for k, ids in enumerate(dict.fromkeys(_ids(request) for request in requests))}
    made: list[list[int]] = []
    for group in sorted(groups.values(), key=lambda group: stacks[_ids(requests[group[0]])]):
        most = min(MOST, max(1, together(requests[group[0]])))
        states: dict[tuple[Use, ...], list[int]] = {}
        for k in group:
            states.setdefault(requests[k].adapters, []).append(k)
        rows = [sorted(state, key=lambda k: things[_thing(requests[k])]) for state in states.values()]
        made += _joined(rows, [all(map(off, uses)) for uses in states], most)
    return made


def swaps(requests: Sequence[GenerateRequest], order: Iterable[Sequence[int]]) -> int:
    """How often other adapters act than before, from none on."""
    acting, count = frozenset[str](), 0
    for batch in order:
        now = frozenset(_ids(requests[batch[0]]))
        count += now != acting
        acting = now
    return count


def encodes(requests: Sequence[GenerateRequest], reads: Callable[[Use], bool]) -> int:
    """How many texts the encoders read: each prompt once for each strength of adapters on them. reads: whether one is
    on them at all.
    """
    made: set[object] = set()
    for request in requests:
        guided = request.guidance is None or request.guidance > 1
        text = tuple((use.adapter, _text(use), use.blocks) for use in request.adapters if reads(use))
        made.add((request.prompt, request.negative if guided else None, text))
    return len(made)


def _joined(rows: Sequence[list[int]], idle: Sequence[bool], most: int) -> list[list[int]]:
    """Batches of pictures of one state each, or of several where they are small."""
    made: list[list[int]] = []
    waiting: list[int] = []
    for row, is_idle in zip(rows, idle, strict=True):
        if is_idle or 2 * len(row) > most:
            made += _even(row, most)
        else:
            if len(waiting) + len(row) > most:
                made.append(waiting)
                waiting = []
            waiting = [*waiting, *row]
    return [*made, waiting] if waiting else made


def _even(row: Sequence[int], most: int) -> list[list[int]]:
    """9 in batches of 8 at most -> 5 and 4."""
    count = -(-len(row) // most)
    ends = [len(row) * k // count for k in range(count + 1)]
    return [list(row[a:b]) for a, b in pairwise(ends)]


def _thing(request: GenerateRequest) -> tuple[str, str, int]:
    """What is drawn, whatever draws it."""
    return request.prompt, request.negative, request.seed


def _ids(request: GenerateRequest) -> tuple[str, ...]:
    return tuple(use.adapter for use in request.adapters)


def _text(use: Use) -> float:
    return use.weight if use.text is None else use.text
