"""What is fuzzed: functions of bytes, which may refuse them by an error of imgadapt's and by no other."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from imgadapt.errors import ImgadaptError

LONGEST = 2.0
"""Seconds of CPU that no input may take."""


@dataclass(frozen=True)
class Target:
    """run: reads an input, as a user's would be, and asserts what must hold of what it makes of it. seeds: inputs to
    begin with, good ones for the most part. words: what inputs of this kind are made of, for the mutations.
    """

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]
    words: tuple[str, ...] = ()

    def __call__(self, data: bytes) -> bool:
        """Try an input; whether it was taken, and not refused.

        Raises:
            AssertionError: it took too long, or the target's own.
            BaseException: whatever it raised that no user should see.
        """
        began = time.thread_time()
        try:
            self.run(data)
            taken = True
        except ImgadaptError as error:
            if not str(error):
                raise AssertionError("an error that says nothing") from error
            str(error).encode()  # half a character would break whatever prints it
            taken = False
        seconds = time.thread_time() - began
        assert seconds < LONGEST, f"{seconds:.1f} s of CPU"
        return taken
