"""Which parts of a recording the model reads: evenly spaced crops, or sliding windows over all of it.

A crop is as long as the model's input window. The range of possible start times is split into ``K`` equal parts, and
each of the ``K`` crops starts in the middle of one part. So one crop is the recording's middle, and no crop touches the
recording's ends. Sliding windows start every hop from the beginning; the last one ends where the recording ends.
Times are in seconds. Positions in a recording that is resampled are counted in samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.storage.errors import SerError

Window = Literal["middle", "speech"]
"""Which part of a recording a model reads when it reads only one: the middle, or the part with most speech."""
MIN_WINDOW_S = 0.1
MAX_CROPS = 100
LONG_S = 6.0
"""Longer recordings need more than their middle: service and page analyse all of them, batch jobs print a note."""
_TAIL_S = 0.001  # this much at the end of a recording may lie outside all windows
_MARGIN = 512  # frames on either side of a part, at the lower rate; more than 256 does not change the result


@dataclass(frozen=True)
class SlidingWindow:
    """Windows of ``window_s`` that start every ``hop_s``."""

    window_s: float
    hop_s: float

    def __post_init__(self) -> None:
        for name, least_s in (("window_s", MIN_WINDOW_S), ("hop_s", MIN_WINDOW_S / 10)):
            if not least_s <= getattr(self, name) < math.inf:
                raise SerError(f"{name} must be {least_s} s or more, and finite, got {getattr(self, name)}")

    def starts(self, duration_s: float) -> list[float]:
        """Start times of the windows; only one if the recording is not longer than the window.

        >>> SlidingWindow(2.0, 1.0).starts(4.5), SlidingWindow(2.0, 2.0).starts(4.0)
        ([0.0, 1.0, 2.0, 2.5], [0.0, 2.0])
        >>> SlidingWindow(2.0, 1.0).starts(0.5)
        [0.0]
        """
        last_s = duration_s - self.window_s
        if last_s <= 0:
            return [0.0]
        starts = [index * self.hop_s for index in range(int(last_s / self.hop_s + 1e-9) + 1)]
        return starts if last_s - starts[-1] <= _TAIL_S else [*starts, last_s]


@dataclass(frozen=True)
class GivenWindows:
    """Windows of ``window_s`` at the given ascending start times ``at``, for a part cut out of a longer stream."""

    window_s: float
    at: tuple[float, ...]

    def starts(self, duration_s: float) -> list[float]:
        """``at``, however long the recording is."""
        return list(self.at)


def check_crops(crops: int) -> None:
    """Raise SerError for a number of crops below 1 or above ``MAX_CROPS``."""
    if crops < 1:
        raise SerError(f"crops must be 1 or more, got {crops}")
    if crops > MAX_CROPS:
        raise SerError(f"crops must be {MAX_CROPS} or fewer, got {crops}; to cover a whole recording, use windows")


def crop_starts(duration_s: float, window_s: float, crops: int) -> list[float]:
    """Start times of ``crops`` windows; only one if the recording is not longer than the window.

    >>> crop_starts(5.0, 2.0, 1), crop_starts(5.0, 2.0, 3), crop_starts(1.0, 2.0, 3)
    ([1.5], [0.5, 1.5, 2.5], [0.0])
    """
    room_s = duration_s - window_s
    if room_s <= 0:
        return [0.0]
    return [room_s * (index + 0.5) / crops for index in range(crops)]


def covered_s(starts: Sequence[float], duration_s: float, window_s: float) -> float:
    """Seconds of the recording that lie in at least one of the windows (``starts`` ascending).

    >>> covered_s([0.0, 1.0, 6.0], 10.0, 2.0), covered_s([0.0], 1.5, 2.0)
    (5.0, 1.5)
    """
    total, reached = 0.0, 0.0
    for start in starts:
        end = min(start + window_s, duration_s)
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def resampled_length(frames: int, from_hz: int, to_hz: int) -> int:
    """Number of samples after resampling `frames` from `from_hz` to `to_hz`: the ceiling of the exact ratio."""
    return -(-frames * to_hz // from_hz)


def placed(window: int, total: int, rate_hz: int, centre_s: float | None = None) -> tuple[int, int]:
    """(start, count) of `window` samples out of `total`, in the middle or around `centre_s`; all if there are fewer.

    >>> placed(4, 10, 1), placed(4, 10, 1, 7.0), placed(4, 10, 1, 9.5), placed(12, 10, 1, 3.0)
    ((3, 4), (5, 4), (6, 4), (0, 10))
    """
    count = min(window, total)
    if centre_s is None:
        return (total - count) // 2, count
    return min(max(round(centre_s * rate_hz - count / 2), 0), total - count), count


def frames_for(start: int, count: int, frames: int, from_hz: int, to_hz: int) -> tuple[int, int]:
    """[first, last): the input frames needed for output samples [start, start + count) after resampling.

    ``first`` is a time that lies on both sample grids, so resampling from there gives the same samples.
    """
    if from_hz == to_hz:
        return start, start + count
    down = from_hz // math.gcd(from_hz, to_hz)  # the two sample grids share a point every `down` frames
    margin = _MARGIN * max(1, -(-from_hz // to_hz))
    first = max(start * from_hz // to_hz - margin, 0) // down * down
    return first, min(resampled_length(start + count, to_hz, from_hz) + margin, frames)
