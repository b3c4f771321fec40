"""Python's collector of unreachable objects, held while thousands are made that all stay."""

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Generator[None]:
    """Thousands of new objects would set the collector off, which looks at every object there is, and free nothing."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
