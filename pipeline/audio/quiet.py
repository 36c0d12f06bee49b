"""libmpg123's remarks on damaged MP3 files kept off the terminal: libsndfile gives no way to ask for that.

Method: C's ``stderr`` stream is pointed at /dev/null while an MP3 is open. The file descriptor 2 is left alone, so
Python's ``sys.stderr`` and faulthandler go on as before; what C code of other threads prints meanwhile is lost.
Limits: GNU libc only, whose ``stderr`` is a variable; elsewhere the remarks are printed.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

_lock = threading.Lock()
_open = 0  # how many are inside `quiet_c_stderr`


@contextmanager
def quiet_c_stderr() -> Iterator[None]:
    """Nothing that C code prints to its ``stderr`` is seen inside."""
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(step: int) -> None:
    """Swap the stream when the first enters and when the last leaves."""
    global _open
    with _lock:
        _open += step
        if (streams := _streams()) is not None:
            variable, loud, silent = streams
            variable.value = silent if _open else loud


@lru_cache(maxsize=1)
def _streams() -> tuple[ctypes.c_void_p, int | None, int] | None:
    """The variable ``stderr``, its stream, and one to /dev/null; None where that cannot be had."""
    try:
        library = ctypes.CDLL(None)
    except TypeError:  # Windows wants a name
        return None
    if not hasattr(library, "gnu_get_libc_version"):
        return None
    library.fopen.restype = ctypes.c_void_p
    silent = library.fopen(b"/dev/null", b"we")
    variable = ctypes.c_void_p.in_dll(library, "stderr")
    return (variable, variable.value, silent) if silent else None
