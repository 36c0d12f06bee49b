"""Which parts of a recording are heard: evenly spaced crops, or windows that walk over all of it. Plain arithmetic.

A crop is as long as the model's window. ``K`` crops of a recording split what the window can slide over into ``K``
equal parts and sit in their middles: one crop is the recording's middle, and no crop touches the very ends. Walking
windows start every hop from the beginning; a last one ends where the recording ends. All times are in seconds; where a
part lies in a recording that is resampled is counted in samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.storage.errors import SerError

Window = Literal["middle", "speech"]
"""Which part of a recording a model takes in where it takes one: its middle, or the one with most speech."""
MIN_WINDOW_S = 0.1
MAX_CROPS = 100
LONG_S = 6.0
"""Of recordings longer than this, the middle is little: service and page hear all of them, batch jobs say so."""
_TAIL_S = 0.001  # what may stay unheard at the end of a recording
_MARGIN = 512  # frames on either side of a part, at the lower rate; from 256 on the result stays the same


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
        """Where the windows of a recording start; one only when it is not longer than the window.

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
    """Windows of ``window_s`` that start at ``at``, ascending: those of something longer than the recording."""

    window_s: float
    at: tuple[float, ...]

    def starts(self, duration_s: float) -> list[float]:
        """``at``, however long the recording is."""
        return list(self.at)


def check_crops(crops: int) -> None:
    """Refuse a number of crops that none would want.

    Raises:
        SerError: below 1 or above ``MAX_CROPS``.
    """
    if crops < 1:
        raise SerError(f"crops must be 1 or more, got {crops}")
    if crops > MAX_CROPS:
        raise SerError(f"crops must be {MAX_CROPS} or fewer, got {crops}; to hear all of a recording use windows")


def crop_starts(duration_s: float, window_s: float, crops: int) -> list[float]:
    """Starts of ``crops`` windows; one only when the recording is not longer than the window.

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
    """Samples that `frames` at `from_hz` become at `to_hz`: the ceiling of the exact ratio."""
    return -(-frames * to_hz // from_hz)


def placed(window: int, total: int, rate_hz: int, centre_s: float | None = None) -> tuple[int, int]:
    """(start, count) of `window` of `total` samples: the middle ones, or around `centre_s`; all where they are fewer.

    >>> placed(4, 10, 1), placed(4, 10, 1, 7.0), placed(4, 10, 1, 9.5), placed(12, 10, 1, 3.0)
    ((3, 4), (5, 4), (6, 4), (0, 10))
    """
    count = min(window, total)
    if centre_s is None:
        return (total - count) // 2, count
    return min(max(round(centre_s * rate_hz - count / 2), 0), total - count), count


def frames_for(start: int, count: int, frames: int, from_hz: int, to_hz: int) -> tuple[int, int]:
    """[first, last) of a recording's `frames`, of which samples [start, start + count) of it resampled are made.

    ``first`` lies where the two sample grids meet: a recording cut off before it gives the same samples.
    """
    if from_hz == to_hz:
        return start, start + count
    down = from_hz // math.gcd(from_hz, to_hz)  # every `down` frames the two grids meet
    margin = _MARGIN * max(1, -(-from_hz // to_hz))
    first = max(start * from_hz // to_hz - margin, 0) // down * down
    return first, min(resampled_length(start + count, to_hz, from_hz) + margin, frames)
