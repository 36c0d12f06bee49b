"""A lock on a file: held by one process at a time, and let go when that process ends, however it ends.

Method: ``flock`` on POSIX systems, ``msvcrt.locking`` on Windows. Limits: advisory; on network file systems as good as
their locks are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.storage.errors import SerError


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file until it is closed; False when another process (or another opening of it) holds the lock."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def only_one(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock in the file ``path``, which is made where missing, folders too, until the end of the block.

    Raises:
        SerError: another process is ``doing`` it (a clause of the message), or the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a")
    except OSError as error:
        raise SerError(f"cannot write into {path.parent}: {error.strerror}; choose another --out") from error
    with lock:
        if not try_lock(lock):
            raise SerError(f"another process is {doing}; wait for it, or choose another --out")
        yield
