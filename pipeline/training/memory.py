"""Keeping freed memory in the process, so that the next training step finds it there.

glibc gives large blocks back to the kernel when they are freed, and the kernel clears every page again when the next
block is asked for. A training step frees and asks for all its activations, over a gigabyte. Source: mallopt(3). Limits:
Linux with glibc, elsewhere nothing changes; the process stays as large as it once was.
"""

from __future__ import annotations

import ctypes
import sys

# numbers and limits of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_INT = 2**31 - 1
_MMAP_THRESHOLDS = (2**30, 2**25)  # the first that is accepted: glibc before 2.35 has a maximum of 32 MiB

IN_WORKERS = {"MALLOC_ARENA_MAX": "1"}
"""Environment of processes that train in a thread of their own: an arena of a thread gives back what it can."""


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, from now on; whether the C library can."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    accepted = any(mallopt(_M_MMAP_THRESHOLD, threshold) for threshold in _MMAP_THRESHOLDS)
    return bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)) and accepted
