"""Windows over time: names, pooling, merging into segments, and the way to Arrow and back."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.inference.timeline import SILENCE, UNCERTAIN, Timeline, joined, log_softmax, nested, no_windows, unnested

LABELS = ("angry", "calm", "sad")


def timeline(
    best: list[int], *, hop_s: float = 1.0, window_s: float = 2.0, channel: str = "mix", seed: int = 0
) -> Timeline:
    """Windows that each are surest of the class given."""
    logits = np.random.default_rng(seed).random((len(best), 3))
    logits[np.arange(len(best)), best] += 2.0
    start_s = hop_s * np.arange(len(best))
    name = np.full(len(best), channel, dtype=object)
    return Timeline(name, start_s, start_s + window_s, np.full(len(best), -20.0), log_softmax(logits))


def test_names() -> None:
    whole = timeline([0, 1, 2])
    whole.level_dbfs[1] = -90.0
    assert whole.names(LABELS) == ["angry", SILENCE, "sad"]
    assert whole.names(LABELS, silence_dbfs=-100.0) == ["angry", "calm", "sad"]
    assert whole.names(LABELS, min_confidence=0.99) == [UNCERTAIN, SILENCE, UNCERTAIN]


def test_merging_joins_neighbours_and_parts_overlaps_in_the_middle() -> None:
    whole = timeline([0, 0, 0, 2, 2, 0])
    segments, names = whole.merged(whole.names(LABELS))
    assert names == ["angry", "sad", "angry"]
    np.testing.assert_array_equal(segments.start_s, [0.0, 3.5, 5.5])
    np.testing.assert_array_equal(segments.end_s, [3.5, 5.5, 7.0])
    mean = whole.log_p[:3].mean(axis=0)
    np.testing.assert_allclose(segments.probabilities[0], np.exp(mean) / np.exp(mean).sum())


def test_merging_keeps_gaps_and_channels() -> None:
    whole = joined([timeline([0, 0, 1], hop_s=5.0, channel="0"), timeline([1, 1], channel="1")])
    segments, names = whole.merged(whole.names(LABELS))
    assert list(zip(segments.channel, names, segments.start_s, segments.end_s, strict=True)) == [
        ("0", "angry", 0.0, 7.0),
        ("0", "calm", 10.0, 12.0),
        ("1", "calm", 0.0, 3.0),
    ]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.floats(0.1, 2.0))
def test_merged_segments_cover_the_same_time_without_overlap(best: list[int], hop_s: float) -> None:
    whole = timeline(best, hop_s=hop_s)
    segments, names = whole.merged(whole.names(LABELS))
    assert names == [name for i, name in enumerate(whole.names(LABELS)) if i == 0 or best[i] != best[i - 1]]
    assert segments.start_s[0] == 0.0
    assert segments.end_s[-1] == whole.end_s[-1]
    np.testing.assert_array_equal(segments.end_s[:-1], segments.start_s[1:])
    assert np.all(segments.end_s > segments.start_s)
    assert segments.names(LABELS) == names, "pooling windows of one name gives that name"


def test_sides_are_pooled_without_silence() -> None:
    whole = joined([timeline([0, 1], channel="0"), timeline([2, 2, 1], channel="1", seed=1)])
    whole.level_dbfs[1] = -100.0
    sides = whole.per_channel()
    assert list(sides.channel) == ["0", "1"]
    np.testing.assert_allclose(sides.log_p[0], whole.log_p[0])
    np.testing.assert_allclose(sides.log_p[1], log_softmax(whole.log_p[2:].mean(axis=0, keepdims=True))[0])
    np.testing.assert_array_equal(sides.end_s, [3.0, 4.0])
    whole.level_dbfs[:] = -150.0  # all of it is silence: then all of it counts
    mean = np.exp(whole.log_p.mean(axis=0))
    assert np.exp(whole.pooled()) == pytest.approx(mean / mean.sum())


def test_no_windows_have_no_segments_and_no_sides() -> None:
    segments, names = no_windows(3).merged([])
    assert (len(segments), names, len(no_windows(3).per_channel())) == (0, [], 0)


def test_arrow_and_back() -> None:
    given_ = [timeline([0, 1]), no_windows(3), joined([timeline([2], channel="0"), timeline([1], channel="1")])]
    column = pa.chunked_array([nested(given_[:1]), nested(given_[1:])])
    for expected, found in zip(given_, unnested(column), strict=True):
        assert list(found.channel) == list(expected.channel)
        for name in ("start_s", "end_s", "level_dbfs", "log_p"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
