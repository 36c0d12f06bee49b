"""Stamps of recordings, so that one that was replaced since can be told without reading it.

A stamp is size and time of change, as ``make`` and ``rsync`` use them. Limits: a copy that keeps both is not seen.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from pipeline.storage.errors import SerError
from pipeline.storage.files import local_path
from pipeline.storage.remote import is_remote, stamp_of

_AT_ONCE = 512
_LATEST_NS = 2**63 - 1  # in the year 2262; broken clocks write later ones


def stamps_of(recordings: Sequence[str]) -> NDArray[np.int64]:
    """Size in bytes and time of change in ns of each recording, ``(n, 2)``; -1 where it cannot be told.

    In threads, as network storage answers slowly; in groups, as a file that is here is told faster than a thread.
    """
    groups = [recordings[begin : begin + _AT_ONCE] for begin in range(0, len(recordings), _AT_ONCE)]
    with ThreadPoolExecutor(8) as pool:
        stamps = [stamp for found in pool.map(_stamps, groups) for stamp in found]
    return np.array(stamps, dtype=np.int64).reshape(-1, 2)


def _stamps(recordings: Sequence[str]) -> list[tuple[int, int]]:
    return [_stamp(recording) for recording in recordings]


def _stamp(recording: str) -> tuple[int, int]:
    try:
        if is_remote(recording):
            return stamp_of(recording)
        status = os.stat(local_path(recording))
    except (OSError, ValueError, SerError):
        return -1, -1
    return status.st_size, min(status.st_mtime_ns, _LATEST_NS)
