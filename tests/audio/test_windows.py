"""Crops and walking windows: every length between nothing and minutes, by properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.audio.windows import MAX_CROPS, SlidingWindow, check_crops, covered_s, crop_starts
from pipeline.storage.errors import SerError

durations = st.floats(0.01, 400.0)


@given(durations, st.floats(0.1, 4.0), st.integers(1, 9))
def test_crops_lie_within_and_evenly(duration_s: float, window_s: float, crops: int) -> None:
    starts = crop_starts(duration_s, window_s, crops)
    if duration_s <= window_s:
        assert starts == [0.0]
        return
    assert len(starts) == crops
    centres = np.array(starts) + window_s / 2
    assert np.mean(centres) == pytest.approx(duration_s / 2)
    assert starts[0] > 0
    assert starts[-1] + window_s < duration_s
    if crops > 1:
        np.testing.assert_allclose(np.diff(starts), (duration_s - window_s) / crops, rtol=1e-9, atol=1e-12)


@given(durations, st.floats(0.1, 4.0), st.floats(0.1, 1.0))
def test_walks_hear_everything(duration_s: float, window_s: float, share: float) -> None:
    hop_s = window_s * share
    starts = SlidingWindow(window_s, hop_s).starts(duration_s)
    assert starts[0] == 0.0
    assert np.all(np.diff(starts) > 0)
    assert np.all(np.diff(starts) <= hop_s * (1 + 1e-9))
    assert covered_s(starts, duration_s, window_s) == pytest.approx(duration_s, abs=2e-3)
    if duration_s > window_s:
        assert starts[-1] + window_s <= duration_s + 1e-6


def test_walks_may_leave_gaps() -> None:
    assert SlidingWindow(2.0, 10.0).starts(25.0) == [0.0, 10.0, 20.0, 23.0]
    assert covered_s([0.0, 10.0, 20.0, 23.0], 25.0, 2.0) == 8.0


@given(durations, st.floats(0.1, 4.0), st.lists(st.floats(0.0, 400.0), min_size=1, max_size=8))
def test_covered_is_the_measure_of_the_union(duration_s: float, window_s: float, starts: list[float]) -> None:
    starts = sorted(start for start in starts if start < duration_s) or [0.0]
    ticks = np.linspace(0, duration_s, 20_001)[:-1] + duration_s / 40_000
    inside = np.zeros(len(ticks), dtype=bool)
    for start in starts:
        inside |= (ticks >= start) & (ticks < start + window_s)
    assert covered_s(starts, duration_s, window_s) == pytest.approx(inside.mean() * duration_s, abs=duration_s * 1e-3)


@pytest.mark.parametrize(("window_s", "hop_s"), [(0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (2.0, 0.0), (2.0, -1.0)])
def test_impossible_walks_are_refused(window_s: float, hop_s: float) -> None:
    with pytest.raises(SerError, match=r"must be 0\.\d+ s or more"):
        SlidingWindow(window_s, hop_s)


def test_more_crops_than_anybody_wants_are_refused() -> None:
    check_crops(MAX_CROPS)
    with pytest.raises(SerError, match="crops must be 100 or fewer, got 100000"):
        check_crops(100_000)
