"""The bar of a program, on stderr."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from tqdm import tqdm

Progress = Callable[[str, int, int], None]
"""(what, done, of)."""


@contextmanager
def bar(unit: str, *, hidden: bool = False) -> Generator[Progress]:
    """A bar of what is done, gone at the end; none where it is hidden, or stderr is no terminal. unit: "layer"; "B" is
    bytes, shown in thousands and millions.
    """
    scaled = unit == "B"
    with tqdm(disable=hidden or None, unit=unit, unit_scale=scaled, leave=False, dynamic_ncols=True) as shown:

        def step(what: str, done: int, of: int) -> None:
            shown.total = of
            shown.set_description(what, refresh=False)
            shown.update(done - shown.n)

        yield step
