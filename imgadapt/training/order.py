"""Which views are in the batch of a step: a function of views, batch size, seed and step, with nothing to save.

An entry is a view, or one of its repeats. A round is `batch` epochs: a bucket of n entries gives n full batches in it,
so that every batch is full and of one size, and every entry comes exactly `batch` times a round. A permutation of the
round says which bucket a step takes; each bucket deals its entries from an endless row of permutations, one an epoch.
Both depend on the pictures' digests and sizes, not on names, so that moving or renaming files changes nothing.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import torch

from imgadapt.errors import ConfigError, DataError
from imgadapt.training.buckets import Size, View
from imgadapt.training.noise import generator

T = TypeVar("T")
_Draw = tuple[int, int]  # (index of a view, how often it has been drawn before)


class Order:
    """The batches of a run.

    views: what is trained, of any sizes. batch: views a step. seed: of the run.
    per_round: steps of a round. fingerprint: SHA-256 of all that the order depends on; a run that goes on with another
    one trains on other pictures than it would have.

    Raises:
        ConfigError: batch is below 1.
        DataError: there are no views, or one repeats less than once.
    """

    def __init__(self, views: Sequence[View], batch: int, seed: int) -> None:
        if batch < 1:
            raise ConfigError(f"batch_size: wanted at least 1, got {batch}")
        if not views:
            raise DataError("no pictures: there is nothing to put into batches")
        never = next((view.example for view in views if view.example.repeats < 1), None)
        if never is not None:
            raise DataError(
                f"{never.path}: wanted 1 repeat or more, got {never.repeats}; leave the picture out instead"
            )
        self.size, self.seed = batch, seed
        self._buckets = _entries(views)
        self.per_round = sum(map(len, self._buckets.values()))
        lines = [f"{size} {views[k].example.digest}" for size, entries in self._buckets.items() for k in entries]
        self.fingerprint = hashlib.sha256("\n".join([f"order 1 {batch} {seed}", *lines]).encode()).hexdigest()
        self._slots = lru_cache(2)(self._deal_buckets)
        self._epoch = lru_cache(4 * len(self._buckets) + batch)(self._deal_entries)

    def batch(self, step: int) -> list[int]:
        """Indices of the views of a step (from 0), all of one size."""
        return [view for view, _ in self._draws(step)]

    def seen(self, step: int) -> list[int]:
        """For each of the step's batch, how often that view has been drawn before."""
        return [before for _, before in self._draws(step)]

    def epochs(self, step: int) -> float:
        """How often all entries have been seen, on average, before a step."""
        return step * self.size / self.per_round

    def _draws(self, step: int) -> list[_Draw]:
        turn, slot = divmod(step, self.per_round)
        size, before = self._slots(turn)[slot]
        many = len(self._buckets[size])
        first = (turn * many + before) * self.size
        return [self._epoch(size, place // many)[place % many] for place in range(first, first + self.size)]

    def _deal_buckets(self, turn: int) -> list[tuple[Size, int]]:
        """For each step of a round, its bucket, and how many steps of the round had that bucket before."""
        slots = [size for size, entries in self._buckets.items() for _ in entries]
        shuffled = torch.randperm(len(slots), generator=generator(self.seed, turn, "buckets")).tolist()
        return _counted([slots[k] for k in shuffled])

    def _deal_entries(self, size: Size, epoch: int) -> list[_Draw]:
        """The entries of a bucket in the order of an epoch."""
        entries = self._buckets[size]
        source = generator(self.seed, size[0], size[1], epoch, "entries")
        shuffled = [entries[k] for k in torch.randperm(len(entries), generator=source).tolist()]
        repeats = Counter(entries)
        return [(view, epoch * repeats[view] + before) for view, before in _counted(shuffled)]


def _entries(views: Sequence[View]) -> dict[Size, list[int]]:
    """Indices of the views of each size, with repeats, in an order that file names have no part in."""
    made: dict[Size, list[int]] = {}
    for k in sorted(range(len(views)), key=lambda k: (views[k].size, views[k].example.digest)):
        made.setdefault(views[k].size, []).extend([k] * views[k].example.repeats)
    return made


def _counted(things: Sequence[T]) -> list[tuple[T, int]]:
    """Each with how often it came before."""
    counts: Counter[T] = Counter()
    made: list[tuple[T, int]] = []
    for thing in things:
        made.append((thing, counts[thing]))
        counts[thing] += 1
    return made
