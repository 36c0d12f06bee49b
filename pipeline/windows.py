"""Which parts of a recording are heard: evenly spaced crops. Times in seconds, plain arithmetic.

A crop is as long as the model's window. ``K`` crops of a recording split what the window can slide over into ``K``
equal parts and sit in their middles: one crop is the recording's middle, and no crop touches the very ends.
"""

from __future__ import annotations


def crop_starts(duration_s: float, window_s: float, crops: int) -> list[float]:
    """Starts, in seconds, of ``crops`` windows; one only when the recording is not longer than the window.

    >>> crop_starts(5.0, 2.0, 1), crop_starts(5.0, 2.0, 3), crop_starts(1.0, 2.0, 3)
    ([1.5], [0.5, 1.5, 2.5], [0.0])
    """
    room_s = duration_s - window_s
    if room_s <= 0:
        return [0.0]
    return [room_s * (index + 0.5) / crops for index in range(crops)]


def covered_s(starts: list[float], duration_s: float, window_s: float) -> float:
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
