"""Shortage: whether an error says that a machine's memory is out, or what else of it."""

import errno
import sys

_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "not enough memory",
    "failed to map segment",
    "alloc_failed",
    "bad_alloc",
    "can't start new thread",
)  # torch's, CUDA's, the loader's


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is out, of a GPU or of the machine."""
    return lacking(error) is not None


def lacking(error: BaseException) -> BaseException | None:
    """The error that says that memory is out: this one, or what it was raised from, as libraries wrap what fails in an
    import.
    """
    seen: list[BaseException] = []
    now: BaseException | None = error
    while now is not None and now not in seen:
        if _says_so(now):
            return now
        if not isinstance(now, RuntimeError | ImportError | SystemError):  # others are what they are
            return None
        seen.append(now)
        now = now.__cause__ or (None if now.__suppress_context__ else now.__context__)
    return None


def _says_so(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    said = str(error).lower() if isinstance(error, RuntimeError | ImportError | OSError | SystemError) else ""
    return any(text in said for text in _MEMORY)


def of_the_system(error: OSError) -> str:
    """What an error of the system says in a line, with the way out where it is known."""
    said = error.strerror or str(error)
    where = f"{error.filename!s}: " if error.filename is not None else ""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{where}too many files are open: allow more with `ulimit -n 1024`"
    return f"{where}{said}" if where else f"cannot write, a file or what is printed: {said}"
