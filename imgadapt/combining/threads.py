"""Work spread over threads so that its bytes do not depend on how many there are.

Products and factorisations of matrices may round otherwise with another number of threads, so each layer is worked on
by one thread, and several layers at a time.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Row = TypeVar("Row")
Result = TypeVar("Result")


@contextmanager
def one_thread_each() -> Generator[int]:
    """Within, torch uses one thread in each thread; gives how many it had: the number of workers to take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def in_order(work: Callable[[Row], Result], rows: Iterable[Row], workers: int) -> Iterator[Result]:
    """work(row) of every row, in their order, a few rows ahead of what is asked for; within `one_thread_each`."""
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for row in rows:
                waiting.append(pool.submit(_without_gradients, work, row))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _without_gradients(work: Callable[[Row], Result], row: Row) -> Result:
    with torch.no_grad():  # it is a setting of each thread
        return work(row)
